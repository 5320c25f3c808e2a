"""A daemon under everything at once, for a while: what it holds must add up, and be back at the end.

Threads allocate, attach, load, transfer, copy, defragment and clear at random, children that have memory
attached are killed, the daemon itself is killed once and started again. Refusals are part of it; wrong bytes,
faults of the daemon, hangs and bytes that are not back are not. The seed is printed; the same seed draws the
same calls, though not in the same order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import vramd
from vramd.bodies import DeviceStatus

KIB, MIB = 1 << 10, 1 << 20
DEVICES = ("cpu:0", "sim:0", "sim:1")
#: What a healthy daemon may answer to calls that race each other.
FINE = {
    "CONFLICT", "NOT_FOUND", "NOT_RESIDENT", "INSUFFICIENT_MEMORY", "TIMEOUT", "CANCELLED",
    "INVALID_ARGUMENT", "TOO_MANY_REQUESTS", "PERMISSION_DENIED", "UNAVAILABLE",
}  # fmt: skip

HOLDER = """
import sys, time, vramd
socket, access, value, *names = sys.argv[1:]
with_all = []
for name in names:
    try:
        with_all.append(vramd.attach_allocation(name, socket=socket, access=access))
    except vramd.VramdError:
        pass
for one in with_all:
    if access == "write":
        one.buffer[:] = bytes([int(value)]) * one.nbytes
print("ready", flush=True)
before = [bytes(one.buffer) for one in with_all]
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    for one, bytes_before in zip(with_all, before):
        if access == "read" and bytes(one.buffer) != bytes_before and one.generation:
            print("CHANGED", one.allocation_id, one.generation, flush=True)
            sys.exit(3)
    time.sleep(0.01)
