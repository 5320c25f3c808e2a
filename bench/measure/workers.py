"""Workers: what a message costs, how soon pressure is seen and relieved, what a hundred of them cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from . import host_pressure, sim_pressure
from .machine import Daemon, Setup, cpu_seconds, median, say, until
from .table import Aim, Row, Table


def measure(setup: Setup, table: Table) -> None:
    _messages(setup, table)
    _pressure(table, "of a real hog", host_pressure.rounds(setup))
    _pressure(table, "of a hog on sim", sim_pressure.rounds(setup))
    _hundred(setup, table)


def _messages(setup: Setup, table: Table) -> None:
    # Who asks has all processors but the last, and who answers has that one.
    *others, last = sorted(os.sched_getaffinity(0))
    if not others:
        say("SKIPPED messages: who asks and who answers need a processor each")
        return
    command = [
        "taskset",
        "--cpu-list",
        ",".join(map(str, others)),
        str(setup.peers),
        "worker",
        sys.executable,
    ]
    command += ["--processor", str(last), "--rounds", str(setup.rounds(12))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    worker, echo, bare = found["worker"], found["pythonEcho"], found["cEcho"]
    ratio = max(worker[share] / echo[share] for share in ("p50Micros", "p99Micros"))
    table.add(
        "1 KB to a Python worker and an answer back",
        "µs",
        [
            Row("vramd", worker["p50Micros"], worker["p99Micros"]),
            Row("Python that only echoes", echo["p50Micros"], echo["p99Micros"]),
            Row("cat", bare["p50Micros"], bare["p99Micros"]),
        ],
        Aim("≤ 1.5 of the echo", ratio <= 1.5),
    )
    rate = found["perSecond"]
    table.add(
        "the same, 64 at once",
        "a second",
        [Row("vramd", rate)],
        Aim("≥ 10000", rate >= 10_000),
        more_is_better=True,
    )


def _pressure(table: Table, whose: str, rounds: list[tuple[float, float]]) -> None:
    if not rounds:
        return
    for what, seconds, most in (
        ("crossing the threshold to the event", [seen for seen, _ in rounds], 250),
        ("to as much free as was looked for", [relieved for _, relieved in rounds], 1000),
    ):
        ms = [one * 1e3 for one in seconds]
        row = Row("vramd", median(ms), max(ms))
        table.add(f"pressure {whose}: {what}", "ms", [row], Aim(f"≤ {most}", max(ms) <= most))


def _hundred(setup: Setup, table: Table) -> None:
    seconds = 10 if setup.quick else 60
    program = f"python={sys.executable} -m vramd.worker"
    with Daemon(setup, "--worker-program", program) as daemon:
        for number in range(100):
            daemon.client.start_worker("python", name=f"worker-{number}")
        until(lambda: all(one["state"] == "Ready" for one in daemon.client.workers()))
        time.sleep(5)
        before = cpu_seconds(daemon.pid)
        time.sleep(seconds)
        share = (cpu_seconds(daemon.pid) - before) / seconds * 100
        table.add(
            f"100 workers, idle: CPU over {seconds} s", "%", [Row("vramd", share)], Aim("< 2", share < 2)
        )
