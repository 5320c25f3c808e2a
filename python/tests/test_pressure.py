"""A real memory hog on a host that a control group makes small: who goes, and what is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from test_worker import has_torch, start

from support import Vramd, running, until

MIB = 1 << 20
LIMIT = 3 << 30

# Takes so many MiB for each line, and really has them.
HOG = """
import sys
held = []
for line in sys.stdin:
    held.append(b"x" * (int(line) << 20))
    print(sum(map(len, held)) >> 20, flush=True)
"""


def groups() -> Path | None:
    """Where this process may make memory control groups, if it may."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",")), None)
    base = Path("/sys/fs/cgroup/memory")
    if own is None:
        return None
    here = base / own.lstrip("/")
    folder = here if here.is_dir() else base
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def small_host() -> Iterator[Path]:
    """A control group with a limit; what is in it at the end is ended."""
    folder = groups()
    if folder is None:
        pytest.skip("no memory control group (version 1) can be made here: root is needed")
    group = folder / f"vramd-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield group
    finally:

        def gone() -> bool:
            for pid in (group / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            with suppress(OSError):
                group.rmdir()
            return not group.exists()

        until(gone, "the control group's end", 20)


class Events(threading.Thread):
    """What the daemon tells, as it comes."""

    def __init__(self, daemon: Vramd) -> None:
        super().__init__(daemon=True)
        self.seen: list[dict[str, Any]] = []
        self._events = daemon.client.events()
        self.start()

    def run(self) -> None:
        with suppress(Exception):
            for event in self._events:
                self.seen.append(dict(event))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.seen if event["event"] == kind]


def test_a_hog_has_the_right_ones_go_and_the_numbers_show_it(binary: str, tmp_path: Path) -> None:
    framework = "torch" if has_torch() else "numpy"
    environment = {"VRAMD_WORKER_FRAMEWORK": framework, "OMP_NUM_THREADS": "1"}
    with small_host() as group:
        enter = f"echo $$ > {group}/cgroup.procs && exec "
        command = tmp_path / "vramd"
        command.write_text(f'#!/bin/sh\n{enter}"{binary}" "$@"\n')
        command.chmod(0o755)
        program = f"python={sys.executable} -m vramd.worker"
        (tmp_path / "home").mkdir()
        more = ("--worker-program", program, "--cpu-limit", "2GiB")
        daemon = Vramd(str(command), tmp_path / "home", environment, *more)
        total = daemon.client.device("cpu:0")["totalBytes"]
        assert total == LIMIT
        weights = {"weights": np.ones((384, 1 << 18), np.float32)}
        for name in ("shared", "mine"):
            safetensors.numpy.save_file(weights, daemon.models / f"{name}.safetensors")
        daemon.client.register_model("shared", daemon.models / "shared.safetensors", keep_alive=-1)
        for name in ("one", "two", "third"):
            start(daemon, name)
        call = daemon.client.call_worker
        for name in ("one", "two"):
            call(name, "memory.load_model", {"name": "shared"}, timeout_seconds=60)
        path = str(daemon.models / "mine.safetensors")
        call("third", "memory.load_model", {"name": "mine", "path": path}, timeout_seconds=60)
        # Both are used; of the two the shared one is used more.
        for _ in range(8):
            daemon.client.touch("shared")

        def measured() -> dict[str, int]:
            shares = daemon.client.model_status("cpu:0")["workerMemory"]["workers"]
            return {share["name"]: share.get("measuredBytes", 0) for share in shares}

        until(lambda: measured()["third"] > 384 * MIB, "the third to be measured")
        # Attached weights are nobody's own: the two have a fraction of what the third has.
        assert measured()["third"] > measured()["one"] + 300 * MIB
        status = daemon.client.model_status("cpu:0")
        assert status["modelMemory"]["residentBytes"] >= 384 * MIB
        events = Events(daemon)

        hog = subprocess.Popen(
            ["sh", "-c", f"{enter}{sys.executable} -c '{HOG}'"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        with running(hog):

            def take(mib: int) -> None:
                assert hog.stdin
                assert hog.stdout
                hog.stdin.write(f"{mib}\n")
                assert hog.stdout.readline()

            def free() -> int:
                return daemon.client.device_pressure("cpu:0")["freeMemory"]

            def grow_until(count: int) -> dict[str, Any]:
                """Until something more was done about it."""
                for _ in range(200):
                    if len(events.of("pressure.relieved")) >= count:
                        break
                    now = daemon.client.device_pressure("cpu:0")
                    if now["pressureLevel"] in ("High", "Critical"):
                        break
                    # In steps that each are seen: faster than that, nothing would be left within a second.
                    take(64 if now["freeMemory"] > total * 0.45 else 16)
                    seen = now["freeMemory"]
                    until(lambda seen=seen: free() < seen, "it to be seen")  # type: ignore[misc]
                return until(lambda: events.of("pressure.relieved")[count - 1 :], "relief", 30)[0]

            done = grow_until(1)
            changed = [event for event in events.of("pressure.changed") if event["level"] == "High"]
            assert changed, events.of("pressure.changed")
            # The third's own goes: nobody used it, and it is quickly back. It was measured to be gone.
            assert [(one["model"], one["worker"]) for one in done["modelsUnloaded"]] == [("mine", "third")], (
                done
            )
            assert done["modelsUnloaded"][0]["measuredBytes"] > 350 * MIB
            assert done["memoryFreed"] >= done["neededBytes"]
            level = daemon.client.device_pressure("cpu:0")["pressureLevel"]
            assert level in ("Normal", "Moderate"), done
            assert attached(daemon) == 2

            # When that is not enough, the two let go of what they do not use, and the daemon unloads it.
            done = grow_until(2)
            assert [one["model"] for one in done["modelsUnloaded"]] == ["shared"], done
            assert done["modelsUnloaded"][0]["measuredBytes"] >= 384 * MIB
            assert sorted(worker["name"] for worker in done["workers"]) == ["one", "third", "two"]
            assert attached(daemon) == 0
        until(
            lambda: daemon.client.device_pressure("cpu:0")["pressureLevel"] == "Normal", "it to be over", 20
        )
        assert [worker["state"] for worker in daemon.client.workers()] == ["Ready"] * 3
        daemon.stop()


def attached(daemon: Vramd) -> int:
    components = daemon.client.model("shared")["components"]
    return sum(place["attachedCount"] for part in components for place in part["residency"])
