"""Room for what a run takes, reserved around it."""

from __future__ import annotations

import mmap
import sys
from types import SimpleNamespace

import pytest

import vramd as api
from support import Vramd, until
from vramd.worker.framework import collect_host

MIB = 1 << 20


def live(vramd: Vramd) -> list[api.bodies.Allocation]:
    return vramd.client.allocations(purpose="a run")["allocations"]


def test_the_daemon_follows_what_this_process_takes(vramd: Vramd) -> None:
    def run(size_bytes: int | None) -> api.bodies.Allocation:
        with api.working_memory(
            vramd.client, "followed", (4, 64), size_bytes=size_bytes, device="cpu:0", purpose="a run"
        ) as room:
            # Not from the heap, which may have kept as much of other tests.
            taken = mmap.mmap(-1, 24 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for _ in range(24):
                taken.write(b"x" * MIB)
            allocation = room["allocationId"]
            used = [0]

            def seen() -> bool:
                shown = vramd.client.allocation(allocation)["reservation"]
                used[0] = shown["usedBytes"]
                return used[0] >= 20 * MIB

            until(seen, "what it took to be measured")
            taken.close()
        return room

    # What other tests left, to Python or the C library, would go while this one measures.
    collect_host()
    first = run(64 * MIB)
    assert first["reservation"]["basis"] == "estimate"
    (footprint,) = vramd.client.footprints("followed")
    assert 20 * MIB <= footprint["learnedBytes"] < 48 * MIB
    assert footprint["shape"] == [4, 64]
    second = run(None)
    assert second["reservation"]["basis"] == "learned"
    assert second["sizeBytes"] == footprint["learnedBytes"]
    assert live(vramd) == []


def test_a_block_that_raises_teaches_nothing(vramd: Vramd) -> None:
    with (
        pytest.raises(KeyError),
        api.working_memory(vramd.client, "raises", size_bytes=MIB, device="sim:0", purpose="a run"),
    ):
        raise KeyError
    assert (vramd.client.footprints("raises"), live(vramd)) == ([], [])


def test_on_a_card_the_framework_says_what_it_took(vramd: Vramd, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 100 * MIB,
        memory_reserved=lambda: 103 * MIB,
        max_memory_allocated=lambda: 112 * MIB,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with api.working_memory(vramd.client, "told", (1,), size_bytes=16 * MIB, device="sim:0") as room:
        assert room["deviceId"] == "sim:0"
    (footprint,) = vramd.client.footprints("told")
    assert (footprint["learnedBytes"], footprint["error"]) == (12 * MIB, 0.333)


def test_a_run_outlives_its_lease(vramd: Vramd) -> None:
    with api.working_memory(
        vramd.client, "long", size_bytes=MIB, device="sim:0", lease_seconds=1, purpose="a run"
    ):
        until(lambda: live(vramd) == [], "the lease to end")


def test_bad_reservations_are_refused(vramd: Vramd) -> None:
    with pytest.raises(api.VramdError) as refused:
        vramd.client.reserve(model="never", device="sim:0")
    assert (refused.value.code, refused.value.details["field"]) == ("INVALID_ARGUMENT", "sizeBytes")
    with pytest.raises(api.InsufficientMemory):
        vramd.client.reserve(1 << 40, device="sim:0")


def test_of_blocks_at_one_time_the_framework_cannot_tell_which_took_what(
    vramd: Vramd, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        max_memory_allocated=lambda: 8 * MIB,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    for name in ("outer", "alone"):
        with api.working_memory(vramd.client, name, size_bytes=16 * MIB, device="sim:0"):
            if name == "outer":
                with api.working_memory(vramd.client, "inner", size_bytes=16 * MIB, device="sim:0"):
                    pass
    learned = {it["model"]: it["learnedBytes"] for it in vramd.client.footprints()}
    assert not {"outer", "inner"} & set(learned)
    assert learned["alone"] == 8 * MIB
    assert vramd.client.forget_footprints("alone")[0]["learnedBytes"] == 8 * MIB
    with pytest.raises(api.NotFound):
        vramd.client.forget_footprints("alone")


def test_a_daemon_that_does_not_see_this_process_reserves_all_the_same(
    vramd: Vramd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getpid", lambda: 4_000_000)
    with api.working_memory(vramd.client, "elsewhere", size_bytes=MIB, device="sim:0") as room:
        assert "pid" not in room["reservation"]
    named = api.working_memory(vramd.client, "elsewhere", size_bytes=MIB, device="sim:0", pid=4_000_001)
    with pytest.raises(api.VramdError, match="no process 4000001"), named:
        pass
