"""One loader in a process of its own: loads the files, sums every byte, prints what that took as JSON."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

READ_BYTES = 4 << 20
DEPTH = 4
HUGE_PAGE = 2 << 20

#: Answers the arrays of all tensors.
Loader = Callable[[list[Path]], Iterable[Any]]


def floor(files: list[Path]) -> list[Any]:
    """Reads past the page cache into a small buffer, several pieces at a time."""
    memory = mmap.mmap(-1, DEPTH * READ_BYTES + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[:] = 1
    buffer = whole[-whole.ctypes.data % HUGE_PAGE :]
    opened = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    pieces = iter([(file, at) for file in opened for at in range(0, os.fstat(file).st_size, READ_BYTES)])
    lock = threading.Lock()

    def work(number: int) -> None:
        into = buffer[number * READ_BYTES : (number + 1) * READ_BYTES].data
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            os.preadv(piece[0], [into], piece[1])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(DEPTH)]
    begin(threads)
    return []


def begin(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def attached(files: list[Path]) -> list[Any]:
    """What vramd has loaded, by its socket."""
    import vramd

    held = vramd.attach("bench", device="cpu:0", socket=str(files[0]))
    KEPT.append(held)
    return list(held.values())


def to_numpy(files: list[Path]) -> list[Any]:
    from safetensors import safe_open

    arrays = []
    for file in files:
        with safe_open(file, framework="np") as opened:
            arrays += [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 - it is no mapping
    return arrays


def to_torch(files: list[Path]) -> list[Any]:
    from safetensors.torch import load_file

    return [tensor for file in files for tensor in load_file(file).values()]


def runai(files: list[Path]) -> Iterable[Any]:
    from runai_model_streamer import SafetensorsStreamer

    streamer = OPEN.enter_context(SafetensorsStreamer())
    streamer.stream_files([str(file) for file in files])
    return [tensor for _, tensor in streamer.get_tensors()]


def fast(files: list[Path]) -> Iterable[Any]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [str(file) for file in files]})
    buffer = loader.copy_files_to_device()
    KEPT.extend([loader, buffer])
    return [buffer.get_tensor(name) for name in buffer.key_to_rank_lidx]


def gguf(files: list[Path]) -> Iterable[Any]:
    from gguf import GGUFReader

    return [tensor.data for file in files for tensor in GGUFReader(file).tensors]


LOADERS: dict[str, Loader] = {
    "floor": floor,
    "attached": attached,
    "safetensors to NumPy": to_numpy,
    "safetensors to torch": to_torch,
    "runai-model-streamer": runai,
    "fastsafetensors": fast,
    "gguf": gguf,
}
MODULES = {
    "safetensors to torch": ["torch", "safetensors.torch"],
    "runai-model-streamer": ["torch", "runai_model_streamer"],
    "fastsafetensors": ["torch", "fastsafetensors"],
    "gguf": ["gguf"],
    "attached": ["vramd"],
}
#: What has to live until all is summed.
KEPT: list[Any] = []
OPEN = contextlib.ExitStack()


def total(array: Any) -> int:
    """The sum of an array's bytes, eight at a time."""
    if not isinstance(array, np.ndarray):
        import torch

        array = array.contiguous().view(-1).view(torch.uint8).numpy()
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    words = len(flat) // 8 * 8
    return int(flat[:words].view(np.uint64).sum(dtype=np.uint64)) + int(flat[words:].sum())


def main() -> None:
    there, name, files = "--there" in sys.argv, *_arguments()
    for module in MODULES.get(name, []):
        __import__(module)
    if there:
        return
    # From here on the most is counted anew; what the interpreter and its modules have is not the load's.
    Path("/proc/self/clear_refs").write_text("5")
    idle = _mib("VmRSS")
    begun, cpu = time.perf_counter(), time.process_time()
    arrays = LOADERS[name](files)
    loaded, spent = time.perf_counter() - begun, time.process_time() - cpu
    peak = _mib("VmHWM") - idle
    for array in arrays:
        total(array)
    summed = time.perf_counter() - begun
    # For what vramd has, what the client does until all is summed is one figure.
    load = summed if name == "attached" else loaded
    print(json.dumps({"load": load, "summed": summed, "cpu": spent, "peak": peak}))


def _mib(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def _arguments() -> tuple[str, list[Path]]:
    name, *files = [argument for argument in sys.argv[1:] if argument != "--there"]
    return name, [Path(file) for file in files]


main()
