from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import statistics
import struct
import sys
import time
from typing import Any

import numpy as np
import pytest

import vramd
from support import PAGE, FakeDaemon, attached_body, count_descriptors, memfd, open_descriptors, until
from vramd import frames

# name, dtype, shape, the value of the first element, its bytes
DTYPES = [
    ("BOOL", True, b"\x01"),
    ("U8", 200, b"\xc8"),
    ("I8", -3, b"\xfd"),
    ("U16", 65535, b"\xff\xff"),
    ("I16", -2, b"\xfe\xff"),
    ("F16", 1.5, struct.pack("<e", 1.5)),
    ("U32", 1 << 31, struct.pack("<I", 1 << 31)),
    ("I32", -7, struct.pack("<i", -7)),
    ("F32", 0.25, struct.pack("<f", 0.25)),
    ("U64", 1 << 63, struct.pack("<Q", 1 << 63)),
    ("I64", -9, struct.pack("<q", -9)),
    ("F64", math.pi, struct.pack("<d", math.pi)),
    ("C64", 1 + 2j, struct.pack("<ff", 1, 2)),
    ("BF16", 1.5, b"\xc0\x3f"),
    ("F8_E5M2", 1.5, b"\x3e"),
    ("F8_E4M3", 1.5, b"\x3c"),
    ("F8_E8M0", 4.0, b"\x81"),
    ("F8_E4M3FNUZ", 1.5, b"\x44"),
    ("F8_E5M2FNUZ", 1.5, b"\x42"),
]


def attach(fake: FakeDaemon, tensors: list[tuple[str, str, list[int], bytes]], **options: Any) -> Any:
    """Attaches a model that the fake daemon makes up, its tensors one behind the other."""
    rows, payload = [], b""
    for name, dtype, shape, data in tensors:
        rows.append((name, dtype, shape, len(payload), len(data)))
        payload += data
    fake.then_attached(attached_body(rows, len(payload)), payload)
    return vramd.attach("toy", socket=fake.path, **options)


FLOATS = struct.pack("<6f", *range(6))


@pytest.mark.parametrize(("dtype", "value", "data"), DTYPES, ids=[row[0] for row in DTYPES])
def test_numpy_reads_every_dtype_at_any_offset(
    fake: FakeDaemon, dtype: str, value: object, data: bytes
) -> None:
    with attach(
        fake, [("pad", "U8", [1], b"x"), ("x", dtype, [2], 2 * data), ("s", dtype, [], data)]
    ) as model:
        assert model["x"].shape == (2,)
        assert model["x"].tobytes() == 2 * data
        assert model["x"][1] == value
        assert model["s"].shape == ()
        assert model["s"][()] == value


