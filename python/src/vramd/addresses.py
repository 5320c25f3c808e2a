"""Mappings by their addresses, which Python's own ``mmap`` hides. Loaded with the first move."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class _View(ctypes.Structure):
    """``Py_buffer``, as the C API of Python 3 has it."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


@contextmanager
def of(mapping: mmap.mmap) -> Iterator[int]:
    """The address of a mapping, which stays mapped meanwhile."""
    view = _View()
    if ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0) != 0:
        raise BufferError("the mapping has no address")
    try:
        yield int(view.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def map_pages(size: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    """Maps a part of a file wherever there is room."""
    address = _libc.mmap(None, size, protection, flags, descriptor, offset)
    if address == _FAILED:
        raise _error()
    return int(address)


def replace(address: int, new: int, size: int, flags: int) -> None:
    """Moves a mapping over another of the same size, in one step; on an error the other stays."""
    if _libc.mremap(new, size, size, flags, address) == _FAILED:
        error = _error()
        _libc.munmap(new, size)
        raise error


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
