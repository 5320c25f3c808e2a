"""The package against the real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import vramd as api
from support import Vramd, count_descriptors, running, until
from vramd.bodies import Operation

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "embedding": np.arange(40_000, dtype=np.float32).reshape(200, 200),
    "bias": np.linspace(-1, 1, 333, dtype=np.float64),
    "ids": np.arange(7, dtype=np.int64),
    "mask": np.array([True, False, True]),
    "scalar": np.array(2.5, dtype=np.float16),
    "empty": np.zeros((0, 5), dtype=np.float32),
}

# Attaches, reports the bytes of a tensor, stays until a line or the end of its input.
WORKER = """
import sys, vramd
with vramd.attach(sys.argv[1], socket=sys.argv[2]) as model:
    print(model["embedding"].tobytes().hex(), flush=True)
    sys.stdin.readline()
"""


def write_exotic(path: Path) -> None:
    """A safetensors file by hand, with dtypes that no NumPy writer knows and offsets that are not aligned."""
    header: dict[str, Any] = {"__metadata__": {"made": "by hand"}}
    payload = b""
    for name, dtype, shape, data in [
        ("byte", "U8", [1], b"\x07"),
        ("bf16", "BF16", [2], b"\xc0\x3f\x20\xc0"),
        ("fp8", "F8_E4M3", [2], b"\x3c\x40"),
        ("fp4", "F4", [4], b"\x12\x34"),
        ("float", "F32", [1], b"\x00\x00\xc0\x3f"),
    ]:
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)],
        }  # fmt: skip
        payload += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


@pytest.fixture
def toy(vramd: Vramd) -> Iterator[str]:
    """A model that is resident on cpu:0, and gone afterwards."""
    path = vramd.models / "toy.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"format": "np"})
    vramd.client.register_model("toy", path, keep_alive=-1)
    vramd.client.load("toy", "cpu:0")
    yield "toy"
    until(lambda: attached(vramd) == 0, "the end of all leases")
    vramd.client.unload("toy")
    vramd.client.remove_model("toy")


def attached(vramd: Vramd, name: str = "toy") -> int:
    return sum(
        residency["attachedCount"]
        for component in vramd.client.model(name)["components"]
        for residency in component["residency"]
    )


def spawn(vramd: Vramd, script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_attached_tensors_equal_those_of_the_file(vramd: Vramd, toy: str) -> None:
    with api.attach(toy, socket=vramd.socket) as model:
        assert set(model) == set(TENSORS)
        for name, expected in TENSORS.items():
            assert model[name].dtype == expected.dtype
            assert np.array_equal(model[name], expected), name
            assert model[name].shape == expected.shape
            with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
                model[name].flags.writeable = True
        assert (model.device, model.component, model.metadata) == ("cpu:0", "weights", {"format": "np"})
        assert model.nbytes >= sum(array.nbytes for array in TENSORS.values())
        assert attached(vramd) == 1
    with pytest.raises(api.ClosedError):
        model["embedding"]


def test_a_hand_made_file_has_its_exotic_dtypes(vramd: Vramd) -> None:
    pytest.importorskip("ml_dtypes")
    path = vramd.models / "exotic.safetensors"
    write_exotic(path)
    vramd.client.register_model("exotic", path)
    vramd.client.load("exotic")
    with api.attach("exotic", socket=vramd.socket) as model:
        assert model["bf16"].tolist() == [1.5, -2.5]
        assert model["fp8"].astype("f4").tolist() == [1.5, 2.0]
        assert model["float"].tolist() == [1.5]
        assert model.raw("fp4").tobytes() == b"\x12\x34"
        assert model.metadata == {"made": "by hand"}
        with pytest.raises(api.UnsupportedDtype):
            model["fp4"]
    until(lambda: attached(vramd, "exotic") == 0, "the end of the lease")
    vramd.client.unload("exotic")
    vramd.client.remove_model("exotic")


def test_torch_computes_with_the_daemons_pages_and_cannot_change_them(vramd: Vramd, toy: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with api.attach(toy, socket=vramd.socket, framework="torch") as model:
        embedding = model["embedding"]
        assert torch.equal(embedding, torch.from_numpy(TENSORS["embedding"].copy()))
        embedding.zero_()
    with api.attach(toy, socket=vramd.socket) as model:
        assert np.array_equal(model["embedding"], TENSORS["embedding"])


def test_two_processes_see_the_same_bytes(vramd: Vramd, toy: str) -> None:
    with (
        running(spawn(vramd, WORKER, toy, vramd.socket)) as one,
        running(spawn(vramd, WORKER, toy, vramd.socket)) as two,
    ):
        expected = TENSORS["embedding"].tobytes().hex()
        assert line_of(one) == line_of(two) == expected
        assert attached(vramd) == 2
        with pytest.raises(api.Conflict) as caught:
            vramd.client.unload(toy)
        holders = {holder["pid"] for holder in caught.value.details["holders"]}
        assert holders == {one.pid, two.pid}


def test_a_killed_worker_loses_its_lease_and_the_other_keeps_the_weights(vramd: Vramd, toy: str) -> None:
    with (
        running(spawn(vramd, WORKER, toy, vramd.socket)) as victim,
        api.attach(toy, socket=vramd.socket) as ours,
    ):
        line_of(victim)
        assert attached(vramd) == 2
        victim.kill()
        start = time.perf_counter()
        until(lambda: attached(vramd) == 1, "the end of the lease")
        print(f"the lease of a killed worker was gone after {(time.perf_counter() - start) * 1e3:.1f} ms")
        assert np.array_equal(ours["embedding"], TENSORS["embedding"])


def test_a_hundred_attachments_leave_nothing_behind(vramd: Vramd, toy: str) -> None:
    api.attach(toy, socket=vramd.socket).close()
    before = count_descriptors()
    for _ in range(100):
        api.attach(toy, socket=vramd.socket).close()
    assert count_descriptors() <= before
    until(lambda: attached(vramd) == 0, "the end of all leases")


def test_what_cannot_be_attached_is_refused_by_name(vramd: Vramd, toy: str) -> None:
    before = count_descriptors()
    for arguments, code in [
        (("nothing",), "NOT_FOUND"),
        (("toy/unet",), "NOT_FOUND"),
        (("toy", "cpu:7"), "NOT_FOUND"),
        (("toy", "sim:0"), "NOT_RESIDENT"),
        (("../toy",), "INVALID_ARGUMENT"),
    ]:
        with pytest.raises(api.VramdError) as caught:
            api.attach(*arguments, socket=vramd.socket)
        assert caught.value.code == code, arguments
    with pytest.raises(api.VramdError):
        api.attach("toy", socket=vramd.socket, access="write")
    path = vramd.models / "asleep.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1)}, path)
    vramd.client.register_model("asleep", path)
    with pytest.raises(api.NotResident) as asleep:
        api.attach("asleep", socket=vramd.socket)
    assert asleep.value.hint
    vramd.client.remove_model("asleep")
    assert count_descriptors() <= before


WRITER = """
import sys, vramd
with vramd.attach_allocation(sys.argv[1], access="write", socket=sys.argv[2]) as shared:
    shared.array[:5] = list(b"hello")
    print("written", flush=True)
    sys.stdin.readline()
