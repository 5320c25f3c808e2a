"""Where the lines travel: the standard streams of a worker that was started, or the daemon's socket."""

from __future__ import annotations

import os
import socket as sockets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from ..errors import ConnectionFailed
from . import protocol


class Channel:
    """Lines from the daemon and to it. Any thread may send."""

    def __init__(
        self, reader: BinaryIO, write: Callable[[bytes], object], close: Callable[[], object]
    ) -> None:
        self._reader = reader
        self._write = write
        self._close = close
        self._lock = threading.Lock()

    def lines(self) -> Iterator[bytes]:
        """Each line until the other side is gone."""
        with self._reader:
            while True:
                try:
                    line = self._reader.readline(protocol.MAX_LINE_BYTES + 1)
                except (OSError, ValueError):
                    return
                if not line.endswith(b"\n"):
                    return
                yield line

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; whether the other side is still there shows when reading ends."""
        line = protocol.encode(message)
        if len(line) > protocol.MAX_LINE_BYTES:
            raise protocol.Refused("PAYLOAD_TOO_LARGE", f"the answer has {len(line)} bytes")
        with suppress(OSError), self._lock:
            self._write(line)

    def close(self) -> None:
        self._close()


def stdio() -> Channel:
    """Takes over this process's standard streams: from now on what anybody prints goes to standard error."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    reader = os.fdopen(incoming, "rb")

    def write(line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(outgoing, rest) :]

    return Channel(reader, write, lambda: None)


def join(path: str, name: str, device: str | None) -> Channel:
    """Connects to the daemon's socket and asks to join."""
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        connection.settimeout(10)
        connection.connect(path)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        hint = "is the daemon running? `vramd status` asks it; VRAMD_SOCKET names its socket"
        raise ConnectionFailed(f"the daemon's socket {path} cannot be reached: {error}", hint=hint) from error

    reader = connection.makefile("rb")

    def close() -> None:
        # Whoever reads is woken first.
        with suppress(OSError):
            connection.shutdown(sockets.SHUT_RDWR)
        connection.close()

    channel = Channel(reader, connection.sendall, close)
    channel.send(protocol.event("join", {"name": name} | ({} if device is None else {"device_id": device})))
    return channel
