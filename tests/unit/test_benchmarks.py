"""What the benchmarks claim: the README's tables are the measured ones, and a row knows whether it met its target."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from measure import Row, as_json, faster, medians  # noqa: E402
from run import README, with_table  # noqa: E402


def test_the_readme_quotes_what_was_measured():
    assert with_table(README.read_text()) == README.read_text()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_every_result_is_a_whole_row(path):
    rows = json.loads(path.read_text())
    assert rows
    assert all(list(row) == ["name", "ours", "other", "unit", "ratio", "target"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)


def test_a_target_is_held_against_the_ratio_or_without_one_against_our_figure():
    assert faster("x", ours=1.0, other=8.5, count=3, unit="images/s", target=">= 8").met() is True
    assert faster("x", ours=1.0, other=7.5, count=3, unit="images/s", target=">= 8").met() is False
    assert Row(name="x", ours=6.5, unit="s", target="<= 6").met() is False
    assert Row(name="x", ours=6.5, unit="s").met() is None


def test_medians_are_taken_by_turns():
    calls = []
    found = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert found.keys() == {"a", "b"}


def test_figures_keep_four_digits():
    (row,) = as_json([faster("x", ours=3.0, other=10.0, count=1, unit="images/s")])
    assert row == {"name": "x", "ours": 0.3333, "other": 0.1, "unit": "images/s", "ratio": 3.333, "target": None}
