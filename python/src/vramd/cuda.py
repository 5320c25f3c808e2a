"""Memory of NVIDIA's cards: imported, mapped for the card, and shown as ``__cuda_array_interface__``.

    descriptor ── imported, mapped ──▶ an address of the card ── the last array over it is gone ──▶ unmapped

Needs nothing but the driver (``libcuda.so.1``). Works in the card's primary context, which torch, CuPy and
everyone else who uses CUDA's runtime share. Whoever computes with an array keeps it until the card is done.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ProtocolError, UnsupportedDtype, VramdError
from .frames import BLOCKS, Row, check_row, packed_shape

if TYPE_CHECKING:
    from .attachment import Attached

#: What this process names to the daemon, and what its frames say of the segment.
HANDLE = "cudaPosixFd"

#: The type strings of the array interface; it has none for what is not here.
_TYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4",
    "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip

_POSIX_FILE_DESCRIPTOR = 1
_NO_DEVICE = 100
_ON_DEVICE = 1
_READ_AND_WRITE = 3


class CudaError(VramdError):
    """The CUDA driver is not there, or refused a call; ``details["cudaError"]`` is its number."""

    local_code = "CUDA_ERROR"


class _Access(ctypes.Structure):
    """``CUmemAccessDesc``"""

    _fields_ = (("kind", c_uint), ("device", c_int), ("flags", c_uint))


#: The functions of the driver that are used here, with their arguments.
_FUNCTIONS: Mapping[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemImportFromShareableHandle": (POINTER(c_ulonglong), c_void_p, c_uint),
    "cuMemRelease": (c_ulonglong,),
    "cuMemAddressReserve": (POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemAddressFree": (c_ulonglong, c_size_t),
    "cuMemMap": (c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemUnmap": (c_ulonglong, c_size_t),
    "cuMemSetAccess": (c_ulonglong, c_size_t, POINTER(_Access), c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_ulonglong, c_size_t),
}


class _Driver:
    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._functions = {name: getattr(library, name) for name in _FUNCTIONS}
        except (OSError, AttributeError) as error:
            raise CudaError(
                f"the CUDA driver cannot be used: {error}",
                hint="install NVIDIA's driver, or attach the model on cpu:0",
            ) from error
        for name, arguments in _FUNCTIONS.items():
            self._functions[name].argtypes = arguments
            self._functions[name].restype = c_uint
        try:
            self.call("cuInit", 0)
            self.has_cards = True
        except CudaError as error:
            if error.details["cudaError"] != _NO_DEVICE:
                raise
            self.has_cards = False

    def call(self, name: str, *arguments: Any) -> None:
        if code := self._functions[name](*arguments):
            raise CudaError(
                f"{name} failed with CUDA error {code}", details={"call": name, "cudaError": code}
            )


_lock = threading.Lock()


def _driver() -> _Driver:
    # Two threads at once would otherwise initialise it twice.
    with _lock:
        return _load()


@functools.cache
def _load() -> _Driver:
    return _Driver()


class Card(NamedTuple):
    #: As this process counts them: the N of torch's ``cuda:N``.
    ordinal: int
    #: The driver's own number.
    device: int


def ordinal_of(uuid: str) -> int | None:
    """Which of this process's cards that is, the N of torch's ``cuda:N``; ``None`` if it does not see it."""
    try:
        return _card(_driver(), uuid).ordinal
    except CudaError:
        return None


def _card(driver: _Driver, uuid: str) -> Card:
    count = c_int()
    if driver.has_cards:
        driver.call("cuDeviceGetCount", byref(count))
    for ordinal in range(count.value):
        device, found = c_int(), ctypes.create_string_buffer(16)
        driver.call("cuDeviceGet", byref(device), ordinal)
        driver.call("cuDeviceGetUuid_v2", found, device)
        if found.raw.hex() == uuid.partition("-")[2].replace("-", "").lower():
            return Card(ordinal, device.value)
    raise CudaError(
        f"CUDA in this process does not see the card {uuid}",
        hint="look at CUDA_VISIBLE_DEVICES: it has to have that card",
    )


class Imported:
    """A segment of the daemon's, mapped for the card for as long as anything refers to it."""

    def __init__(self, descriptor: int, size: int, handle: Mapping[str, Any]) -> None:
        #: 0 while it is not mapped.
        self.address = 0
        uuid = handle.get("deviceUuid")
        if not isinstance(uuid, str):
            raise ProtocolError(f"the daemon's handle does not name a card: {handle!r}")
        self._driver = _driver()
        self.card = _card(self._driver, uuid)
        self.size = size
        self._process = os.getpid()
        self._context = c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self.card.device)
        try:
            with self._current():
                self.address = self._map(descriptor)
        except BaseException:
            # What is mapped goes with this object, and the context after it.
            if not self.address:
                self._driver.call("cuDevicePrimaryCtxRelease_v2", self.card.device)
            raise

    def _map(self, descriptor: int) -> int:
        call, size = self._driver.call, self.size
        memory, address = c_ulonglong(), c_ulonglong()
        call("cuMemImportFromShareableHandle", byref(memory), descriptor, _POSIX_FILE_DESCRIPTOR)
        try:
            call("cuMemAddressReserve", byref(address), size, 0, 0, 0)
            try:
                call("cuMemMap", address, size, 0, memory, 0)
                try:
                    access = _Access(_ON_DEVICE, self.card.device, _READ_AND_WRITE)
                    call("cuMemSetAccess", address, size, byref(access), 1)
                except BaseException:
                    call("cuMemUnmap", address, size)
                    raise
            except BaseException:
                call("cuMemAddressFree", address, size)
                raise
        finally:
            # The mapping keeps the memory.
            call("cuMemRelease", memory)
        return address.value

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def synchronize(self) -> None:
        """Waits until the card has done what this process has asked of it."""
        if os.getpid() == self._process:
            with self._current():
                self._driver.call("cuCtxSynchronize")

    def copy(self, offset: int, size: int) -> bytearray:
        """Bytes of it, as the processor can read them."""
        assert 0 <= offset <= offset + size <= self.size
        copied = bytearray(size)
        if size:
            target = (ctypes.c_char * size).from_buffer(copied)
            with self._current():
                self._driver.call("cuMemcpyDtoH_v2", target, self.address + offset, size)
        return copied

    def __del__(self) -> None:
        # In the child of a fork the driver does not work, and the mapping is the parent's.
        if not self.address or os.getpid() != self._process:
            return
        # The driver may have ended before the interpreter; then it has unmapped everything.
        with suppress(CudaError):
            with self._current():
                # What is under way may still read it.
                self._driver.call("cuCtxSynchronize")
                self._driver.call("cuMemUnmap", self.address, self.size)
                self._driver.call("cuMemAddressFree", self.address, self.size)
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self.card.device)


