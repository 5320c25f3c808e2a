"""The REST interface, a method for every call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .errors import Timeout, from_body
from .events import EventStream
from .transport import Transport

if TYPE_CHECKING:
    from . import bodies

DEFAULT_SERVER = "http://127.0.0.1:8726"
# As long as one request may wait; longer waits are made of several.
_LONGEST_WAIT_SECONDS = 60
_ENDED = ("Completed", "Failed", "Cancelled")


class Client:
    """Talks to a daemon, at ``http://HOST:PORT`` or ``unix:PATH``; safe to share between threads.

    >>> client = vramd.Client()
    >>> client.register_model("minilm", "/models/minilm/model.safetensors")
    >>> client.load("minilm", keep_alive="1h")
    >>> client.status()["total"]["allocatedBytes"]

    Answers are plain dicts, as the wire has them. A call that the daemon refuses raises ``VramdError`` or one
    of its subclasses. Arguments left at ``None`` are not sent: the daemon's default holds. ``timeout`` bounds
    the wait for an answer, on top of what a call itself is asked to wait. ``owner`` is whose the allocations
    and reservations are that name none; a worker's are its own, by ``VRAMD_OWNER``.
    """

    def __init__(self, server: str | None = None, *, timeout: float = 30.0, owner: str | None = None) -> None:
        self._transport = Transport(server or os.environ.get("VRAMD_SERVER") or DEFAULT_SERVER, timeout)
        self._owner = owner or os.environ.get("VRAMD_OWNER")

    def __repr__(self) -> str:
        return f"vramd.Client({self._transport.server!r})"

    # Devices and memory

    def devices(self) -> list[bodies.Device]:
        page: bodies.DevicePage = self._get("/api/devices")
        return page["devices"]

    def device(self, device: str) -> bodies.Device:
        """One device, by id (``cpu:0``) or uuid."""
        found: bodies.Device = self._get(f"/api/devices/{_part(device)}")
        return found

    def status(self, *, include: Iterable[bodies.Include] = ()) -> bodies.MemoryStatus:
        """All devices, and their sums."""
        status: bodies.MemoryStatus = self._get("/api/memory/status", include=_list(include))
        return status

    def device_status(self, device: str, *, include: Iterable[bodies.Include] = ()) -> bodies.DeviceStatus:
        path = f"/api/memory/status/{_part(device)}"
        status: bodies.DeviceStatus = self._get(path, include=_list(include))
        return status

    def usage(self, *, window: str | None = None, step: str | None = None) -> list[bodies.DeviceUsage]:
        """Use over time of all devices; ``window`` and ``step`` such as ``"15m"``, an hour at most."""
        page: bodies.UsagePage = self._get("/api/memory/usage", window=window, step=step)
        return page["devices"]

    def device_usage(
        self, device: str, *, window: str | None = None, step: str | None = None
    ) -> bodies.DeviceUsage:
        path = f"/api/memory/usage/{_part(device)}"
        usage: bodies.DeviceUsage = self._get(path, window=window, step=step)
        return usage

    def limits(self) -> list[bodies.DeviceLimits]:
        page: bodies.LimitsPage = self._get("/api/memory/limits")
        return page["limits"]

    def device_limits(self, device: str) -> bodies.DeviceLimits:
        limits: bodies.DeviceLimits = self._get(f"/api/memory/limits/{_part(device)}")
        return limits

    def set_limits(
        self,
        device: str,
        *,
        limit_bytes: int | None,
        soft_limit_bytes: int | None = None,
        reserve_bytes: int | None = None,
        owners: Mapping[str, bodies.ShareLimits] | None = None,
        purposes: Mapping[str, bodies.ShareLimits] | None = None,
    ) -> bodies.DeviceLimits:
        """Sets all limits of a device anew; ``limit_bytes=None`` goes back to the configured one.

        Idle models go for a limit below what is held: ``evicted`` says which, ``aboveBytes`` what stays.
        """
        body = {"limitBytes": limit_bytes} | _given(
            softLimitBytes=soft_limit_bytes, reserveBytes=reserve_bytes, owners=owners, purposes=purposes
        )
        limits: bodies.DeviceLimits = self._transport.call(
            "PUT", f"/api/memory/limits/{_part(device)}", body=body
        )
        return limits

    # Allocations

    def allocations(
        self,
        *,
        device: str | None = None,
        owner: str | None = None,
        purpose: str | None = None,
        allocation_type: bodies.AllocationType | None = None,
        status: bodies.AllocationStatus | None = None,
        persistent: bool | None = None,
        sort: bodies.Sort | None = None,
        page_size: int | None = None,
        page_token: str | None = None,
    ) -> bodies.AllocationPage:
        """One page; ``nextPageToken`` is there when another follows."""
        path = "/api/memory/allocations" + ("" if device is None else f"/device/{_part(device)}")
        page: bodies.AllocationPage = self._get(
            path,
            owner=owner,
            purpose=purpose,
            allocationType=allocation_type,
            status=status,
            persistent=persistent,
            sort=sort,
            pageSize=page_size,
            pageToken=page_token,
        )
        return page

    def allocation(self, allocation_id: str) -> bodies.Allocation:
        """One allocation, with its history."""
        found: bodies.Allocation = self._get(f"/api/memory/allocation/{_part(allocation_id)}")
        return found

    def allocate(
        self,
        size_bytes: int,
        *,
        device: str | None = None,
        alignment: int | None = None,
        allocation_type: bodies.AllocationType | None = None,
        memory_type: bodies.MemoryType | None = None,
        purpose: str | None = None,
        priority: bodies.Priority | None = None,
        persistent: bool | None = None,
        timeout_seconds: int | None = None,
        lease_seconds: int | None = None,
        on_shortage: bodies.OnShortage | None = None,
        owner: str | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Allocation:
        """Allocates on ``device``, or on the best one; ``placement`` in the answer says why it was chosen."""
        path = "/api/memory/allocations/allocate" + ("" if device is None else f"/{_part(device)}")
        body = _given(
            sizeBytes=size_bytes,
            alignment=alignment,
            allocationType=allocation_type,
            memoryType=memory_type,
            purpose=purpose,
            priority=priority,
            persistent=persistent,
            timeoutSeconds=timeout_seconds,
            leaseSeconds=lease_seconds,
            onShortage=on_shortage,
            owner=owner or self._owner,
        )
        made: bodies.Allocation = self._transport.call(
            "POST", path, body=body, idempotency_key=idempotency_key, wait=_wait(on_shortage, timeout_seconds)
        )
        return made

    def reserve(
        self,
        size_bytes: int | None = None,
        *,
        model: str | None = None,
        shape: Iterable[int] = (),
        device: str | None = None,
        pid: int | None = None,
        held_bytes: int | None = None,
        allocation_type: bodies.AllocationType | None = None,
        purpose: str | None = None,
        priority: bodies.Priority | None = None,
        timeout_seconds: int | None = None,
        lease_seconds: int | None = None,
        on_shortage: bodies.OnShortage | None = None,
        owner: str | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Allocation:
        """Reserves room for what this program allocates itself while a model runs.

        How much is what runs of this model, device and shape were measured to take, or ``size_bytes`` before
        there was one. ``vramd.working_memory`` does this around a block.
        """
        body = _given(
            sizeBytes=size_bytes,
            model=model,
            shape=list(shape) or None,
            deviceId=device,
            pid=pid,
            heldBytes=held_bytes,
            allocationType=allocation_type,
            purpose=purpose,
            priority=priority,
            timeoutSeconds=timeout_seconds,
            leaseSeconds=lease_seconds,
            onShortage=on_shortage,
            owner=owner or self._owner,
        )
        wait = _wait(on_shortage, timeout_seconds)
        made: bodies.Allocation = self._transport.call(
            "POST", "/api/memory/reservations", body=body, idempotency_key=idempotency_key, wait=wait
        )
        return made

    def footprints(self, model: str | None = None) -> list[bodies.Footprint]:
        """What runs took beside the weights: by model, device and shape."""
        page: bodies.FootprintPage = self._get("/api/memory/footprints", model=model)
        return page["footprints"]

    def forget_footprints(self, model: str) -> list[bodies.Footprint]:
        """Forgets what runs of ``model`` took; answers that."""
        path = f"/api/memory/footprints/{_part(model)}"
        page: bodies.FootprintPage = self._transport.call("DELETE", path)
        return page["footprints"]

    def renew(
        self, allocation_id: str, *, lease_seconds: int | None = None, used_bytes: int | None = None
    ) -> bodies.Allocation:
        """Starts the time to live of its lease anew; ``used_bytes`` says what is in use of a reservation."""
        path = f"/api/memory/allocation/{_part(allocation_id)}/renew"
        renewed: bodies.Allocation = self._post(path, leaseSeconds=lease_seconds, usedBytes=used_bytes)
        return renewed

    def release(self, allocation_id: str, *, peak_bytes: int | None = None) -> bodies.Released:
        """Releases it; answers when the device has its bytes back.

        ``peak_bytes`` says the most that was in use of a reservation, which the next one is made by.
        """
        path = f"/api/memory/allocations/{_part(allocation_id)}"
        released: bodies.Released = self._transport.call("DELETE", path, query=_given(peakBytes=peak_bytes))
        return released

    # What moves bytes

    def transfer(
        self,
        items: Iterable[str | bodies.TransferItem],
        target_device: str,
        *,
        mode: bodies.TransferMode = "move",
        checksum: bool = False,
        priority: bodies.Priority | None = None,
        max_bytes_per_second: int | None = None,
        wait: bool = True,
        timeout: float | None = None,
        progress: Callable[[bodies.Operation], object] | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Moves or copies to another device: all of ``items``, or none is begun.

        An item is an allocation's id, or ``{"model": "sdxl", "component": "unet"}``. A moved allocation keeps
        its id. What fails or is cancelled leaves the old copy as it was.
        """
        body = _given(
            items=[{"allocationId": item} if isinstance(item, str) else item for item in items],
            targetDeviceId=target_device,
            mode=mode,
            checksum=checksum,
            priority=priority,
            maxBytesPerSecond=max_bytes_per_second,
        )
        return self._start("/api/memory/transfer", body, idempotency_key, wait, timeout, progress)

    def transfer_status(self, transfer_id: str) -> bodies.Operation:
        found: bodies.Operation = self._get(f"/api/memory/transfer/{_part(transfer_id)}")
        return found

    def cancel_transfer(self, transfer_id: str) -> bodies.Operation:
        """The old copy stays as it was; items that had arrived stay where they are."""
        path = f"/api/memory/transfer/{_part(transfer_id)}"
        cancelled: bodies.Operation = self._transport.call("DELETE", path)
        return cancelled

    def copy(
        self,
        source_allocation_id: str,
        target_allocation_id: str,
        *,
        source_offset: int = 0,
        target_offset: int = 0,
        size_bytes: int | None = None,
        checksum: bool = False,
        priority: bodies.Priority | None = None,
        max_bytes_per_second: int | None = None,
        wait: bool = True,
        timeout: float | None = None,
        progress: Callable[[bodies.Operation], object] | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Copies bytes from one allocation into another; by default up to the end of the source."""
        body = _given(
            sourceAllocationId=source_allocation_id,
            targetAllocationId=target_allocation_id,
            sourceOffset=source_offset,
            targetOffset=target_offset,
            sizeBytes=size_bytes,
            checksum=checksum,
            priority=priority,
            maxBytesPerSecond=max_bytes_per_second,
        )
        return self._start("/api/memory/copy", body, idempotency_key, wait, timeout, progress)

    def defragment(
        self,
        device: str | None = None,
        *,
        max_bytes: int | None = None,
        max_moves: int | None = None,
        max_milliseconds: int | None = None,
        max_bytes_per_second: int | None = None,
        priority: bodies.Priority | None = None,
        wait: bool = True,
        timeout: float | None = None,
        progress: Callable[[bodies.Operation], object] | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Packs what shares segments, on ``device`` or on all; ``result`` says what moved and what did not.

        Attached arrays keep their addresses and their bytes.
        """
        body = _defragment(max_bytes, max_moves, max_milliseconds, max_bytes_per_second, priority)
        path = _on("/api/memory/operations/defragment", device)
        return self._start(path, body, idempotency_key, wait, timeout, progress)

    def plan_defragment(
        self,
        device: str | None = None,
        *,
        max_bytes: int | None = None,
        max_moves: int | None = None,
        max_milliseconds: int | None = None,
    ) -> list[bodies.DefragmentPlan]:
        """What ``defragment`` would do: one plan for each device. Nothing moves."""
        body = _defragment(max_bytes, max_moves, max_milliseconds, None, None) | {"dryRun": True}
        path = _on("/api/memory/operations/defragment", device)
        answer: bodies.DefragmentPlans = self._transport.call("POST", path, body=body)
        return answer["plans"]

    def clear(
        self,
        what: bodies.ClearTarget,
        device: str | None = None,
        *,
        owner: str | None = None,
        allocation_id: str | None = None,
        force: bool = False,
        wait: bool = True,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Gives back ``"Cache"``, ``"Unused"`` or an owner's ``"Allocations"``; ``"Zero"`` zeroes one.

        ``result`` says how many bytes were asked, acknowledged and measured.
        """
        body = _given(what=what, owner=owner, allocationId=allocation_id, force=force)
        path = _on("/api/memory/operations/clear", device)
        return self._start(path, body, idempotency_key, wait, timeout, None)

    def plan_clear(
        self,
        what: bodies.ClearTarget,
        device: str | None = None,
        *,
        owner: str | None = None,
        allocation_id: str | None = None,
        force: bool = False,
    ) -> bodies.Cleared:
        """What ``clear`` would clear. Nothing goes."""
        body = _given(what=what, owner=owner, allocationId=allocation_id, force=force, dryRun=True)
        path = _on("/api/memory/operations/clear", device)
        answer: bodies.Cleared = self._transport.call("POST", path, body=body)
        return answer

    # Models

    def models(self) -> list[bodies.Model]:
        page: bodies.ModelPage = self._get("/api/models")
        return page["models"]

    def model(self, name: str) -> bodies.Model:
        found: bodies.Model = self._get(_model(name))
        return found

    def register_model(
        self,
        name: str,
        path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        *,
        keep_alive: str | int | None = None,
        pinned: bool | None = None,
        priority: bodies.Priority | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Model:
        """Makes a model known. ``path``: a file, a shard index or a directory; or one for each component.

        >>> client.register_model("sdxl", {"unet": "/models/sdxl/unet", "vae": "/models/sdxl/vae"})
        """
        sources = path if isinstance(path, Mapping) else {"weights": path}
        components = {part: {"path": os.fspath(source)} for part, source in sources.items()}
        body = _given(
            name=name, components=components, keepAlive=keep_alive, pinned=pinned, priority=priority
        )
        made: bodies.Model = self._transport.call(
            "POST", "/api/models", body=body, idempotency_key=idempotency_key
        )
        return made

    def remove_model(self, name: str) -> bodies.Model:
        """Forgets a model that is not resident; answers with what it was."""
        removed: bodies.Model = self._transport.call("DELETE", _model(name))
        return removed

    def load(
        self,
        name: str,
        device: str | None = None,
        *,
        components: Iterable[str] | None = None,
        keep_alive: str | int | None = None,
        on_shortage: bodies.OnShortage | None = None,
        timeout_seconds: int | None = None,
        split: bool | None = None,
        checksum: bool | None = None,
        wait: bool = True,
        timeout: float | None = None,
        progress: Callable[[bodies.Operation], object] | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Makes a model resident, on ``device`` or on the best one.

        Returns when it is, and raises what went wrong; with ``wait=False`` returns at once. ``timeout``
        bounds the wait, not the load. ``progress`` is called with the operation as it goes on. Without room,
        idle models go for it, unless ``on_shortage`` says otherwise. With ``split`` its components may go to
        different devices, if none has room for all. With ``checksum`` its bytes are summed, and later loads
        of the same files are held to that.
        """
        body = _given(
            deviceId=device,
            components=None if components is None else list(components),
            keepAlive=keep_alive,
            onShortage=on_shortage,
            timeoutSeconds=timeout_seconds,
            split=split,
            checksum=checksum,
        )
        return self._start(f"{_model(name)}/load", body, idempotency_key, wait, timeout, progress)

    def prefetch(
        self,
        name: str,
        device: str | None = None,
        *,
        wait: bool = True,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Brings the model to host memory, for its next use on ``device`` or on the first card for it."""
        return self._start(
            f"{_model(name)}/prefetch", _given(deviceId=device), idempotency_key, wait, timeout, None
        )

    def unload(
        self,
        name: str,
        device: str | None = None,
        *,
        wait: bool = True,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Operation:
        """Gives the model's memory back, on ``device`` or on all; ``Conflict`` while it is attached."""
        return self._start(
            f"{_model(name)}/unload", _given(deviceId=device), idempotency_key, wait, timeout, None
        )

    def plan(
        self, models: Iterable[str | bodies.PlanItem], *, device: str | None = None
    ) -> bodies.MemoryPlan:
        """What loads of these models would come to, in this order: where, what would go, how many seconds."""
        named = [models] if isinstance(models, str) else models
        items = [{"model": item} if isinstance(item, str) else item for item in named]
        body = _given(models=items, deviceId=device)
        plan: bodies.MemoryPlan = self._transport.call("POST", "/api/memory/plan", body=body)
        return plan

    def pin(self, name: str) -> bodies.Model:
        """Keeps it resident whatever its keep-alive says."""
        pinned: bodies.Model = self._post(f"{_model(name)}/pin")
        return pinned

    def unpin(self, name: str) -> bodies.Model:
        unpinned: bodies.Model = self._post(f"{_model(name)}/unpin")
        return unpinned

    def touch(self, name: str, *, keep_alive: str | int | None = None) -> bodies.Model:
        """Counts as use: its keep-alive starts anew."""
        touched: bodies.Model = self._post(f"{_model(name)}/touch", keepAlive=keep_alive)
        return touched

    # Pressure, and models in one view

    def pressure(self) -> list[bodies.DevicePressure]:
        """How tight memory is on each device, and what would help."""
        page: bodies.PressurePage = self._get("/api/memory/pressure")
        return page["devices"]

    def device_pressure(self, device: str) -> bodies.DevicePressure:
        found: bodies.DevicePressure = self._get(f"/api/memory/pressure/{_part(device)}")
        return found

    def model_status(self, device: str) -> bodies.ModelStatus:
        """The daemon's models and the workers' on a device; attached weights are counted once."""
        status: bodies.ModelStatus = self._get(f"/api/memory/model/status/{_part(device)}")
        return status

    def optimize_models(
        self,
        device: str,
        *,
        strategy: bodies.EvictionPolicy | None = None,
        target_pressure_level: bodies.PressureLevel | None = None,
        max_models_to_unload: int | None = None,
        min_memory_to_free: int | None = None,
        force_optimization: bool | None = None,
        exclude_models: Iterable[str] = (),
        max_optimization_time_ms: int | None = None,
    ) -> bodies.ModelsOptimized:
        """Has idle models go, the daemon's and the workers' in one order of cost, until enough is free.

        ``memoryFreed`` is what was measured, ``acknowledgedBytes`` what workers said.
        """
        body = _given(
            strategy=strategy,
            targetPressureLevel=target_pressure_level,
            maxModelsToUnload=max_models_to_unload,
            minMemoryToFree=min_memory_to_free,
            forceOptimization=force_optimization,
            excludeModels=list(exclude_models) or None,
            maxOptimizationTimeMs=max_optimization_time_ms,
        )
        path = f"/api/memory/model/optimize/{_part(device)}"
        wait = (max_optimization_time_ms or 10_000) / 1000
        done: bodies.ModelsOptimized = self._transport.call("POST", path, body=body, wait=wait)
        return done

    # Workers, each by its name or id

    def workers(self) -> list[bodies.Worker]:
        """Those that the daemon started and those that joined, also those that have ended lately."""
        page: bodies.WorkerPage = self._get("/api/workers")
        return page["workers"]

    def worker(self, worker: str, *, logs: bool = False) -> bodies.Worker:
        """One worker; with ``logs`` also the last lines that it wrote."""
        include = "logs" if logs else None
        found: bodies.Worker = self._get(f"/api/workers/{_part(worker)}", include=include)
        return found

    def start_worker(
        self,
        program: str,
        *,
        name: str | None = None,
        device: str | None = None,
        environment: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        restart: bodies.RestartPolicy | None = None,
        heartbeat_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> bodies.Worker:
        """Starts a program that the daemon's configuration allows; its ``state`` tells how it goes."""
        body = _given(
            program=program,
            name=name,
            deviceId=device,
            environment=dict(environment) if environment else None,
            memoryLimitBytes=memory_limit_bytes,
            restart=restart,
            heartbeatSeconds=heartbeat_seconds,
        )
        started: bodies.Worker = self._transport.call(
            "POST", "/api/workers", body=body, idempotency_key=idempotency_key
        )
        return started

    def stop_worker(self, worker: str) -> bodies.Worker:
        """Ends it and all that it started; answers once it has ended. One that has ended leaves the list."""
        # It is asked, told by a signal, then killed.
        stopped: bodies.Worker = self._transport.call("DELETE", f"/api/workers/{_part(worker)}", wait=15)
        return stopped

    def call_worker(
        self,
        worker: str,
        action: str,
        data: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: int | None = None,
    ) -> dict[str, Any]:
        """Asks a worker to do one of its ``actions``; answers what it answered."""
        body = _given(action=action, data=dict(data or {}), timeoutSeconds=timeout_seconds)
        answer: bodies.WorkerAnswer = self._transport.call(
            "POST", f"/api/workers/{_part(worker)}/call", body=body, wait=timeout_seconds or 30
        )
        return answer["data"]

    # Operations and events

    def operations(self, *, state: bodies.OperationState | None = None) -> list[bodies.Operation]:
        page: bodies.OperationPage = self._get("/api/operations", state=state)
        return page["operations"]

    def operation(self, operation_id: str, *, wait_seconds: int | None = None) -> bodies.Operation:
        """One operation; with ``wait_seconds`` (at most 600), once it has ended or that time is over."""
        path = f"/api/operations/{_part(operation_id)}"
        found: bodies.Operation = self._transport.call(
            "GET", path, query={"wait": wait_seconds}, wait=wait_seconds or 0
        )
        return found

    def cancel_operation(self, operation_id: str) -> bodies.Operation:
        cancelled: bodies.Operation = self._transport.call("DELETE", f"/api/operations/{_part(operation_id)}")
        return cancelled

    def pause_operation(self, operation_id: str) -> bodies.Operation:
        """Holds an operation that moves bytes; what is in flight ends."""
        paused: bodies.Operation = self._post(f"/api/operations/{_part(operation_id)}/pause")
        return paused

    def resume_operation(self, operation_id: str) -> bodies.Operation:
        resumed: bodies.Operation = self._post(f"/api/operations/{_part(operation_id)}/resume")
        return resumed

    def wait_operation(
        self,
        operation_id: str,
        *,
        timeout: float | None = None,
        progress: Callable[[bodies.Operation], object] | None = None,
    ) -> bodies.Operation:
        """Waits until it has ended; raises its error, or ``Timeout`` while it goes on."""
        return self._wait(self.operation(operation_id), timeout, progress)

    def events(self, last_event_id: str | None = None, *, retry_seconds: float = 30.0) -> EventStream:
        """What happens from now on, or since ``last_event_id``; resumes by itself after a dropped connection.

        >>> with client.events() as events:
        ...     for event in events:
        ...         print(event["event"], event["data"])
        """
        return EventStream(self._transport, last_event_id, retry_seconds)

    # The daemon itself

    def health(self) -> bodies.Health:
        """Whether the daemon answers at all."""
        health: bodies.Health = self._get("/healthz")
        return health

    def ready(self) -> bodies.Health:
        """Whether it serves; raises ``VramdError`` with code ``UNAVAILABLE`` until it does."""
        health: bodies.Health = self._get("/readyz")
        return health

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document of this interface."""
        document: dict[str, Any] = self._get("/api/openapi.json")
        return document

    def _get(self, path: str, **query: Any) -> Any:
        return self._transport.call("GET", path, query=query)

    def _post(self, path: str, **body: Any) -> Any:
        return self._transport.call("POST", path, body=_given(**body) or None)

    def _start(
        self,
        path: str,
        body: dict[str, Any],
        idempotency_key: str | None,
        wait: bool,
        timeout: float | None,
        progress: Callable[[bodies.Operation], object] | None,
    ) -> bodies.Operation:
        operation: bodies.Operation = self._transport.call(
            "POST", path, body=body or None, idempotency_key=idempotency_key
        )
        return self._wait(operation, timeout, progress) if wait else operation

    def _wait(
        self,
        operation: bodies.Operation,
        timeout: float | None,
        progress: Callable[[bodies.Operation], object] | None,
    ) -> bodies.Operation:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.01
        while True:
            if progress is not None:
                progress(operation)
            if operation["state"] in _ENDED:
                break
            left = _LONGEST_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise Timeout(
                    f"{operation['subject']}: not ended after {timeout:g} s; it goes on",
                    details={"operationId": operation["operationId"]},
                    retryable=True,
                )
            if progress is None and left >= 1:
                seconds = int(min(left, _LONGEST_WAIT_SECONDS))
                operation = self.operation(operation["operationId"], wait_seconds=seconds)
            else:
                time.sleep(min(pause, left))
                pause = min(2 * pause, 0.2)
                operation = self.operation(operation["operationId"])
        if "error" in operation:
            raise from_body(operation["error"])
        return operation


def _wait(on_shortage: str | None, timeout_seconds: int | None) -> int:
    # What others had loaded stays until they come, for a while, and what goes takes a while to be back.
    return {
        "wait": 30 if timeout_seconds is None else timeout_seconds,
        "evict": 600 + (timeout_seconds or 0),
    }.get(on_shortage or "fail", 0)


def _part(text: str) -> str:
    return quote(text, safe=":")


def _model(name: str) -> str:
    return f"/api/models/{_part(name)}"


def _on(path: str, device: str | None) -> str:
    return path if device is None else f"{path}/{_part(device)}"


def _defragment(
    max_bytes: int | None,
    max_moves: int | None,
    max_milliseconds: int | None,
    max_bytes_per_second: int | None,
    priority: str | None,
) -> dict[str, Any]:
    return _given(
        maxBytes=max_bytes,
        maxMoves=max_moves,
        maxMilliseconds=max_milliseconds,
        maxBytesPerSecond=max_bytes_per_second,
        priority=priority,
    )


def _list(words: Iterable[str]) -> str | None:
    return ",".join(words) or None


def _given(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
