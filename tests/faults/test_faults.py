"""A few of the faults that `make faults` plays by the hundred: the same command ends as if nothing had happened.

Each point is drawn from its number (points.py), so a failing one is played again by it alone.
"""

from pathlib import Path

import pytest
from faults.playing import Project, Stage, can_mount
from faults.points import KINDS, draw

# one process makes the run that all points are compared with
pytestmark = pytest.mark.xdist_group("faults")

# kills, SIGTERM, a full disk, a read error, damaged cache files and manifests, two workflows at once: of each kind a
# point that does not take long, and all programs but one
SHORT = (0, 1, 2, 6, 8, 12, 14, 17, 28, 75)


STRIKES = {
    "kill -9 of the stage", "kill -9 of the process group", "kill -9 of Snakemake", "SIGTERM to the stage",
    "disk full", "read error",
}  # fmt: skip
"""Faults that no first command survives."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory, python):
    return Stage(tmp_path_factory.mktemp("faults") / "stage", python)


@pytest.mark.parametrize("seed", SHORT)
def test_the_same_command_ends_as_if_nothing_had_happened(stage, seed):
    point = draw(seed)
    if point.kind == "disk full" and not can_mount(stage.folder):
        pytest.skip("a full disk needs the right to mount one")
    # raises Failure, an AssertionError, for anything that a user must not see
    outcome = stage.play(point)
    assert outcome.runs > 1 or point.kind not in STRIKES, "the fault has ended the first command"


def test_an_empty_folder_that_stays_is_seen(tmp_path):
    for name in ("results/models/.tmp-0", "results/manifests/pets", "results/logs/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "results/manifests/pets/latents.tsv").write_text("")
    names = {"results/models/.tmp-0", "results/manifests/pets/latents.tsv"}
    assert Project(tmp_path, Path("python")).names() == names


def test_consecutive_numbers_go_through_all_kinds():
    assert {draw(seed).kind for seed in range(7, 7 + len(KINDS))} == set(KINDS)
    assert draw(5) == draw(5)
