#!/usr/bin/env python3
"""vramd on a machine with an NVIDIA card: models go there, are attached, compared, measured, and gone again.

Needs the package `vramd` and nothing else; torch where it is there. `cargo xtask test-gpu` builds what it
needs and runs it, or packs it for another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vramd

MIB = 1 << 20
#: How many tensors the model of many has: those of a large language model with experts.
MANY = 3435


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vramd", help="the daemon's binary")
    parser.add_argument("--bytes", type=int, default=2048 * MIB, help="of the large model")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = Check(options.vramd, Path(directory), options.bytes).run()
    for name, value in figures.items():
        print(f"{name:48} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


class Check:
    def __init__(self, binary: str, home: Path, size: int) -> None:
        self.home = home
        self.size = size
        self.figures: dict[str, Any] = {}
        self.free_before = used_bytes()
        ready = home / "ready.json"
        arguments = {
            "--listen": "none",
            "--socket": home / "socket",
            "--state-dir": home / "state",
            "--model-root": home,
            "--ready-file": ready,
        }
        command = [binary, "serve", *(str(word) for pair in arguments.items() for word in pair)]
        self.daemon = subprocess.Popen(command, stderr=(home / "log").open("wb"))
        wait(lambda: ready.exists() or self.daemon.poll() is not None, "the daemon's start")
        self.client = vramd.Client(f"unix:{home / 'socket'}")

    def run(self) -> dict[str, Any]:
        try:
            self.idle("after the start")
            self.model("many", MANY, 64 * MIB)
            self.model("large", 400, self.size)
            for name in ("many", "large"):
                self.attached(name)
            self.ledger()
            self.transfers()
            self.given_back()
        except BaseException:
            sys.stderr.write((self.home / "log").read_text())
            raise
        finally:
            self.daemon.send_signal(signal.SIGTERM)
            assert self.daemon.wait(30) == 0
        return self.figures

    def idle(self, when: str) -> None:
        """An idle daemon has nothing of the card."""
        used = used_bytes()
        if used is not None and self.free_before is not None:
            self.figures[f"VRAM taken {when}, MiB"] = (used - self.free_before) // MIB
            pids = compute_processes()
            assert self.daemon.pid not in pids, "the daemon has a context"
            assert not pids & children(self.daemon.pid), "a loader has a context"

    def model(self, name: str, count: int, size: int) -> None:
        write_model(self.home / f"{name}.safetensors", count, size, seed=count)
        self.client.register_model(name, str(self.home / f"{name}.safetensors"))
        begun = time.monotonic()
        self.client.load(name, device="cuda:0")
        rate = size / (time.monotonic() - begun) / 1e9
        self.figures[f"load of {name} ({size // MIB} MiB), GB/s"] = round(rate, 2)

    def attached(self, name: str) -> None:
        """Every byte is that of the file, seen by the card."""
        framework: Any = "torch" if has_torch() else "cuda"
        socket, times = str(self.home / "socket"), []
        for _ in range(9):
            begun = time.perf_counter()
            with vramd.attach(name, socket=socket, framework=framework) as model:
                for tensor in model:
                    model[tensor]
                times.append((time.perf_counter() - begun) * 1000)
        self.figures[f"attach of {name}, {framework}, all tensors, p50 ms"] = round(
            statistics.median(times), 2
        )
        with (
            (self.home / f"{name}.safetensors").open("rb") as file,
            vramd.attach(name, socket=socket, framework=framework) as model,
        ):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for tensor in model:
                begin, end = header[tensor]["data_offsets"]
                file.seek(8 + length + begin)
                expected = file.read(end - begin)
                if framework == "torch":
                    here = model[tensor].cpu().numpy().tobytes()
                else:
                    here = bytes(model[tensor].copy_to_host())
                assert here == expected, f"{name}: {tensor} differs"
                del here
        self.figures[f"{name}: every byte is the file's"] = True

    def ledger(self) -> None:
        used = used_bytes()
        if used is not None:
            shown = self.client.device_status("cuda:0")["usedBytes"]
            self.figures["ledger's use over NVML's"] = round(shown / used, 3)
            assert abs(shown - used) <= 0.05 * used, f"the ledger has {shown}, NVML {used}"

    def transfers(self) -> None:
        """From RAM to the card and back, beside a bare copy of pinned memory."""
        client, size = self.client, min(self.size, 1024 * MIB)
        here, there = (
            client.allocate(size, device=device, lease_seconds=3600)["allocationId"]
            for device in ("cpu:0", "cuda:0")
        )
        for name, pair in (("RAM to VRAM", (here, there)), ("VRAM to RAM", (there, here))):
            rates = [client.copy(*pair)["bytesPerSecond"] / 1e9 for _ in range(5)]
            self.figures[f"{name}, GB/s"] = round(statistics.median(rates[1:]), 2)
        if has_torch():
            self.figures["bare pinned copy to the card, GB/s"] = round(pinned_rate(size), 2)
        for each in (here, there):
            client.release(each)

    def given_back(self) -> None:
        for name in ("many", "large"):
            self.client.unload(name)
        assert self.client.device_status("cuda:0")["allocatedBytes"] == 0
        loaders = children(self.daemon.pid)
        wait(lambda: not children(self.daemon.pid), "the loader's end", 30)
        self.figures["loaders that had to end"] = len(loaders)
        self.idle("at the end")


def write_model(path: Path, count: int, size: int, seed: int) -> None:
    """A safetensors file of float32 tensors of about the same size, with seeded contents."""
    each = size // count // 4 * 4
    header = {
        f"layers.{number}.weight": {
            "dtype": "F32", "shape": [each // 4], "data_offsets": [number * each, (number + 1) * each],
        }
        for number in range(count)
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = random.Random(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = count * each
        while left:
            part = min(left, 16 * MIB)
            file.write(source.randbytes(part))
            left -= part


def has_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def pinned_rate(size: int) -> float:
    import torch

    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(size / (time.perf_counter() - begun) / 1e9)
    return statistics.median(rates[1:])


def smi(*query: str) -> list[str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def used_bytes() -> int | None:
    """What the driver says is used of the first card, without what it keeps for itself."""
    found = smi("--query-gpu=memory.used")
    return None if found is None else int(found[0]) * MIB


def compute_processes() -> set[int]:
    return {int(pid) for pid in smi("--query-compute-apps=pid") or [] if pid.isdigit()}


def children(pid: int) -> set[int]:
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as listed:
            found |= {int(child) for child in listed.read().split()}
    return found


def wait(condition: Any, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