"""


class Failed(Exception):
    """Something that must not happen."""


class Soak:
    def __init__(self, binary: str, directory: Path, seed: int) -> None:
        self.binary, self.directory = binary, directory
        self.models = directory / "models"
        self.models.mkdir()
        self.draw = random.Random(seed)
        self.calls: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=40)
        self.failures: list[str] = []
        self.lock = threading.Lock()
        self.paused = threading.Event()
        self.busy = 0
        self.children: list[subprocess.Popen[str]] = []
        self.start()
        for number in range(6):
            size = (200 * KIB if number % 2 else 20 * MIB) + number
            header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
            data = len(header).to_bytes(8, "little") + header + bytes([number]) * size
            (self.models / f"m{number}.safetensors").write_bytes(data)
            self.client.register_model(f"m{number}", self.models / f"m{number}.safetensors", keep_alive=-1)

    def start(self) -> None:
        ready = self.directory / "ready.json"
        ready.unlink(missing_ok=True)
        command = [
            self.binary, "serve", "--listen", "127.0.0.1:0", "--socket", str(self.directory / "sock"),
            "--state-dir", str(self.directory / "state"), "--model-root", str(self.models),
            "--cpu-limit", "512MiB", "--sim", "1GiB,256MiB", "--ready-file", str(ready),
        ]  # fmt: skip
        log = (self.directory / "log").open("ab")
        self.daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while not ready.exists():
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise Failed("the daemon does not start: " + (self.directory / "log").read_text()[-2000:])
            time.sleep(0.02)
        served = json.loads(ready.read_text())
        self.client = vramd.Client(f"http://{served['address']}")
        self.socket = served["socket"]

    # What a thread does

    def work(self, seed: int, until: float) -> None:
        draw = random.Random(seed)
        actions = [
            (self.allocate, 30), (self.free, 22), (self.renew, 3), (self.hold, 3), (self.model, 6),
            (self.transfer, 6), (self.copy, 4), (self.defragment, 5), (self.clear, 1), (self.nonsense, 4),
        ]  # fmt: skip
        while time.monotonic() < until and not self.failures:
            if self.paused.is_set():
                time.sleep(0.01)
                continue
            action = draw.choices([one for one, _ in actions], [weight for _, weight in actions])[0]
            with self.lock:
                self.busy += 1
            try:
                action(draw)
                outcome = "done"
            except vramd.VramdError as error:
                outcome = error.code
                down = self.paused.is_set()
                if error.code not in FINE and not down:
                    self.fail(f"{action.__name__}: {error.code}: {error} {error.details}")
            except Exception as error:
                outcome = repr(error)
                if not self.paused.is_set():
                    self.fail(f"{action.__name__}: {error!r}")
            finally:
                with self.lock:
                    self.busy -= 1
                    self.calls[f"{action.__name__} {outcome[:40]}"] += 1
                    self.recent.append(f"{action.__name__} {outcome[:80]}")

    def fail(self, what: str) -> None:
        with self.lock:
            self.failures.append(what)

    def some(self, draw: random.Random, count: int = 1) -> list[str]:
        page = self.client.allocations(page_size=200)["allocations"]
        open_ones = [one["allocationId"] for one in page if one["owner"] != "vramd"]
        return draw.sample(open_ones, min(count, len(open_ones)))

    def allocate(self, draw: random.Random) -> None:
        size = int(2 ** draw.uniform(8, 20 if draw.random() < 0.85 else 25))
        device = draw.choice([None, *DEVICES])
        persistent = draw.random() < 0.1
        self.client.allocate(
            size,
            device=device,
            owner=draw.choice(["one", "two", "three"]),
            purpose=draw.choice(["scratch", "kv", ""]),
            persistent=persistent or None,
            lease_seconds=None if persistent else draw.choice([1, 5, 60]),
            on_shortage=draw.choice(["fail", "fail", "wait"]),
            timeout_seconds=1,
        )

    def free(self, draw: random.Random) -> None:
        for name in self.some(draw):
            self.client.release(name)

    def renew(self, draw: random.Random) -> None:
        for name in self.some(draw):
            self.client.renew(name, lease_seconds=draw.choice([1, 30]))

    def hold(self, draw: random.Random) -> None:
        """A process of its own has memory attached, and is killed at any moment."""
        names, access = self.some(draw, 4), draw.choice(["read", "read", "write"])
        command = [sys.executable, "-c", HOLDER, self.socket, access, str(draw.randrange(256)), *names]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            with self.lock:
                self.children.append(child)
            time.sleep(draw.uniform(0.05, 1.5))
            child.send_signal(signal.SIGKILL)
            out, errors = child.communicate()
            with self.lock:
                self.children.remove(child)
            # Bytes may change under a reader by a writer, a copy or a clearing; that they do not by a move is
            # for the tests of moves. Here a child must only never die of what the daemon did.
            if child.returncode not in (-signal.SIGKILL, 0, 3) and not self.paused.is_set():
                self.fail(f"a child ended with {child.returncode}: {out} {errors}")

    def model(self, draw: random.Random) -> None:
        name = f"m{draw.randrange(6)}"
        if draw.random() < 0.4:
            self.client.unload(name)
            return
        self.client.load(name, draw.choice(DEVICES), timeout=60)
        with vramd.attach(name, draw.choice([None, *DEVICES]), socket=self.socket) as weights:
            raw = weights.raw("a")
            number = int(name[1:])
            if raw[0] != number or raw[-1] != number or bytes(raw[:: 64 * KIB]).strip(bytes([number])):
                self.fail(f"wrong bytes in {name} on {weights.device}")

    def transfer(self, draw: random.Random) -> None:
        items: list[Any] = list(self.some(draw, draw.randrange(1, 4)))
        if draw.random() < 0.3:
            items = [{"model": f"m{draw.randrange(6)}"}]
        if not items:
            return
        begun = self.client.transfer(
            items,
            draw.choice(DEVICES),
            mode=draw.choice(["move", "copy"]),
            checksum=draw.random() < 0.5,
            priority=draw.choice(["Low", "Normal", "High", "Critical"]),
            wait=False,
        )
        self.finish(draw, begun["operationId"])

    def copy(self, draw: random.Random) -> None:
        pair = self.some(draw, 2)
        if len(pair) == 2:
            begun = self.client.copy(pair[0], pair[1], size_bytes=draw.choice([256, 4096]), wait=False)
            self.finish(draw, begun["operationId"])

    def defragment(self, draw: random.Random) -> None:
        device = draw.choice([None, *DEVICES])
        if draw.random() < 0.3:
            self.client.plan_defragment(device)
            return
        bound = draw.choice([{}, {}, {"max_moves": 3}, {"max_bytes": MIB}, {"max_milliseconds": 20}])
        begun = self.client.defragment(device, wait=False, **bound)
        self.finish(draw, begun["operationId"])

    def finish(self, draw: random.Random, operation: str) -> None:
        if draw.random() < 0.2:
            self.client.pause_operation(operation)
            self.client.resume_operation(operation)
        if draw.random() < 0.2:
            self.client.cancel_operation(operation)
        self.client.wait_operation(operation, timeout=60)

    def clear(self, draw: random.Random) -> None:
        if draw.random() < 0.5:
            self.client.clear(draw.choice(["Cache", "Unused"]), timeout=60)
        else:
            self.client.clear("Allocations", owner="three", force=draw.random() < 0.5, timeout=60)

    def nonsense(self, draw: random.Random) -> None:
        missing = "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f"
        draw.choice([
            lambda: self.client.release(missing),
            lambda: self.client.transfer([missing], "sim:0"),
            lambda: self.client.transfer(["m0"], "sim:9"),
            lambda: self.client.copy(missing, missing),
            lambda: self.client.allocate(1 << 62),
            lambda: self.client.defragment("no-device"),
            lambda: self.client.load("no-model"),
        ])()  # fmt: skip

    # What must hold

    def quiet(self) -> None:
        """Lets what is under way end, and begins nothing new."""
        self.paused.set()
        deadline = time.monotonic() + 120
        while self.busy:
            if time.monotonic() > deadline:
                raise Failed(f"{self.busy} calls hang; the last ones: {list(self.recent)}")
            time.sleep(0.01)

    def check(self) -> None:
        """At rest the sums hold to the byte."""
        self.quiet()

        def sums() -> str | None:
            listed: Counter[str] = Counter()
            token = None
            while True:
                page = self.client.allocations(page_size=1000, page_token=token)
                for one in page["allocations"]:
                    listed[one["deviceId"]] += one["blockBytes"]
                token = page.get("nextPageToken")
                if token is None:
                    break
            for status in self.client.status()["devices"]:
                if wrong := disagrees(status, listed[status["deviceId"]]):
                    return wrong
            return None

        until(sums, 60)
        self.paused.clear()

    def kill_the_daemon(self) -> None:
        self.quiet()
        persistent = {one["allocationId"] for one in self.everything() if one["persistent"]}
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        self.start()
        back = {one["allocationId"] for one in self.everything() if one["owner"] != "vramd"}
        if not back <= persistent:
            raise Failed(f"after a kill {back - persistent} are there that were not persistent")
        if len(self.client.models()) != 6:
            raise Failed("after a kill the models are not known")
        self.paused.clear()

    def everything(self) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.allocations(page_size=1000, page_token=token)
            found += page["allocations"]
            token = page.get("nextPageToken")
            if token is None:
                return found

    def all_is_back(self) -> None:
        self.quiet()
        for status in self.client.operations(state="Running"):
            self.client.wait_operation(status["operationId"], timeout=60)

        def empty() -> str | None:
            for one in self.everything():
                if one["owner"] == "vramd":
                    continue
                try:
                    self.client.release(one["allocationId"])
                except vramd.VramdError as error:
                    if error.code not in FINE:
                        raise
            for model in self.client.models():
                if any(part["residency"] for part in model["components"]):
                    try:
                        self.client.unload(model["name"])
                    except vramd.VramdError as error:
                        if error.code not in FINE:
                            raise
            self.client.clear("Cache", timeout=30)
            for status in self.client.status()["devices"]:
                for figure in ("allocatedBytes", "reservedBytes", "poolFreeBytes", "allocationCount"):
                    if status[figure]:  # type: ignore[literal-required]
                        return f"{status['deviceId']}: {figure} is {status[figure]}"  # type: ignore[literal-required]
            return None

        until(empty, 90)
        memory = [name for name in open_files(self.daemon.pid) if "memfd:vramd" in name]
        if memory:
            raise Failed(f"the daemon still holds {memory}")
        self.daemon.send_signal(signal.SIGTERM)
        if code := self.daemon.wait(30):
            raise Failed(f"the daemon ended with {code}")


def disagrees(status: DeviceStatus, listed: int) -> str | None:
    parts = (
        "allocatedBytes",
        "poolFreeBytes",
        "reservedBytes",
        "workerBytes",
        "foreignBytes",
        "unknownBytes",
    )
    total = sum(status[part] for part in parts)  # type: ignore[literal-required]
    if total != status["usedBytes"]:
        return f"{status['deviceId']}: {total} in parts, {status['usedBytes']} used"
    if listed != status["allocatedBytes"]:
        return f"{status['deviceId']}: {listed} listed, {status['allocatedBytes']} allocated"
    return None


def open_files(pid: int) -> list[str]:
    """What the process has open, without what it closed while this looked."""
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(entry))
    return names


def until(wrong: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while what := wrong():
        if time.monotonic() > deadline:
            raise Failed(what)
        time.sleep(0.1)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("binary")
    arguments.add_argument("--seconds", type=float, default=600)
    arguments.add_argument("--seed", type=int, default=None)
    given = arguments.parse_args()
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}, {given.seconds:g} s", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(os.path.abspath(given.binary), Path(directory), seed)
        began = time.monotonic()
        end = began + given.seconds
        threads = [threading.Thread(target=soak.work, args=(seed + number, end)) for number in range(6)]
        for thread in threads:
            thread.start()
        try:
            killed = False
            while time.monotonic() < end and not soak.failures:
                time.sleep(min(10, given.seconds / 6))
                soak.check()
                if not killed and time.monotonic() - began > given.seconds / 2:
                    killed = True
                    soak.kill_the_daemon()
            for thread in threads:
                thread.join()
            if not soak.failures:
                soak.all_is_back()
        except Failed as error:
            soak.failures.append(str(error))
        except vramd.VramdError as error:
            soak.failures.append(f"{error.code}: {error} {error.details}")
        finally:
            soak.paused.set()
            for thread in threads:
                thread.join(60)
            soak.daemon.kill()
            soak.daemon.wait()
        for call, count in sorted(soak.calls.items()):
            print(f"{count:8} {call}")
        if soak.failures:
            print(f"FAILED with seed {seed}:", *soak.failures, sep="\n  ", file=sys.stderr)
            print("last calls:", *soak.recent, sep="\n  ", file=sys.stderr)
            print((Path(directory) / "log").read_text()[-4000:], file=sys.stderr)
            return 1
    print(f"{sum(soak.calls.values())} calls; the ledger adds up, and all memory is back")
    return 0


if __name__ == "__main__":
    sys.exit(main())
