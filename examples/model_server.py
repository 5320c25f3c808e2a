"""A model server that shares the machine's memory: what it does not use goes when others need the room."""

import sys
from typing import Any

import numpy as np

from vramd.worker import Model, Worker


class Server(Worker):
    def on_load(self, name: str) -> dict[str, Any]:
        """Called when a model is used that is not held: return your network or its state dict."""
        megabytes = int(name.rpartition("-")[2])
        return {"layer": np.ones((megabytes, 512, 512), np.float32)}

    def on_unload(self, model: Model) -> None:
        """Called when the memory of an idle model is needed. Drop what refers to it; raise to keep it."""
        print(f"{model.name} goes after {model.use_count} uses", file=sys.stderr, flush=True)

    def on_pressure(self, device: str, level: str, target_bytes: int) -> None:
        """Called when memory is tight: drop what you can make again."""


if __name__ == "__main__":
    with Server("example") as server:
        for line in sys.stdin:
            with server.using(line.strip()) as model:  # busy: it stays
                print(f"{model.name}: {model.value['layer'].sum():.0f}", flush=True)
