"""``Worker``: what a model server subclasses, or runs beside itself, to share the machine's memory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..attachment import Attachment, default_socket
from ..errors import ConnectionFailed
from . import channel, protocol
from .framework import Framework, best, tensor_bytes
from .instructor import Instructor
from .interface import Interface
from .manager import Manager, Model
from .protocol import Call, Refused

if TYPE_CHECKING:
    from typing_extensions import Self

_LONGEST_PAUSE_SECONDS = 30.0


class Worker:
    """A process that tells the daemon which models it holds, and lets them go when it is asked.

    Override ``on_load`` and compute inside ``using``: that is enough. ``start`` serves on a thread of its own
    beside your server, ``run`` until the daemon ends it.

    >>> class Embedder(vramd.worker.Worker):
    ...     def on_load(self, name):
    ...         return load_network(name)
    >>> worker = Embedder("embedder", device="cuda:0")
    >>> worker.start()
    >>> with worker.using("minilm") as model:
    ...     model.value(text)

    A server that keeps its networks elsewhere says so with ``hold``, and drops them in ``on_unload``.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        device: str | None = None,
        socket: str | None = None,
        framework: Framework | None = None,
    ) -> None:
        self.name = name or type(self).__name__.lower()
        self._device = device
        self._socket = socket or os.environ.get("VRAMD_SOCKET") or default_socket()
        self._framework = framework
        self._manager = Manager(self._tell)
        self._interface: Interface | None = None
        self._channel: channel.Channel | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Event()
        #: What models took, by name.
        self._sizes: dict[str, int] = {}
        # For this process alone: one that it starts is no worker of the daemon's.
        self._is_child = os.environ.pop("VRAMD_WORKER", None) == "stdio"
        self._streams: channel.Channel | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()

    # What a subclass may override

    def on_load(self, name: str) -> Any:
        """Makes a model that is used and not held: a state dict, a module, tensors, or an attachment."""
        raise Refused("NOT_FOUND", f"this worker has no model {name}")

    def on_unload(self, model: Model) -> None:
        """The memory of an idle model is needed: drop all references. Raise ``Refused`` to keep it."""

    def on_offload(self, model: Model) -> None:
        """It is to leave its device for host memory. Raise ``Refused`` to keep it where it is."""

    def on_restore(self, model: Model) -> None:
        """It is back on its device."""

    def on_pressure(self, device: str, level: str, target_bytes: int) -> None:
        """Memory is tight: drop what can be made again. The daemon still looks for ``target_bytes``."""

    # What a model server tells

    def hold(
        self,
        name: str,
        *,
        size_bytes: int = 0,
        attached_bytes: int = 0,
        attached_model: str | None = None,
        device: str | None = None,
        kind: str | None = None,
        priority: str = "Normal",
        load_seconds: float | None = None,
        value: Any = None,
    ) -> Model:
        """Says that this process holds a model: ``size_bytes`` its own, ``attached_bytes`` the daemon's."""
        model = Model(
            name,
            device or self.device,
            size_bytes,
            attached_bytes,
            attached_model,
            kind,
            priority,
            load_seconds,
            value=value,
        )
        return self._manager.hold(model)

    def drop(self, name: str) -> None:
        """Says that it holds it no longer."""
        self._manager.drop(name)

    def using(self, name: str) -> AbstractContextManager[Model]:
        """While inside, the model is busy, and stays. One that is not held is made by ``on_load`` first."""
        return self._manager.using(name, self._load, self._restore)

    def _load(self, name: str) -> Model:
        began = time.monotonic()
        if self._interface is not None:
            # As large as it was before, or as the largest there was.
            likely = self._sizes.get(name, max(self._sizes.values(), default=0))
            self._interface.models.make_room(self.device, likely)
        value = self.on_load(name)
        seconds = round(time.monotonic() - began, 6)
        if isinstance(value, Attachment):
            self._sizes[name] = 0
            attached = f"{value.model}/{value.component}"
            return Model(name, value.device, 0, value.nbytes, attached, load_seconds=seconds, value=value)
        try:
            size = self._sizes[name] = self.size_of(value)
        except (AttributeError, TypeError):
            what = f"on_load made a {type(value).__name__} of {name}"
            hint = "return a state dict, a module, tensors or an attachment; or say its size with hold"
            raise Refused("WORKER_FAILED", what, hint) from None
        if self._interface is not None:
            self._interface.models.check_limit(name, self.device)
        return Model(name, self.device, size, load_seconds=seconds, value=value)

    def _restore(self, name: str) -> None:
        if self._interface is None:
            raise Refused("CONFLICT", f"{name} is offloaded, and the daemon has never been there")
        try:
            self._interface.models.bring_back(name)
        except Refused as error:
            # Another who uses it was first.
            if error.code != "CONFLICT":
                raise

    @property
    def device(self) -> str:
        """The device that it is to use: its own choice, or the daemon's."""
        return self._device or "cpu:0"

    @property
    def connected(self) -> bool:
        """Whether it speaks with a daemon now."""
        return self._channel is not None

    def models(self) -> list[Model]:
        return self._manager.models()

    @staticmethod
    def size_of(model: Any) -> int:
        """The bytes of a torch module, a state dict, tensors, or one of them."""
        if hasattr(model, "parameters") and hasattr(model, "buffers"):
            return tensor_bytes([*model.parameters(), *model.buffers()])
        if isinstance(model, Mapping):
            return tensor_bytes(model.values())
        return tensor_bytes([model] if hasattr(model, "shape") else model)

    # Its life

    def start(self) -> None:
        """Joins the daemon from a thread of its own, and again whenever the daemon comes back."""
        if self._thread is not None:
            raise RuntimeError("it was started already")
        if self._is_child:
            # At once: the program around may read and print from now on.
            self._streams = channel.stdio()
        self._thread = threading.Thread(target=self._run, name="vramd-worker", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Serves until the daemon asks to end, or ``close``. One that was started is waited for."""
        if self._thread is not None:
            self._thread.join()
        else:
            self._run()

    def _run(self) -> None:
        if self._is_child:
            self._serve(self._streams or channel.stdio())
            return
        pause = 0.5
        told = False
        while not self._closed.is_set():
            try:
                joined = channel.join(self._socket, self.name, self._device)
            except ConnectionFailed as error:
                if not told:
                    what = f"{error.message}; {self.name} joins once there is one"
                    print(f"vramd.worker: {what}\nhint: {error.hint}", file=sys.stderr, flush=True)
                    told = True
                self._closed.wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                continue
            pause = 0.5
            if self._serve(joined):
                return
            self._closed.wait(pause)

    def close(self) -> None:
        """Leaves the daemon. What it holds stays."""
        self._closed.set()
        with self._lock:
            if self._channel is not None:
                self._channel.close()
        thread = self._thread
        # Who reads standard input reads until that ends.
        if thread is not None and thread is not threading.current_thread() and not self._is_child:
            thread.join(10)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, connected: channel.Channel) -> bool:
        """One conversation; answers whether it was to be the last."""
        framework = self._framework or best()
        self._framework = framework
        # Over all conversations: what it holds outlives a daemon.
        interface = self._interface = self._interface or Interface(framework, self._manager, self)
        slow = interface.actions()

        def hello(call: Call) -> Mapping[str, Any]:
            return self._greet(call, framework, interface, [*slow, "ping"])

        def shutdown(call: Call) -> Mapping[str, Any]:
            instructor.ending = True
            self._closed.set()
            return {}

        quick = {"hello": hello, "ping": lambda call: {}, "shutdown": shutdown}
        instructor = Instructor(connected, quick, slow)
        with self._lock:
            self._channel = connected
        if self._closed.is_set():
            return True
        over = threading.Event()
        reports = threading.Thread(
            target=self._report, args=(connected, over), name="vramd-reports", daemon=True
        )
        reports.start()
        dismissed = False
        try:
            instructor.run()
        except protocol.Dismissed as error:
            hint = "" if error.hint is None else f"\nhint: {error.hint}"
            print(f"vramd.worker: the daemon refuses {self.name}: {error}{hint}", file=sys.stderr, flush=True)
            # What is wrong with the request itself is wrong the next time too.
            dismissed = error.code in ("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED")
            self._closed.wait(_LONGEST_PAUSE_SECONDS if not dismissed else 0)
        finally:
            with self._lock:
                self._channel = None
            over.set()
            self._changed.set()
            connected.close()
        return dismissed or instructor.ending or self._closed.is_set()

    def _report(self, connected: channel.Channel, over: threading.Event) -> None:
        """Tells the daemon which models there are when that has changed: nobody who computes waits for it."""
        self._changed.set()
        while not over.is_set():
            self._changed.wait()
            self._changed.clear()
            models = self._manager.models()
            if self._interface is not None and any(one.orphaned and not one.busy for one in models):
                # Hooks may take their time.
                threading.Thread(target=self._interface.models.let_orphans_go, daemon=True).start()
            if not over.is_set():
                reports = [model.report() for model in models]
                connected.send(protocol.event("models", {"loaded_models": reports}))

    def _greet(
        self, call: Call, framework: Framework, interface: Interface, actions: list[str]
    ) -> dict[str, Any]:
        versions = call.data.get("versions")
        if not isinstance(versions, list) or protocol.VERSION not in versions:
            raise Refused("CONFLICT", f"this worker speaks version {protocol.VERSION}, not {versions}")
        limit = call.optional_number("memory_limit_mb")
        self._manager.limit_bytes = None if limit is None else protocol.size_bytes(limit)
        uuids = call.data.get("device_uuids")
        framework.know(uuids if isinstance(uuids, dict) else {})
        device = self._device = self._device or call.optional_text("device_id")
        device = device or "cpu:0"
        interface.models.device = interface.allocations.device = device
        interface.models.server = call.optional_text("server") or os.environ.get("VRAMD_SERVER")
        interface.models.socket = call.optional_text("socket") or self._socket
        return {
            "version": protocol.VERSION,
            "implementation": f"vramd {__version__}",
            "framework": framework.name,
            "actions": sorted(actions),
        }

    def _tell(self) -> None:
        """What there is has changed."""
        self._changed.set()
