"""Attaching a resident model, and the first touch of its bytes."""

from __future__ import annotations

import json
import mmap
import os
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

import vramd

from .machine import MODEL, Daemon, Setup, median, p99, read_all
from .memfd import Holder
from .table import Aim, Row, Table

PAGE = 4096


class Opened(NamedTuple):
    """What an attach gave: arrays by name, and what ends it."""

    arrays: dict[str, Any]
    close: Callable[[], None] = lambda: None


def with_vramd(path: str) -> Opened:
    weights = vramd.attach(MODEL, socket=path)
    return Opened({name: weights[name] for name in weights}, weights.close)


def memfd_by_hand(path: str) -> Opened:
    """The least that can be done: receive, parse, map, and an array for each row. Nothing is checked."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    size, (descriptor,), _, _ = socket.recv_fds(connection, 8, 1)
    rows = json.loads(connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
    buffer = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    os.close(descriptor)
    kinds = {"F16": np.dtype("<f2")}
    arrays = {name: np.ndarray(shape, kinds[kind], buffer, offset) for name, kind, shape, offset in rows}
    return Opened(arrays, connection.close)


def mapped_file(path: Path) -> Opened:
    """The file mapped, as frameworks do that bring their own reader of the format."""
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    payload = 8 + int.from_bytes(buffer[:8], "little")
    header = json.loads(buffer[8:payload])
    kind = np.dtype("<f2")
    rows = ((name, row["shape"], payload + row["data_offsets"][0]) for name, row in header.items())
    return Opened({name: np.ndarray(shape, kind, buffer, offset) for name, shape, offset in rows})


def safetensors_slices(path: Path) -> Opened:
    """`safe_open` and a handle of each tensor: its dtype and shape, no array yet."""
    file: Any = safe_open(path, framework="np")
    names = file.keys()
    return Opened({name: file.get_slice(name) for name in names})


def safetensors_arrays(path: Path) -> Opened:
    """`safe_open` and an array of each tensor: for NumPy that is a copy."""
    with safe_open(path, framework="np") as file:
        names = file.keys()
        return Opened({name: file.get_tensor(name) for name in names})


def measure(setup: Setup, table: Table) -> None:
    with Daemon(setup) as daemon, Holder(setup.model) as holder:
        daemon.hold(setup)
        read_all(setup.model)
        views: dict[str, Callable[[], Opened]] = {
            "vramd": partial(with_vramd, str(daemon.socket)),
            "memfd by hand, 4 KiB pages": partial(memfd_by_hand, holder.path),
            "warm file mapped by hand": partial(mapped_file, setup.model),
        }
        _compare(views)
        _attach(
            setup,
            table,
            views | {"safetensors `get_slice`, no arrays": partial(safetensors_slices, setup.model)},
        )
        _copies(setup, table, views["vramd"], partial(safetensors_arrays, setup.model))
        _touch(setup, table, views)


def _compare(views: dict[str, Callable[[], Opened]]) -> None:
    """Ends the run if the contestants do not give the same arrays."""
    first, *others = (attach() for attach in views.values())
    for other in others:
        for name, array in first.arrays.items():
            theirs = other.arrays[name]
            if array.shape != theirs.shape or not np.array_equal(
                _bytes(array)[::PAGE], _bytes(theirs)[::PAGE]
            ):
                raise SystemExit(f"{name} differs: what is measured is not the same")
    for opened in (first, *others):
        opened.close()


def _attach(setup: Setup, table: Table, contestants: dict[str, Callable[[], Opened]]) -> None:
    times: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(setup.rounds(400)):
        for who, attach in contestants.items():
            begin = time.perf_counter()
            opened = attach()
            for array in opened.arrays.values():
                _ = array.shape if isinstance(array, np.ndarray) else array.get_shape()
            times[who].append((time.perf_counter() - begin) * 1e3)
            opened.close()
    rows = [Row(who, median(taken), p99(taken)) for who, taken in times.items()]
    ours, by_hand = rows[0], rows[1]
    met = ours.median <= 2 and (ours.p99 or 0) <= 5 and ours.median <= by_hand.median + 0.5
    aim = Aim("p50 ≤ 2, p99 ≤ 5, ≤ memfd by hand + 0.5", met)
    table.add("attach, to 400 NumPy arrays", "ms", rows, aim)


def _copies(setup: Setup, table: Table, ours: Callable[[], Opened], theirs: Callable[[], Opened]) -> None:
    rows = []
    for who, attach in (("vramd", ours), ("safetensors `get_tensor`, warm file", theirs)):
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            opened = attach()
            for array in opened.arrays.values():
                np.bitwise_or.reduce(_bytes(array)[::PAGE])
            taken.append((time.perf_counter() - begin) * 1e3)
            opened.close()
            del opened, array
        rows.append(Row(who, median(taken)))
    table.add("attach and touch every page", "ms", rows)


def _touch(setup: Setup, table: Table, contestants: dict[str, Callable[[], Opened]]) -> None:
    touched: dict[str, list[float]] = {who: [] for who in contestants}
    summed: dict[str, list[float]] = {who: [] for who in contestants}
    faults: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(setup.rounds(7)):
        for who, attach in contestants.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            touched[who].append(_over(attach, lambda array: np.bitwise_or.reduce(array[::PAGE])))
            faults[who].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            summed[who].append(_over(attach, lambda array: np.add.reduce(array.view(np.uint64))))
    for measure, unit, figures in (
        ("first touch of every page", "ms", touched),
        ("page faults in it", "faults", faults),
        ("first sum of all bytes", "ms", summed),
    ):
        table.add(measure, unit, [Row(who, median(values)) for who, values in figures.items()])


def _over(attach: Callable[[], Opened], work: Callable[[Any], Any]) -> float:
    opened = attach()
    arrays = [_bytes(array) for array in opened.arrays.values()]
    begin = time.perf_counter()
    for array in arrays:
        work(array)
    taken = (time.perf_counter() - begin) * 1e3
    opened.close()
    return taken


def _bytes(array: Any) -> Any:
    return np.asarray(array).reshape(-1).view(np.uint8)
