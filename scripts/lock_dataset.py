"""Lock what a workflow's LoRAs were made from and what was made: every hash, version and setting, in one file.

    python scripts/lock_dataset.py --config my.yaml --lock dataset.lock

Run it where snakemake runs. `snakemake lock` makes what is not made yet, and then does the same. Every file is read;
nothing is remembered from earlier.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.config import add_config_arguments, config_from
from qwen_image.lock.inventory import take_inventory, to_lock
from qwen_image.lock.layout import read_layout
from qwen_image.lock.rows import write_lock
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Look at everything, and write the lock."""
    parser = argparse.ArgumentParser(description="Lock what a workflow's LoRAs were made from.", allow_abbrev=False)
    add_config_arguments(parser)
    parser.add_argument("--lock", type=Path, default=Path("dataset.lock"), help="where it goes")
    args = parser.parse_args(argv)
    layout = read_layout(*config_from(args))
    rows = to_lock(take_inventory(layout))
    write_lock(args.lock, rows)
    print(f"lock: {len(rows)} facts in {args.lock}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
