"""The table: a row for each contestant of each measure, vramd's first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Aim(NamedTuple):
    """What vramd's row should reach, and whether it did."""

    text: str
    met: bool


class Row(NamedTuple):
    who: str
    median: float
    p99: float | None = None


class Table:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(
        self,
        measure: str,
        unit: str,
        rows: Sequence[Row],
        aim: Aim | None = None,
        *,
        more_is_better: bool = False,
    ) -> None:
        """Adds a measure. The first row is vramd's, the others are set against it."""
        ours = rows[0]
        for index, row in enumerate(rows):
            cells = [
                f"{measure}, {unit}" if index == 0 else "",
                row.who,
                _number(row.median),
                _number(row.p99),
            ]
            if index > 0:
                ratio = ours.median / row.median if row.median else float("inf")
                ahead = ratio >= 1 if more_is_better else ratio <= 1
                cells += [f"{ratio:.2f}", "ahead" if ahead else "**behind**"]
            elif aim:
                cells += ["", f"{aim.text}: {'met' if aim.met else '**missed**'}"]
            else:
                cells += ["", ""]
            self._lines.append("| " + " | ".join(cells) + " |")

    def __str__(self) -> str:
        head = "| what | who | median | p99 | vramd ÷ it | vramd is |"
        return "\n".join([head, "|---|---|---:|---:|---:|---|", *self._lines])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
