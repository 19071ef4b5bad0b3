"""The real Snakemake on a machine with a GPU: every stage finds it, and stages that want the only one take turns."""

from pathlib import Path

import pytest
import torch
from demo_project import Project

# one process makes the run that all tests here look at
pytestmark = pytest.mark.xdist_group("gpu workflow")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with two runs that were trained at once as far as one GPU lets them."""
    project = Project(tmp_path_factory.mktemp("workflow") / "project")
    project.folder.mkdir()
    (project.folder / "runs.tsv").write_text("output_name\tlearning_rate\na\t1e-3\nb\t5e-4\n")
    (project.folder / "prompts.txt").write_text("a red star --w 64 --h 64 --s 2\n")
    project.configure(
        runs="runs.tsv",
        output_name=None,
        sample_prompts="prompts.txt",
        sample_every_n_epochs=1,
    )
    result = project.run("--resources", "local_gpu=4", "--set-threads", "train=2", cores=8)
    assert result.code == 0, result.text
    return project, result


def logs(project, stage):
    return [path.read_text() for path in sorted((project.folder / "results/logs" / stage).rglob("*.log"))]


def test_every_stage_computes_on_the_gpu(finished):
    project, _ = finished
    device = f"computed on cuda, {torch.cuda.get_device_name()}"
    for stage, count in {"cache_latents": 1, "cache_text_encoder_outputs": 1, "train": 2}.items():
        texts = logs(project, stage)
        assert len(texts) == count and all(device in text for text in texts), texts


def test_stages_that_want_the_only_gpu_take_turns(finished):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several")
    project, _ = finished
    assert any("waiting for 1 of the GPUs 0, in use by " in text for text in logs(project, "train"))


def test_a_second_run_does_nothing(finished):
    result = finished[0].run()
    assert result.code == 0 and result.nothing_done, result.text


def test_what_was_made_on_a_gpu_is_locked_and_verified(finished, tmp_path):
    project = finished[0].copy(tmp_path / "project")
    for target in ("lock", "verify"):
        result = project.run("--", target)
        assert result.code == 0, result.text
    assert f"cuda, {torch.cuda.get_device_name()}" in Path(project.folder, "dataset.lock").read_text()


def test_pictures_were_made(finished):
    assert list((finished[0].folder / "results/models/sample").glob("*.png"))
