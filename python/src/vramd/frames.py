"""The frames of the attach protocol; ``protocol/attach.md`` is its document.

Owns the layout, the reading of one frame with its descriptors, and the checks of the daemon's answer. Leaves
out connections and mappings.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import ProtocolError, Timeout

MAGIC = b"VRMD"
VERSION = 1
HEADER = struct.Struct("<4sHHII")
ATTACH, ATTACHED, ERROR, MOVED, ACKNOWLEDGE = 1, 2, 3, 4, 5
MAX_REQUEST_BYTES = 64 << 10
MAX_REPLY_BYTES = 256 << 20
MAX_DESCRIPTORS = 253

#: For each kind: the longest body, the most descriptors.
_BOUNDS = {
    ATTACH: (MAX_REQUEST_BYTES, 0),
    ATTACHED: (MAX_REPLY_BYTES, MAX_DESCRIPTORS),
    ERROR: (MAX_REQUEST_BYTES, 0),
    MOVED: (MAX_REQUEST_BYTES, MAX_DESCRIPTORS),
    ACKNOWLEDGE: (MAX_REQUEST_BYTES, 0),
}

#: Bits of one element, by dtype. A dtype that is not here was added later: its bytes can still be had.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

#: Elements and bytes of one block, by the dtypes of GGUF files that pack elements into blocks.
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q8_1": (32, 36), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "Q8_K": (256, 292), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36),
    "Q1_0": (128, 18),
}  # fmt: skip


class Header(NamedTuple):
    kind: int
    body_bytes: int
    descriptors: int


class Tensor(NamedTuple):
    """What is known of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: From the beginning of the block.
    offset: int
    bytes: int


#: ``socket.recvmsg``, or what answers like it.
Recvmsg = Callable[[int, int, int], tuple[bytes, list[tuple[int, int, bytes]], int, Any]]

#: One row of the tensor table: what ``Tensor`` has, in its order.
Row = Sequence[Any]


class Reply(NamedTuple):
    """The daemon's answer, checked: its figures fit each other."""

    lease_id: str
    device: str
    allocation_id: str
    generation: int
    model: str | None
    component: str | None
    access: str
    segment: int
    segment_bytes: int
    page_bytes: int
    offset: int
    bytes: int
    #: By name, as they were sent.
    tensors: dict[str, Row]
    metadata: dict[str, str]
    #: What the segment's descriptor is; ``None`` for a memfd.
    handle: dict[str, Any] | None


def encode(kind: int, body: Mapping[str, Any], descriptors: int = 0) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return HEADER.pack(MAGIC, VERSION, kind, len(text), descriptors) + text


def decode_header(data: bytes) -> Header:
    magic, version, kind, body_bytes, descriptors = HEADER.unpack(data)
    if magic != MAGIC:
        raise ProtocolError("the frame does not begin with VRMD", hint="is this the socket of vramd?")
    if version != VERSION:
        raise ProtocolError(f"the frame has version {version}; this side speaks version {VERSION}")
    if kind not in _BOUNDS:
        raise ProtocolError(f"there is no frame of kind {kind}")
    body_limit, descriptor_limit = _BOUNDS[kind]
    if body_bytes > body_limit:
        raise ProtocolError(f"the frame's body has {body_bytes} bytes; at most {body_limit} are allowed")
    if descriptors > descriptor_limit:
        raise ProtocolError(
            f"the frame announces {descriptors} descriptors; at most {descriptor_limit} are allowed"
        )
    return Header(kind, body_bytes, descriptors)


def receive(connection: socket.socket) -> tuple[int, Any, list[int]]:
    """Reads one frame: kind, body as JSON, and descriptors, which are then the caller's to close."""
    descriptors: list[int] = []
    try:
        # Reading no further than the header keeps what follows it for plain reads.
        data, dropped = _read(connection.recvmsg, HEADER.size, descriptors)
        if dropped:
            raise ProtocolError(_DROPPED, hint=_DROPPED_HINT)
        if not data:
            raise ProtocolError("the daemon closed the connection before it answered")
        header = _arrived(data + _receive_exactly(connection, HEADER.size - len(data)), descriptors)
        return header.kind, _json(_receive_exactly(connection, header.body_bytes)), descriptors
    except BaseException as error:
        close_all(descriptors)
        if isinstance(error, TimeoutError):
            raise Timeout("the daemon did not answer the attach request in time", retryable=True) from error
        if isinstance(error, OSError):
            raise ProtocolError(f"the connection broke within a frame: {error}") from error
        raise


