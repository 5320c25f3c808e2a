"""Workers against the real daemon: the one that can be started as it is, and the class for model servers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import vramd as api
from support import ROOT, Vramd, running, until
from vramd import cuda
from vramd.worker import Model, Refused, Worker
from vramd.worker.framework import NumPy, Torch, collect_host, private_bytes
from vramd.worker.interface import Interface

MEGABYTE = 1 << 20
TENSORS = {
    "embedding": np.arange(1 << 21, dtype=np.float32).reshape(2048, 1024),
    "bias": np.linspace(-1, 1, 333, dtype=np.float32),
}
SIZE_MB = sum(tensor.nbytes for tensor in TENSORS.values()) / MEGABYTE


def has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module", params=["numpy", "torch"])
def daemon(
    request: pytest.FixtureRequest, binary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Vramd]:
    if request.param == "torch" and not has_torch():
        pytest.skip("torch is not installed")
    program = f"python={sys.executable} -m vramd.worker"
    environment = {"VRAMD_WORKER_FRAMEWORK": request.param, "OMP_NUM_THREADS": "1"}
    directory = tmp_path_factory.mktemp("vramd")
    daemon = Vramd(binary, directory, environment, "--worker-program", program)
    path = daemon.models / "toy.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"format": "np"})
    daemon.client.register_model("toy", path, keep_alive=-1)
    yield daemon
    daemon.stop()


def start(daemon: Vramd, name: str, **more: Any) -> None:
    daemon.client.start_worker("python", name=name, **more)
    until(lambda: daemon.client.worker(name)["state"] == "Ready", f"{name} to be ready", 60)


@pytest.fixture
def worker(daemon: Vramd, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Asks a worker of this test's own."""
    name = request.node.originalname[:40].replace("_", "-")
    start(daemon, name)
    yield lambda action, **data: daemon.client.call_worker(name, action, data)
    stopped = daemon.client.stop_worker(name)
    assert stopped["lastExit"].get("code") == 0, stopped
    assert stopped["faultCount"] == 0, stopped


def attached(daemon: Vramd) -> int:
    components = daemon.client.model("toy")["components"]
    return sum(place["attachedCount"] for part in components for place in part["residency"])


def test_every_status_has_the_frameworks_figures(worker: Any) -> None:
    for action in ("memory.get_status", "memory.get_model_status"):
        status = worker(action)
        figures = ("gpu_allocated_gb", "gpu_reserved_gb", "gpu_free_gb", "gpu_total_gb")
        assert all(status[figure] >= 0 for figure in figures)
        assert status["cpu_memory_gb"] > 0.001
        assert status["optimization_settings"]["framework"].startswith(("numpy", "torch"))
    pressure = worker("memory.get_pressure")["devices"]["cpu:0"]
    assert 0 < pressure["ratio"] < 1
    assert pressure["level"] is None
    told = worker("memory.pressure_check", device_id="cpu:0", level="High", target_mb=1)
    assert told["level"] == "High"
    assert worker("memory.get_pressure")["devices"]["cpu:0"]["level"] == "High"
    requests = worker("memory.analytics")["requests"]
    assert requests["memory.get_pressure"]["count"] == 2


def test_its_own_buffers_take_real_memory_and_give_it_back(worker: Any) -> None:
    used = worker("memory.get_status")["devices"]["cpu:0"]["used_mb"]
    made = worker("memory.allocate", size_mb=64, purpose="scratch")
    assert made["size_mb"] == 64
    assert worker("memory.get_status")["devices"]["cpu:0"]["used_mb"] > used + 60
    moved = worker("memory.transfer", allocation_id=made["allocation_id"], target_device_id="cpu:0")

    def ended() -> Any:
        status = worker("memory.transfer_status", transfer_id=moved["transfer_id"])
        return status if status["state"] != "Running" else None

    status = until(ended, "the transfer's end")
    assert (status["state"], status["done_mb"]) == ("Completed", 64)
    with pytest.raises(api.NotFound):
        worker("memory.deallocate", allocation_id=made["allocation_id"])
    gone = worker("memory.deallocate", allocation_id=status["target_allocation_id"])
    assert gone["freed_mb"] > 60
    worker("memory.allocate", size_mb=32)
    cleared = worker("memory.clear", device_id="cpu:0", allocations=True)
    assert cleared["allocation_count"] == 1
    assert cleared["freed_mb"] > 30
    assert worker("memory.defragment")["moved_mb"] == 0


