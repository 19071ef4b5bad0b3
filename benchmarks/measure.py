"""Timing by turns: every figure is a median, every ratio compares what ran alternately in one process or one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    ours: float
    """Our median."""
    other: float | None = None
    """The other side's median; None where there is nothing to compare with."""
    unit: str
    """Of both figures, for example ``s`` or ``images/s``."""
    ratio: float | None = None
    """The quantity that the target speaks of; what it divides is said in the name."""
    target: str | None = None
    """For example ``>= 8``; None where no target was set."""

    def met(self) -> bool | None:
        """Whether the ratio (or, without one, our figure) meets the target; None without a target."""
        if self.target is None:
            return None
        relation, _, limit = self.target.partition(" ")
        value = self.ours if self.ratio is None else self.ratio
        return value >= float(limit) if relation == ">=" else value <= float(limit)


def medians(candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Call the candidates in turn, `rounds` times each after `warmup` uncounted turns; return the median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def faster(name: str, *, ours: float, other: float, count: float, unit: str, target: str | None = None) -> Row:
    """Return a row of rates (`count` things in so many seconds) whose ratio says how many times faster ours is."""
    return Row(name=name, ours=count / ours, other=count / other, unit=unit, ratio=other / ours, target=target)


def as_json(rows: list[Row]) -> list[dict]:
    """Return the rows as plain tables, figures rounded to four significant digits."""
    return [
        {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(row).items()}
        for row in rows
    ]


def as_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | ours | other | unit | ratio | target | met |", "|---|---:|---:|---|---:|---|---|"]
    for row in rows:
        figures = ["" if value is None else f"{value:.3g}" for value in (row.ours, row.other, row.ratio)]
        met = {None: "", True: "yes", False: "**no**"}[row.met()]
        target = row.target or ""
        lines.append(f"| {row.name} | {figures[0]} | {figures[1]} | {row.unit} | {figures[2]} | {target} | {met} |")
    return "\n".join(lines)
