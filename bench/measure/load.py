"""Loading the model from a cold disk, beside the fastest plain read of the same file."""

from __future__ import annotations

import mmap
import os
import threading
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from safetensors import safe_open

from .machine import MODEL, Daemon, Setup, cpu_seconds, forget, median, say
from .table import Aim, Row, Table

READ_BYTES = 4 << 20
DEPTH = 4
HUGE_PAGE = 2 << 20
AIM = 1.05
POPULATE_WRITE = 23  # of madvise; Python has no name for it


def measure(setup: Setup, table: Table) -> None:
    floor: list[float] = []
    loaded: list[float] = []
    filled: list[float] = []
    processor: list[float] = []
    with Daemon(setup) as daemon:
        buffer = Buffer(setup.model.stat().st_size)
        # A virtual machine faults in memory that it once gave back far more slowly: take all of it once.
        daemon.hold(setup)
        daemon.client.unload(MODEL)
        for _ in range(setup.rounds(7)):
            forget(setup.model)
            floor.append(buffer.read(setup.model))
            forget(setup.model)
            before = cpu_seconds(daemon.pid)
            whole, reading = _load(daemon)
            loaded.append(whole)
            filled.append(reading)
            processor.append(cpu_seconds(daemon.pid) - before)
            daemon.client.unload(MODEL)
        del buffer
    copied = []
    for _ in range(setup.rounds(3)):
        forget(setup.model)
        begin = time.perf_counter()
        with safe_open(setup.model, framework="np") as file:
            names = file.keys()
            arrays = [file.get_tensor(name) for name in names]
        copied.append(time.perf_counter() - begin)
        del arrays
    size = setup.model.stat().st_size
    say(f"O_DIRECT at {size / median(floor) / 1e9:.2f} GB/s; a load took {median(processor):.2f} s of CPU")
    raw = Row("O_DIRECT read into huge pages, touched before", median(floor))
    ratio = median(loaded) / median(floor)
    rows = [Row("vramd", median(loaded)), raw, Row("safetensors `get_tensor`", median(copied))]
    table.add("cold load, its pages made within", "s", rows, Aim(f"≤ {AIM} of O_DIRECT", ratio <= AIM))
    table.add("the same from its first byte on", "s", [Row("vramd", median(filled)), raw])


def _load(daemon: Daemon) -> tuple[float, float]:
    """Seconds of the whole operation, and from when its bytes began to arrive."""
    operation = daemon.client.load(MODEL, device="cpu:0", keep_alive=-1, wait=False)
    first = time.time()
    while operation["state"] in ("Queued", "Running"):
        if operation["bytesDone"] == 0:
            first = time.time()
        time.sleep(0.005)
        operation = daemon.client.operation(operation["operationId"])
    if operation["state"] != "Completed":
        raise SystemExit(f"the load failed: {operation}")
    begin, end = (datetime.fromisoformat(operation[key]).timestamp() for key in ("startedAt", "finishedAt"))
    return end - begin, end - max(begin, first)


class Buffer:
    """Anonymous memory of huge pages, all touched, to read into."""

    def __init__(self, size: int) -> None:
        rounded = -(-size // READ_BYTES) * READ_BYTES
        self._memory = mmap.mmap(-1, rounded + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory.madvise(POPULATE_WRITE)
        whole = np.frombuffer(self._memory, np.uint8)
        self._bytes = whole[-whole.ctypes.data % HUGE_PAGE :]

    def read(self, path: Path) -> float:
        """Reads a file, several large pieces at a time; answers with the seconds that it took."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        pieces = iter(range(0, os.fstat(file).st_size, READ_BYTES))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    begin = next(pieces, None)
                if begin is None:
                    return
                os.preadv(file, [self._bytes[begin : begin + READ_BYTES].data], begin)

        threads = [threading.Thread(target=work) for _ in range(DEPTH)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - started
        os.close(file)
        return taken