@pytest.mark.parametrize(
    ("action", "data"),
    [
        ("memory.allocate", {}),
        ("memory.allocate", {"size_mb": -1}),
        ("memory.allocate", {"size_mb": "much"}),
        ("memory.allocate", {"size_mb": 1, "device_id": "cuda:9"}),
        ("memory.load_model", {}),
        ("memory.load_model", {"name": ""}),
        ("memory.load_model", {"name": "x", "priority": "Highest"}),
        ("memory.optimize_memory", {"strategy": "Random"}),
        ("memory.pressure_check", {"device_id": "cpu:0", "level": "Extreme"}),
        ("memory.clear", {"device_id": 3}),
    ],
)
def test_bad_data_is_refused(daemon: Vramd, action: str, data: dict[str, Any]) -> None:
    if "bad" not in [one["name"] for one in daemon.client.workers()]:
        start(daemon, "bad")
    with pytest.raises(api.VramdError) as refused:
        daemon.client.call_worker("bad", action, data)
    assert refused.value.code == "INVALID_ARGUMENT"
    assert daemon.client.worker("bad")["faultCount"] == 0


def test_two_attach_one_model_and_a_third_holds_its_own(daemon: Vramd) -> None:
    for name in ("one", "two", "third"):
        start(daemon, name)
    call = daemon.client.call_worker
    for name in ("one", "two"):
        loaded = call(name, "memory.load_model", {"name": "toy", "type": "encoder"})
        assert loaded["tensor_count"] == 2
        assert loaded["model"]["memory_mb"] == 0
        assert loaded["model"]["attached_mb"] >= SIZE_MB
    path = str(daemon.models / "toy.safetensors")
    own = call("third", "memory.load_model", {"name": "mine", "path": path, "estimated_size_mb": 9})
    assert own["model"]["memory_mb"] == pytest.approx(SIZE_MB, abs=0.01)
    assert attached(daemon) == 2
    for name, is_own in (("one", False), ("two", False), ("third", True)):

        def told(name: str = name) -> Any:
            return daemon.client.worker(name)["models"]

        model = until(told, f"the models of {name}")[0]
        assert (model["ownBytes"] > 0, model["attachedBytes"] > 0) == (is_own, not is_own)
        assert model.get("attachedModel") == (None if is_own else "toy")
    with pytest.raises(api.Conflict):
        call("third", "memory.offload_model", {"name": "mine"})
    with pytest.raises(api.Conflict):
        call("third", "memory.load_model", {"name": "mine", "path": path})
    offloaded = call("one", "memory.offload_model", {"name": "toy"})
    assert offloaded["model"]["offloaded"] is True
    until(lambda: attached(daemon) == 1, "one reader")
    assert call("one", "memory.restore_model", {"name": "toy"})["model"]["attached_mb"] >= SIZE_MB
    assert attached(daemon) == 2

    gone = call("third", "memory.unload_model", {"name": "mine"})
    assert gone["acknowledged_mb"] == pytest.approx(SIZE_MB, abs=0.01)
    assert gone["freed_mb"] > SIZE_MB * 0.9
    let_go = call("one", "memory.optimize_memory", {"target_reduction_mb": 1, "strategy": "LargestFirst"})
    assert [one["name"] for one in let_go["unloaded"]] == ["toy"]
    until(lambda: attached(daemon) == 1, "one reader")
    assert call("two", "cleanup")["unloaded"] == ["toy"]
    until(lambda: attached(daemon) == 0, "no reader")
    for name in ("one", "two", "third"):
        daemon.client.stop_worker(name)


def test_a_limit_is_kept_and_bad_files_are_named(daemon: Vramd) -> None:
    # Its interpreter and its framework count too.
    start(daemon, "limited", memory_limit_bytes=8 << 30)
    call = daemon.client.call_worker
    path = daemon.models / "toy.safetensors"
    with pytest.raises(api.InsufficientMemory):
        call("limited", "memory.load_model", {"name": "a", "path": str(path), "estimated_size_mb": 9000})
    bad = daemon.models / "bad.safetensors"
    bad.write_bytes(b"\xff" * 64)
    for file, code in ((bad, "INVALID_MODEL_FILE"), (daemon.models / "none.safetensors", "NOT_FOUND")):
        with pytest.raises(api.VramdError) as refused:
            call("limited", "memory.load_model", {"name": "a", "path": str(file)})
        assert refused.value.code == code
    with pytest.raises(api.NotFound):
        call("limited", "memory.load_model", {"name": "nobody-registered-this"})
    assert call("limited", "memory.get_model_info")["model_count"] == 0
    with pytest.raises(api.InsufficientMemory):
        call("limited", "memory.allocate", {"size_mb": 8193})
    call("limited", "memory.allocate", {"size_mb": 1})
    with pytest.raises(api.InsufficientMemory, match=r"of 8192\.0 MB"):
        call("limited", "memory.allocate", {"size_mb": 8192})
    daemon.client.stop_worker("limited")


