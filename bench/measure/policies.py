"""What each eviction policy loads for, over traces of several kinds; and how fast they are simulated."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import Setup
from .table import Aim, Row, Table

MODELS = 16
WEIGHTS = [1 / (rank + 1) ** 1.2 for rank in range(MODELS)]


def _machine(dice: random.Random) -> dict[str, Any]:
    """Models from 1 to 40 GB, from sources of three speeds, on a device of 80 GB."""
    models = []
    for number in range(MODELS):
        size = int(math.exp(dice.uniform(math.log(1e9), math.log(40e9))))
        seconds = round(size / dice.choice([0.5e9, 2e9, 3e9]) + 1, 2)
        models.append({"name": f"m{number}", "bytes": size, "loadSeconds": seconds, "keepAlive": -1})
    return {"devices": [{"deviceId": "cuda:0", "bytes": 80 * 10**9}], "models": models}


def _skewed(dice: random.Random) -> int:
    return dice.choices(range(MODELS), WEIGHTS)[0]


def _kinds(dice: random.Random) -> dict[str, Callable[[int], int]]:
    """Which model the nth request is for."""
    state = {"current": 0, "order": list(range(MODELS))}

    def bursts(_: int) -> int:
        if dice.random() < 0.1:
            state["current"] = _skewed(dice)
        return int(state["current"])

    def shifting(at: int) -> int:
        if at % 2000 == 0:
            dice.shuffle(state["order"])
        return int(state["order"][_skewed(dice)])

    def pairs(at: int) -> int:
        if at % 2 == 0:
            state["current"] = _skewed(dice)
            return int(state["current"])
        return (int(state["current"]) + 1) % MODELS

    def day(at: int) -> int:
        half = MODELS // 2
        return _skewed(dice) % half + (half if at // 1000 % 2 else 0)

    return {
        "skewed": lambda _: _skewed(dice),
        "even": lambda _: dice.randrange(MODELS),
        "in turn": lambda at: at % MODELS,
        "in bursts": bursts,
        "shifting": shifting,
        "in pairs": pairs,
        "skewed, then in turn": lambda at: _skewed(dice) if at // 500 % 2 else at % MODELS,
        "by day and night": day,
    }


def _write(path: Path, dice: random.Random, choose: Callable[[int], int], requests: int, gap: float) -> None:
    now = 0.0
    with path.open("w") as trace:
        for at in range(requests):
            now += dice.expovariate(1 / gap)
            trace.write(f"{now:.3f},m{choose(at)},{dice.uniform(0.5, 5):.2f}\n")


def _simulated(setup: Setup, trace: Path, machine: Path, *more: str) -> dict[str, Any]:
    command = [str(setup.vramd), "simulate", str(trace), "--machine", str(machine), "--json", *more]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return {one["policy"]: one for one in json.loads(done.stdout)["policies"]}


def measure(setup: Setup, table: Table) -> None:
    requests, seeds = (5_000, 2) if setup.quick else (20_000, 5)
    trace, machine = setup.work / "requests.csv", setup.work / "machine.json"
    ratios: dict[str, list[float]] = {}
    others: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        for gap in (30.0, 300.0):
            dice = random.Random(seed * 1000 + int(gap))
            machine.write_text(json.dumps(_machine(dice)))
            for kind, choose in _kinds(dice).items():
                _write(trace, dice, choose, requests, gap)
                found = _simulated(setup, trace, machine)
                least = found["LowestCost"]["loadSeconds"]
                ratios.setdefault(kind, []).append(least / found["LeastRecentlyUsed"]["loadSeconds"])
                for policy, one in found.items():
                    seconds = others.setdefault(kind, {}).setdefault(policy, [])
                    seconds.append(one["loadSeconds"])
    for kind, seconds in others.items():
        rows = [
            Row(policy, statistics.geometric_mean(values))
            for policy, values in sorted(seconds.items(), key=lambda item: item[0] != "LowestCost")
        ]
        worst = max(ratios[kind])
        if kind == "skewed":
            mean = statistics.geometric_mean(ratios[kind])
            aim = Aim(
                f"0.75 of LRU's in the mean ({mean:.2f}), 1.05 at most ({worst:.2f})",
                mean <= 0.75 and worst <= 1.05,
            )
        else:
            aim = Aim(f"1.05 of LRU's at most ({worst:.2f})", worst <= 1.05)
        table.add(
            f"{requests} requests {kind}: loading, geometric mean of {len(ratios[kind])}", "s", rows, aim
        )
    count = 100_000 if setup.quick else 1_000_000
    dice = random.Random(7)
    machine.write_text(json.dumps(_machine(dice)))
    _write(trace, dice, _kinds(dice)["skewed"], count, 30.0)
    start = time.perf_counter()
    _simulated(setup, trace, machine, "--policy", "LowestCost")
    seconds = time.perf_counter() - start
    table.add(f"simulating {count} requests", "s", [Row("vramd", seconds)], Aim("< 10", seconds < 10))
