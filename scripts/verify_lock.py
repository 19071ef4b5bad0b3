"""Verify that everything is as it was locked: say what differs, from what, and why.

    python scripts/verify_lock.py --config my.yaml --lock dataset.lock

Run it where snakemake runs. Every file is read; nothing is remembered from earlier, nothing is made or mended. Exit
code 0 when all is as locked, 1 when anything differs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from qwen_image.config import add_config_arguments, config_from
from qwen_image.dataset.listing import MAX_PROBLEMS
from qwen_image.lock.differences import Differences, compare
from qwen_image.lock.inventory import take_inventory
from qwen_image.lock.layout import read_layout
from qwen_image.lock.rows import only_inputs, read_lock
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Compare, and say what differs."""
    parser = argparse.ArgumentParser(description="Verify that everything is as locked.", allow_abbrev=False)
    add_config_arguments(parser)
    parser.add_argument("--lock", type=Path, default=Path("dataset.lock"), help="what to compare with")
    parser.add_argument("--inputs_only", action="store_true", help="what is made is not looked at")
    parser.add_argument("--known_only", action="store_true", help="what the lock says nothing of is not told as new")
    args = parser.parse_args(argv)
    locked = read_lock(args.lock)
    layout = read_layout(*config_from(args))
    inventory = take_inventory(layout, inputs_only=args.inputs_only)
    if args.inputs_only:
        locked = only_inputs(locked)
    if args.known_only:
        inventory = replace(inventory, rows={key: inventory.rows[key] for key in locked if key in inventory.rows})
    differences = compare(locked, inventory, str(args.lock))
    print(report(differences, len(locked), str(args.lock)), file=sys.stderr)
    return 1 if differences.problems else 0


def report(differences: Differences, facts: int, lock: str) -> str:
    """Return the whole message: what differs, and what was only done in another way."""
    lines = [f"verify: all {facts} facts are as in {lock}"]
    if count := len(differences.problems):
        lines = [f"verify: {count} {'difference' if count == 1 else 'differences'} from {lock}:"]
        for _, several in groupby(differences.problems, key=lambda problem: problem.file.partition(",")[0]):
            told = list(several)
            lines += [f"- {problem}" for problem in told[:MAX_PROBLEMS]]
            lines += [f"- {told[0].file.partition(',')[0]}: {len(told) - MAX_PROBLEMS} more"][
                : len(told) > MAX_PROBLEMS
            ]
    lines += [f"note: made in another way: {note}" for note in differences.notes]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