_DROPPED = "the kernel dropped descriptors of the frame"
_DROPPED_HINT = "this process has too many open files: raise RLIMIT_NOFILE (ulimit -n)"


class Move(NamedTuple):
    """A whole ``Moved`` frame."""

    body: Any
    #: The caller's to close.
    descriptors: list[int]
    #: Why it cannot be followed, whatever its body says.
    problem: str | None


class Moves:
    """The ``Moved`` frames of one connection, read without waiting for what has not come yet.

    One comes only after the one before was acknowledged, so each is alone on its connection.
    """

    def __init__(self) -> None:
        self._begun = b""
        self._descriptors: list[int] = []
        self._dropped = False

    def read(self, recvmsg: Recvmsg) -> Move | None:
        """Reads once; the move, when that makes it whole.

        Raises ``EOFError`` when the connection ended, and not within a frame.
        """
        try:
            size = HEADER.size + MAX_REQUEST_BYTES - len(self._begun)
            data, dropped = _read(recvmsg, size, self._descriptors)
        except BlockingIOError:
            return None
        if not data and not self._begun:
            raise EOFError
        if not data:
            raise ProtocolError("the connection ended within a frame")
        self._begun += data
        self._dropped |= dropped
        if len(self._begun) < HEADER.size:
            return None
        header, body = decode_header(self._begun[: HEADER.size]), self._begun[HEADER.size :]
        if header.kind != MOVED:
            raise ProtocolError(f"the daemon sent a frame of kind {header.kind} to an attachment")
        if len(body) < header.body_bytes:
            return None
        if len(body) > header.body_bytes:
            raise ProtocolError("more came than one frame, which was not answered yet")
        came = len(self._descriptors)
        problem = None
        if self._dropped:
            problem = f"{_DROPPED}: {_DROPPED_HINT}"
        elif came != header.descriptors:
            problem = f"the frame announces {header.descriptors} descriptors and {came} came"
        move = Move(_json(body), self._descriptors, problem)
        self.__init__()  # type: ignore[misc]
        return move

    def close(self) -> None:
        close_all(self._descriptors)


def close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _read(recvmsg: Recvmsg, size: int, descriptors: list[int]) -> tuple[bytes, bool]:
    """Reads once, and takes the descriptors that come with it; whether the kernel dropped some, too."""
    fds = array("i")
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * fds.itemsize)
    data, ancillary, flags, _ = recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    descriptors.extend(fds)
    return data, bool(flags & socket.MSG_CTRUNC)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if count == 0:
            raise ProtocolError(f"the connection ended {len(rest)} bytes before the end of the frame")
        rest = rest[count:]
    return bytes(data)


def _arrived(data: bytes, descriptors: list[int]) -> Header:
    """A header, held to the descriptors that came with it."""
    header = decode_header(data)
    if len(descriptors) != header.descriptors:
        raise ProtocolError(
            f"the frame announces {header.descriptors} descriptors and {len(descriptors)} came"
        )
    return header


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the frame's body is not JSON: {error}") from error


def read_reply(body: Any, descriptors: int) -> Reply:
    """Holds the body of an ``Attached`` frame to its own figures."""
    try:
        reply = _reply(body)
        if len(body["segments"]) != descriptors:
            raise ProtocolError(f"{descriptors} descriptors came for {len(body['segments'])} segments")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ProtocolError(f"the daemon's answer is malformed: {error!r}") from error
    return reply


def generation(body: Any) -> int:
    """The generation of a ``Moved``: without it there is no answer."""
    try:
        return _natural(body["generation"], "generation")
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the daemon's move is malformed: {error!r}") from error


