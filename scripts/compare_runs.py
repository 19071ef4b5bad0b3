"""Compare trainings: rank them, and show where they differ, how their losses went, and what their samples look like.

    python scripts/compare_runs.py                          # every run in results/train
    python scripts/compare_runs.py rank8 rank16             # these
    python scripts/compare_runs.py elsewhere/results/train/rank32 rank16

Prints the ranking and writes runs.tsv, report.html and, where there are sample pictures, samples.png. Runs that failed
or are not finished are named and not ranked. Exit code 0 when at least one run is ranked. `snakemake compare` trains
what is not trained yet and does the same.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas

from qwen_image.comparison.pictures import find_samples
from qwen_image.comparison.ranking import differing_settings, in_order, notes, printable, table
from qwen_image.comparison.report import report_html
from qwen_image.comparison.runs import Run, find_folders, read_runs
from qwen_image.files import atomic_write
from qwen_image.problems import InputError, Problem, run
from qwen_image.sampling.sheet import contact_sheet

OWN_FOLDER = Path("results/compare/by_hand")
"""Not the workflow's, which would take a comparison of other runs for its own."""
SHOWN = ("rank", "run", "best_validation_loss", "best_step", "final_validation_loss", "final_training_loss", "steps")


def main(argv: list[str] | None = None) -> int:
    """Compare, write the files, and print the ranking."""
    args = _parser().parse_args(argv)
    runs = in_order(read_runs(find_folders(args.runs)))
    if not any(one.trained for one in runs):
        mend = "train it first; a stage that failed has left its reason in results/logs"
        raise InputError([Problem(file=one.name, found=one.state, mend=mend) for one in runs])
    _write(runs, args.output_dir)
    print(ranking_text(runs))
    for note in notes(runs):
        print(f"note: {printable(note)}", file=sys.stderr)
    print(f"compare: {args.output_dir / 'report.html'}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare trainings.", allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name, or folder results/train/NAME (default: all here)")
    parser.add_argument(
        "--output_dir", type=Path, default=OWN_FOLDER, help=f"folder to write to (default: {OWN_FOLDER})"
    )
    return parser


def _write(runs: Sequence[Run], folder: Path) -> None:
    samples = find_samples(runs)
    if samples.runs:
        sheet = contact_sheet(samples.labels, samples.prompts, samples.files)
        atomic_write(folder / "samples.png", lambda stream: sheet.save(stream, format="PNG"))
    else:  # of an earlier comparison
        (folder / "samples.png").unlink(missing_ok=True)
    atomic_write(folder / "report.html", report_html(runs, samples))
    text = io.StringIO()
    table(runs).to_csv(text, sep="\t", index=False, lineterminator="\n")
    atomic_write(folder / "runs.tsv", text.getvalue())


def ranking_text(runs: Sequence[Run]) -> str:
    """Return the ranking as columns of text."""
    shown = table(runs)[[*SHOWN, *differing_settings(runs)]].map(_cell)
    # a letter of these scripts takes the room of two
    with pandas.option_context("display.unicode.east_asian_width", True):
        return shown.to_string(index=False, max_colwidth=40)


def _cell(value: object) -> str:
    if pandas.isna(value):
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


if __name__ == "__main__":
    sys.exit(run(main))
