"""The demonstration: one model, held once, used by many.

Starts a daemon of its own, loads all-MiniLM-L6-v2 into it, lets two processes attach the model and compute
with it, lets a third load the plain file, and compares: the vectors, the time, and the memory. Then three
models take turns on a simulated device that holds two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import minilm
import vramd

MODEL = "minilm"
SENTENCES = [
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun.",
    "There is hardly any GPU memory left.",
    "The graphics card has run out of VRAM.",
]
MIB = 1 << 20
#: Requests of a client for models by their names.
REQUESTS = ["chat", "search", "chat", "draw", "chat", "search", "chat", "draw", "chat"]


class Failed(Exception):
    """The demonstration did not show what it should; the text says what was wrong."""


class Daemon:
    """A ``vramd serve`` with a state of its own, stopped by its pid."""

    def __init__(self, binary: str, directory: Path, arguments: list[str]) -> None:
        ready = directory / "ready.json"
        self.log = directory / "vramd.log"
        command = [
            binary,
            "serve",
            "--state-dir",
            str(directory / "state"),
            "--ready-file",
            str(ready),
            *arguments,
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VRAMD_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failed("the daemon did not start")
            time.sleep(0.005)
        served = json.loads(ready.read_text())
        self.url, self.socket = f"http://{served['address']}", served["socket"]
        self.client = vramd.Client(self.url)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        if code := self.process.wait(30):
            raise Failed(f"the daemon ended with {code}")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def daemon(binary: str, arguments: list[str]) -> Iterator[Daemon]:
    """Runs a daemon; on a failure shows the end of its log, and leaves nothing behind either way."""
    with tempfile.TemporaryDirectory(prefix="vramd-demo-") as directory:
        log, running = Path(directory) / "vramd.log", None
        try:
            running = Daemon(binary, Path(directory), ["--model-root", str(minilm.directory()), *arguments])
            yield running
            running.stop()
        except (Failed, vramd.VramdError):
            if log.exists():
                tail = log.read_text(errors="replace").splitlines()[-20:]
                print("the end of the daemon's log:", *tail, sep="\n  ", file=sys.stderr)
            raise
        finally:
            if running is not None:
                running.kill()


def load(client: vramd.Client) -> None:
    """Registers the model and loads it, with a progress line on a terminal."""

    def progress(operation: Any) -> None:
        if sys.stdout.isatty() and operation["bytesTotal"]:
            share = operation["bytesDone"] / operation["bytesTotal"]
            print(f"\r  loading  [{'#' * int(30 * share):<30}] {share:4.0%}", end="", flush=True)

    client.register_model(MODEL, minilm.directory() / "model.safetensors")
    start = time.perf_counter()
    client.load(MODEL, device="cpu:0", keep_alive=-1, progress=progress)
    seconds = time.perf_counter() - start
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    model = client.model(MODEL)
    where = ", ".join(residency["deviceId"] for residency in model["components"][0]["residency"])
    print(f"  loaded   {model['sizeBytes'] / MIB:.1f} MiB onto {where} in {seconds:.2f} s")


@contextmanager
def worker(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A worker process that has its sentences; at the end it is told to go, and must go well."""
    script = str(Path(__file__).with_name("embed_worker.py"))
    process = subprocess.Popen(
        [sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(SENTENCES) + "\n")
        process.stdin.flush()
        yield process
        process.communicate("\n", timeout=30)
        if process.returncode:
            raise Failed(f"worker {process.pid} ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def report(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Failed(f"worker {process.pid} ended without a report")
    found: dict[str, Any] = json.loads(line)
    found["vectors"] = np.frombuffer(bytes.fromhex(found["vectors"]), np.float32).reshape(len(SENTENCES), -1)
    return found


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process: private to it (smaps_rollup), and of its mapping of the daemon's memory (smaps)."""
    found = {"private": 0, "rss": 0, "pss": 0, "huge": 0}
    for field, size in _fields(Path(f"/proc/{pid}/smaps_rollup").read_text()):
        if field.startswith("Private_"):
            found["private"] += size
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            inside = "/memfd:" in line
        elif inside:
            for field, size in _fields(line):
                found["rss"] += size if field == "Rss" else 0
                found["pss"] += size if field == "Pss" else 0
                found["huge"] += size if field.endswith("_Hugetlb") else 0
    return found


def _fields(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            yield words[0].rstrip(":"), int(words[1]) * 1024


def show(binary: str) -> None:
    """The whole demonstration."""
    with tempfile.TemporaryDirectory(prefix="vramd-demo-") as sockets, ExitStack() as stack:
        socket = f"{sockets}/vramd.sock"
        serve = ["--listen", "127.0.0.1:0", "--socket", socket, "--sim", "200MiB", "--model-root", sockets]
        running = stack.enter_context(daemon(binary, serve))
        print(f"  daemon   pid {running.process.pid}, {running.url}, {running.socket}")
        load(running.client)
        path = str(minilm.directory() / "model.safetensors")
        reports = {}
        for name, arguments in {
            "attached, first": ("attach", running.socket, MODEL),
            "attached, second": ("attach", running.socket, MODEL),
            "plain file": ("file", path),
        }.items():
            reports[name] = report(stack.enter_context(worker(*arguments)))  # and it stays, with what it has
        count = running.client.model(MODEL)["components"][0]["residency"][0]["attachedCount"]
        print(f"  attached by {count} processes at once\n")
        compare_memory(reports)
        compare_vectors(reports)
        switch(running, Path(sockets))
    print("\n  the daemon has stopped, and nothing is left behind")


def compare_memory(reports: dict[str, dict[str, Any]]) -> None:
    print(
        f"  {'':18}{'pid':>8}{'weights':>12}{'usable in':>12}{'shared':>12}{'its share':>12}{'private':>12}"
    )
    for name, found in reports.items():
        used = memory(found["pid"])
        shared = used["rss"] + used["huge"]
        columns = [
            found["bytes"] / MIB,
            found["seconds"] * 1e3,
            shared / MIB,
            used["pss"] / MIB,
            used["private"] / MIB,
        ]
        units = [" MiB", " ms", " MiB", " MiB", " MiB"]
        text = "".join(f"{f'{value:.1f}{unit}':>12}" for value, unit in zip(columns, units, strict=True))
        print(f"  {name:18}{found['pid']:>8}{text}")
        if name != "plain file":
            if shared < found["bytes"]:
                raise Failed(f"{name}: only {shared} of {found['bytes']} bytes are mapped from the daemon")
            if used["pss"] > 0.6 * used["rss"]:
                raise Failed(f"{name}: the weights are not shared: {used}")
    print("  (shared: mapped from the daemon; its share: that, divided among all who have it mapped)\n")


def compare_vectors(reports: dict[str, dict[str, Any]]) -> None:
    plain = reports["plain file"]
    for name, found in reports.items():
        difference = float(np.abs(found["vectors"] - plain["vectors"]).max())
        if difference or found["checksum"] != plain["checksum"]:
            raise Failed(f"{name}: vectors differ by up to {difference} from those of the plain file")
    print("  the vectors of all three are equal: largest difference 0\n")
    cosines = plain["vectors"] @ plain["vectors"].T
    for row, sentence in enumerate(SENTENCES):
        print(f"  {sentence:40}" + "".join(f"{cosine:7.2f}" for cosine in cosines[row]))
    if not cosines[0, 1] > cosines[0, 2] or not cosines[2, 3] > cosines[1, 2]:
        raise Failed(
            "sentences that mean the same are not closer than others: the model was not computed well"
        )


def switch(running: Daemon, root: Path) -> None:
    """Three models on a device that holds two: who asks for one gets it, and what is needed least goes."""
    client, file = running.client, minilm.directory() / "model.safetensors"
    print("\n  three models of 86.7 MiB take turns on sim:0, which has 200 MiB\n")
    for name in sorted(set(REQUESTS)):
        # Files of their own: of one and the same all three would be held once.
        client.register_model(name, shutil.copyfile(file, root / f"{name}.safetensors"))
    end = file.read_bytes()[-64:]
    went: list[str] = []
    for name in REQUESTS:
        start = time.perf_counter()
        result = client.load(name, device="sim:0")["result"]
        with vramd.attach(name, device="sim:0", socket=running.socket) as weights:
            seconds = time.perf_counter() - start
            last = max((weights.info(tensor) for tensor in weights), key=lambda tensor: tensor.offset)
            if bytes(weights.raw(last.name)[-64:]) != end:
                raise Failed(f"{name}: the last bytes are not those of the file")
        how = "loaded" if result["loaded"] else "was there"
        if result.get("copiedFrom"):
            how = f"copied from {result['copiedFrom'][0]}"
        evicted = [one["model"] for one in result.get("evicted", [])]
        went += evicted
        text = f", and {', '.join(evicted)} went" if evicted else ""
        print(f"  {name:8}{seconds * 1e3:8.1f} ms   {how}{text}")
    if not went or "chat" in went:
        raise Failed(f"the model that is used most should stay, and others go: {went} went")


def keep(binary: str) -> None:
    """Keeps a daemon on the default address and socket until Ctrl-C."""
    with daemon(binary, []) as running:
        print(f"  daemon   pid {running.process.pid}, {running.url}, {running.socket}")
        load(running.client)
        print(
            f"""
  try, in another terminal:

    curl {running.url}/api/memory/status
    {binary} models
    {binary} attach {MODEL}
    {sys.executable} -c 'import vramd; print(vramd.attach("{MODEL}")["embeddings.LayerNorm.bias"][:4])'
    open {running.url}/docs

  Ctrl-C stops it.""",
            flush=True,
        )
        try:
            code = running.process.wait()
        except KeyboardInterrupt:
            print()
        else:
            raise Failed(f"the daemon ended by itself with {code}")
    print("  stopped")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vramd", default="vramd", metavar="PATH", help="the binary (default: from PATH)")
    parser.add_argument(
        "--keep", action="store_true", help="keep the daemon, on its default address, until Ctrl-C"
    )
    options = parser.parse_args()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        (keep if options.keep else show)(options.vramd)
    except (Failed, vramd.VramdError, OSError) as error:
        print(f"the demonstration failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
