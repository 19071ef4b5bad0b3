"""Check a configuration, its dataset and its checkpoints before anything runs; all problems in one message.

    python scripts/check_config.py --config my.yaml

Exit code 0 when nothing keeps the workflow from starting, 2 with the list of problems. Items that cannot be used are
told, and are no such problem.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.check import bad_items, check_all, summary
from qwen_image.config import add_config_arguments, config_from
from qwen_image.files import write_if_changed
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Check, print what the datasets hold, and write the same as a report if asked to."""
    parser = argparse.ArgumentParser(description="Check a configuration and everything it names.")
    add_config_arguments(parser)
    parser.add_argument("--report", type=Path, help="file for the summary of the datasets")
    args = parser.parse_args(argv)
    checked = check_all(*config_from(args))
    on_bad_item = next(iter(checked.runs.values()))["on_bad_item"]
    datasets = [dataset for several in checked.datasets.values() for dataset in several]
    text = f"check: {bad_items(datasets, on_bad_item) or 'no problems found'}\n"
    for file, several in checked.datasets.items():
        text += (f"{file}\n" if len(checked.datasets) > 1 else "") + summary(several)
    if len(checked.runs) > 1:
        text += f"{len(checked.runs)} runs: {', '.join(checked.runs)}\n"
    print(text, end="", file=sys.stderr)
    if args.report:
        write_if_changed(args.report, text)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
