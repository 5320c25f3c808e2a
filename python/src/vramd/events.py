"""Server-sent events, resumed after a dropped connection."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import TYPE_CHECKING

from .errors import ProtocolError, VramdError
from .transport import Transport, failure

if TYPE_CHECKING:
    from typing_extensions import Self

    from .bodies import Event

# The daemon sends a heartbeat every 10 s: silence for three of them is a dead connection.
_SILENCE_SECONDS = 45.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0


class EventStream(Iterator["Event"]):
    """What happens in the daemon, from the moment the stream was opened, for as long as you iterate.

    A dropped connection is opened again from the last event seen, for up to ``retry_seconds``; then
    ``ConnectionFailed`` is raised. After a ``reset`` event, or a ``lag``, read the state anew.
    """

    def __init__(self, transport: Transport, last_event_id: str | None, retry_seconds: float) -> None:
        self.last_event_id = last_event_id
        self._transport = transport
        self._retry_seconds = retry_seconds
        self._connection: AbstractContextManager[HTTPResponse] | None = None
        self._response: HTTPResponse | None = None
        self._closed = False
        self._connect()

    def __next__(self) -> Event:
        while not self._closed:
            event = self._read()
            if event is not None:
                return event
            self._reconnect()
        raise StopIteration

    def close(self) -> None:
        self._closed = True
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        headers = {"Accept": "text/event-stream"}
        if self.last_event_id is not None:
            headers["Last-Event-ID"] = self.last_event_id
        connection = self._transport.open("GET", "/api/events", None, headers, _SILENCE_SECONDS)
        response = connection.__enter__()
        self._connection, self._response = connection, response
        if response.status != 200:
            error = failure(response, response.read())
            self._disconnect()
            raise error

    def _disconnect(self) -> None:
        connection, self._connection, self._response = self._connection, None, None
        if connection is not None:
            connection.__exit__(None, None, None)

    def _reconnect(self) -> None:
        self._disconnect()
        deadline = time.monotonic() + self._retry_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            time.sleep(pause)
            try:
                return self._connect()
            except VramdError as error:
                if not error.retryable or time.monotonic() + pause > deadline:
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _read(self) -> Event | None:
        """The next event; ``None`` when the connection broke."""
        assert self._response is not None
        data: list[str] = []
        event_id = None
        while True:
            try:
                line = self._response.readline()
            except (OSError, HTTPException):
                return None
            if not line.endswith(b"\n"):
                return None
            field, _, value = line.decode().rstrip("\r\n").partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                event_id = value
            elif field == "data":
                data.append(value)
            elif not field and not value and data:  # an empty line ends the event; ":" alone is a heartbeat
                self.last_event_id = event_id or self.last_event_id
                return self._parse("\n".join(data))

    def _parse(self, text: str) -> Event:
        try:
            event: Event = json.loads(text)
        except ValueError as error:
            raise ProtocolError(f"the daemon sent an event that is not JSON: {text[:80]!r}") from error
        return event