class Array:
    """Attached memory of a card, for whoever knows ``__cuda_array_interface__``: torch, CuPy, Numba, JAX.

    >>> with vramd.attach("sdxl/unet", device="cuda:0", framework="cuda") as weights:
    ...     table = cupy.asarray(weights["time_embed.0.weight"])

    It is the daemon's own memory, which every process reads: nobody may write to it, though the card would
    let them.
    """

    def __init__(self, attached: Attached, imported: Imported, row: Row, offset: int) -> None:
        name, dtype, shape, _, size = row
        self._attached = attached
        self._imported = imported
        self._offset = offset
        self.name: str = name
        #: As the file has it: ``BF16``, ``F8_E4M3``.
        self.dtype: str = dtype
        self.shape: tuple[int, ...] = tuple(shape)
        self.nbytes: int = size
        #: The N of torch's ``cuda:N`` in this process.
        self.ordinal = imported.card.ordinal

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype in BLOCKS:
            return self._interface(tuple(packed_shape(self.dtype, self.shape)), "|u1")
        if self.dtype not in _TYPES:
            raise UnsupportedDtype(
                f"the array interface has no {self.dtype}, which tensor {self.name!r} has",
                hint='attach with framework="torch", or take its bytes: .bytes',
            )
        return self._interface(self.shape, _TYPES[self.dtype])

    @property
    def bytes(self) -> Bytes:
        """The same memory as plain bytes, of any dtype."""
        return Bytes(self)

    def copy_to_host(self) -> bytearray:
        """A copy that the processor can read."""
        self._attached.check_open()
        return self._imported.copy(self._offset, self.nbytes)

    def _interface(self, shape: tuple[int, ...], typestr: str) -> dict[str, Any]:
        self._attached.check_open()
        address = self._imported.address + self._offset if self.nbytes else 0
        if address % int(typestr[2:]):
            # A card takes alignment for granted, and files may break it: a fault there ends the context.
            raise UnsupportedDtype(
                f"tensor {self.name!r} begins at an address that is no multiple of its elements' size",
                hint="copy its bytes: .bytes is an array of them",
            )
        # torch takes no array that says it is read-only.
        return {"shape": shape, "typestr": typestr, "data": (address, False), "strides": None, "version": 3}

    def __repr__(self) -> str:
        return f"<vramd.cuda.Array {self.name}, {self.dtype} {self.shape}>"


class Bytes:
    """The bytes of an array, as an array of their own."""

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._array._interface((self._array.nbytes,), "|u1")


def array(attached: Attached, row: Row, buffer: Imported, base: int) -> Array:
    """The tensor as a view of ``buffer``, in which its block begins at ``base``."""
    check_row(row, attached.nbytes)
    return Array(attached, buffer, row, base + row[3])
