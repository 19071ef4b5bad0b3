"""Sample pictures in the workflow: prompts are cached, pictured while training, and on a sheet of all checkpoints."""

import os
import shutil
import tomllib

import pytest
from PIL import Image

# one process makes the samples that all tests here look at
pytestmark = pytest.mark.xdist_group("samples")

PROMPTS = "a red star --w 64 --h 64 --s 2\na blue moon --w 96 --h 48 --s 1 --l 1 --d 3\n"
SAMPLED = {
    # another seed: a finished training is not done again for the pictures on its way
    "sample_prompts": "prompts.txt", "sample_every_n_steps": 1, "sample_at_first": True, "save_every_n_steps": 1,
    "seed": 7,
}  # fmt: skip
SHEET = "results/samples/demo/sheet.png"


def age(project):
    """Make all files so far older than what is changed next: file systems count in coarse ticks."""
    for folder in ("results", "resources"):
        for path in (project.folder / folder).rglob("*"):
            if path.is_file():
                times = path.stat()
                os.utime(path, ns=(times.st_atime_ns - 10**10, times.st_mtime_ns - 10**10))


@pytest.fixture(scope="module")
def sampled(finished, tmp_path_factory):
    """The finished demo with prompts, after `snakemake samples`."""
    project = finished[0].copy(tmp_path_factory.mktemp("samples") / "project")
    (project.folder / "prompts.txt").write_text(PROMPTS)
    project.configure(**SAMPLED)
    result = project.run("--", "samples")
    assert result.code == 0, result.text
    return project, result


def test_prompts_are_cached_and_pictured(sampled):
    project, result = sampled
    stages = {"cache_prompts", "check_config", "generate_samples", "train", "train_config"}
    assert set(result.rules) == stages | {"samples"}
    assert result.rules.index("cache_prompts") < result.rules.index("train")
    # two prompts, and the negative one of the first; the second has no guidance
    assert project.encoded("cache_prompts") == 3
    arguments = tomllib.loads((project.folder / "results/train/demo/config.toml").read_text())
    assert arguments["prompts_manifest"] == "results/manifests/dataset/prompts/demo.tsv"
    pictures = sorted(path.name for path in (project.folder / "results/models/sample").iterdir())
    assert [name.split("_")[1] for name in pictures] == ["000000"] * 2 + ["000001"] * 2 + ["000002"] * 2
    made = {path.name for path in (project.folder / SHEET).parent.iterdir()}
    stems = {"demo", "demo-step00000001", "demo-step00000002"}
    assert len(made) == 1 + 2 * len(stems)
    assert {name.rsplit("_", 2)[0] for name in made if name != "sheet.png"} == stems
    with Image.open(project.folder / SHEET) as sheet:
        assert sheet.width > 64 + 96 and sheet.height > 3 * 64


def test_a_new_prompt_is_encoded_alone_and_trains_nothing(sampled, tmp_path):
    project = sampled[0].copy(tmp_path / "project")
    age(project)
    with open(project.folder / "prompts.txt", "a") as stream:
        stream.write("a green sun --w 64 --h 64 --s 1\n")
    result = project.run("--", "samples")
    assert (result.code, result.rules) == (0, ["cache_prompts", "generate_samples", "samples"]), result.text
    assert project.encoded("cache_prompts") == 1


def test_a_bad_prompt_file_stops_before_anything_runs(sampled, tmp_path):
    project = sampled[0].copy(tmp_path / "project")
    (project.folder / "prompts.txt").write_text("a red star --w 64 --i picture.png\na moon --s 2000\n")
    result = project.run("-n")
    assert result.code != 0
    assert "prompts.txt: line 1" in result.text and "prompts.txt: line 2" in result.text
    assert not result.rules


def test_a_path_that_begins_with_a_dash_is_no_option(sampled, tmp_path):
    project = sampled[0].copy(tmp_path / "project")
    for name in ("-b", "c"):
        shutil.copy(project.folder / "results/models/demo.safetensors", project.folder / f"{name}.safetensors")
    project.configure(base_weights=["-b.safetensors", "c.safetensors"], base_weights_multiplier=[-0.5, 1.0])
    result = project.run("-n", "--printshellcmds", "--", "samples")
    assert result.code == 0, result.text
    assert "--base_weights ./-b.safetensors c.safetensors --base_weights_multiplier -0.5 1.0" in result.text


def test_without_prompts_the_target_says_what_to_set(project):
    result = project.run("-n", "--", "samples")
    assert result.code != 0
    assert "set sample_prompts" in result.text
