"""What holds the bytes: PyTorch where it is there, else NumPy, which knows host memory alone."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from .. import cuda
from .protocol import Refused, gigabytes, megabytes

#: Bytes that a copy moves between two looks at whether it is still wanted.
CHUNK_BYTES = 64 << 20


class Framework(Protocol):
    """Memory of one framework, by devices as the daemon names them."""

    kind: Literal["torch", "numpy"]
    #: Its name and version.
    name: str

    def know(self, uuids: Mapping[str, str]) -> None:
        """By which the daemon's devices are known, whatever this process counts them as."""
        ...

    def devices(self) -> list[str]: ...

    def used_bytes(self, device: str) -> int:
        """What this process holds there."""
        ...

    def figures(self, device: str) -> dict[str, Any]:
        """What the framework knows of its memory there."""
        ...

    def empty(self, size_bytes: int, device: str) -> Any:
        """A buffer of bytes."""
        ...

    def size_of(self, value: Any) -> int: ...

    def copy_into(self, target: Any, source: Any, offset: int, size_bytes: int) -> None: ...

    def load(self, path: Path, device: str, check: Callable[[], None]) -> Mapping[str, Any]:
        """A state dict from a file, in memory of this process; ``check`` raises once nobody waits for it."""
        ...

    def move(self, value: Any, device: str) -> Any:
        """A module, a state dict, tensors or one of them, on another device."""
        ...

    def collect(self, device: str | None) -> None:
        """Gives back to the system what is kept for later."""
        ...


def best() -> Framework:
    """PyTorch if it can be imported, else NumPy."""
    if os.environ.get("VRAMD_WORKER_FRAMEWORK", "torch") == "torch":
        try:
            return Torch()
        except ImportError:
            pass
    return NumPy()


class NumPy:
    kind: Literal["torch", "numpy"] = "numpy"

    def __init__(self) -> None:
        import numpy

        self._numpy = numpy
        self.name = f"numpy {numpy.__version__}"

    def know(self, uuids: Mapping[str, str]) -> None:
        pass

    def devices(self) -> list[str]:
        return ["cpu:0"]

    def used_bytes(self, device: str) -> int:
        self._check(device)
        return private_bytes()

    def figures(self, device: str) -> dict[str, Any]:
        self._check(device)
        return host_figures()

    def empty(self, size_bytes: int, device: str) -> Any:
        self._check(device)
        # Its pages are there once this returns: a promise of the system's is no memory.
        try:
            return self._numpy.full(size_bytes, 0, self._numpy.uint8)
        except ValueError as error:
            raise MemoryError(str(error)) from error

    def size_of(self, value: Any) -> int:
        return int(value.nbytes)

    def copy_into(self, target: Any, source: Any, offset: int, size_bytes: int) -> None:
        target[offset : offset + size_bytes] = source[offset : offset + size_bytes]

    def load(self, path: Path, device: str, check: Callable[[], None]) -> Mapping[str, Any]:
        self._check(device)
        if path.suffix != ".safetensors":
            what = f"without PyTorch this worker reads .safetensors, not {path.suffix or path.name}"
            raise Refused("INVALID_MODEL_FILE", what)
        return _read_safetensors(path, "numpy")

    def move(self, value: Any, device: str) -> Any:
        self._check(device)
        return value

    def collect(self, device: str | None) -> None:
        collect_host()

    def _check(self, device: str) -> None:
        if not device.startswith("cpu:"):
            raise Refused(
                "INVALID_ARGUMENT", f"NumPy knows host memory alone, not {device}", "install PyTorch"
            )


