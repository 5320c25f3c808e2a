"""torch tensors over attached memory, without a copy.

torch has no read-only tensors, so their mapping is private and copy-on-write: what a process writes it alone
sees, and the daemon's bytes stay as they are. A card knows no such mapping: what is there is not to be
written to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import cuda
from .errors import UnsupportedDtype
from .frames import BLOCKS, Row, check_row, packed_shape

if TYPE_CHECKING:
    from .attachment import Attached

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def tensor(attached: Attached, row: Row, buffer: Any, base: int) -> Any:
    """The tensor as a view of ``buffer``, in which its block begins at ``base``."""
    name, dtype_name, shape, offset, size = row
    check_row(row, attached.nbytes)
    if dtype_name in BLOCKS:
        dtype_name, shape = "U8", packed_shape(dtype_name, shape)
    dtype = getattr(torch, _NAMES.get(dtype_name, ""), None)
    if dtype is None:
        raise UnsupportedDtype(
            f"torch {torch.__version__} has no {dtype_name}, which tensor {name!r} has",
            hint=f"raw({name!r}) gives its bytes",
        )
    on_card = isinstance(buffer, cuda.Imported)
    device = f"cuda:{buffer.card.ordinal}" if on_card else "cpu"
    if size == 0:  # frombuffer takes no empty buffer
        return torch.empty(shape, dtype=dtype, device=device)
    if on_card:
        # torch keeps the object that it gets, and with it the mapping.
        raw = torch.as_tensor(cuda.array(attached, row, buffer, base).bytes, device=device)
    else:
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=base + offset)
    # Older ones do not tell a dtype's size.
    if (base + offset) % torch.empty(0, dtype=dtype).element_size():
        # torch's kernels take alignment for granted, and files may break it: the one case that costs a copy.
        raw = raw.clone()
    return raw.view(dtype).view(shape)
