"""Play faults by the hundred and print the table of docs/reliability.md.

    PYTHONPATH=$PWD/tests:$PWD/scripts python tests/faults/make_table.py --points 108 --processes 2

Exits with 1 when a point did not end as it must. Such points are told whole; --first N --points 1 plays one again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.playing import Failure, Outcome, Stage, can_mount
from faults.points import KINDS, Point, draw
from warm_python import warm_python


def main() -> int:
    """Play them all; return the exit code."""
    parser = argparse.ArgumentParser(description="Play faults and print the table of how they ended.")
    parser.add_argument("--points", type=int, default=6 * len(KINDS), help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="points played at once")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name, warm_python(Path(name, "warm")) as python:
        stage = Stage(Path(name, "stage"), python)
        points = [draw(seed) for seed in range(args.first, args.first + args.points)]
        if not can_mount(stage.folder):
            print("faults: no right to mount a small file system; nothing is played on a full disk", file=sys.stderr)
            points = [point for point in points if point.kind != "disk full"]
        with ThreadPoolExecutor(args.processes) as pool:
            ended = list(pool.map(lambda point: _play(stage, point), points))
    failures = [one for one in ended if isinstance(one, Failure)]
    print(_table(points, [one for one in ended if isinstance(one, Outcome)]))
    print(f"\n{len(points)} points, {len(failures)} failed, {time.monotonic() - begun:.0f} s")
    return 1 if failures else 0


def _play(stage: Stage, point: Point) -> Outcome | Failure:
    try:
        outcome = stage.play(point)
    except Failure as failure:
        print(f"FAILED {point}: {failure}\n", file=sys.stderr, flush=True)
        return failure
    print(f"{point}: {outcome.how}", file=sys.stderr, flush=True)
    return outcome


def _table(points: list[Point], outcomes: list[Outcome]) -> str:
    lines = ["| fault | points | programs | failed | what it took |", "|---|---:|---:|---:|---|"]
    for kind in KINDS:
        played = [point for point in points if point.kind == kind]
        good = [outcome for outcome in outcomes if outcome.point.kind == kind]
        took = Counter(outcome.how for outcome in good).most_common()
        said = "; ".join(f"{how} ({count})" for how, count in took)
        programs = len({point.program for point in played})
        lines.append(f"| {kind} | {len(played)} | {programs} | {len(played) - len(good)} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
