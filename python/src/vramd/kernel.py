"""The kernel's calls that a move is made of, by way of libc. Loaded by the thread that follows moves.

Each of Python's own gives up the interpreter, and where other threads compute, has it back a switch interval
later: 5 ms. These keep it, for they are over in microseconds; only for large mappings they do not.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: What is mapped, or taken away, in about half a millisecond. With more the other threads do not wait for it.
_BRIEF_BYTES = 16 << 20

_MAP_FIXED_REPLACES = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
_PAGE = mmap.PAGESIZE
# Bits of an entry of /proc/self/pagemap.
_PRESENT, _SWAPPED, _OF_THE_FILE = 1 << 63, 1 << 62, 1 << 61

#: The calls: what each returns, which is -1 for a failure (so addresses are signed), and what it takes.
_int, _size, _ssize, _address, _offset = (
    ctypes.c_int, ctypes.c_size_t, ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_long,
)  # fmt: skip
_CALLS = {
    "open": (_int, ctypes.c_char_p, _int),
    "pread": (_ssize, _int, _address, _size, _offset),
    "lseek": (_offset, _int, _offset, _int),
    "close": (_int, _int),
    "recvmsg": (_ssize, _int, _address, _int),
    "send": (_ssize, _int, ctypes.c_char_p, _size, _int),
    "mmap": (_ssize, _address, _size, _int, _int, _int, _offset),
    "mremap": (_ssize, _address, _size, _size, _int, _address),
    "munmap": (_int, _address, _size),
    "madvise": (_int, _address, _size, _int),
}


def _declare(libc: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, *arguments) in _CALLS.items():
        call = getattr(libc, name)
        call.restype, call.argtypes, call.errcheck = result, arguments, _check
    return libc


def _check(result: int, _call: Any, _arguments: Any) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


_keeping = _declare(ctypes.PyDLL(None, use_errno=True))
_yielding = _declare(ctypes.CDLL(None, use_errno=True))


def _libc(mapped: int) -> ctypes.CDLL:
    return _keeping if mapped <= _BRIEF_BYTES else _yielding


class _Part(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", _address), ("len", _size))


class _Message(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = (
        ("name", _address),
        ("namelen", ctypes.c_uint32),
        ("iov", _address),
        ("iovlen", _size),
        ("control", _address),
        ("controllen", _size),
        ("flags", _int),
    )


#: ``struct cmsghdr``: its length with the payload, level and kind.
_CONTROL = struct.Struct("Nii")


def recvmsg(
    descriptor: int, size: int, space: int, flags: int
) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
    """What a socket's ``recvmsg`` answers, but at once: ``BlockingIOError`` when there is nothing to read."""
    data, control = ctypes.create_string_buffer(size), ctypes.create_string_buffer(space)
    part = _Part(ctypes.addressof(data), size)
    message = _Message(
        iov=ctypes.addressof(part), iovlen=1, control=ctypes.addressof(control), controllen=space
    )
    count = _keeping.recvmsg(descriptor, ctypes.byref(message), flags | socket.MSG_DONTWAIT)
    ancillary = []
    if message.controllen:  # nothing but descriptors comes to this socket, and these in one message
        length, level, kind = _CONTROL.unpack_from(control)
        ancillary.append((level, kind, ctypes.string_at(control, length)[_CONTROL.size :]))
    return ctypes.string_at(data, count), ancillary, message.flags, None


def send(descriptor: int, data: bytes) -> None:
    """Sends what is so short that it goes whole or not at all."""
    _keeping.send(descriptor, data, len(data), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def close_all(descriptors: list[int]) -> None:
    while descriptors:
        _keeping.close(descriptors.pop())


def file_bytes(descriptor: int) -> int:
    """How long a file is; 0 for what has no length."""
    try:
        return int(_keeping.lseek(descriptor, 0, os.SEEK_END))
    except OSError:
        return 0


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
def address_of(mapping: mmap.mmap) -> Iterator[int]:
    """The address of a mapping, which Python's own ``mmap`` hides; it stays mapped meanwhile."""
    view = _View()
    if ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0) != 0:
        raise BufferError("the mapping has no address")
    try:
        yield int(view.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def map_pages(size: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    """Maps a part of a file wherever there is room."""
    return int(_libc(size).mmap(None, size, protection, flags, descriptor, offset))


def replace(address: int, new: int, size: int) -> None:
    """Moves a mapping over another of the same size, in one step; on an error the other stays.

    If the kernel could not even do that, for want of memory of its own, the process ends: whoever read there
    next would crash.
    """
    try:
        _libc(size).mremap(new, size, size, _MAP_FIXED_REPLACES, address)
    except OSError:
        try:
            _libc(size).madvise(address, size, mmap.MADV_NORMAL)
        except OSError as gone:
            if gone.errno == errno.ENOMEM:
                os.abort()
        _libc(size).munmap(new, size)
        raise


def written(address: int, size: int) -> bool:
    """Whether any page of a private mapping is this process's own."""
    count = -(-size // _PAGE)
    entries = (ctypes.c_uint64 * count)()
    pagemap = _keeping.open(b"/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        read = _libc(size).pread(pagemap, entries, ctypes.sizeof(entries), address // _PAGE * 8)
    finally:
        _keeping.close(pagemap)
    if read < ctypes.sizeof(entries):
        return True  # what cannot be seen may be written
    return any(entry & (_PRESENT | _SWAPPED) and not entry & _OF_THE_FILE for entry in entries)
