"""Runs the comparisons and prints one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import allocators, attach, idle, loader, machine, model, moves, policies, serving, vulkan, workers
from .table import Table

COMPARISONS = {
    "attach": attach,
    "http": serving,
    "load": loader,
    "idle": idle,
    "moves": moves,
    "vulkan": vulkan,
    "policies": policies,
    "workers": workers,
    "allocators": allocators,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a model of 512 MB instead of 4 GB, fewer rounds"
    )
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison instead of all")
    parser.add_argument("--vramd", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--peers", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--allocators", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    setup = machine.Setup(
        options.vramd.resolve(),
        options.peers.resolve(),
        options.allocators.resolve(),
        options.work.resolve(),
        options.quick,
    )
    table = Table()
    with machine.huge_pages():
        before = machine.describe()
        if options.only not in ("moves", "vulkan", "policies", "workers", "allocators"):
            model.ensure(setup)
        for name, comparison in COMPARISONS.items():
            if options.only in (None, name):
                machine.say(name)
                comparison.measure(setup, table)
    print(before)
    print(table)


main()
