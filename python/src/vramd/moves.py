"""Moves: the daemon gives attached bytes another place, and nobody who uses them notices.

One thread for all attachments of the process waits for ``Moved`` frames. It maps the new pages elsewhere,
brings them in, and then puts them under the old addresses in one call of the kernel, so that every array and
tensor stays valid with the same bytes. Only then it acknowledges, and the daemon gives the old pages back.

What cannot follow says so, and keeps its old pages: an attachment that lived through a fork (the child has
them mapped too), and a private mapping that this process has written to.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from . import frames
from .errors import ProtocolError, VramdError

if TYPE_CHECKING:
    from .attachment import Attached

#: How long the rest of a frame may take once it has begun.
_FRAME_SECONDS = 5.0

_MAP_FIXED_REPLACES = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_PAGE = mmap.PAGESIZE
# Bits of an entry of /proc/self/pagemap.
_PRESENT, _SWAPPED, _OF_THE_FILE = 1 << 63, 1 << 62, 1 << 61


class _Follower:
    """The thread and what it follows. The lock is held while a frame is dealt with: closing waits for it."""

    def __init__(self) -> None:
        # One that can be taken again: collecting garbage in the thread itself may close an attachment.
        self.lock = threading.RLock()
        self._attached: dict[int, weakref.ref[Attached]] = {}
        self._epoll: select.epoll | None = None

    def follow(self, connection: socket.socket, attached: Attached) -> None:
        with self.lock:
            self._attached[connection.fileno()] = weakref.ref(attached)
            if self._epoll is None:
                self._epoll = select.epoll()
                threading.Thread(
                    target=self._run, args=(self._epoll,), name="vramd-moves", daemon=True
                ).start()
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def forget(self, connection: socket.socket) -> None:
        with self.lock:
            descriptor = connection.fileno()
            if self._attached.pop(descriptor, None) is not None and self._epoll is not None:
                self._epoll.unregister(descriptor)

    def before_fork(self) -> None:
        self.lock.acquire()
        for reference in self._attached.values():
            if (attached := reference()) is not None:
                attached._fixed = "the process has forked since, and its child has the old pages mapped too"

    def in_parent(self) -> None:
        self.lock.release()

    def in_child(self) -> None:
        # The parent goes on reading the connections that both have.
        if self._epoll is not None:
            self._epoll.close()
        self.__init__()  # type: ignore[misc]

    def _run(self, epoll: select.epoll) -> None:
        while True:
            for descriptor, _ in epoll.poll():
                with self.lock:
                    reference = self._attached.get(descriptor)
                    attached = reference() if reference is not None else None
                    if attached is not None and attached._connection is not None:
                        self._take(attached, attached._connection)
                    # Or this thread alone would keep it from being collected until the next frame.
                    del attached

    def _take(self, attached: Attached, connection: socket.socket) -> None:
        try:
            connection.settimeout(_FRAME_SECONDS)
            if not connection.recv(1, socket.MSG_PEEK):
                return self.forget(connection)  # the daemon is gone; the pages stay
            kind, body, descriptors = frames.receive(connection)
            try:
                if kind != frames.MOVED:
                    raise ProtocolError(f"the daemon sent a frame of kind {kind} to an attachment")
                _follow(attached, connection, body, descriptors)
            finally:
                frames.close_all(descriptors)
                connection.settimeout(None)
        except (OSError, VramdError) as error:
            self.forget(connection)
            connection.close()
            if isinstance(error, ProtocolError):
                warnings.warn(f"{attached} follows no moves any more: {error}", RuntimeWarning, stacklevel=1)


_follower = _Follower()
follow = _follower.follow
forget = _follower.forget
os.register_at_fork(
    before=_follower.before_fork, after_in_parent=_follower.in_parent, after_in_child=_follower.in_child
)


def _follow(attached: Attached, connection: socket.socket, body: Any, descriptors: list[int]) -> None:
    moved = frames.read_moved(body, len(descriptors), attached._reply)
    refused = attached._fixed or _remap(attached, moved, descriptors[moved.segment])
    if refused is None:
        attached._reply = moved
        answer: dict[str, Any] = {"generation": moved.generation, "moved": True}
    else:
        answer = {"generation": moved.generation, "moved": False, "reason": refused}
    connection.sendall(frames.encode(frames.ACKNOWLEDGE, answer))


def _remap(attached: Attached, moved: frames.Reply, descriptor: int) -> str | None:
    """Puts the new pages under the old addresses; answers why it cannot be done."""
    buffer = attached._buffer
    if not isinstance(buffer, mmap.mmap):
        return None  # nothing is mapped
    # Only now: importing it takes longer than many an attach.
    from . import addresses

    start = moved.offset - moved.offset % moved.page_bytes
    if attached._private:
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
    else:
        flags = mmap.MAP_SHARED | _MAP_POPULATE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if moved.access == "write" else 0)
    if os.fstat(descriptor).st_size < start + len(buffer):
        raise ProtocolError("the segment of the new place is shorter than announced")
    with addresses.of(buffer) as address:
        if attached._private and _written(address, len(buffer)):
            return "this process has written to its private copy"
        try:
            new = addresses.map_pages(len(buffer), protection, flags, descriptor, start)
            addresses.replace(address, new, len(buffer), _MAP_FIXED_REPLACES)
        except OSError as error:
            return f"the new pages could not be mapped: {error.strerror}"
    return None


def _written(address: int, size: int) -> bool:
    """Whether any page of a private mapping is this process's own."""
    count = -(-size // _PAGE)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // _PAGE * 8)
        entries = memoryview(pagemap.read(count * 8)).cast("Q")
    if len(entries) < count:
        return True  # what cannot be seen may be written
    return any(entry & (_PRESENT | _SWAPPED) and not entry & _OF_THE_FILE for entry in entries)