@pytest.mark.parametrize(("dtype", "value", "data"), DTYPES, ids=[row[0] for row in DTYPES])
def test_torch_reads_every_dtype_at_any_offset(
    fake: FakeDaemon, dtype: str, value: object, data: bytes
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from vramd import tensors

    if not hasattr(torch, tensors._NAMES[dtype]):
        with (
            attach(fake, [("x", dtype, [2], 2 * data)], framework="torch") as model,
            pytest.raises(vramd.UnsupportedDtype, match="torch"),
        ):
            model["x"]
        return
    rows = [("x", dtype, [2], 2 * data), ("pad", "U8", [1], b"x"), ("s", dtype, [], data)]
    with attach(fake, rows, framework="torch") as model:
        assert tuple(model["x"].shape) == (2,)
        assert tuple(model["s"].shape) == ()
        for name in ("x", "s"):
            first = model[name].reshape(-1)[0]
            assert first.item() == value if dtype != "F8_E8M0" else first.float().item() == value


def test_torch_writes_into_a_copy_of_its_own(fake: FakeDaemon) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    with attach(fake, [("x", "F32", [2, 3], FLOATS)], framework="torch") as model:
        ours = model["x"]
        ours += 1
        assert ours.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert model["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert ours.sum() == 21  # valid as long as it is referred to
    with pytest.raises(vramd.ClosedError):
        model["x"]


def test_torch_has_no_packed_dtypes_but_their_bytes(fake: FakeDaemon) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    with attach(fake, [("x", "F4", [4], b"\x12\x34")], framework="torch") as model:
        with pytest.raises(vramd.UnsupportedDtype, match="F4"):
            model["x"]
        assert model.raw("x").tobytes() == b"\x12\x34"


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_packed_rows_of_gguf_files_are_rows_of_bytes(fake: FakeDaemon, framework: str) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    rows = bytes(range(36)) * 3
    with attach(
        fake, [("x", "Q4_0", [3, 64], rows), ("y", "F32", [1], b"\0" * 4)], framework=framework
    ) as model:
        assert (tuple(model["x"].shape), model["x"][2].tolist()) == ((3, 36), list(range(36)))
        assert model.info("x") == ("x", "Q4_0", (3, 64), 0, 108)


@pytest.mark.parametrize("shape", [[3, 32], [64, 3], [], [3, 33]])
def test_packed_rows_of_another_size_are_refused(fake: FakeDaemon, shape: list[int]) -> None:
    with attach(fake, [("x", "Q4_0", shape, bytes(108))]) as model, pytest.raises(vramd.ProtocolError):
        model["x"]


def test_tensors_without_elements_are_tensors(fake: FakeDaemon) -> None:
    with attach(fake, [("a", "I64", [0, 4], b""), ("x", "U8", [1], b"x"), ("z", "F32", [0], b"")]) as model:
        assert model["a"].shape == (0, 4)
        assert model["z"].shape == (0,)
    with attach(fake, [("a", "I64", [0, 4], b"")]) as model:  # and a model of nothing else is one too
        assert (model.nbytes, model["a"].shape, model.raw("a").nbytes) == (0, (0, 4), 0)


def test_an_attachment_is_a_mapping_with_facts(fake: FakeDaemon) -> None:
    with attach(fake, [("x", "F32", [2, 3], FLOATS), ("y", "U8", [2], b"ab")], device="cpu:0") as model:
        assert (list(model), len(model), "x" in model, "z" in model) == (["x", "y"], 2, True, False)
        assert model.info("x") == ("x", "F32", (2, 3), 0, 24)
        assert (model.model, model.component, model.device, model.generation) == (
            "toy",
            "weights",
            "cpu:0",
            3,
        )
        assert (model.nbytes, model.metadata) == (26, {"format": "pt"})
        assert dict(model)["y"].tobytes() == model.raw("y") == b"ab"
        with pytest.raises(KeyError):
            model["z"]
    assert fake.requests == [{"model": "toy", "deviceId": "cpu:0", "access": "read", "moves": True}]


def test_a_component_is_named_behind_a_slash_or_apart(fake: FakeDaemon) -> None:
    for _ in range(2):
        fake.then_attached(attached_body([], 8), bytes(8))
    vramd.attach("sdxl/unet", socket=fake.path).close()
    vramd.attach("sdxl", component="unet", socket=fake.path).close()
    assert fake.requests == 2 * [{"model": "sdxl", "component": "unet", "access": "read", "moves": True}]
    with pytest.raises(ValueError, match="names a component already"):
        vramd.attach("sdxl/unet", component="vae", socket=fake.path)


def test_arrays_are_views_that_cannot_be_written(fake: FakeDaemon) -> None:
    with attach(fake, [("x", "F32", [2, 3], FLOATS)]) as model:
        x = model["x"]
        assert not x.flags.owndata
        assert x.ctypes.data == model["x"].ctypes.data
        with pytest.raises(ValueError, match="read-only"):
            x[0, 0] = 1
        with pytest.raises(ValueError, match="read-only"):
            x += 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            x.flags.writeable = True
        with pytest.raises(TypeError):
            model.raw("x")[0] = 1


def test_arrays_and_views_of_them_raise_after_close(fake: FakeDaemon) -> None:
    with attach(fake, [("x", "F32", [2, 3], FLOATS)]) as model:
        x = model["x"]
        views = [x, x[0], x.T, x.reshape(-1), x[:, None]]
    assert model.closed
    for view in views:
        for use in (
            lambda a: a + 1,
            lambda a: a[0],
            lambda a: a.sum(),
            lambda a: a @ a.T,
            np.sum,
            np.mean,
            np.linalg.norm,
            lambda a: np.concatenate([a, a]),
            lambda a: a.tolist(),
            lambda a: a.tobytes(),
            lambda a: a.astype("f8"),
            lambda a: a.copy(),
            list,
            pickle.dumps,
            copy.deepcopy,
        ):
            with pytest.raises(vramd.ClosedError, match="closed"):
                use(view)
        assert "closed" in repr(view)
        assert "closed" in str(view)
    with pytest.raises(vramd.ClosedError):
        model["x"]
    with pytest.raises(vramd.ClosedError):
        model.raw("x")
    with pytest.raises(vramd.ClosedError):
        model.__enter__()
    model.close()  # twice is fine


def test_results_and_copies_are_ordinary_arrays_and_stay(fake: FakeDaemon) -> None:
    with attach(fake, [("x", "F32", [2, 3], FLOATS)]) as model:
        x = model["x"]
        results = [x + 0, x.copy(), x.astype("f4"), np.concatenate([x[:1], x[1:]]), copy.deepcopy(x)]
        results += [pickle.loads(pickle.dumps(x)), np.where(x > 9, 1, x)]
        assert type(x + 0) is np.ndarray
        assert type(x @ x.T) is np.ndarray
        total = np.empty((2, 3), "f4")
        assert np.add(x, x, out=total) is total
        assert str(x) == str(np.asarray(x))
    for result in results:
        assert result.sum() == 15
        assert result.flags.writeable


def test_what_escapes_the_check_still_cannot_fault(fake: FakeDaemon) -> None:
    with attach(fake, [("x", "F32", [2, 3], FLOATS)]) as model:
        plain, raw = np.asarray(model["x"]).view(np.ndarray), model.raw("x")
    assert plain.sum() == 15
    assert raw.tobytes() == FLOATS


def test_close_ends_the_lease_and_the_last_array_the_mapping(fake: FakeDaemon) -> None:
    gc.collect()  # tests before this one left tracebacks that hold arrays
    before, mapped = count_descriptors(), mappings()
    model = attach(fake, [("x", "F32", [2, 3], FLOATS)])
    x = model["x"]
    model.close()
    until(lambda: fake.ended_leases == 1, "the end of the lease")
    assert mappings() == mapped + 1
    del x
    assert mappings() == mapped
    until(lambda: count_descriptors() <= before, "the end of the descriptors")


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return maps.read().count("memfd:vramd-test")


def test_an_array_keeps_its_attachment(fake: FakeDaemon) -> None:
    x = attach(fake, [("x", "F32", [2, 3], FLOATS)])["x"]
    gc.collect()
    assert x.sum() == 15
    assert fake.ended_leases == 0
    with pytest.warns(ResourceWarning, match="unclosed <vramd.Attachment toy/weights"):
        del x
    until(lambda: fake.ended_leases == 1, "the end of the lease")


def test_only_the_pages_of_the_block_are_mapped(fake: FakeDaemon) -> None:
    payload = bytes(range(256)) * 40
    segment = memfd(payload, before=5 * PAGE + 100)
    body = attached_body(
        [("x", "U8", [10240], 0, 10240)],
        10240,
        segments=[{"bytes": 8 * PAGE, "pageBytes": PAGE}],
        block={"segment": 0, "offset": 5 * PAGE + 100, "bytes": 10240},
    )
    fake.then(frames.encode(frames.ATTACHED, body, 1), [segment])
    with vramd.attach("toy", socket=fake.path) as model, open("/proc/self/maps") as maps:
        assert model["x"].tobytes() == payload
        line = next(line for line in maps if "memfd:vramd-test" in line)
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        assert high - low == 3 * PAGE


def test_the_bytes_of_an_allocation_are_shared(fake: FakeDaemon) -> None:
    body = attached_body([], 100, access="write")
    del body["model"], body["component"]
    with open(memfd(bytes(100)), "r+b", closefd=True) as shared:
        for _ in range(2):
            fake.then(frames.encode(frames.ATTACHED, body, 1), [os.dup(shared.fileno())])
        with vramd.attach_allocation("some-id", access="write", socket=fake.path) as ours:
            ours.buffer[:5] = b"hello"
            array = ours.array
            array[5:10] += 7
            assert os.pread(shared.fileno(), 10, PAGE) == b"hello" + 5 * b"\x07"
            assert (ours.nbytes, array.shape) == (100, (100,))
        with pytest.raises(vramd.ClosedError):
            array[0] = 1
        with pytest.raises(vramd.ClosedError):
            ours.buffer  # noqa: B018
    assert fake.requests[0] == {"allocationId": "some-id", "access": "write", "moves": True}


def test_without_ml_dtypes_the_ways_out_are_named(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramd import arrays

    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    arrays.dtype_of.cache_clear()
    with attach(fake, [("x", "BF16", [1], b"\xc0\x3f"), ("p", "F6_E2M3", [4], b"abc")]) as model:
        with pytest.raises(vramd.UnsupportedDtype, match=r"(?s)'x'.*install.*ml_dtypes.*torch"):
            model["x"]
        with pytest.raises(vramd.UnsupportedDtype, match=r"(?s)F6_E2M3.*raw\('p'\)"):
            model["p"]
        assert model.raw("p").tobytes() == b"abc"
    arrays.dtype_of.cache_clear()


def test_no_daemon_is_a_connection_that_failed() -> None:
    before = open_descriptors()
    with pytest.raises(vramd.ConnectionFailed, match=r"(?s)/nowhere/vramd.sock.*is vramd serve running"):
        vramd.attach("toy", socket="/nowhere/vramd.sock")
    assert open_descriptors() <= before


def test_the_socket_is_found_as_the_daemon_places_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.delenv("VRAMD_SOCKET", raising=False)
    assert vramd.default_socket() == "/run/user/1000/vramd/vramd.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("HOME", "/home/worker")
    assert vramd.default_socket() == "/home/worker/.local/state/vramd/vramd.sock"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert vramd.default_socket() == "/run/vramd/vramd.sock"
    monkeypatch.setenv("VRAMD_SOCKET", "/elsewhere")
    assert vramd.default_socket() == "/elsewhere"


def test_four_hundred_tensors_are_attached_in_milliseconds(fake: FakeDaemon) -> None:
    """Prints the figure; asserts only that every array is there."""
    size = 100
    rows = [(f"model.layers.{i}.weight", "F32", [5, 5], i * size, size) for i in range(400)]
    body = attached_body(rows, 400 * size)
    times = []
    for _ in range(50):
        fake.then_attached(body, bytes(400 * size))
        start = time.perf_counter()
        model = vramd.attach("toy", socket=fake.path)
        arrays = dict(model)
        times.append(time.perf_counter() - start)
        assert len(arrays) == 400
        model.close()
    times.sort()
    print(f"attach, 400 arrays: p50 {statistics.median(times) * 1e3:.2f} ms, max {times[-1] * 1e3:.2f} ms")
