"""The interface: every action of the protocol by its name, done by the worker that is responsible for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from .allocation import Allocations
from .analytics import Analytics
from .framework import Framework, Torch, collect_host, gpu_figures
from .instructor import Action
from .manager import LEVELS, Manager
from .model_memory import Hooks, ModelMemory
from .protocol import Call, Refused, megabytes
from .transfer import Transfers


class PressureHooks(Hooks, Protocol):
    def on_pressure(self, device: str, level: str, target_bytes: int) -> None: ...


class Interface:
    """The operations on memory."""

    def __init__(self, framework: Framework, manager: Manager, hooks: PressureHooks) -> None:
        self._framework = framework
        self._manager = manager
        self._hooks = hooks
        self.models = ModelMemory(framework, manager, hooks)
        self.allocations = Allocations(framework, manager, self.models.device)
        self._transfers = Transfers(framework, self.allocations)
        self._analytics = Analytics(framework)
        self._cleaned = 0

    def actions(self) -> dict[str, Action]:
        """What takes time or may wait for a lock; each is counted."""
        actions: dict[str, Action] = {
            "memory.load_model": self.models.load,
            "memory.unload_model": self.models.unload,
            "memory.get_model_info": self.model_info,
            "memory.optimize_memory": self.models.optimize,
            "memory.model_optimize": self.models.optimize,
            "memory.offload_model": self.models.offload,
            "memory.restore_model": self.models.restore,
            "memory.get_status": self.status,
            "memory.get_model_status": self.model_status,
            "memory.get_pressure": self.pressure,
            "memory.pressure_check": self.pressure_check,
            "memory.analytics": lambda call: self._analytics.report(),
            "memory.allocate": self.allocations.allocate,
            "memory.deallocate": self.allocations.deallocate,
            "memory.transfer": self._transfers.transfer,
            "memory.transfer_status": self._transfers.status,
            "memory.clear": self.clear,
            "memory.defragment": self.defragment,
            "cleanup": self.cleanup,
        }
        return {name: self._counted(name, action) for name, action in actions.items()}

    def _counted(self, name: str, action: Action) -> Action:
        def counted(call: Call) -> Mapping[str, Any]:
            began, failed = time.monotonic(), True
            try:
                answer = action(call)
                failed = False
                return answer
            finally:
                self._analytics.note(name, time.monotonic() - began, failed)

        return counted

    def model_info(self, call: Call) -> dict[str, Any]:
        models = [model.report() for model in self._manager.models()]
        used = sum(model["memory_mb"] for model in models)
        limit = self._manager.limit_bytes
        limit_mb = None if limit is None else megabytes(limit)
        return {
            "loaded_models": models,
            "model_count": len(models),
            "memory_usage_mb": used,
            "memory_limit_mb": limit_mb,
            "available_memory_mb": None if limit_mb is None else max(limit_mb - used, 0.0),
        }

    def status(self, call: Call) -> dict[str, Any]:
        self._analytics.sample()
        return self.figures() | {
            "devices": {device: self._framework.figures(device) for device in self._framework.devices()},
            "allocations": self.allocations.all(),
            "model_count": len(self._manager.models()),
        }

    def model_status(self, call: Call) -> dict[str, Any]:
        return self.figures() | self.model_info(call)

    def figures(self) -> dict[str, Any]:
        """What comes with every status."""
        cards = self._framework.summary() if isinstance(self._framework, Torch) else gpu_figures()
        settings = {
            "framework": self._framework.name,
            "memory_limit_mb": None
            if self._manager.limit_bytes is None
            else megabytes(self._manager.limit_bytes),
            "default_strategy": "LowestCost",
            "cleanup_count": self._cleaned,
        }
        return {**cards, "optimization_settings": settings}

    def pressure(self, call: Call) -> dict[str, Any]:
        """Each device as this process sees it, and the level that the daemon last told."""
        devices = {}
        for device in self._framework.devices():
            figures = self._framework.figures(device)
            total, free = figures["total_mb"], figures["free_mb"]
            devices[device] = {
                "ratio": round(1 - free / total, 4) if total else 0.0,
                "available_mb": free,
                "total_mb": total,
                "own_mb": figures["used_mb"],
                "level": self._manager.levels.get(device),
            }
        return {"devices": devices}

    def pressure_check(self, call: Call) -> dict[str, Any]:
        """The daemon tells how tight memory is: caches go, and the program is told."""
        device, level = call.text("device_id"), call.text("level")
        if level not in LEVELS:
            raise Refused("INVALID_ARGUMENT", f"the level {level} is none of {', '.join(LEVELS)}")
        self._manager.levels[device] = level
        known = device in self._framework.devices()
        before = self._framework.used_bytes(device) if known else 0
        self._hooks.on_pressure(device, level, round(call.number("target_mb", 0) * (1 << 20)))
        if level in ("High", "Critical") and known:
            self._framework.collect(device)
        after = self._framework.used_bytes(device) if known else 0
        return {"device_id": device, "level": level, "freed_mb": megabytes(max(before - after, 0))}

    def clear(self, call: Call) -> dict[str, Any]:
        """The framework's caches; with ``allocations`` also the buffers that this worker allocated."""
        device = call.optional_text("device_id")
        devices = self._framework.devices() if device is None else [device]
        before = {one: self._framework.used_bytes(one) for one in devices}
        count = self.allocations.clear(device) if call.flag("allocations") else 0
        self._framework.collect(device)
        freed = {one: megabytes(max(before[one] - self._framework.used_bytes(one), 0)) for one in devices}
        return {"freed_mb": sum(freed.values()), "by_device": freed, "allocation_count": count}

    def defragment(self, call: Call) -> dict[str, Any]:
        """Frameworks move nothing: what they keep in pieces that nobody uses goes back to the system."""
        device = call.optional_text("device_id")
        devices = self._framework.devices() if device is None else [device]
        before = sum(self._framework.used_bytes(one) for one in devices)
        self._framework.collect(device)
        after = sum(self._framework.used_bytes(one) for one in devices)
        return {"freed_mb": megabytes(max(before - after, 0)), "moved_mb": 0.0}

    def cleanup(self, call: Call) -> dict[str, Any]:
        """All that is idle goes: models, buffers, caches."""
        before = sum(self._framework.used_bytes(one) for one in self._framework.devices())
        (gone, refused), count = self.models.let_all_go(), self.allocations.clear(None)
        self._framework.collect(None)
        collect_host()
        after = sum(self._framework.used_bytes(one) for one in self._framework.devices())
        self._cleaned += 1
        freed = megabytes(max(before - after, 0))
        return {"unloaded": gone, "refused": refused, "allocation_count": count, "freed_mb": freed}