def read_moved(body: Any, descriptors: int, before: Reply) -> Reply:
    """Holds the body of a ``Moved`` frame to its own figures and to what is mapped; the new reply."""
    try:
        segment, segment_bytes, page_bytes, offset, size = _place(body)
        if len(body["segments"]) != descriptors:
            raise ProtocolError(f"{descriptors} descriptors came for {len(body['segments'])} segments")
        moved = before._replace(
            device=_text(body["deviceId"]),
            generation=_natural(body["generation"], "generation"),
            segment=segment,
            segment_bytes=segment_bytes,
            offset=offset,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ProtocolError(f"the daemon's move is malformed: {error!r}") from error
    if _handle(body["segments"][segment]) != before.handle:
        raise ProtocolError("a block cannot move to a segment of another kind")
    if (size, page_bytes) != (before.bytes, before.page_bytes):
        raise ProtocolError(f"a block of {before.bytes} bytes cannot move to one of {size}")
    if (offset - before.offset) % page_bytes:
        raise ProtocolError(
            f"from byte {before.offset} to {offset} is no move by whole pages of {page_bytes}"
        )
    if moved.generation <= before.generation:
        raise ProtocolError(f"generation {moved.generation} cannot come after {before.generation}")
    return moved


def _place(body: Any) -> tuple[int, int, int, int, int]:
    """Where the bytes are: segment, its bytes and those of its pages, offset, bytes."""
    block = body["block"]
    index = _natural(block["segment"], "block.segment")
    segment = body["segments"][index]
    segment_bytes = _natural(segment["bytes"], "segment.bytes")
    page_bytes = _natural(segment["pageBytes"], "segment.pageBytes")
    offset = _natural(block["offset"], "block.offset")
    size = _natural(block["bytes"], "block.bytes")
    if page_bytes == 0 or page_bytes % mmap.ALLOCATIONGRANULARITY or segment_bytes % page_bytes:
        raise ProtocolError(f"a segment of {segment_bytes} bytes in pages of {page_bytes} cannot be mapped")
    if offset + size > segment_bytes:
        raise ProtocolError(
            f"the block ends at byte {offset + size}, behind its segment of {segment_bytes} bytes"
        )
    return index, segment_bytes, page_bytes, offset, size


def _reply(body: Any) -> Reply:
    segment, segment_bytes, page_bytes, offset, size = _place(body)
    rows = body["tensors"]
    tensors = {row[0]: row for row in rows}
    if len(tensors) != len(rows):
        raise ProtocolError("the tensor table names a tensor twice")
    # Whether a row fits its block is checked when its tensor is used: NumPy does most of that anyway, and for
    # all rows here it would take a sixth of an attach.
    if not {*map(len, rows)} <= {5}:
        raise ProtocolError("the tensor table has a row that is not [name, dtype, shape, offset, bytes]")
    return Reply(
        lease_id=_text(body["leaseId"]),
        device=_text(body["deviceId"]),
        allocation_id=_text(body["allocationId"]),
        generation=_natural(body["generation"], "generation"),
        model=body.get("model"),
        component=body.get("component"),
        access=_text(body["access"]),
        segment=segment,
        segment_bytes=segment_bytes,
        page_bytes=page_bytes,
        offset=offset,
        bytes=size,
        tensors=tensors,
        metadata=dict(body.get("metadata", {})),
        handle=_handle(body["segments"][segment]),
    )


def _handle(segment: Any) -> dict[str, Any] | None:
    handle = segment.get("handle")
    if handle is not None:
        _text(handle["type"])
    return None if handle is None or handle["type"] == "memfd" else dict(handle)


def check_row(row: Row, block_bytes: int) -> None:
    """Holds a row of the tensor table to its own figures and to its block."""
    name, dtype, shape, offset, size = row
    for value in (*shape, offset, size):
        _natural(value, f"a figure of tensor {name!r}")
    if offset + size > block_bytes:
        raise ProtocolError(
            f"tensor {name!r} ends at byte {offset + size}, behind its block of {block_bytes} bytes"
        )
    if dtype in BLOCKS:
        has = math.prod(packed_shape(dtype, shape)) == size
    else:
        has = dtype not in BITS or math.prod(shape) * BITS[dtype] == size * 8
    if not has:
        raise ProtocolError(f"tensor {name!r}, {math.prod(shape)} times {dtype}, does not have {size} bytes")


def packed_shape(dtype: str, shape: Sequence[int]) -> list[int]:
    """The shape of a packed tensor as bytes: its last dimension counts those of a row."""
    elements, size = BLOCKS[dtype]
    if not shape or shape[-1] % elements:
        raise ProtocolError(f"a row of {list(shape)} is no number of blocks of {dtype}")
    return [*shape[:-1], shape[-1] // elements * size]


def _natural(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{name} is {value!r}, not a natural number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"the daemon's answer has {value!r} where a text belongs")
    return value