class Torch:
    kind: Literal["torch", "numpy"] = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._uuids: Mapping[str, str] = {}
        self.name = f"torch {torch.__version__}"

    def know(self, uuids: Mapping[str, str]) -> None:
        self._uuids = {one: uuid for one, uuid in uuids.items() if one.startswith("cuda:")}

    def devices(self) -> list[str]:
        # Those that this process uses: asking others for figures would open a context on them.
        return ["cpu:0", *(self._ordinals() if self._torch.cuda.is_initialized() else ())]

    def _ordinals(self) -> dict[str, int]:
        """The cards of this process by the daemon's names; by torch's where the daemon has none."""
        if not self._uuids:
            return {f"cuda:{ordinal}": ordinal for ordinal in range(self._torch.cuda.device_count())}
        # Not before somebody uses them: a process that has asked the driver cannot be forked any more.
        found = {one: cuda.ordinal_of(uuid) for one, uuid in self._uuids.items()}
        return {one: ordinal for one, ordinal in found.items() if ordinal is not None}

    def used_bytes(self, device: str) -> int:
        place = self._place(device)
        return private_bytes() if place.type == "cpu" else int(self._torch.cuda.memory_reserved(place))

    def figures(self, device: str) -> dict[str, Any]:
        place = self._place(device)
        if place.type == "cpu":
            return host_figures()
        of_torch = self._torch.cuda
        free, total = of_torch.mem_get_info(place)
        stats = of_torch.memory_stats(place)
        return {
            "used_mb": megabytes(of_torch.memory_reserved(place)),
            "allocated_mb": megabytes(of_torch.memory_allocated(place)),
            "peak_allocated_mb": megabytes(of_torch.max_memory_allocated(place)),
            "inactive_split_mb": megabytes(stats.get("inactive_split_bytes.all.current", 0)),
            "free_mb": megabytes(free),
            "total_mb": megabytes(total),
        }

    def summary(self) -> dict[str, float]:
        """All cards together."""
        of_torch, cards = self._torch.cuda, self.devices()[1:]
        free = total = allocated = reserved = 0
        for card in cards:
            place = self._place(card)
            of_card = of_torch.mem_get_info(place)
            free, total = free + of_card[0], total + of_card[1]
            allocated += of_torch.memory_allocated(place)
            reserved += of_torch.memory_reserved(place)
        return gpu_figures(allocated, reserved, free, total)

    def empty(self, size_bytes: int, device: str) -> Any:
        place = self._place(device)
        try:
            return self._torch.zeros(size_bytes, dtype=self._torch.uint8, device=place)
        except (RuntimeError, TypeError) as error:
            raise MemoryError(f"PyTorch gave no {size_bytes} bytes on {device}") from error

    def size_of(self, value: Any) -> int:
        return int(value.numel() * value.element_size())

    def copy_into(self, target: Any, source: Any, offset: int, size_bytes: int) -> None:
        target[offset : offset + size_bytes].copy_(source[offset : offset + size_bytes])
        if target.is_cuda or source.is_cuda:
            self._torch.cuda.synchronize()

    def load(self, path: Path, device: str, check: Callable[[], None]) -> Mapping[str, Any]:
        if path.suffix == ".safetensors":
            # What the library reads is a mapping of the file, nothing of this process's own.
            tensors, moved = _read_safetensors(path, "torch"), {}
            for name, tensor in tensors.items():
                check()
                moved[name] = self.move(tensor, device)
            return moved
        if not path.exists():
            raise Refused("NOT_FOUND", f"there is no file {path}")
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            try:
                state = self._torch.load(path, map_location=self._place(device), weights_only=True)
            except Exception as error:
                what = f"{path} holds no weights alone that PyTorch can read: {type(error).__name__}"
                raise Refused("INVALID_MODEL_FILE", what) from error
            state = state.get("state_dict", state) if isinstance(state, dict) else None
            if isinstance(state, dict):
                return {
                    name: tensor for name, tensor in state.items() if isinstance(tensor, self._torch.Tensor)
                }
        raise Refused(
            "INVALID_MODEL_FILE",
            f"{path} holds no state dict that this worker reads",
            "it reads .safetensors, and .pt, .pth, .bin and .ckpt with weights alone; the daemon loads .gguf",
        )

    def move(self, value: Any, device: str) -> Any:
        return self._move(value, self._place(device), {})

    def _move(self, value: Any, place: Any, moved: dict[Any, Any]) -> Any:
        if isinstance(value, self._torch.nn.Module):
            return value.to(place)
        if isinstance(value, self._torch.Tensor):
            storage = storage_of(value)
            if storage is None:
                return value.to(place, copy=True)
            # Tied weights stay tied.
            flags = (value.is_conj(), value.is_neg())
            same = (storage, value.data_ptr(), value.dtype, value.shape, value.stride(), flags)
            if same not in moved:
                moved[same] = value.to(place, copy=True)
            return moved[same]
        if isinstance(value, Mapping):
            return {name: self._move(one, place, moved) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._move(one, place, moved) for one in value]
        raise Refused("CONFLICT", f"a {type(value).__name__} cannot be moved: it is no tensor")

    def collect(self, device: str | None) -> None:
        collect_host()
        # Asking would open a context on a card that this process does not use.
        if self._torch.cuda.is_initialized() and not (device or "cuda").startswith("cpu"):
            self._torch.cuda.synchronize()
            self._torch.cuda.empty_cache()

    def _place(self, device: str) -> Any:
        if device.startswith("cpu:"):
            return self._torch.device("cpu")
        cards = self._ordinals() if self._torch.cuda.is_available() else {}
        if device in cards:
            return self._torch.device("cuda", cards[device])
        known = ", ".join(["cpu:0", *cards])
        raise Refused("INVALID_ARGUMENT", f"PyTorch has no {device} here", f"it has: {known}")


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """The bytes of NumPy arrays or torch tensors; of what several share, once."""
    shared: dict[tuple[str, int], int] = {}
    alone = 0
    for one in tensors:
        if hasattr(one, "data_ptr"):
            storage = storage_of(one)
            if storage is None:
                alone += _plain_bytes(one)
            else:
                shared[storage[:2]] = storage[2]
            continue
        whole = one
        while getattr(whole, "base", None) is not None and hasattr(whole.base, "nbytes"):
            whole = whole.base
        shared["", id(whole)] = int(whole.nbytes)
    return alone + sum(shared.values())


