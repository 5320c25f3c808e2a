"""Moves: the daemon gives attached bytes another place, and nobody who uses them notices.

One thread for all attachments of the process waits for ``Moved`` frames. It maps the new pages elsewhere,
brings them in, and then puts them under the old addresses in one call of the kernel, so that every array and
tensor stays valid with the same bytes. Only then it acknowledges, and the daemon gives the old pages back.
Beside threads that compute it gets the interpreter late: once it has, it keeps it until it has dealt with all
that came (``kernel``).

What cannot follow says so, and keeps its old pages: an attachment that lived through a fork (the child has
them mapped too), a private mapping that this process has written to, and a place that cannot be used.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
import warnings
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from . import frames
from .errors import ProtocolError

if TYPE_CHECKING:
    from .attachment import Attached

_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000


class _Followed(NamedTuple):
    attached: weakref.ref[Attached]
    frames: frames.Moves


class _Follower:
    """The thread and what it follows. The lock is held while a frame is dealt with: closing waits for it."""

    def __init__(self) -> None:
        # One that can be taken again: collecting garbage in the thread itself may close an attachment.
        self.lock = threading.RLock()
        #: By the descriptors of their connections.
        self._followed: dict[int, _Followed] = {}
        self._epoll: select.epoll | None = None

    def follow(self, connection: socket.socket, attached: Attached) -> None:
        with self.lock:
            if self._epoll is None:
                epoll = select.epoll()
                thread = threading.Thread(target=self._run, args=(epoll,), name="vramd-moves", daemon=True)
                try:
                    thread.start()
                except BaseException:
                    epoll.close()
                    raise
                self._epoll = epoll
            self._epoll.register(connection.fileno(), select.EPOLLIN)
            self._followed[connection.fileno()] = _Followed(weakref.ref(attached), frames.Moves())

    def forget(self, connection: socket.socket) -> None:
        with self.lock:
            descriptor = connection.fileno()
            followed = self._followed.pop(descriptor, None)
            if followed is not None and self._epoll is not None:
                self._epoll.unregister(descriptor)
                followed.frames.close()

    def before_fork(self) -> None:
        self.lock.acquire()
        # A copy: what is collected meanwhile is closed, and forgotten here.
        for followed in list(self._followed.values()):
            if (attached := followed.attached()) is not None:
                attached._fixed = "the process has forked since, and its child has the old pages mapped too"

    def in_parent(self) -> None:
        self.lock.release()

    def in_child(self) -> None:
        # The parent goes on reading the connections that both have.
        epoll, all_followed = self._epoll, list(self._followed.values())
        self.__init__()  # type: ignore[misc]
        if epoll is not None:
            epoll.close()
        for followed in all_followed:
            followed.frames.close()

    def _run(self, epoll: select.epoll) -> None:
        # Here, since it takes longer than many an attach; now, since later no descriptor may be left for it.
        from . import kernel  # noqa: F401

        while True:
            for descriptor, _ in epoll.poll():
                with self.lock:
                    followed = self._followed.get(descriptor)
                    attached = followed.attached() if followed is not None else None
                    if followed is not None and attached is not None and attached._connection is not None:
                        self._take(attached, attached._connection, followed.frames)
                    # Or this thread alone would keep it from being collected until the next frame.
                    del attached

    def _take(self, attached: Attached, connection: socket.socket, moves: frames.Moves) -> None:
        from . import kernel

        try:
            if (move := moves.read(partial(kernel.recvmsg, connection.fileno()))) is not None:
                try:
                    answer = _follow(attached, move)
                finally:
                    kernel.close_all(move.descriptors)
                kernel.send(connection.fileno(), answer)
        except (EOFError, ConnectionError):
            self.forget(connection)
            attached._ended = "the daemon has closed the connection"
        except Exception as error:
            # Whatever it is, it must not end this thread. The connection stays open: while it is, the daemon
            # gives the pages to nobody else.
            self.forget(connection)
            attached._ended = f"{type(error).__name__}: {error}"
            with suppress(RuntimeWarning):  # warnings may be errors
                warnings.warn(f"{attached} follows no moves any more: {error}", RuntimeWarning, stacklevel=1)


_follower = _Follower()
follow = _follower.follow
forget = _follower.forget
os.register_at_fork(
    before=_follower.before_fork, after_in_parent=_follower.in_parent, after_in_child=_follower.in_child
)


def _follow(attached: Attached, move: frames.Move) -> bytes:
    """Follows a move, or keeps the old pages; the acknowledgement either way."""
    answer: dict[str, Any] = {"generation": frames.generation(move.body), "moved": True}
    refused = move.problem or attached._fixed
    if refused is None:
        try:
            moved = frames.read_moved(move.body, len(move.descriptors), attached._reply)
            refused = _remap(attached, moved, move.descriptors[moved.segment])
        except ProtocolError as error:
            refused = str(error)
    if refused is None:
        attached._reply = moved
    else:
        answer |= {"moved": False, "reason": refused}
    return frames.encode(frames.ACKNOWLEDGE, answer)


def _remap(attached: Attached, moved: frames.Reply, descriptor: int) -> str | None:
    """Puts the new pages under the old addresses; answers why it cannot be done."""
    from . import kernel

    buffer = attached._buffer
    if not isinstance(buffer, mmap.mmap):
        return None  # nothing is mapped
    start = moved.offset - moved.offset % moved.page_bytes
    if attached._private:
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
    else:
        flags = mmap.MAP_SHARED | _MAP_POPULATE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if moved.access == "write" else 0)
    if kernel.file_bytes(descriptor) < start + len(buffer):
        raise ProtocolError("the segment of the new place is shorter than announced")
    try:
        with kernel.address_of(buffer) as address:
            if attached._private and kernel.written(address, len(buffer)):
                return "this process has written to its private copy"
            new = kernel.map_pages(len(buffer), protection, flags, descriptor, start)
            kernel.replace(address, new, len(buffer))
    except OSError as error:
        return f"the new pages could not be mapped: {error.strerror}"
    return None
