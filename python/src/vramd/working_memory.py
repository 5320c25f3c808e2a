"""Room for what a run takes beside the weights, reserved for as long as the run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

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
    lease_seconds: int | None = None,
    purpose: str | None = None,
) -> Iterator[bodies.Allocation]:
    """Reserves what runs of ``model`` took before, runs the block, and says what it took this time.

    >>> with vramd.working_memory(client, "sdxl", (1, 1024, 1024), size_bytes=6 << 30, on_shortage="evict"):
    ...     image = pipeline(prompt)

    ``size_bytes`` is reserved as long as no run of that shape was measured. On a card, PyTorch's own figures
    of its current device say what the block took; elsewhere the daemon follows this process. A block that
    raises teaches nothing.
    """
    room = client.reserve(
        size_bytes,
        model=model,
        shape=shape,
        device=device,
        pid=os.getpid(),
        held_bytes=_cached(),
        on_shortage=on_shortage,
        timeout_seconds=timeout_seconds,
        priority=priority,
        lease_seconds=lease_seconds,
        purpose=purpose,
    )
    peak = _meter() if _is_card(room["deviceId"]) else None
    try:
        yield room
    except BaseException:
        # What it took until then says little of a run that ends well, and 0 is nothing to learn from.
        _release(client, room, 0)
        raise
    _release(client, room, None if peak is None else peak())


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


def _meter() -> Callable[[], int] | None:
    cuda = _cuda()
    if cuda is None:
        return None
    cuda.reset_peak_memory_stats()
    before = int(cuda.memory_allocated())
    return lambda: max(int(cuda.max_memory_allocated()) - before, 0)
