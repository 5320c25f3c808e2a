"""Memory of cards, on the fake CUDA driver: the true calls, in processes that load it by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import vramd as api
from support import ROOT, Vramd, until

CARD = "GPU-01234567-89ab-cdef-0123-456789abcdef"
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "table": np.arange(300_000, dtype=np.float32).reshape(600, 500),
    "ids": np.arange(7, dtype=np.int64),
    "empty": np.zeros((0, 5), dtype=np.float32),
}

# Looks at memory of the fake card as the card would: its addresses are this process's own.
PRELUDE = """
import ctypes, gc, json, os, sys, vramd
socket = sys.argv[1]
def seen(array):
    shown = array.__cuda_array_interface__
    address, size = shown["data"][0], array.nbytes
    return ctypes.string_at(address, size) if size else b""
def mapped():
    return open("/proc/self/maps").read().count("a card's memory")
"""


@pytest.fixture(scope="module")
def driver(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = Path(binary).parent
    for library in (built / "deps" / "libvramd_fake_cuda.so", built / "libvramd_fake_cuda.so"):
        if library.exists():
            home = tmp_path_factory.mktemp("driver")
            (home / "libcuda.so.1").write_bytes(library.read_bytes())
            (home / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")
            (home / "cards").write_text(f"{CARD} {4 << 30} 0\n")
            return home
    pytest.skip("no fake CUDA driver: `cargo test` builds it")


@pytest.fixture(scope="module")
def daemon(binary: str, driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vramd]:
    daemon = Vramd(binary, tmp_path_factory.mktemp("vramd-cuda"), {"LD_LIBRARY_PATH": str(driver)})
    path = daemon.models / "toy.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    daemon.client.register_model("toy", str(path))
    daemon.client.load("toy", device="cuda:0")
    yield daemon
    daemon.stop()


def run(driver: Path, script: str, *arguments: str, **environment: str) -> Any:
    """What a process of its own prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *arguments],
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def attached_count(daemon: Vramd) -> int:
    return daemon.client.model("toy")["components"][0]["residency"][0]["attachedCount"]


def test_a_model_on_a_card_is_attached_without_a_copy(daemon: Vramd, driver: Path) -> None:
    script = """
with vramd.attach("toy", socket=socket, framework="cuda") as model:
    table = model["table"]
    shown = {name: seen(model[name]).hex() for name in model}
    raw = {name: bytes(model.raw(name)).hex() for name in model}
    host = bytes(table.copy_to_host()).hex()
    interface = table.__cuda_array_interface__
    plain = table.bytes.__cuda_array_interface__
    assert plain["data"] == interface["data"] and plain["shape"] == (table.nbytes,)
    ordinals = [vramd.cuda.ordinal_of(uuid) for uuid in (sys.argv[2], "GPU-0")]
    print(json.dumps([model.device, shown, raw, host, interface, table.ordinal, mapped(), ordinals]))
"""
    device, shown, raw, host, interface, ordinal, mappings, ordinals = run(
        driver, script, daemon.socket, CARD
    )
    assert ordinals == [0, None]
    expected = {name: array.tobytes().hex() for name, array in TENSORS.items()}
    assert (device, ordinal, mappings) == ("cuda:0", 0, 1)
    assert shown == raw == expected
    assert host == expected["table"]
    assert (interface["shape"], interface["typestr"], interface["version"]) == ([600, 500], "<f4", 3)


def test_the_mapping_goes_with_the_last_array(daemon: Vramd, driver: Path) -> None:
    script = """
model = vramd.attach("toy", socket=socket, framework="cuda")
table = model["table"]
states = [mapped()]
model.close()
states.append(mapped())
try:
    table.__cuda_array_interface__
except vramd.ClosedError as error:
    states.append(error.code)
del table, model
gc.collect()
states.append(mapped())
print(json.dumps(states))
"""
    assert run(driver, script, daemon.socket) == [1, 1, "CLOSED", 0]


def test_processes_share_what_is_written_to_an_allocation(daemon: Vramd, driver: Path) -> None:
    allocation = daemon.client.allocate(1 << 20, device="cuda:0", lease_seconds=600)["allocationId"]
    script = """
with vramd.attach_allocation(sys.argv[2], socket=socket, framework="cuda", access=sys.argv[3]) as shared:
    if sys.argv[3] == "write":
        ctypes.memmove(shared.array.__cuda_array_interface__["data"][0], b"hello", 5)
    print(json.dumps(bytes(shared.buffer[:5]).hex()))
"""
    assert run(driver, script, daemon.socket, allocation, "read") == "0000000000"
    assert run(driver, script, daemon.socket, allocation, "write") == b"hello".hex()
    assert run(driver, script, daemon.socket, allocation, "read") == b"hello".hex()
    daemon.client.release(allocation)


