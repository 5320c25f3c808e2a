"""Writes the pickled traces of crates/vramd/tests/fixtures: what PyTorch's memory snapshot holds, as far as
we read it.

The same history in the oldest and the newest protocol that Python writes such files in.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "crates/vramd/tests/fixtures"
BASE = 0x7F5A_0000_0000
MIB = 1 << 20


def entry(action: str, offset: int, size: int, microseconds: int) -> dict[str, Any]:
    frames = [{"filename": "model.py", "line": 12, "name": "forward"}]
    return {
        "action": action,
        "addr": BASE + offset,
        "size": size,
        "stream": 0,
        "time_us": 1_760_000_000_000_000 + microseconds,
        "frames": frames,
    }


def snapshot() -> dict[str, Any]:
    trace = [
        entry("segment_alloc", 0, 20 * MIB, 0),
        entry("alloc", 0, 8 * MIB, 10),
        entry("alloc", 8 * MIB, 4 * MIB, 20),
        entry("free_requested", 0, 8 * MIB, 30),
        entry("free_completed", 0, 8 * MIB, 40),
        entry("alloc", 0, 2 * MIB, 50),
        {**entry("oom", 0, 64 * MIB, 60), "device_free": 3 * MIB},
        entry("free_requested", 8 * MIB, 4 * MIB, 70),
        entry("free_completed", 8 * MIB, 4 * MIB, 80),
        entry("snapshot", 0, 0, 90),
    ]
    return {
        "segments": [{"device": 0, "address": BASE, "total_size": 20 * MIB, "blocks": []}],
        "device_traces": [trace, []],
        "allocator_settings": {"expandable_segments": False, "garbage_collection_threshold": 0.0},
    }


if __name__ == "__main__":
    for protocol in (2, 4):
        path = FIXTURES / f"pytorch_{protocol}.pickle"
        path.write_bytes(pickle.dumps(snapshot(), protocol=protocol))
