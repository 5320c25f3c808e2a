"""Copies within a Vulkan device and from one to another, beside bare programs and a plain copy."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import vramd

from .machine import Daemon, Setup, median, say
from .table import Aim, Row, Table

BYTES = 256 << 20
AIM = 0.95
# What is handed out: so much in segments of that size, or what the device has room for.
SHARED = 4 << 30
SEGMENT = 64 << 20
OVERLAP = 1.5


def measure(setup: Setup, table: Table) -> None:
    with Daemon(setup, "--vulkan", "all") as daemon:
        devices = [one for one in daemon.client.devices() if one["deviceId"].startswith("vulkan:")]
        if not devices:
            say("no Vulkan driver is installed: nothing is measured")
        for device in devices:
            _copies(setup, daemon.client, device, table)
            if device["capabilities"]["handle"]:
                _attached(setup, daemon, device, table)
        for source in devices:
            for target in devices:
                if source is not target:
                    _between(setup, daemon.client, source, target, table)


def _copies(setup: Setup, client: vramd.Client, device: Any, table: Table) -> None:
    name = device["deviceId"]
    say(f"{name}: {device['name']}")
    source, target = (
        client.allocate(BYTES, device=name, lease_seconds=3600)["allocationId"] for _ in range(2)
    )
    ours: list[float] = []
    bare: list[float] = []
    plain: list[float] = []
    for number in range(setup.rounds(5) + 1):
        copied = client.copy(source, target)
        rate = copied["bytesPerSecond"] / 1e9
        programs = ["vulkan", name.partition(":")[2], "--bytes", str(BYTES), "--rounds", "3"]
        found = _run(setup, *programs)
        assert found["name"] == device["name"], f"{name} is another adapter there: {found['name']}"
        memcpy = _run(setup, "copier", "--block", str(1 << 20), "--total", str(BYTES), "--threads", "1")
        if number > 0:  # the first warms up
            ours.append(rate)
            bare += [one / 1e9 for one in found["bytesPerSecond"]]
            plain.append(memcpy["bytesPerSecond"] / 1e9)
    for one in (source, target):
        client.release(one)
    aim = Aim(f"≥ {AIM} of the bare program", median(ours) >= AIM * median(bare))
    rows = [
        Row("vramd", median(ours)),
        Row("bare `vkCmdCopyBuffer`", median(bare)),
        Row("memcpy, one thread", median(plain)),
    ]
    table.add(f"256 MiB copied on {device['name']}", "GB/s", rows, aim, more_is_better=True)


def _between(setup: Setup, client: vramd.Client, source: Any, target: Any, table: Table) -> None:
    names = [source["name"], target["name"]]
    say(f"from {names[0]} to {names[1]}")
    one, other = (
        client.allocate(BYTES, device=device["deviceId"], lease_seconds=3600)["allocationId"]
        for device in (source, target)
    )
    ordinals = [device["deviceId"].partition(":")[2] for device in (source, target)]
    ours: list[float] = []
    plain: list[float] = []
    for number in range(setup.rounds(5) + 1):
        rate = client.copy(one, other)["bytesPerSecond"] / 1e9
        found = _run(setup, "vulkan-between", *ordinals, "--bytes", str(BYTES), "--rounds", "3")
        assert found["names"] == names, f"these are other adapters there: {found['names']}"
        if number > 0:  # the first warms up
            ours.append(rate)
            plain += [one / 1e9 for one in found["bytesPerSecond"]]
    for each in (one, other):
        client.release(each)
    aim = Aim(f"≥ {OVERLAP} of the plain way", median(ours) >= OVERLAP * median(plain))
    rows = [
        Row("vramd, overlapped", median(ours)),
        Row("out, across, in: one after the other", median(plain)),
    ]
    table.add(f"256 MiB from {names[0]} to {names[1]}", "GB/s", rows, aim, more_is_better=True)


def _attached(setup: Setup, daemon: Daemon, device: Any, table: Table) -> None:
    name, client = device["deviceId"], daemon.client
    say(f"{name}: handed out and imported")
    room = client.device_status(name)["availableBytes"]
    count = min(SHARED, room * 4 // 5) // SEGMENT
    ids = [client.allocate(SEGMENT, device=name, lease_seconds=3600)["allocationId"] for _ in range(count)]
    ordinal = name.partition(":")[2]
    found = _run(setup, "vulkan-attach", ordinal, str(daemon.socket), *ids, "--rounds", str(setup.rounds(7)))
    assert found["name"] == device["name"], f"{name} is another adapter there: {found['name']}"
    for one in ids:
        client.release(one)
    size = f"{count * SEGMENT / (1 << 30):.2f} GiB in {count} segments on {device['name']}"
    messages = f"vramd, {found['descriptorsAMessage']} descriptor a message"
    # No contest: one after the other, a program waits for both.
    table.add(f"{size}: handed out", "ms", [Row(messages, median(found["attachMilliseconds"]))])
    table.add(f"{size}: imported", "ms", [Row("the driver", median(found["importMilliseconds"]))])


def _run(setup: Setup, *arguments: str) -> Any:
    done = subprocess.run([setup.peers, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