def test_who_cannot_use_a_card_is_told_what_to_do(daemon: Vramd, driver: Path) -> None:
    # NumPy cannot; nothing of CUDA is loaded for that.
    with pytest.raises(api.Conflict) as refused:
        api.attach("toy", socket=daemon.socket)
    assert refused.value.details["handle"] == "cudaPosixFd"
    assert 'framework="torch"' in str(refused.value)
    # This process has no driver.
    with pytest.raises(api.CudaError, match="libcuda") as missing:
        api.attach("toy", socket=daemon.socket, framework="cuda")
    assert "cpu:0" in str(missing.value)
    # Another may not use this card.
    script = """
try:
    vramd.attach("toy", socket=socket, framework="cuda")
except vramd.CudaError as error:
    print(json.dumps([str(error), mapped()]))
"""
    text, mappings = run(driver, script, daemon.socket, CUDA_VISIBLE_DEVICES="")
    assert CARD in text
    assert "CUDA_VISIBLE_DEVICES" in text
    assert mappings == 0
    # None of them left a lease behind.
    until(lambda: attached_count(daemon) == 0, "the leases' end")


def test_what_a_card_could_not_read_is_refused(daemon: Vramd, driver: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    text = json.dumps(header).encode()
    path = daemon.models / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + np.float32(1.5).tobytes())
    daemon.client.register_model("odd", str(path))
    daemon.client.load("odd", device="cuda:0")
    script = """
with vramd.attach("odd", socket=socket, framework="cuda") as model:
    try:
        model["odd"].__cuda_array_interface__
    except vramd.UnsupportedDtype as error:
        plain = model["odd"].bytes.__cuda_array_interface__
        host = bytes(model["odd"].copy_to_host()).hex()
        print(json.dumps([error.hint, plain["typestr"], plain["shape"], host]))
"""
    hint, typestr, shape, host = run(driver, script, daemon.socket)
    assert ".bytes" in hint
    assert (typestr, shape, host) == ("|u1", [4], np.float32(1.5).tobytes().hex())


def test_who_uses_a_card_is_named(daemon: Vramd, driver: Path) -> None:
    (driver / "processes").write_text(f"{os.getpid()} {3 << 20}\n4194303\n")
    status = daemon.client.device_status("cuda:0", include=["processes"])
    me = Path("/proc/self/comm").read_text().strip()
    assert status["usedBy"] == [
        {"pid": os.getpid(), "command": me, "usedBytes": 3 << 20},
        {"pid": 4194303, "command": "?", "usedBytes": None},
    ]
    # Other devices do not tell, and nobody is asked without need.
    assert "usedBy" not in daemon.client.device_status("cpu:0", include=["processes"])
    assert "usedBy" not in daemon.client.device_status("cuda:0")
    every = daemon.client.status(include=["processes"])
    assert [len(device.get("usedBy", [])) for device in every["devices"]] == [0, 2, 0]
    # A driver that fails at it hides nothing else.
    (driver / "faults").write_text("nvmlDeviceGetComputeRunningProcesses_v3 0 999")
    assert "usedBy" not in daemon.client.device_status("cuda:0", include=["processes"])
    (driver / "faults").unlink()


def test_a_card_that_fails_holds_up_no_close(daemon: Vramd, driver: Path) -> None:
    script = """
model = vramd.attach("toy", socket=socket, framework="cuda")
with open(sys.argv[2] + "/faults", "w") as faults:
    faults.write("cuCtxSynchronize 0 700")
model.close()
os.unlink(sys.argv[2] + "/faults")
print(json.dumps(model.closed))
"""
    assert run(driver, script, daemon.socket, str(driver)) is True
    until(lambda: attached_count(daemon) == 0, "the lease's end")


def test_the_check_for_real_cards_runs(binary: str, driver: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_check.py", binary, "--bytes", str(32 << 20)],
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "every byte is the file's" in done.stdout


@pytest.mark.parametrize(
    "call", ["cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
)
def test_an_import_that_fails_leaves_nothing(daemon: Vramd, driver: Path, call: str) -> None:
    script = """
import vramd.kernel  # Or the thread that follows moves has its file open just now.
def descriptors():
    paths = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(path) for path in paths if os.path.lexists(path))
with vramd.attach("toy", socket=socket, framework="cuda") as model:
    pass
del model
gc.collect()
before = descriptors()
home = sys.argv[2]
with open(home + "/faults", "w") as faults:
    faults.write(sys.argv[3] + " 1 999")
try:
    vramd.attach("toy", socket=socket, framework="cuda")
except vramd.CudaError as error:
    code = error.details
os.unlink(home + "/faults")
assert descriptors() == before
with vramd.attach("toy", socket=socket, framework="cuda") as model:
    print(json.dumps([code, mapped(), bytes(model.raw("ids")).hex()]))
"""
    details, mappings, ids = run(driver, script, daemon.socket, str(driver), call)
    assert details == {"call": call, "cudaError": 999}
    assert (mappings, ids) == (1, TENSORS["ids"].tobytes().hex())
