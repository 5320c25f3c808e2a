"""Client of vramd, the memory daemon for AI inference machines.

``attach`` gives the tensors of a resident model, without a copy; ``Client`` has a method for every REST call.
"""

from .attachment import AllocationAttachment, Attachment, attach, attach_allocation, default_socket
from .client import Client
from .cuda import CudaError
from .errors import (
    Cancelled,
    ClosedError,
    Conflict,
    ConnectionFailed,
    InsufficientMemory,
    NotFound,
    NotResident,
    ProtocolError,
    Timeout,
    UnsupportedDtype,
    VramdError,
)
from .events import EventStream
from .frames import Tensor
from .working_memory import working_memory

__version__ = "0.1.0"

__all__ = [
    "AllocationAttachment",
    "Attachment",
    "Cancelled",
    "Client",
    "ClosedError",
    "Conflict",
    "ConnectionFailed",
    "CudaError",
    "EventStream",
    "InsufficientMemory",
    "NotFound",
    "NotResident",
    "ProtocolError",
    "Tensor",
    "Timeout",
    "UnsupportedDtype",
    "VramdError",
    "attach",
    "attach_allocation",
    "default_socket",
    "working_memory",
]
