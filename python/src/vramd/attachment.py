"""Attaching: a connection to the daemon that is the lease, and the mapping that it gives.

    Unconnected ── attach ──▶ Open ── close, end of the process ──▶ Closed
                     └─ an error: nothing is left

Owns the connection and the mapping. What becomes of the bytes is ``arrays`` (NumPy) and ``tensors`` (torch).
A mapping is never unmapped by hand: it goes when the last array over it goes, so no access can fault. Moves
of its bytes to another place are the business of ``moves``.
"""

from __future__ import annotations

import mmap
import os
import socket as sockets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, overload

from . import cuda, frames, moves
from .errors import ClosedError, ConnectionFailed, ProtocolError, Timeout, VramdError, from_body
from .frames import Reply, Row, Tensor

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from .arrays import Array
    from .bodies import Access

Framework = Literal["numpy", "torch", "cuda"]

#: What the daemon holds for an attachment, as this process has it.
Buffer = mmap.mmap | bytes | cuda.Imported

#: The descriptors that each framework can use; the daemon gives no others.
_HANDLES = {"numpy": ["memfd"], "torch": ["memfd", cuda.HANDLE], "cuda": [cuda.HANDLE]}
T = TypeVar("T")

# Python's mmap has the name since 3.13 only; the value is Linux's on every architecture that it knows.
_MAP_NORESERVE = 0x4000


def default_socket() -> str:
    """Where the daemon listens unless it was told otherwise: ``VRAMD_SOCKET``, or the place of this user."""
    if configured := os.environ.get("VRAMD_SOCKET"):
        return configured
    if os.geteuid() == 0:
        return "/run/vramd/vramd.sock"
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/vramd/vramd.sock"
    # Not under /tmp: there another user could serve in our place.
    return os.path.expanduser("~/.local/state/vramd/vramd.sock")


