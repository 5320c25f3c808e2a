"""Workers: processes that hold model memory of their own, and give it back when the daemon asks.

``Worker`` turns a model server into one; ``python -m vramd.worker`` is one that can be started as it is.
``protocol/worker.md`` is what they and the daemon say to each other.
"""

from .manager import Model
from .protocol import Call, Refused
from .server import Worker

__all__ = ["Call", "Model", "Refused", "Worker"]
