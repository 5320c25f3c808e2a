"""Room for what a run takes beside the weights, reserved for as long as the run."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import VramdError

if TYPE_CHECKING:
    from . import bodies
    from .client import Client


@contextlib.contextmanager
def working_memory(
    client: Client,
    model: str,
    shape: Iterable[int] = (),
    *,
    size_bytes: int | None = None,
    device: str | None = None,
    on_shortage: bodies.OnShortage | None = None,
    timeout_seconds: int | None = None,
    priority: bodies.Priority | None = None,
    lease_seconds: int = 86_400,
    purpose: str | None = None,
    pid: int | None = None,
) -> Iterator[bodies.Allocation]:
    """Reserves what runs of ``model`` took before, runs the block, and says what it took this time.

    >>> with vramd.working_memory(client, "sdxl", (1, 1024, 1024), size_bytes=6 << 30, on_shortage="evict"):
    ...     image = pipeline(prompt)

    ``size_bytes`` is reserved as long as no run of that shape was measured. On a card, PyTorch's own figures
    of its current device say what the block took, unless another such block ran in this process meanwhile;
    elsewhere the daemon follows this process, or ``pid``. The room ends with the block, with that process, or
    after ``lease_seconds``. A block that raises teaches nothing.
    """
    fields: dict[str, Any] = {
        "model": model,
        "shape": tuple(shape),
        "device": device,
        # What a framework keeps is on a card: which one it will be is only known if it is named.
        "held_bytes": _cached() if device is not None and _is_card(device) else None,
        "on_shortage": on_shortage,
        "timeout_seconds": timeout_seconds,
        "priority": priority,
        "lease_seconds": lease_seconds,
        "purpose": purpose,
    }
    try:
        room = client.reserve(size_bytes, pid=os.getpid() if pid is None else pid, **fields)
    except VramdError as refused:
        if pid is not None or refused.details.get("field") != "pid":
            raise
        # The daemon does not see this process: one of us is in a container.
        room = client.reserve(size_bytes, **fields)
    peak = None
    try:
        peak = _Meter(_cuda()) if _is_card(room["deviceId"]) and _cuda() is not None else None
        yield room
    except BaseException:
        # What it took until then says little of a run that ends well, and 0 is nothing to learn from.
        _release(client, room, 0)
        raise
    finally:
        if peak is not None:
            peak.stop()
    _release(client, room, None if peak is None else peak.bytes)


def _release(client: Client, room: bodies.Allocation, peak_bytes: int | None) -> None:
    # The run is over, and no worse for a lease that had ended before it or a daemon that is gone.
    with contextlib.suppress(VramdError):
        client.release(room["allocationId"], peak_bytes=peak_bytes)


def _is_card(device: str) -> bool:
    return not device.startswith("cpu:")


def _cuda() -> Any:
    """PyTorch's ``torch.cuda``, if this process uses it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _cached() -> int:
    """What PyTorch keeps for its next tensors."""
    cuda = _cuda()
    return 0 if cuda is None else max(int(cuda.memory_reserved() - cuda.memory_allocated()), 0)


class _Meter:
    """What PyTorch allocated at most since it was made; None where another one ran at the same time."""

    _running: ClassVar[set[_Meter]] = set()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.bytes: int | None = None
        with self._lock:
            self._is_alone = not self._running
            if self._is_alone:
                cuda.reset_peak_memory_stats()
            self._before = int(cuda.memory_allocated())
            for other in self._running:
                other._is_alone = False
            self._running.add(self)

    def stop(self) -> None:
        with self._lock:
            self._running.discard(self)
            if self._is_alone:
                self.bytes = max(int(self._cuda.max_memory_allocated()) - self._before, 0)
