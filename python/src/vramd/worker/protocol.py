"""Frames of the worker protocol, one JSON object on each line, and its units: megabytes are 2**20 bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

VERSION = 1
#: The longest line, its end included.
MAX_LINE_BYTES = 16 << 20
MEGABYTE = 1 << 20
GIGABYTE = 1 << 30

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class Refused(Exception):
    """What a worker will not or cannot do; the daemon's caller is told just this."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class Dismissed(Refused):
    """The daemon does not let this worker join."""


class Call:
    """One request under way: what it says, and whether anybody still waits for it."""

    __slots__ = ("_cancelled", "action", "data", "deadline", "request_id")

    def __init__(
        self, request_id: str, action: str, data: Mapping[str, Any], deadline_ms: float | None
    ) -> None:
        self.request_id = request_id
        self.action = action
        self.data = data
        self.deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1000
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def check(self) -> None:
        """To be asked now and then by what takes long: raises once nobody waits any more."""
        if self._cancelled:
            raise Refused("CANCELLED", f"{self.action} was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Refused("TIMEOUT", f"{self.action} took longer than its caller waits")

    # What the data says, checked

    def text(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str) or not value:
            raise Refused("INVALID_ARGUMENT", f"{self.action} takes {field}, a text; it got {value!r}")
        return value

    def optional_text(self, field: str) -> str | None:
        return None if self.data.get(field) is None else self.text(field)

    def number(self, field: str, default: float | None = None) -> float:
        value = self.data.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            raise Refused("INVALID_ARGUMENT", f"{self.action} takes {field}, a number; it got {value!r}")
        return float(value)

    def optional_number(self, field: str) -> float | None:
        return None if self.data.get(field) is None else self.number(field)

    def texts(self, field: str) -> list[str]:
        value = self.data.get(field, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            what = f"{self.action} takes {field}, a list of texts; it got {value!r}"
            raise Refused("INVALID_ARGUMENT", what)
        return value

    def flag(self, field: str) -> bool:
        value = self.data.get(field, False)
        if not isinstance(value, bool):
            raise Refused("INVALID_ARGUMENT", f"{self.action} takes {field}, true or false; it got {value!r}")
        return value


def encode(message: Mapping[str, Any]) -> bytes:
    """The line of a message, with its end."""
    return _ENCODER.encode(message).encode() + b"\n"


def decode(line: bytes) -> Call:
    """Reads a request."""
    try:
        message = json.loads(line.decode())
    except ValueError as error:
        raise Refused("INVALID_ARGUMENT", f"a line is no JSON: {error}") from None
    if not isinstance(message, dict):
        raise Refused("INVALID_ARGUMENT", "a line is no JSON object")
    if message.get("event") == "refused":
        why = message.get("data") or {}
        raise Dismissed(str(why.get("code")), str(why.get("message")), why.get("hint"))
    request_id, action, data = message.get("request_id"), message.get("action"), message.get("data", {})
    if not isinstance(request_id, str) or not isinstance(action, str) or not isinstance(data, dict):
        raise Refused("INVALID_ARGUMENT", "a request has request_id and action, texts, and data, an object")
    deadline_ms = message.get("deadline_ms")
    return Call(request_id, action, data, deadline_ms if isinstance(deadline_ms, int | float) else None)


def reply(request_id: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"request_id": request_id, "success": True, "data": data}


def failure(request_id: str, error: Refused) -> dict[str, Any]:
    body = {"code": error.code, "message": error.message}
    if error.hint is not None:
        body["hint"] = error.hint
    return {"request_id": request_id, "success": False, "error": body}


def event(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"event": name, "data": data}


def megabytes(size_bytes: float) -> float:
    return round(size_bytes / MEGABYTE, 3)


def gigabytes(size_bytes: float) -> float:
    return round(size_bytes / GIGABYTE, 6)


def size_bytes(megabytes: float) -> int:
    return round(megabytes * MEGABYTE)