def storage_of(tensor: Any) -> tuple[str, int, int] | None:
    """Where a plain tensor's bytes are, and how many; ``None`` of one that wraps others or has none."""
    try:
        storage = (tensor.untyped_storage if hasattr(tensor, "untyped_storage") else tensor.storage)()
        place, size = storage.data_ptr(), int(storage.nbytes())
    except (RuntimeError, ValueError, TypeError):
        return None
    return (str(tensor.device), place, size) if place else None


def _plain_bytes(tensor: Any) -> int:
    """Of one without a storage of its own; nothing of one that is not made yet."""
    try:
        return int(tensor.numel() * tensor.element_size())
    except (RuntimeError, ValueError):
        return 0


def private_bytes() -> int:
    """What this process shares with nobody: attached weights are not in it."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def host_figures() -> dict[str, Any]:
    known = {}
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            known[name] = int(rest.split()[0]) * 1024
    return {
        "used_mb": megabytes(private_bytes()),
        "free_mb": megabytes(known.get("MemAvailable", 0)),
        "total_mb": megabytes(known.get("MemTotal", 0)),
    }


def gpu_figures(allocated: int = 0, reserved: int = 0, free: int = 0, total: int = 0) -> dict[str, float]:
    return {
        "gpu_allocated_gb": gigabytes(allocated),
        "gpu_reserved_gb": gigabytes(reserved),
        "gpu_free_gb": gigabytes(free),
        "gpu_total_gb": gigabytes(total),
        "cpu_memory_gb": gigabytes(private_bytes()),
    }


def collect_host() -> None:
    """Has Python let go of what nobody refers to, and the C library give its free pages back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read_safetensors(path: Path, framework: Literal["torch", "numpy"]) -> Mapping[str, Any]:
    try:
        load_file = importlib.import_module(f"safetensors.{framework}").load_file
    except ImportError:
        hint = "pip install safetensors; or let the daemon hold the model and attach it, which needs nothing"
        raise Refused("CONFLICT", "the package safetensors is not installed", hint) from None
    try:
        tensors: Mapping[str, Any] = load_file(path)
    except FileNotFoundError:
        raise Refused("NOT_FOUND", f"there is no file {path}") from None
    except Exception as error:
        raise Refused("INVALID_MODEL_FILE", f"{path}: {error}") from error
    return tensors
