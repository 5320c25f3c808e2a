"""What can go wrong, as exceptions.

Every exception carries what the daemon's error body carries. A subclass exists only where a program would
catch it; everything else is told apart by ``code``, which is a closed list (``docs/errors.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class VramdError(Exception):
    """An error from the daemon, or on the way to it.

    >>> try:
    ...     client.load("sdxl")
    ... except vramd.InsufficientMemory as error:
    ...     print(error.code, error.details["availableBytes"])
    """

    #: The code where the error did not come from the daemon.
    local_code = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        details: Mapping[str, Any] | None = None,
        status: int | None = None,
        retryable: bool = False,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.local_code
        self.hint = hint
        self.details: dict[str, Any] = dict(details or {})
        #: The HTTP status of the code; ``None`` where the error did not come from the daemon.
        self.status = status
        #: Whether the same request may succeed later without a change.
        self.retryable = retryable
        self.request_id = request_id

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]"
        return f"{text}\nhint: {self.hint}" if self.hint else text


class NotFound(VramdError):
    """Nothing has that id, name or path."""

    local_code = "NOT_FOUND"


class Conflict(VramdError):
    """The thing is in a state that does not allow this; ``details`` says who holds it."""

    local_code = "CONFLICT"


class NotResident(VramdError):
    """The model is registered, but not resident on that device: load it first."""

    local_code = "NOT_RESIDENT"


class InsufficientMemory(VramdError):
    """There is not enough memory; ``details`` has what was asked, what is free and who holds the rest."""

    local_code = "INSUFFICIENT_MEMORY"


class Cancelled(VramdError):
    """The operation was cancelled."""

    local_code = "CANCELLED"


class Timeout(VramdError):
    """The wait ended first, in the daemon or here."""

    local_code = "TIMEOUT"


class ConnectionFailed(VramdError):
    """The daemon could not be reached, or the connection broke."""

    local_code = "CONNECTION_FAILED"


class ProtocolError(VramdError):
    """The other side said something that is not in the protocol."""

    local_code = "PROTOCOL_ERROR"


class ClosedError(VramdError, ValueError):
    """The attachment is closed; its arrays can no longer be used."""

    local_code = "CLOSED"


class UnsupportedDtype(VramdError, TypeError):
    """The framework has no dtype for this tensor; ``raw(name)`` gives its bytes."""

    local_code = "UNSUPPORTED_DTYPE"


_BY_CODE: dict[str, type[VramdError]] = {
    kind.local_code: kind
    for kind in (NotFound, Conflict, NotResident, InsufficientMemory, Cancelled, Timeout)
}


def from_body(error: Any, request_id: str | None = None) -> VramdError:
    """The exception for the daemon's error body."""
    if not isinstance(error, Mapping) or not isinstance(error.get("code"), str):
        return ProtocolError("the daemon sent an error without a code", request_id=request_id)
    code = error["code"]
    return _BY_CODE.get(code, VramdError)(
        str(error.get("message", "")),
        code=code,
        hint=error.get("hint"),
        details=error.get("details"),
        status=error.get("status"),
        retryable=bool(error.get("retryable", False)),
        request_id=request_id,
    )