"""


def test_an_allocation_is_written_by_one_process_and_read_by_another(vramd: Vramd) -> None:
    made = vramd.client.allocate(10_000, device="cpu:0", purpose="chat")
    with running(spawn(vramd, WRITER, made["allocationId"], vramd.socket)) as writer:
        assert line_of(writer) == "written"
        with api.attach_allocation(made["allocationId"], socket=vramd.socket) as shared:
            assert shared.nbytes == 10_000
            assert bytes(shared.buffer[:6]) == b"hello\0"
            with pytest.raises(TypeError):
                shared.buffer[0] = 1
    until(lambda: len(vramd.client.allocation(made["allocationId"])["leases"]) == 1, "the end of the leases")
    assert vramd.client.release(made["allocationId"])["allocationId"] == made["allocationId"]


def test_every_call_about_memory(vramd: Vramd) -> None:
    client = vramd.client
    assert {"cpu:0", "sim:0"} <= {device["deviceId"] for device in client.devices()}
    device = client.device("cpu:0")
    assert client.device(device["uuid"]) == device
    status = client.status(include=["allocations", "fragmentation", "processes"])
    assert {entry["deviceId"] for entry in status["devices"]} >= {"cpu:0", "sim:0"}
    assert "fragmentationDetails" in status["devices"][0]
    assert "allocations" not in client.device_status("cpu:0")

    made, again = (
        client.allocate(
            5000,
            device="sim:0",
            alignment=4096,
            allocation_type="KvCache",
            purpose="every call",
            priority="High",
            lease_seconds=60,
            owner="tests",
            idempotency_key="every-call",
        )
        for _ in range(2)
    )
    assert made["allocationId"] == again["allocationId"]
    assert (made["sizeBytes"], made["deviceId"], made["owner"]) == (5000, "sim:0", "tests")
    assert client.allocate(100, memory_type="RAM", persistent=False)["placement"]["reason"]
    found = client.allocations(owner="tests", allocation_type="KvCache", sort="-sizeBytes", page_size=10)
    assert [entry["allocationId"] for entry in found["allocations"]] == [made["allocationId"]]
    assert client.allocations(device="sim:0", owner="tests")["allocations"]
    assert client.allocation(made["allocationId"])["history"]
    before = made["leases"][0]["expiresAt"]
    assert client.renew(made["allocationId"], lease_seconds=600)["leases"][0]["expiresAt"] > before
    assert client.release(made["allocationId"])["releasedBytes"] >= 5000
    with pytest.raises(api.NotFound):
        client.allocation(made["allocationId"])
    for entry in client.allocations(status="Active", persistent=False)["allocations"]:
        if entry["allocationType"] == "Buffer":
            client.release(entry["allocationId"])

    with pytest.raises(api.InsufficientMemory) as caught:
        client.allocate(1 << 40, device="sim:0")
    assert caught.value.status == 507
    most = client.allocate(60 << 20, device="sim:0")
    with pytest.raises(api.Timeout):
        client.allocate(10 << 20, device="sim:0", on_shortage="wait", timeout_seconds=0)
    client.release(most["allocationId"])
    with pytest.raises(api.VramdError, match="INVALID_ARGUMENT"):
        client.allocate(-1)

    limit = client.device_limits("sim:0")["limitBytes"]
    assert client.set_limits("sim:0", limit_bytes=limit // 2)["overridden"]
    assert client.set_limits("sim:0", limit_bytes=None)["limitBytes"] == limit
    assert {entry["deviceId"] for entry in client.limits()} >= {"cpu:0", "sim:0"}


def test_every_call_about_models(vramd: Vramd) -> None:
    client = vramd.client
    path = vramd.models / "every.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1000)}, path)
    assert client.register_model("every", {"unet": path, "vae": path}, keep_alive="1h")["name"] == "every"
    with pytest.raises(api.Conflict):
        client.register_model("every", path)
    assert "every" in {model["name"] for model in client.models()}
    seen: list[Operation] = []
    assert client.load("every", "cpu:0", components=["unet"], progress=seen.append)["state"] == "Completed"
    assert seen[-1]["state"] == "Completed"
    started = client.load("every", "cpu:0", wait=False)
    assert client.wait_operation(started["operationId"], timeout=10)["state"] == "Completed"
    assert client.operation(started["operationId"], wait_seconds=1)["state"] == "Completed"
    assert started["operationId"] in {one["operationId"] for one in client.operations(state="Completed")}
    with pytest.raises(api.Conflict):
        client.cancel_operation(started["operationId"])
    assert client.pin("every")["pinned"]
    assert not client.unpin("every")["pinned"]
    assert client.touch("every", keep_alive="2h")["keepAlive"] == "2h"
    with pytest.raises(api.Conflict):
        client.remove_model("every")
    with pytest.raises(api.VramdError, match="INVALID_ARGUMENT"):  # two components: one must be named
        api.attach("every", socket=vramd.socket)
    with api.attach("every/vae", "cpu:0", socket=vramd.socket) as model:
        assert model.component == "vae"
    until(lambda: attached(vramd, "every") == 0, "the end of the lease")
    assert client.unload("every", "cpu:0")["state"] == "Completed"
    assert client.remove_model("every")["name"] == "every"
    with pytest.raises(api.NotFound):
        client.model("every")


def test_events_are_told_as_they_happen_and_again_from_an_id(vramd: Vramd) -> None:
    path = vramd.models / "told.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1)}, path)
    with vramd.client.events() as events:
        vramd.client.register_model("told", path)
        vramd.client.remove_model("told")
        told = [next(event for event in events if event["event"].startswith("model.")) for _ in range(2)]
        assert [event["event"] for event in told] == ["model.registered", "model.removed"]
    with vramd.client.events(told[0]["id"]) as again:
        assert next(event for event in again if event["event"].startswith("model.")) == told[1]


def test_the_daemon_answers_over_its_unix_socket_too(vramd: Vramd) -> None:
    client = api.Client(f"unix:{vramd.socket}")
    assert client.health()["status"] == client.ready()["status"] == "ok"
    assert client.openapi()["openapi"].startswith("3.")
    assert client.devices() == vramd.client.devices()


def test_threads_share_a_client_and_attach_side_by_side(vramd: Vramd, toy: str) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                with api.attach(toy, socket=vramd.socket) as model:
                    assert model["ids"].tolist() == list(range(7))
                vramd.client.device("cpu:0")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_after_a_fork_the_lease_lives_until_both_have_closed_it(vramd: Vramd, toy: str) -> None:
    model = api.attach(toy, socket=vramd.socket)
    go, went = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(went)
            os.read(go, 1)
        os._exit(0)
    model.close()
    os.close(go)
    try:
        assert attached(vramd) == 1
    finally:
        os.close(went)
        os.waitpid(child, 0)
    until(lambda: attached(vramd) == 0, "the end of the lease")
