"""The instructor: takes requests, has each done by what is responsible, and answers each exactly once."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from ..errors import VramdError
from . import protocol
from .channel import Channel
from .protocol import Call, Refused

Action = Callable[[Call], Mapping[str, Any]]

#: How many requests that take time are worked on at once.
THREADS = 4


class Instructor:
    """Dispatches the requests of one connection.

    ``quick`` actions are done where they are read, the others on threads, so that a long one holds up nobody.
    """

    def __init__(self, channel: Channel, quick: Mapping[str, Action], slow: Mapping[str, Action]) -> None:
        self._channel = channel
        self._quick = quick
        self._slow = slow
        self._open: dict[str, Call] = {}
        self._lock = threading.Lock()
        self.ending = False

    def run(self) -> None:
        """Serves until the daemon is gone or asks to end."""
        waiting: SimpleQueue[tuple[Action, Call] | None] = SimpleQueue()
        for _ in range(THREADS):
            # A hook that never comes back must not keep the program from ending.
            threading.Thread(target=self._work, args=(waiting,), name="vramd-action", daemon=True).start()
        try:
            for line in self._channel.lines():
                try:
                    call = protocol.decode(line)
                except protocol.Dismissed:
                    raise
                except Refused as error:
                    # Without an id there is nobody to answer.
                    print(f"vramd.worker: {error}", file=sys.stderr, flush=True)
                    continue
                if call.action == "cancel":
                    self._cancel(call.request_id)
                elif action := self._quick.get(call.action):
                    self._answer(call, self._done(action, call))
                    if self.ending:
                        return
                elif action := self._slow.get(call.action):
                    with self._lock:
                        self._open[call.request_id] = call
                    waiting.put((action, call))
                else:
                    known = ", ".join(sorted(set(self._quick) | set(self._slow)))
                    refused = Refused(
                        "INVALID_ARGUMENT", f"there is no action {call.action}", f"there are: {known}"
                    )
                    self._channel.send(protocol.failure(call.request_id, refused))
        finally:
            with self._lock:
                for call in self._open.values():
                    call.cancel()
            for _ in range(THREADS):
                waiting.put(None)

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            call = self._open.get(request_id)
        if call is not None:
            call.cancel()

    def _work(self, waiting: SimpleQueue[tuple[Action, Call] | None]) -> None:
        while (one := waiting.get()) is not None:
            action, call = one
            try:
                message = self._done(action, call)
            except BaseException as error:  # a hook that would end the program ends its request
                message = protocol.failure(call.request_id, _refusal(error))
            with self._lock:
                self._open.pop(call.request_id, None)
            self._answer(call, message)

    def _answer(self, call: Call, message: Mapping[str, Any]) -> None:
        try:
            self._channel.send(message)
        except Refused as error:
            self._channel.send(protocol.failure(call.request_id, error))
        except (TypeError, ValueError) as error:
            what = Refused("WORKER_FAILED", f"the answer to {call.action} cannot be written: {error}")
            self._channel.send(protocol.failure(call.request_id, what))

    def _done(self, action: Action, call: Call) -> dict[str, Any]:
        try:
            call.check()
            return protocol.reply(call.request_id, action(call))
        except Exception as error:
            return protocol.failure(call.request_id, _refusal(error))


def _refusal(error: BaseException) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, VramdError):
        return Refused(error.code, error.message, error.hint)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Refused("INSUFFICIENT_MEMORY", str(error) or "the system gave no memory")
    traceback.print_exception(error)
    return Refused(type(error).__name__, str(error) or repr(error))
