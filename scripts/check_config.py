"""Check a configuration, its dataset and its checkpoints before anything runs; all problems in one message.

    python scripts/check_config.py --config my.yaml

Exit code 0 when nothing is wrong, 2 with the list of problems.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.check import check_all, summary
from qwen_image.config import add_config_arguments, config_from
from qwen_image.files import write_if_changed
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Check, print what the datasets hold, and write the same as a report if asked to."""
    parser = argparse.ArgumentParser(description="Check a configuration and everything it names.")
    add_config_arguments(parser)
    parser.add_argument("--report", type=Path, help="file for the summary of the datasets")
    args = parser.parse_args(argv)
    _, datasets = check_all(*config_from(args))
    text = summary(datasets)
    print(f"check: no problems found\n{text}", end="", file=sys.stderr)
    if args.report:
        write_if_changed(args.report, text)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
