"""The allocator and the planner of moves beside their peers: a program of its own measures, this prints."""

from __future__ import annotations

import json
import subprocess

from .machine import Setup, say
from .table import Aim, Row, Table


def measure(setup: Setup, table: Table) -> None:
    if not setup.allocators.exists():
        say("SKIPPED: its program was not built")
        return
    command = [str(setup.allocators), *(["--quick"] if setup.quick else [])]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    for found in json.loads(output):
        aim = Aim(**found["aim"]) if found["aim"] else None
        rows = [Row(**row) for row in found["rows"]]
        table.add(found["what"], found["unit"], rows, aim, more_is_better=found["more_is_better"])
