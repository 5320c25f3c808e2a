"""The manager: which models this process holds, how they are used, and what they may take."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..attachment import Attachment
from .framework import private_bytes
from .protocol import Refused, megabytes

LEVELS = ("Normal", "Moderate", "High", "Critical")
PRIORITIES = ("Low", "Normal", "High", "Critical")
STRATEGIES = ("LowestCost", "LeastRecentlyUsed", "LeastFrequentlyUsed", "LargestFirst", "LowestPriority")


@dataclass
class Model:
    """A model that this process holds."""

    name: str
    device: str
    #: Its bytes that are this process's own.
    size_bytes: int = 0
    #: Its bytes that are the daemon's.
    attached_bytes: int = 0
    #: The registered model that those are of.
    attached_model: str | None = None
    kind: str | None = None
    priority: str = "Normal"
    load_seconds: float | None = None
    offloaded: bool = False
    value: Any = None
    use_count: int = 0
    last_used: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)
    users: int = 0
    #: The thread that has it go or come back; 0: none.
    mover: int = 0

    @property
    def busy(self) -> bool:
        return self.users > 0

    @property
    def orphaned(self) -> bool:
        """Whether the daemon that its weights are attached from is gone."""
        return isinstance(self.value, Attachment) and self.value.ended is not None

    def report(self) -> dict[str, Any]:
        """As the daemon is told."""
        return {
            "name": self.name,
            "type": self.kind,
            "device_id": self.device,
            "offloaded": self.offloaded,
            "memory_mb": megabytes(self.size_bytes),
            "attached_mb": 0.0 if self.orphaned else megabytes(self.attached_bytes),
            "attached_model": self.attached_model,
            "busy": self.busy,
            "priority": self.priority,
            "use_count": self.use_count,
            "idle_seconds": round(time.monotonic() - self.last_used, 3),
            "load_seconds": None if self.load_seconds is None else float(self.load_seconds),
        }

    def cost(self) -> float:
        """What a byte of it is worth: uses a second, times the seconds to get it back, over its bytes."""
        alive = max(time.monotonic() - self.since, 1.0)
        idle = max(time.monotonic() - self.last_used, 1.0)
        rate = self.use_count / alive / idle
        weight = 2.0 ** PRIORITIES.index(self.priority)
        return weight * rate * (self.load_seconds or 1.0) / max(self.size_bytes + self.attached_bytes, 1)


#: What a program says of a model.
_TOLD = (
    "device",
    "size_bytes",
    "attached_bytes",
    "attached_model",
    "kind",
    "priority",
    "load_seconds",
    "value",
)
_DEVICE = re.compile(r"[a-z][a-z0-9]{0,15}:[0-9]{1,5}")


def check(model: Model) -> None:
    """Refuses what the daemon would: it takes a report as a whole or not at all."""
    if not 0 < len(model.name.encode()) <= 256 or not model.name.isprintable():
        raise Refused("INVALID_ARGUMENT", f"{model.name!r} is no name of a model")
    if not _DEVICE.fullmatch(model.device):
        raise Refused("INVALID_ARGUMENT", f"{model.device!r} is no device such as cuda:0")
    for what, text in (("kind", model.kind), ("attached model", model.attached_model)):
        named = isinstance(text, str) and 0 < len(text.encode()) <= 256 and text.isprintable()
        if text is not None and not named:
            raise Refused("INVALID_ARGUMENT", f"{text!r} names no {what}")
    if model.load_seconds is not None and not 0 <= model.load_seconds < math.inf:
        raise Refused("INVALID_ARGUMENT", f"{model.load_seconds!r} is no number of seconds")
    if model.priority not in PRIORITIES:
        known = ", ".join(PRIORITIES)
        raise Refused("INVALID_ARGUMENT", f"the priority {model.priority} is none of {known}")
    if model.size_bytes < 0 or model.attached_bytes < 0:
        raise Refused("INVALID_ARGUMENT", f"{model.name} cannot have less than 0 bytes")


class Manager:
    """The models, safe to use from any thread."""

    def __init__(self, changed: Callable[[], None], limit_bytes: int | None = None) -> None:
        self._models: dict[str, Model] = {}
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        #: Two who use a model for the first time load it once.
        self._loading = threading.RLock()
        self._taking = threading.RLock()
        self._changed = changed
        self.limit_bytes = limit_bytes
        #: The level that the daemon last told, by device.
        self.levels: dict[str, str] = {}

    def models(self) -> list[Model]:
        with self._lock:
            return list(self._models.values())

    def get(self, name: str) -> Model:
        with self._lock:
            model = self._models.get(name)
        if model is None:
            known = ", ".join(model.name for model in self.models()) or "none"
            raise Refused("NOT_FOUND", f"this worker has no model {name}", f"it has: {known}")
        return model

    def hold(self, model: Model) -> Model:
        """Takes a model in; one of that name that is in use is brought up to date instead, and answered."""
        check(model)
        with self._lock:
            held = self._models.get(model.name)
            if held is not None and (held.users or held.mover):
                for name in _TOLD:
                    setattr(held, name, getattr(model, name))
            else:
                self._models[model.name] = held = model
        self._changed()
        return held

    def hold_new(self, model: Model) -> None:
        """Takes a model in that is not here."""
        with self._lock:
            self.check_new(model.name)
            self._models[model.name] = model
        self._changed()

    def check_new(self, name: str) -> None:
        """Refuses what is here already."""
        with self._lock:
            if name in self._models:
                raise Refused("CONFLICT", f"{name} is loaded already")

    def taking(self) -> AbstractContextManager[object]:
        """While inside, nobody else takes memory: where there is a limit, what was checked stays so."""
        return nullcontext() if self.limit_bytes is None else self._taking

    def has_room(self, device: str, size_bytes: int) -> bool:
        """Whether so much more host memory stays below the limit, with all that this process has."""
        if self.limit_bytes is None or not device.startswith("cpu:"):
            return True
        return private_bytes() + size_bytes <= self.limit_bytes

    def check_room(self, name: str, device: str, size_bytes: int) -> None:
        """Refuses what has no room below the limit."""
        if self.limit_bytes is not None and not self.has_room(device, size_bytes):
            takes = f", which takes {megabytes(size_bytes)} MB" if size_bytes else ""
            taken = f"the process has {megabytes(private_bytes())} of {megabytes(self.limit_bytes)} MB"
            what = f"there is no room for {name}{takes}: {taken}"
            hint = (
                "unload another model, or raise the worker's limit: the interpreter and its libraries count"
            )
            raise Refused("INSUFFICIENT_MEMORY", what, hint)

    def drop(self, name: str) -> Model | None:
        with self._lock:
            model = self._models.pop(name, None)
        if model is not None:
            self._changed()
        return model

    @contextmanager
    def using(
        self, name: str, load: Callable[[str], Model], restore: Callable[[str], object]
    ) -> Iterator[Model]:
        """While inside, the model is busy and stays. What is not there is loaded or restored first."""
        while (model := self._take(name)) is None or model.offloaded:
            if model is None:
                with self._loading:
                    if name not in self._models:
                        self.hold(load(name))
            else:
                restore(name)
        if model.users == 1:
            self._changed()
        try:
            yield model
        finally:
            with self._lock:
                model.users -= 1
                model.last_used = time.monotonic()
                last = model.users == 0
            if last:
                self._changed()

    def _take(self, name: str) -> Model | None:
        """The model, busy from now on unless it is offloaded; once nobody has it go or come back."""
        with self._settled:
            while (model := self._models.get(name)) is not None and model.mover:
                if model.mover == threading.get_ident():
                    raise Refused("CONFLICT", f"{name} is on its way, which is what this hook is for")
                self._settled.wait()
            if model is not None and model.orphaned and not model.users:
                # What its weights were may be others' by now.
                model.value.close()
                del self._models[name]
                return None
            if model is not None and not model.offloaded:
                model.users += 1
                model.use_count += 1
            return model

    @contextmanager
    def moving(self, name: str) -> Iterator[Model]:
        """While inside, an idle model goes or comes back; who would use it waits."""
        with self._lock:
            model = self.get(name)
            if model.busy:
                raise Refused("CONFLICT", f"{name} is in use", "ask again once it is idle")
            if model.mover:
                raise Refused("CONFLICT", f"{name} is on its way already", "ask again in a moment")
            model.mover = threading.get_ident()
        try:
            yield model
        finally:
            with self._settled:
                model.mover = 0
                self._settled.notify_all()
        self._changed()

    def in_order(self, strategy: str, device: str | None = None) -> list[Model]:
        """The idle models, the first to go first."""
        keys: dict[str, Callable[[Model], Any]] = {
            "LowestCost": Model.cost,
            "LeastRecentlyUsed": lambda model: model.last_used,
            "LeastFrequentlyUsed": lambda model: (model.use_count, model.last_used),
            "LargestFirst": lambda model: -model.size_bytes,
            "LowestPriority": lambda model: (PRIORITIES.index(model.priority), model.last_used),
        }
        if strategy not in keys:
            raise Refused("INVALID_ARGUMENT", f"{strategy} is none of {', '.join(STRATEGIES)}")
        idle = [
            model
            for model in self.models()
            if not model.busy and not model.mover and device in (None, model.device)
        ]
        return sorted(idle, key=keys[strategy])
