"""The transfer worker: copies and moves of buffers between devices, piece by piece, in the background."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .allocation import Allocations, Buffer
from .framework import CHUNK_BYTES, Framework
from .protocol import Call, Refused, megabytes

#: So many transfers that have ended are remembered.
KEPT = 256


@dataclass
class Transfer:
    transfer_id: str
    source: str
    target_device: str
    moves: bool
    total_bytes: int
    done_bytes: int = 0
    state: str = "Running"
    target: str | None = None
    error: dict[str, str] | None = None
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None


class Transfers:
    def __init__(self, framework: Framework, allocations: Allocations) -> None:
        self._framework = framework
        self._allocations = allocations
        self._transfers: dict[str, Transfer] = {}
        self._lock = threading.Lock()

    def transfer(self, call: Call) -> dict[str, Any]:
        """Begins one; ``transfer_status`` tells how it goes. A move's source goes once its copy is whole."""
        buffer = self._allocations.get(call.text("allocation_id"))
        target_device, moves = call.text("target_device_id"), not call.flag("copy")
        total = self._framework.size_of(buffer.value)
        target = self._allocations.empty("the copy", total, target_device)
        transfer = Transfer(str(uuid.uuid4()), buffer.allocation_id, target_device, moves, total)
        with self._lock:
            buffer.readers += 1
            self._transfers[transfer.transfer_id] = transfer
            ended = [one.transfer_id for one in self._transfers.values() if one.state != "Running"]
            for old in ended[: max(len(ended) - KEPT, 0)]:
                del self._transfers[old]
        threading.Thread(target=self._run, args=(transfer, buffer, target), daemon=True).start()
        return _shown(transfer)

    def status(self, call: Call) -> dict[str, Any]:
        transfer_id = call.text("transfer_id")
        with self._lock:
            transfer = self._transfers.get(transfer_id)
        if transfer is None:
            raise Refused("NOT_FOUND", f"this worker knows no transfer {transfer_id}")
        return _shown(transfer)

    def _run(self, transfer: Transfer, buffer: Buffer, target: Any) -> None:
        try:
            for offset in range(0, transfer.total_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, transfer.total_bytes - offset)
                self._framework.copy_into(target, buffer.value, offset, size)
                transfer.done_bytes = offset + size
            arrived = self._allocations.take_in(transfer.target_device, target, buffer.purpose)
            transfer.target = arrived.allocation_id
        except Exception as error:
            transfer.error = {"code": type(error).__name__, "message": str(error)}
        with self._lock:
            buffer.readers -= 1
        if transfer.error is None and transfer.moves:
            # Another transfer may still read it, or it went meanwhile.
            with suppress(Refused):
                self._allocations.drop(buffer.allocation_id)
        transfer.seconds = time.monotonic() - transfer.began
        transfer.state = "Completed" if transfer.error is None else "Failed"


def _shown(transfer: Transfer) -> dict[str, Any]:
    return {
        "transfer_id": transfer.transfer_id,
        "state": transfer.state,
        "source_allocation_id": transfer.source,
        "target_allocation_id": transfer.target,
        "target_device_id": transfer.target_device,
        "done_mb": megabytes(transfer.done_bytes),
        "total_mb": megabytes(transfer.total_bytes),
        "seconds": transfer.seconds,
        "error": transfer.error,
    }
