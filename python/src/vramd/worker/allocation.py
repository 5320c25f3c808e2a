"""The allocation worker: buffers of the framework, which this process holds for whoever asked."""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass
from typing import Any

from .framework import Framework
from .manager import Manager
from .protocol import Call, Refused, megabytes, size_bytes


@dataclass
class Buffer:
    allocation_id: str
    device: str
    purpose: str
    value: Any
    #: A transfer reads it.
    readers: int = 0


class Allocations:
    def __init__(self, framework: Framework, manager: Manager, device: str) -> None:
        self._framework = framework
        self._manager = manager
        self._buffers: dict[str, Buffer] = {}
        self._lock = threading.Lock()
        self.device = device

    def allocate(self, call: Call) -> dict[str, Any]:
        size = size_bytes(call.number("size_mb"))
        if size == 0:
            raise Refused("INVALID_ARGUMENT", "size_mb is less than a byte")
        device = call.optional_text("device_id") or self.device
        value = self.empty("the allocation", size, device)
        return self.shown(self.take_in(device, value, call.optional_text("purpose") or ""))

    def deallocate(self, call: Call) -> dict[str, Any]:
        buffer = self.drop(call.text("allocation_id"))
        shown, before = self.shown(buffer), self._framework.used_bytes(buffer.device)
        device = buffer.device
        del buffer
        self._framework.collect(device)
        return shown | {"freed_mb": megabytes(max(before - self._framework.used_bytes(device), 0))}

    def empty(self, what: str, size_bytes: int, device: str) -> Any:
        """A buffer, if there is room for it."""
        with self._manager.taking():
            self._manager.check_room(what, device, size_bytes)
            return self._framework.empty(size_bytes, device)

    def take_in(self, device: str, value: Any, purpose: str) -> Buffer:
        buffer = Buffer(str(uuid.uuid4()), device, purpose, value)
        with self._lock:
            self._buffers[buffer.allocation_id] = buffer
        return buffer

    def get(self, allocation_id: str) -> Buffer:
        with self._lock:
            buffer = self._buffers.get(allocation_id)
        if buffer is None:
            raise Refused("NOT_FOUND", f"this worker has no allocation {allocation_id}")
        return buffer

    def drop(self, allocation_id: str) -> Buffer:
        with self._lock:
            buffer = self._buffers.get(allocation_id)
            if buffer is not None and buffer.readers:
                raise Refused("CONFLICT", f"allocation {allocation_id} is being transferred")
            found = self._buffers.pop(allocation_id, None)
        return found or self.get(allocation_id)

    def clear(self, device: str | None) -> int:
        """Lets all of a device's go but what is being transferred; answers how many went."""
        with self._lock:
            gone = [
                buffer.allocation_id
                for buffer in self._buffers.values()
                if device in (None, buffer.device) and not buffer.readers
            ]
            for allocation_id in gone:
                del self._buffers[allocation_id]
        return len(gone)

    def shown(self, buffer: Buffer) -> dict[str, Any]:
        return {
            "allocation_id": buffer.allocation_id,
            "device_id": buffer.device,
            "size_mb": megabytes(self._framework.size_of(buffer.value)),
            "purpose": buffer.purpose,
        }

    def all(self) -> list[dict[str, Any]]:
        with self._lock:
            buffers = list(self._buffers.values())
        return [self.shown(buffer) for buffer in buffers]
