"""Measure the cache and print the table that the README quotes.

    python benchmarks/run.py                                  everything, about 50 minutes on 2 cores
    python benchmarks/run.py --only vae text_encoder          some of it
    python benchmarks/run.py --musubi-tuner DIR --musubi-python PYTHON

Every row is a ratio of medians measured by turns in this run, or a figure with its unit. The rows are also written to
benchmarks/results/cpu.json, and from there as a table into the README.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

from measure import Row, as_json, as_table  # noqa: E402

PARTS = ("vae", "text_encoder", "caching", "workflow", "nodes")
README = HERE.parent / "README.md"
MARKS = ("<!-- benchmarks -->\n", "<!-- /benchmarks -->\n")


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; where not all were, the other rows stay in the results file as they were."""
    parser = argparse.ArgumentParser(description="Measure the cache.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--results", type=Path, help="file to write (default: benchmarks/results/cpu.json)")
    parser.add_argument("--musubi-tuner", type=Path, help="a checkout of musubi-tuner to measure beside")
    parser.add_argument("--musubi-python", default=sys.executable, help="the Python that it is installed for")
    args = parser.parse_args(argv)
    results = args.results or HERE / "results" / "cpu.json"
    print(f"{_machine()}\n", file=sys.stderr)
    rows: list[Row] = []
    for part in args.only:
        module = importlib.import_module(part)
        found = module.rows(args.musubi_tuner, args.musubi_python) if part == "caching" else module.rows()
        print(f"\n{as_table(found)}", file=sys.stderr, flush=True)
        rows += found
    write_rows(results, rows, whole=set(args.only) == set(PARTS))
    if args.results is None:
        README.write_text(with_table(README.read_text()))
    print(as_table(rows))
    return 0


def with_table(readme: str) -> str:
    """Return the README's text with the table of the results between its marks."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    results = HERE / "results" / "cpu.json"
    table = as_table([Row(**row) for row in json.loads(results.read_text())] if results.exists() else [])
    return f"{before}{MARKS[0]}\n{table}\n\n{MARKS[1]}{after}"


def write_rows(path: Path, rows: list[Row], *, whole: bool) -> None:
    """Write rows over those of the same names; the others stay, unless these are the `whole` file."""
    fresh = as_json(rows)
    names = {row["name"] for row in fresh}
    before = json.loads(path.read_text()) if path.exists() and not whole else []
    kept = [row for row in before if row["name"] not in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept + fresh, indent=1, ensure_ascii=False) + "\n")


def _machine() -> str:
    import torch

    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
