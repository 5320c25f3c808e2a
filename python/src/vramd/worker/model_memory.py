"""Model memory: state dicts, attached from the daemon without a copy or in memory of this process."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..attachment import Attachment, attach
from ..client import Client
from .framework import Framework, tensor_bytes
from .manager import LEVELS, Manager, Model, check
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
        check(model)
        self._manager.check_new(name)
        began = time.monotonic()
        if path is None:
            model.attached_model = call.optional_text("model") or name
            self._attach(model)
        else:
            size = max(estimate, _file_bytes(Path(path)))
            with self._manager.taking():
                self.make_room(device, size)
                self._manager.check_room(name, device, size)
                model.value = self._framework.load(Path(path), device, call.check)
            model.size_bytes = tensor_bytes(model.value.values())
        model.load_seconds = round(time.monotonic() - began, 6)
        try:
            call.check()
            self._manager.hold_new(model)
        except Refused:
            if isinstance(model.value, Attachment):
                model.value.close()
            raise
        return {"model": model.report(), "tensor_count": len(model.value)}

    def unload(self, call: Call) -> dict[str, Any]:
        return self.let_go(call.text("name"))

    def let_go(self, name: str) -> dict[str, Any]:
        """Unloads an idle model; answers what it said it had, and what this process measures as freed."""
        with self._manager.moving(name) as model:
            before = self._used(model.device)
            # If the program refuses, all stays as it was.
            self._hooks.on_unload(model)
            if isinstance(model.value, Attachment):
                model.value.close()
            report = model.report()
            model.value = None
            self._manager.drop(name)
            self._homes.pop(name, None)
            self._framework.collect(model.device)
            freed = max(before - self._used(model.device), 0)
        return {
            "name": name,
            "acknowledged_mb": report["memory_mb"],
            "released_attached_mb": report["attached_mb"],
            "freed_mb": megabytes(freed),
        }

    def offload(self, call: Call) -> dict[str, Any]:
        """To host memory, or, of attached weights, off this process: until ``restore_model``."""
        with self._manager.moving(call.text("name")) as model:
            if model.offloaded:
                raise Refused("CONFLICT", f"{model.name} is offloaded already")
            is_attached = isinstance(model.value, Attachment)
            if not is_attached and model.device.startswith("cpu:"):
                raise Refused("CONFLICT", f"{model.name} is in host memory already", "unload it instead")
            home = model.device
            before = self._used(home)
            self._hooks.on_offload(model)
            try:
                if is_attached:
                    model.value.close()
                    model.value, model.attached_bytes = None, 0
                elif model.value is not None:
                    model.value = self._framework.move(model.value, "cpu:0")
            except BaseException:
                self._hooks.on_restore(model)
                raise
            self._homes[model.name] = home
            model.device = model.device if is_attached else "cpu:0"
            model.offloaded = True
            self._framework.collect(home)
            freed = max(before - self._used(home), 0)
        return {"model": model.report(), "freed_mb": megabytes(freed)}

    def restore(self, call: Call) -> dict[str, Any]:
        return {"model": self.bring_back(call.text("name")).report()}

    def bring_back(self, name: str) -> Model:
        """Restores what is offloaded."""
        with self._manager.moving(name) as model:
            if not model.offloaded:
                raise Refused("CONFLICT", f"{name} is not offloaded")
            home = self._homes.get(name, model.device)
            if model.attached_model is not None:
                self._attach(model)
            elif model.value is not None:
                model.value = self._framework.move(model.value, home)
            model.device, model.offloaded = home, False
            self._homes.pop(name, None)
            self._hooks.on_restore(model)
        return model

    def optimize(self, call: Call) -> dict[str, Any]:
        """Lets idle models go, one after the other, until enough has; without a target all of them."""
        began = time.monotonic()
        wanted = call.number("target_reduction_mb", 0)
        level = call.optional_text("pressure_level")
        if level is not None and level not in LEVELS:
            raise Refused("INVALID_ARGUMENT", f"the level {level} is none of {', '.join(LEVELS)}")
        device = call.optional_text("device_id")
        excluded = set(call.texts("exclude_models"))
        most, longest = call.optional_number("max_models"), call.optional_number("max_time_ms")
        before = self._used(device)
        unloaded: list[dict[str, Any]] = []
        refused: list[dict[str, str]] = []
        for model in self._manager.in_order(call.optional_text("strategy") or "LowestCost", device):
            given = sum(one["acknowledged_mb"] + one["released_attached_mb"] for one in unloaded)
            late = longest is not None and (time.monotonic() - began) * 1000 >= longest
            if (
                (wanted and given >= wanted)
                or (level == "Normal" and not wanted)
                or (most is not None and len(unloaded) >= most)
                or late
            ):
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

    def make_room(self, device: str, size_bytes: int) -> None:
        """Lets idle models in host memory go until one of that size would have room below the limit."""
        idle = self._manager.in_order("LowestCost", device)
        if not self._manager.has_room(device, size_bytes - sum(model.size_bytes for model in idle)):
            # None goes in vain.
            return
        for model in idle:
            if self._manager.has_room(device, size_bytes):
                return
            if model.size_bytes:
                with suppress(Exception):
                    self.let_go(model.name)

    def check_limit(self, name: str, device: str) -> None:
        """One that was loaded stays if there is room below the limit once other idle ones have gone."""
        self.make_room(device, 0)
        self._manager.check_room(name, device, 0)

    def let_orphans_go(self) -> None:
        """Idle models whose weights another daemon held: the next use attaches them anew."""
        for model in self._manager.models():
            if model.orphaned:
                with suppress(Exception):
                    self.let_go(model.name)

    def let_all_go(self) -> tuple[list[str], list[dict[str, str]]]:
        """Everything that nobody uses; answers what went, and what was refused."""
        gone, refused = [], []
        for model in self._manager.in_order("LowestCost"):
            try:
                self.let_go(model.name)
                gone.append(model.name)
            except Exception as error:
                refused.append({"name": model.name, "message": str(error)})
        return gone, refused

    def _used(self, device: str | None) -> int:
        """What this process has there; of devices that the framework does not know, that is not known."""
        known = self._framework.devices()
        devices = known if device is None else [one for one in known if one == device]
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


def _file_bytes(path: Path) -> int:
    """Of what cannot be read, who reads it says why."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
