"""NumPy arrays over attached memory, without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UnsupportedDtype
from .frames import BLOCKS, Row, check_row, packed_shape

if TYPE_CHECKING:
    from .attachment import Attached

_NATIVE = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


class Array(np.ndarray[Any, np.dtype[Any]]):
    """An array whose bytes are the daemon's: a view of shared memory.

    It raises ``ClosedError`` once its attachment is closed, and so does every view made from it by NumPy
    (slices, ``reshape``, ``.T``). Results of computations and copies are ordinary arrays and stay.
    ``np.asarray(array)`` and ``array.view(np.ndarray)`` shed the check: such a view stays readable, since
    the mapping lives as long as anything refers to it.
    """

    __slots__ = ("_attached",)
    _attached: Attached | None

    def __array_finalize__(self, template: Any) -> None:
        # An array that owns its bytes is a copy, and outlives the attachment.
        if template is None or self.flags.owndata:
            self._attached = None
        else:
            self._attached = getattr(template, "_attached", None)

    def _check(self) -> None:
        if self._attached is not None:
            self._attached.check_open()

    def _plain(self) -> np.ndarray[Any, np.dtype[Any]]:
        self._check()
        return np.ndarray.view(self, np.ndarray)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out", ())
        if out:
            kwargs["out"] = tuple(_plain(array) for array in out)
        if "where" in kwargs:
            kwargs["where"] = _plain(kwargs["where"])
        result = getattr(ufunc, method)(*(_plain(value) for value in inputs), **kwargs)
        return out[0] if len(out) == 1 and out[0] is not None else result

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        _check_all(args)
        _check_all(kwargs.values())
        return super().__array_function__(func, types, args, kwargs)

    def __repr__(self) -> str:
        if self._attached is not None and self._attached.closed:
            return f"<closed vramd.Array, {self.dtype} {self.shape}>"
        return super().__repr__()

    def __str__(self) -> str:
        if self._attached is not None and self._attached.closed:
            return repr(self)
        return super().__str__()

    def __reduce__(self) -> Any:
        return self._plain().copy().__reduce__()


def _plain(value: Any) -> Any:
    return value._plain() if isinstance(value, Array) else value


def _check_all(values: Any) -> None:
    for value in values:
        if isinstance(value, Array):
            value._check()
        elif isinstance(value, (list, tuple)):
            _check_all(value)


def _guarded(name: str) -> Callable[..., Any]:
    method = getattr(np.ndarray, name)

    @functools.wraps(method)
    def guarded(self: Array, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return method(self, *args, **kwargs)

    return guarded


# The methods that read or write elements without passing through a ufunc.
for _name in (
    "__bool__", "__complex__", "__contains__", "__copy__", "__deepcopy__", "__float__", "__getitem__",
    "__index__", "__int__", "__iter__", "__setitem__", "argmax", "argmin", "argpartition", "argsort",
    "astype", "byteswap", "choose", "compress", "copy", "diagonal", "dot", "dump", "dumps", "fill", "flatten",
    "item", "nonzero", "partition", "put", "ravel", "repeat", "reshape", "round", "searchsorted", "sort",
    "take", "tobytes", "tofile", "tolist", "trace", "transpose",
):  # fmt: skip
    setattr(Array, _name, _guarded(_name))


@functools.cache
def dtype_of(name: str) -> np.dtype[Any] | None:
    """NumPy's dtype for a dtype of the tensor table; ``None`` if there is none here."""
    if name in _NATIVE:
        return np.dtype(_NATIVE[name])
    if name in _ML_DTYPES:
        try:
            import ml_dtypes
        except ImportError:
            return None
        found = getattr(ml_dtypes, _ML_DTYPES[name], None)
        return None if found is None else np.dtype(found)
    return None


def array(attached: Attached, row: Row, buffer: Any, base: int) -> Array:
    """The tensor as a view of ``buffer``, in which its block begins at ``base``."""
    name, dtype_name, shape, offset, size = row
    if dtype_name in BLOCKS:
        check_row(row, attached.nbytes)
        dtype_name, shape = "U8", packed_shape(dtype_name, shape)
    dtype = dtype_of(dtype_name)
    if dtype is None:
        raise _unsupported(name, dtype_name)
    try:
        view: Array = Array(shape, dtype, buffer, base + offset)
    except (TypeError, ValueError):
        check_row(row, attached.nbytes)
        raise
    if view.nbytes != size or not 0 <= offset <= attached.nbytes - size:
        check_row(row, attached.nbytes)
    view._attached = attached
    return view


def _unsupported(name: str, dtype: str) -> UnsupportedDtype:
    if dtype in _ML_DTYPES:
        return UnsupportedDtype(
            f"NumPy has no {dtype} of its own, which tensor {name!r} needs",
            hint='install a recent ml_dtypes (pip install -U ml_dtypes), or attach with framework="torch"',
        )
    return UnsupportedDtype(
        f"NumPy has no {dtype}, which tensor {name!r} has", hint=f"raw({name!r}) gives its packed bytes"
    )
