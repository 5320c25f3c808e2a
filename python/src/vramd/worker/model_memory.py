"""Model memory: state dicts, attached from the daemon without a copy or in memory of this process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from ..attachment import Attachment, attach
from ..client import Client
from .framework import Framework, tensor_bytes
from .manager import Manager, Model
from .protocol import Call, Refused, megabytes, size_bytes


class Hooks(Protocol):
    """What the program around it does when models go and come back."""

    def on_unload(self, model: Model) -> None: ...

    def on_offload(self, model: Model) -> None: ...

    def on_restore(self, model: Model) -> None: ...


class ModelMemory:
    """Loads models and lets them go. What it frees it measures."""

    def __init__(self, framework: Framework, manager: Manager, hooks: Hooks) -> None:
        self._framework = framework
        self._manager = manager
        self._hooks = hooks
        self._homes: dict[str, str] = {}
        self.server: str | None = None
        self.socket: str | None = None
        self.device = "cpu:0"

    def load(self, call: Call) -> dict[str, Any]:
        """With ``path`` a state dict of its own; without one what is registered as ``name``, attached."""
        name, path = call.text("name"), call.optional_text("path")
        device = call.optional_text("device_id") or self.device
        model = Model(
            name,
            device,
            kind=call.optional_text("type"),
            priority=call.optional_text("priority") or "Normal",
        )
        estimate = size_bytes(call.number("estimated_size_mb", 0))
        self._manager.check_new(name, 0 if path is None else estimate)
        began = time.monotonic()
        if path is None:
            model.attached_model = call.optional_text("model") or name
            self._attach(model)
        else:
            model.value = self._framework.load(Path(path), device)
            model.size_bytes = tensor_bytes(model.value.values())
            self._manager.check_new(name, model.size_bytes)
        call.check()
        model.load_seconds = round(time.monotonic() - began, 6)
        self._manager.hold(model)
        return {"model": model.report(), "tensor_count": len(model.value)}

    def unload(self, call: Call) -> dict[str, Any]:
        return self.let_go(call.text("name"))

    def let_go(self, name: str) -> dict[str, Any]:
        """Unloads an idle model; answers what it said it had, and what this process measures as freed."""
        model = self._manager.idle(name)
        before = self._framework.used_bytes(model.device)
        # If the program refuses, all stays as it was.
        self._hooks.on_unload(model)
        if isinstance(model.value, Attachment):
            model.value.close()
        report = model.report()
        model.value = None
        self._manager.drop(name)
        self._homes.pop(name, None)
        self._framework.collect(model.device)
        freed = max(before - self._framework.used_bytes(model.device), 0)
        return {
            "name": name,
            "acknowledged_mb": report["memory_mb"],
            "released_attached_mb": report["attached_mb"],
            "freed_mb": megabytes(freed),
        }

    def offload(self, call: Call) -> dict[str, Any]:
        """To host memory, or, of attached weights, off this process: until ``restore_model``."""
        model = self._manager.idle(call.text("name"))
        if model.offloaded:
            raise Refused("CONFLICT", f"{model.name} is offloaded already")
        is_attached = isinstance(model.value, Attachment)
        if not is_attached and model.device.startswith("cpu:"):
            raise Refused("CONFLICT", f"{model.name} is in host memory already", "unload it instead")
        before = self._framework.used_bytes(model.device)
        self._hooks.on_offload(model)
        home = self._homes[model.name] = model.device
        if is_attached:
            model.value.close()
            model.value, model.attached_bytes = None, 0
        else:
            if model.value is not None:
                model.value = self._framework.move(model.value, "cpu:0")
            model.device = "cpu:0"
        model.offloaded = True
        self._framework.collect(home)
        self._manager.hold(model)
        return {
            "model": model.report(),
            "freed_mb": megabytes(max(before - self._framework.used_bytes(home), 0)),
        }

    def restore(self, call: Call) -> dict[str, Any]:
        model = self._manager.get(call.text("name"))
        if not model.offloaded:
            raise Refused("CONFLICT", f"{model.name} is not offloaded")
        home = self._homes.get(model.name, model.device)
        if model.attached_model is not None:
            self._attach(model)
        elif model.value is not None:
            model.value = self._framework.move(model.value, home)
        model.device, model.offloaded = home, False
        self._homes.pop(model.name, None)
        self._hooks.on_restore(model)
        self._manager.hold(model)
        return {"model": model.report()}

    def optimize(self, call: Call) -> dict[str, Any]:
        """Lets idle models go, one after the other, until enough has."""
        began = time.monotonic()
        wanted = call.number("target_reduction_mb", 0)
        device = call.optional_text("device_id")
        excluded = set(call.texts("exclude_models"))
        most, longest = call.optional_number("max_models"), call.optional_number("max_time_ms")
        before = self._used(device)
        unloaded: list[dict[str, Any]] = []
        refused: list[dict[str, str]] = []
        for model in self._manager.in_order(call.optional_text("strategy") or "LowestCost", device):
            given = sum(one["acknowledged_mb"] + one["released_attached_mb"] for one in unloaded)
            late = longest is not None and (time.monotonic() - began) * 1000 >= longest
            if (wanted and given >= wanted) or (most is not None and len(unloaded) >= most) or late:
                break
            if model.name in excluded:
                continue
            call.check()
            try:
                unloaded.append(self.let_go(model.name))
            except Exception as error:
                refused.append({"name": model.name, "message": str(error)})
        self._framework.collect(device)
        return {
            "unloaded": unloaded,
            "refused": refused,
            "acknowledged_mb": sum(one["acknowledged_mb"] for one in unloaded),
            "freed_mb": megabytes(max(before - self._used(device), 0)),
            "milliseconds": round((time.monotonic() - began) * 1000, 3),
        }

    def let_all_go(self) -> list[str]:
        """Everything that nobody uses; answers what that was."""
        names = [model.name for model in self._manager.models() if not model.busy]
        for name in names:
            self.let_go(name)
        return names

    def _used(self, device: str | None) -> int:
        devices = self._framework.devices() if device is None else [device]
        return sum(self._framework.used_bytes(one) for one in devices)

    def _attach(self, model: Model) -> None:
        assert model.attached_model is not None
        if self.server is not None:
            # One that is resident there is no load.
            Client(self.server).load(model.attached_model.partition("/")[0], device=model.device)
        model.value = attach(
            model.attached_model, device=model.device, socket=self.socket, framework=self._framework.kind
        )
        model.attached_bytes = model.value.nbytes