class Attached:
    """What attachments of models and of allocations share: the lease, the mapping, and their end."""

    def __init__(
        self,
        connection: sockets.socket,
        reply: Reply,
        buffer: Buffer,
        base: int,
        private: bool = False,
    ) -> None:
        self._connection: sockets.socket | None = connection
        self._reply = reply
        self._buffer: Buffer | None = buffer
        self._base = base
        self._private = private
        #: Why this attachment follows no moves.
        self._fixed: str | None = None
        self._ended: str | None = None
        self.nbytes: Final = reply.bytes

    @property
    def lease_id(self) -> str:
        return self._reply.lease_id

    @property
    def allocation_id(self) -> str:
        return self._reply.allocation_id

    @property
    def device(self) -> str:
        return self._reply.device

    @property
    def generation(self) -> int:
        """Counts up whenever the bytes get a new place or new contents.

        A new place changes nothing for who reads: the same arrays have the same bytes at the same addresses.
        """
        return self._reply.generation

    @property
    def closed(self) -> bool:
        return self._connection is None

    @property
    def ended(self) -> str | None:
        """Why the daemon is not heard of any more; ``None`` while it is, or with ``moves=False``.

        When the daemon is gone, the bytes stay as they are. When it has ended the attachment by force
        (``vramd clear --force``), they may soon be others'.
        """
        return self._ended

    def close(self) -> None:
        """Ends the lease at once. The pages go with the last array that refers to them."""
        connection, buffer, self._connection, self._buffer = self._connection, self._buffer, None, None
        if connection is not None:
            try:
                if isinstance(buffer, cuda.Imported):
                    # The daemon may give the bytes to others: whoever computes with them ends first. A card
                    # that fails computes nothing.
                    with suppress(cuda.CudaError):
                        buffer.synchronize()
            finally:
                moves.forget(connection)
                connection.close()

    def check_open(self) -> None:
        if self._connection is None:
            raise ClosedError(f"{self} is closed", hint="use its arrays inside the with block, or copy them")

    def _open_buffer(self) -> Buffer:
        self.check_open()
        assert self._buffer is not None
        return self._buffer

    def _slice(self, offset: int, size: int) -> memoryview:
        start = self._base + offset
        buffer = self._open_buffer()
        if isinstance(buffer, cuda.Imported):
            return memoryview(buffer.copy(start, size)).toreadonly()
        return memoryview(buffer)[start : start + size]

    def __enter__(self) -> Self:
        self.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.closed:
            warnings.warn(f"unclosed {self}", ResourceWarning, stacklevel=1, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<vramd.{type(self).__name__} {self._subject()} on {self.device}, {self.nbytes} bytes>"

    def _subject(self) -> str:
        return self.allocation_id


class Attachment(Attached, Mapping[str, T], Generic[T]):
    """A model's component, attached: a mapping from tensor names to arrays over the daemon's own memory.

    Each access makes a new view, in about a microsecond. After ``close`` every access raises ``ClosedError``.
    """

    def __init__(
        self,
        connection: sockets.socket,
        reply: Reply,
        buffer: Buffer,
        base: int,
        framework: Framework,
    ) -> None:
        super().__init__(connection, reply, buffer, base, private=framework == "torch")
        self._tensors = reply.tensors
        self._framework = framework
        self._view: Callable[[Attached, Row, Any, int], T] | None = None

    @property
    def model(self) -> str:
        return self._reply.model or ""

    @property
    def component(self) -> str:
        return self._reply.component or ""

    @property
    def metadata(self) -> dict[str, str]:
        """``__metadata__`` of the model's file."""
        return self._reply.metadata

    def info(self, name: str) -> Tensor:
        """Name, dtype (as the file has it: ``BF16``, ``F8_E4M3``), shape, offset and bytes of a tensor."""
        row = self._tensors[name]
        frames.check_row(row, self.nbytes)
        name, dtype, shape, offset, size = row
        return Tensor(name, dtype, tuple(shape), offset, size)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only; of any dtype, packed ones too. Of a card, a copy."""
        tensor = self.info(name)
        return self._slice(tensor.offset, tensor.bytes).toreadonly()

    def __getitem__(self, name: str) -> T:
        if self._buffer is None:
            self.check_open()
        if self._view is None:
            self._view = self._load_framework()
        return self._view(self, self._tensors[name], self._buffer, self._base)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _subject(self) -> str:
        return f"{self.model}/{self.component}"

    def _load_framework(self) -> Callable[[Attached, Row, Any, int], Any]:
        if self._framework == "torch":
            from . import tensors

            return tensors.tensor
        if self._framework == "cuda":
            return cuda.array
        from . import arrays

        return arrays.array


class AllocationAttachment(Attached):
    """An allocation's bytes, attached: shared with everyone else who has it attached."""

    @property
    def buffer(self) -> memoryview:
        """All bytes; writable when it was attached for writing. Of a card, a copy that is read-only."""
        return self._slice(0, self.nbytes)

    @property
    def array(self) -> Any:
        """All bytes as an array of ``uint8``: NumPy's, or ``vramd.cuda.Array`` of a card."""
        whole = (self.allocation_id, "U8", (self.nbytes,), 0, self.nbytes)
        buffer = self._open_buffer()
        if isinstance(buffer, cuda.Imported):
            return cuda.array(self, whole, buffer, self._base)
        from . import arrays

        return arrays.array(self, whole, buffer, self._base)


@overload
def attach(
    model: str,
    device: str | None = None,
    *,
    component: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    framework: Literal["numpy"] = "numpy",
    access: Access = "read",
    moves: bool = True,
    timeout: float = 10.0,
) -> Attachment[Array]: ...


@overload
def attach(
    model: str,
    device: str | None = None,
    *,
    component: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    framework: Literal["torch"],
    access: Access = "read",
    moves: bool = True,
    timeout: float = 10.0,
) -> Attachment[torch.Tensor]: ...


@overload
def attach(
    model: str,
    device: str | None = None,
    *,
    component: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    framework: Literal["cuda"],
    access: Access = "read",
    moves: bool = True,
    timeout: float = 10.0,
) -> Attachment[cuda.Array]: ...


def attach(
    model: str,
    device: str | None = None,
    *,
    component: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    framework: Framework = "numpy",
    access: Access = "read",
    moves: bool = True,
    timeout: float = 10.0,
) -> Attachment[Any]:
    """Attaches a resident model: ``"sdxl/unet"`` names a component, ``"sdxl"`` its only one.

    >>> with vramd.attach("minilm") as weights:
    ...     table = weights["embeddings.word_embeddings.weight"]  # no copy: the daemon's own pages
    ...     vector = table[101] / np.linalg.norm(table[101])

    ``device`` is needed when the component is resident on more than one. With ``framework="torch"`` the
    values are tensors over a private, copy-on-write mapping: a write is seen by this process alone, and takes
    a page of memory (a huge page, where the daemon uses these; without a free one the kernel ends the
    process, so ``clone()`` what you mean to change).

    What is on an NVIDIA card is attached with ``framework="torch"``, or with ``"cuda"`` for anyone else who
    knows ``__cuda_array_interface__``. It is the memory itself, in every process that has it: do not write to
    it.

    The daemon may give the bytes another place meanwhile: the arrays stay as they are, at their addresses. (A
    private mapping that was written to stays where it is; a first write at the very moment of a move may be
    lost.) ``moves=False`` keeps the bytes where they are: for memory that the kernel or a device reads by
    itself (``O_DIRECT``, ``io_uring`` buffers, RDMA, registered with CUDA) or that is locked: those keep the
    old pages.

    The attachment keeps the model resident until ``close``, or until the process ends in whatever way. After
    a fork the child has it too, and the lease ends when both have closed it.
    """
    if framework not in _HANDLES:
        raise ValueError(f'framework must be "numpy", "torch" or "cuda", not {framework!r}')
    name, slash, part = model.partition("/")
    if slash and component is not None:
        raise ValueError(f"{model!r} names a component already; leave out component={component!r}")
    request: dict[str, Any] = {
        "model": name,
        "component": part if slash else component,
        "deviceId": device,
        "access": access,
        "moves": moves,
        "handles": _HANDLES[framework] if framework != "numpy" else None,
    }

    def build(connection: sockets.socket, reply: Reply, buffer: Buffer, base: int) -> Attachment[Any]:
        return Attachment(connection, reply, buffer, base, framework)

    return _attach(request, socket, timeout, framework == "torch", build)


def attach_allocation(
    allocation_id: str,
    *,
    socket: str | os.PathLike[str] | None = None,
    framework: Literal["numpy", "cuda"] = "numpy",
    access: Access = "read",
    moves: bool = True,
    timeout: float = 10.0,
) -> AllocationAttachment:
    """Attaches an allocation; with ``access="write"`` its bytes can be written, and others see it at once.

    ``framework="cuda"`` is for what is on an NVIDIA card. ``moves`` is as for ``attach``; what is attached
    for writing is never moved.

    >>> with vramd.attach_allocation(allocation["allocationId"], access="write") as shared:
    ...     shared.buffer[:5] = b"hello"
    """
    if framework not in ("numpy", "cuda"):
        raise ValueError(f'framework must be "numpy" or "cuda", not {framework!r}')
    request: dict[str, Any] = {
        "allocationId": allocation_id,
        "access": access,
        "moves": moves,
        "handles": _HANDLES[framework] if framework != "numpy" else None,
    }
    return _attach(request, socket, timeout, False, AllocationAttachment)


A = TypeVar("A", bound=Attached)


def _attach(
    request: Mapping[str, Any],
    socket: str | os.PathLike[str] | None,
    timeout: float,
    private: bool,
    build: Callable[[sockets.socket, Reply, Buffer, int], A],
) -> A:
    frame = frames.encode(frames.ATTACH, {key: value for key, value in request.items() if value is not None})
    connection = _connect(os.fspath(socket or default_socket()), frame, timeout)
    try:
        kind, body, descriptors = frames.receive(connection)
        try:
            if kind == frames.ERROR:
                raise _refused(body)
            if kind != frames.ATTACHED:
                raise ProtocolError(f"the daemon answered with a frame of kind {kind}")
            reply = frames.read_reply(body, len(descriptors))
            if reply.access != request["access"]:
                raise ProtocolError(f"asked for {request['access']} access, the daemon gave {reply.access}")
            sent = "memfd" if reply.handle is None else reply.handle["type"]
            if sent not in (request.get("handles") or ["memfd"]):
                raise ProtocolError(f"the daemon sent a {sent}, which nobody asked for")
            buffer, base = _map(reply, descriptors[reply.segment], private)
        finally:
            frames.close_all(descriptors)
        connection.settimeout(None)
        attached = build(connection, reply, buffer, base)
        if reply.handle is not None:
            attached._fixed = "memory of a card stays at its address only while it stays where it is"
        if request["moves"]:
            moves.follow(connection, attached)
        return attached
    except BaseException:
        connection.close()
        raise


def _refused(body: Any) -> VramdError:
    error = from_body(body)
    if error.details.get("handle") == cuda.HANDLE:
        error.hint = 'attach it with framework="torch" or "cuda", or load it on cpu:0'
    return error


def _connect(path: str, frame: bytes, timeout: float) -> sockets.socket:
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(path)
        connection.sendall(frame)
    except TimeoutError as error:
        connection.close()
        raise Timeout(f"no connection to the daemon at {path} in {timeout} s", retryable=True) from error
    except OSError as error:
        connection.close()
        raise ConnectionFailed(
            f"no connection to the daemon at {path}: {error.strerror or error}",
            hint="is vramd serve running, and is this its socket? (VRAMD_SOCKET names another)",
            retryable=True,
        ) from error
    return connection


def _map(reply: Reply, descriptor: int, private: bool) -> tuple[Buffer, int]:
    """Maps the pages that hold the block; answers with the mapping and where in it the block begins."""
    if reply.handle is not None:
        return cuda.Imported(descriptor, reply.segment_bytes, reply.handle), reply.offset
    if reply.bytes == 0:
        return b"", 0
    start = reply.offset - reply.offset % reply.page_bytes
    end = -(-(reply.offset + reply.bytes) // reply.page_bytes) * reply.page_bytes
    if private:
        # Nothing is reserved for copies that are never made: huge pages above all are the daemon's to use.
        flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    elif reply.access == "write":
        flags, protection = mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
    else:
        flags, protection = mmap.MAP_SHARED, mmap.PROT_READ
    try:
        mapping = mmap.mmap(descriptor, end - start, flags=flags, prot=protection, offset=start)
    except (OSError, ValueError) as error:  # ValueError: the file behind the descriptor is shorter
        raise ProtocolError(
            f"bytes {start} to {end} of the daemon's segment cannot be mapped: {error}"
        ) from error
    return mapping, reply.offset - start