def test_a_server_makes_room_below_its_limit_before_it_refuses() -> None:
    class Small(Worker):
        def on_load(self, name: str) -> Any:
            return np.ones(MEGABYTE * (150 if name == "large" else 40), np.uint8)

    server = Small("small")
    server._interface = Interface(NumPy(), server._manager, server)
    collect_host()
    server._manager.limit_bytes = private_bytes() + 100 * MEGABYTE
    for name in ("a", "b", "c"):
        with server.using(name):
            pass
    left = {model.name for model in server.models()}
    assert len(left) == 2
    assert "c" in left
    server._interface.models.make_room("cpu:0", 1 << 40)
    assert {model.name for model in server.models()} == left, "none goes in vain"
    with server.using("c"), pytest.raises(Refused, match="no room for large"), server.using("large"):
        pass
    assert [model.name for model in server.models()] == ["c"]


def test_tied_tensors_count_once_and_stay_tied() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.zeros(1 << 18)
    state = {"embedding": weight, "head": weight, "part": weight[:10]}
    assert Worker.size_of(state) == 1 << 20
    moved = Torch().move(state, "cpu:0")
    assert moved["embedding"].data_ptr() == moved["head"].data_ptr() != weight.data_ptr()
    row = np.zeros(16, np.float32)
    assert Worker.size_of([row, row, row[:3], row.copy()]) == 128
    # What only looks alike stays apart.
    number = torch.full((4,), 1 + 2j)
    moved = Torch().move({"a": number, "b": number.conj()}, "cpu:0")
    assert (moved["a"][0].item(), moved["b"][0].item()) == (1 + 2j, 1 - 2j)
    wrapper = type("Wraps", (torch.Tensor,), {"__torch_dispatch__": lambda *_: NotImplemented})
    assert Worker.size_of([torch.Tensor._make_wrapper_subclass(wrapper, (4,)) for _ in range(2)]) == 32
    assert Worker.size_of([torch.zeros(1).expand(1000)]) == 4


def test_cards_go_by_their_uuids_whatever_a_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "ordinal_of", {"GPU-b": 0}.get)
    framework = Torch()
    assert framework.devices() == ["cpu:0", "cuda:0"]
    framework.know({"cpu:0": "host-1", "cuda:0": "GPU-a", "cuda:1": "GPU-b"})
    assert framework.devices() == ["cpu:0", "cuda:1"]
    assert framework._place("cuda:1") == torch.device("cuda", 0)
    with pytest.raises(Refused, match="no cuda:0 here"):
        framework._place("cuda:0")


