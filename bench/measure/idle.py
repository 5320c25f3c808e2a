"""What a daemon costs that nobody asks anything."""

from __future__ import annotations

import time

from .machine import Daemon, Setup, cpu_seconds, memory_mib
from .table import Aim, Row, Table


def measure(setup: Setup, table: Table) -> None:
    seconds = 10 if setup.quick else 60
    with Daemon(setup) as daemon:
        for holds in ("nothing", "the model"):
            if holds == "the model":
                daemon.hold(setup)
            before = cpu_seconds(daemon.pid)
            time.sleep(seconds)
            share = (cpu_seconds(daemon.pid) - before) / seconds * 100
            table.add(
                f"idle, holding {holds}: CPU over {seconds} s",
                "%",
                [Row("vramd", share)],
                Aim("< 1", share < 1),
            )
            own = memory_mib(daemon.pid, "RssAnon", "RssFile")
            table.add("its memory beside the pool", "MiB", [Row("vramd", own)], Aim("< 64", own < 64))
