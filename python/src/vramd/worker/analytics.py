"""The analytics worker: what this process did with memory, and how much it had over time."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any

from .framework import Framework
from .protocol import megabytes

#: So many samples of each device are kept.
KEPT = 256


class Analytics:
    def __init__(self, framework: Framework) -> None:
        self._framework = framework
        self._counts: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._samples: dict[str, deque[tuple[float, int]]] = {}
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def note(self, action: str, seconds: float, failed: bool) -> None:
        """Counts a request."""
        with self._lock:
            self._counts[action] += 1
            self._seconds[action] += seconds  # type: ignore[assignment]
            if failed:
                self._failures[action] += 1

    def sample(self) -> None:
        """Looks how much each device has of this process's."""
        now = round(time.monotonic() - self._began, 3)
        for device in self._framework.devices():
            used = self._framework.used_bytes(device)
            with self._lock:
                self._samples.setdefault(device, deque(maxlen=KEPT)).append((now, used))

    def report(self) -> dict[str, Any]:
        self.sample()
        with self._lock:
            return {
                "uptime_seconds": round(time.monotonic() - self._began, 3),
                "requests": {
                    action: {
                        "count": count,
                        "failed": self._failures[action],
                        "mean_milliseconds": round(self._seconds[action] / count * 1000, 3),
                    }
                    for action, count in sorted(self._counts.items())
                },
                "devices": {
                    device: {
                        "used_mb": megabytes(samples[-1][1]),
                        "peak_mb": megabytes(max(used for _, used in samples)),
                        "samples": [[at, megabytes(used)] for at, used in samples],
                    }
                    for device, samples in self._samples.items()
                },
            }