def test_what_it_allocates_over_rest_is_its_own(daemon: Vramd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMD_OWNER", "worker:some")
    client = api.Client(daemon.address)
    made = client.allocate(4096, device="sim:0")
    assert made["owner"] == "worker:some"
    client.release(made["allocationId"])


class Server(Worker):
    """A model server that holds what it says."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.networks: dict[str, bytearray] = {}
        self.pressures: list[tuple[str, str, int]] = []
        self.keeps = False

    def on_unload(self, model: Model) -> None:
        if self.keeps:
            raise Refused("CONFLICT", "it is dear to me")
        self.networks.pop(model.name)

    def on_pressure(self, device: str, level: str, target_bytes: int) -> None:
        self.pressures.append((device, level, target_bytes))


def test_a_model_server_joins_and_gives_way(daemon: Vramd) -> None:
    call, shown = daemon.client.call_worker, daemon.client.worker
    with Server("server", socket=daemon.socket) as server:
        until(lambda: "server" in [one["name"] for one in daemon.client.workers()], "it to join")
        until(lambda: shown("server")["state"] == "Ready", "it to be ready")
        assert shown("server")["pid"] == os.getpid()
        server.networks["net"] = bytearray(32 * MEGABYTE)
        server.hold("net", size_bytes=32 * MEGABYTE, load_seconds=2.5)
        until(lambda: shown("server")["models"], "its model to be known")
        with server.using("net"):
            until(lambda: shown("server")["models"][0]["busy"], "it to be busy")
            with pytest.raises(api.Conflict, match="in use"):
                call("server", "memory.unload_model", {"name": "net"})
        server.keeps = True
        with pytest.raises(api.Conflict, match="dear"):
            call("server", "memory.unload_model", {"name": "net"})
        assert "net" in server.networks
        server.keeps = False
        call("server", "memory.pressure_check", {"device_id": "cpu:0", "level": "Critical", "target_mb": 3})
        assert server.pressures == [("cpu:0", "Critical", 3 * MEGABYTE)]
        assert call("server", "memory.unload_model", {"name": "net"})["acknowledged_mb"] == 32
        assert server.networks == {}
        until(lambda: not shown("server")["models"], "its model to be gone")
    until(lambda: shown("server")["state"] == "Exited", "it to leave")


def test_running_one_that_was_started_waits_for_it(daemon: Vramd, capfd: pytest.CaptureFixture[str]) -> None:
    with Server("once", socket=daemon.socket) as server:
        running = threading.Thread(target=server.run)
        running.start()
        until(lambda: "once" in [one["name"] for one in daemon.client.workers()], "it to join")
        until(lambda: daemon.client.worker("once")["state"] == "Ready", "it to be ready")
        names = [one["name"] for one in daemon.client.workers()]
        assert "once-2" not in names
        assert running.is_alive()
    running.join(10)
    assert not running.is_alive()
    with Server("early", socket=f"{daemon.socket}-not-there"):
        until(lambda: "early joins once there is one" in capfd.readouterr().err, "it to say so")


def test_nobody_uses_what_is_going_and_what_is_offloaded_comes_back(daemon: Vramd) -> None:
    going, go_on = threading.Event(), threading.Event()

    class Slow(Worker):
        loads = 0

        def on_load(self, name: str) -> Any:
            if name == "attached":
                return api.attach("toy", socket=daemon.socket)
            self.loads += 1
            return {"weights": np.ones(1024, np.float32)}

        def on_unload(self, model: Model) -> None:
            going.set()
            assert go_on.wait(10)

    daemon.client.load("toy", "cpu:0")
    call = daemon.client.call_worker
    with Slow("slow", socket=daemon.socket) as server:
        until(lambda: "slow" in [one["name"] for one in daemon.client.workers()], "it to join")
        until(lambda: daemon.client.worker("slow")["state"] == "Ready", "it to be ready")
        with server.using("a"):
            # What is in use is brought up to date, and stays in use.
            server.hold("a", size_bytes=4096)
            with pytest.raises(api.Conflict, match="in use"):
                call("slow", "memory.unload_model", {"name": "a"})
        unload = threading.Thread(target=call, args=("slow", "memory.unload_model", {"name": "a"}))
        unload.start()
        assert going.wait(10)
        with pytest.raises(api.Conflict, match="on its way"):
            call("slow", "memory.unload_model", {"name": "a"})
        seen: list[Any] = []

        def use() -> None:
            with server.using("a") as model:
                seen.append(model.value)

        user = threading.Thread(target=use)
        user.start()
        go_on.set()
        unload.join(10)
        user.join(10)
        assert seen[0]["weights"].sum() == 1024
        assert server.loads == 2

        with server.using("attached") as model:
            assert model.attached_bytes > 0
        until(lambda: attached(daemon) == 1, "it to be attached")
        call("slow", "memory.offload_model", {"name": "attached"})
        until(lambda: attached(daemon) == 0, "it to be let go")
        with server.using("attached") as model:
            assert model.value["bias"][0] == TENSORS["bias"][0]
        call("slow", "memory.unload_model", {"name": "attached"})


def test_what_a_program_says_of_its_models_is_checked_where_it_says_so() -> None:
    server = Server("checked")
    for bad in (
        {"name": "x", "device": "cuda"},
        {"name": ""},
        {"name": "x" * 300},
        {"name": "x", "size_bytes": -1},
        {"name": "x", "priority": "Highest"},
        {"name": "x", "kind": ""},
        {"name": "x", "attached_model": "a\nb"},
        {"name": "x", "load_seconds": float("nan")},
    ):
        with pytest.raises(Refused):
            server.hold(**bad)
    assert server.models() == []
    # What the framework knows nothing of can be held all the same.
    server.networks["jax"] = bytearray(8)
    server.hold("jax", size_bytes=1 << 30, device="cuda:0")
    assert server.models()[0].device == "cuda:0"


def test_a_refused_name_is_told_once_and_a_hook_that_ends_is_answered(
    daemon: Vramd, capfd: pytest.CaptureFixture[str]
) -> None:
    Worker("no name", socket=daemon.socket).run()
    told = capfd.readouterr().err
    assert "the daemon refuses no name" in told
    assert told.count("refuses") == 1

    class Ends(Worker):
        def on_unload(self, model: Model) -> None:
            raise SystemExit(3)

    with Ends("ends", socket=daemon.socket) as server:
        server.hold("x", size_bytes=1, device="cuda:0")
        until(lambda: "ends" in [one["name"] for one in daemon.client.workers()], "it to join")
        until(lambda: daemon.client.worker("ends")["state"] == "Ready", "it to be ready")
        with pytest.raises(api.VramdError) as refused:
            daemon.client.call_worker("ends", "memory.unload_model", {"name": "x"})
        assert refused.value.details["workerCode"] == "SystemExit"
        assert [model.name for model in server.models()] == ["x"]


def test_a_server_that_is_told_to_end_leaves_and_a_lost_daemon_is_waited_for(
    binary: str, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    socket = str(tmp_path / "one" / "vramd.sock")
    daemon = Vramd(binary, tmp_path / "one")

    class Attaches(Worker):
        refused = 0

        def on_load(self, name: str) -> Any:
            return api.attach("toy", socket=socket)

        def on_unload(self, model: Model) -> None:
            self.refused += model.name == "kept"
            if model.name == "kept":
                raise Refused("CONFLICT", "it is dear to me")

    def serve(daemon: Vramd) -> None:
        path = daemon.models / "toy.safetensors"
        safetensors.numpy.save_file(TENSORS, path)
        daemon.client.register_model("toy", path, keep_alive=-1)
        daemon.client.load("toy", "cpu:0")

    serve(daemon)
    server = Attaches("server", socket=socket)
    server.hold("net", size_bytes=MEGABYTE)
    server.start()
    for name in ("toy", "kept"):
        with server.using(name):
            pass
    with pytest.raises(RuntimeError):
        server.start()
    until(lambda: daemon.client.workers() and daemon.client.worker("server")["models"], "its model")
    daemon.process.kill()
    daemon.process.wait()
    again = Vramd(binary, tmp_path / "two", None, "--socket", socket)
    try:
        until(lambda: again.client.workers() and again.client.worker("server")["models"], "it to be back", 20)
        # What the first daemon held is nobody's any more, and is had anew from the second.
        until(lambda: "toy" not in [model.name for model in server.models()], "the old weights to be let go")
        until(lambda: server.refused > 0, "the others to be asked for")
        assert server.refused < 10, "nobody is asked again and again"
        serve(again)
        with server.using("kept") as model:
            # Whatever it says: they are nobody's.
            assert model.value.ended is None
        with server.using("toy") as model:
            assert model.value["bias"][0] == TENSORS["bias"][0]
        until(lambda: attached(again) == 2, "the new weights to be attached")
        again.client.stop_worker("server")
        ended = [one for one in threading.enumerate() if one.name == "vramd-worker"]
        until(lambda: not any(one.is_alive() for one in ended), "its thread to end")
    finally:
        server.close()
        for model in server.models():
            if isinstance(model.value, api.Attachment):
                model.value.close()
        again.stop()


def test_the_example_of_the_guide_is_short_and_does_what_the_guide_says(daemon: Vramd) -> None:
    source = (ROOT / "examples" / "model_server.py").read_text()
    assert f"```python\n{source}```" in (ROOT / "docs" / "workers.md").read_text()
    assert len(source.splitlines()) < 40
    command = [sys.executable, str(ROOT / "examples" / "model_server.py")]
    environment = os.environ | {"VRAMD_SOCKET": daemon.socket}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1
    )
    with running(process):
        assert process.stdin
        assert process.stdout
        assert process.stderr

        def use(name: str) -> None:
            assert process.stdin
            assert process.stdout
            process.stdin.write(f"{name}\n")
            assert process.stdout.readline() == f"{name}: {64 * MEGABYTE // 4}\n"

        def models() -> Any:
            return "example" in names() and daemon.client.worker("example")["models"]

        def names() -> list[str]:
            return [one["name"] for one in daemon.client.workers()]

        use("tiny-64")
        assert until(models, "its model to be known", 20)[0]["ownBytes"] == 64 * MEGABYTE
        gone = daemon.client.call_worker("example", "memory.unload_model", {"name": "tiny-64"})
        assert gone["freed_mb"] > 60
        assert process.stderr.readline() == "tiny-64 goes after 1 uses\n"
        use("tiny-64")
