"""Several runs from one configuration in the real workflow: what they share, what fails alone, what is done again."""

from __future__ import annotations

import re
import shutil

import pandas
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# one process makes the runs that all tests here look at
pytestmark = pytest.mark.xdist_group("many runs")

FATAL = "1e38"  # a learning rate that leaves no finite weight: the training's result is refused


def write_table(project, *rows: tuple[str, str, str]) -> None:
    text = "\n".join("\t".join(row) for row in (("output_name", "learning_rate", "vae"), *rows))
    (project.folder / "runs.tsv").write_text(f"{text}\n")


def other_vae(project) -> str:
    """A VAE of the demo's shape with other weights."""
    path = project.folder / "resources/demo/vae.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    with safe_open(path, "pt") as file:
        save_file(tensors | {first: tensors[first] * 1.5}, project.folder / "other.safetensors", file.metadata())
    return "other.safetensors"


def trained(result) -> set[str]:
    """The runs whose training was started."""
    return set(re.findall(r"train: train the LoRA (\S+)", result.text))


@pytest.fixture(scope="module")
def many(finished, tmp_path_factory):
    """A project with three runs, one of them bad, after `snakemake` made one LoRA and then was asked for all."""
    project = finished[0].copy(tmp_path_factory.mktemp("many") / "project")
    write_table(project, ("a", "5e-4", ""), ("bad", FATAL, ""), ("own_latents", "", other_vae(project)))
    project.configure(runs="runs.tsv", output_name=None)
    one = project.run("--keep-going", "results/models/a.safetensors")
    return project, one, project.run()


def test_one_run_by_the_name_of_its_lora(many):
    _, one, _ = many
    assert one.code == 0, one.text
    assert trained(one) == {"a"}
    # its caches are those that were there before there was a table
    assert set(one.rules) == {"train_config", "train"}


def test_a_run_that_fails_leaves_the_others_unharmed(many):
    project, _, everything = many
    assert everything.code != 0
    assert trained(everything) == {"bad", "own_latents"}
    models = project.folder / "results/models"
    assert (models / "own_latents.safetensors").exists() and (models / "a.safetensors").exists()
    assert (project.folder / "results/train/own_latents/lora.sha256").exists()
    assert not (project.folder / "results/train/bad/lora.sha256").exists()
    assert "Stage check_lora failed" in everything.text or "Stage train failed" in everything.text


def test_only_the_run_with_another_vae_has_its_own_latents(many):
    project, _, everything = many
    assert [rule for rule in everything.rules if "latents" in rule] == ["cache_latents", "merge_latents"]
    assert "cache_text_encoder_outputs" not in everything.rules
    names = sorted(path.name for path in (project.folder / "results/manifests").iterdir())
    assert len(names) == 2 and names[0] == "dataset" and re.fullmatch(r"dataset\.vae-other-[0-9a-f]{8}", names[1])
    cache = project.folder / "results/cache/demo"
    plain = sorted(cache.glob("*_qi.safetensors"))
    own = sorted((cache / names[1].removeprefix("dataset.")).iterdir())
    assert [path.name for path in plain] == [path.name for path in own]
    assert all(one.read_bytes() != other.read_bytes() for one, other in zip(plain, own, strict=True))


def test_a_mended_row_trains_its_run_alone_and_the_order_of_rows_nothing(many, tmp_path):
    project = many[0].copy(tmp_path / "project")
    write_table(project, ("own_latents", "", "other.safetensors"), ("bad", "1e-3", ""), ("a", "5e-4", ""))
    result = project.run()
    assert result.code == 0, result.text
    assert trained(result) == {"bad"}
    assert set(result.rules) == {"check_config", "train_config", "train"}
    again = project.run()
    assert again.nothing_done, again.text
    compared = project.run("--", "compare")
    assert (compared.code, compared.rules) == (0, ["compare_runs", "compare"]), compared.text
    rows = pandas.read_csv(project.folder / "results/compare/runs.tsv", sep="\t")
    assert sorted(rows["run"]) == ["a", "bad", "own_latents"] and rows["rank"].notna().all()
    assert "the order says little: vae differ" in compared.text


STAGES = ("cache_latents", "cache_text_encoder_outputs")
SMALL = """[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
image_directory = "chosen"
cache_directory = "cache"
num_repeats = %d
"""


def test_datasets_that_differ_in_repeats_are_encoded_once_and_other_rows_rename_nothing(finished, tmp_path):
    project = finished[0].copy(tmp_path / "project")
    (project.folder / "chosen").mkdir()
    for path in sorted((project.folder / "resources/demo/images").glob("00[1-4]*")):
        shutil.copy(path, project.folder / "chosen")
    files = [f"{name}.toml" for name in ("once", "twice", "again")]
    for repeats, file in enumerate(files, start=1):
        (project.folder / file).write_text(SMALL % repeats)

    def cached(*rows: tuple[str, str], **changes):
        text = "".join(f"{name}\t{file}\n" for name, file in rows)
        (project.folder / "runs.tsv").write_text(f"output_name\tdataset_config\n{text}")
        project.configure(runs="runs.tsv", **changes)
        # all jobs at once that can be
        threads = [f"{stage}=1" for stage in STAGES]
        result = project.run("--resources", "local_gpu=4", "--set-threads", *threads, "--", "cache_only", cores=4)
        assert result.code == 0, result.text
        return [(result.rules.count(stage), project.encoded(stage)) for stage in STAGES if stage in result.rules]

    assert cached(("a", ""), ("b", "twice.toml"), dataset_config="once.toml") == [(2, 4), (2, 4)]
    assert cached(("c", "again.toml"), ("b", "twice.toml"), ("a", "")) == [(1, 0), (1, 0)]
    assert cached(("a", ""), ("b", "twice.toml")) == []
    # left to the rows, they find the files where they were
    rows = [("a", "once.toml"), ("b", "twice.toml")]
    assert [encoded for _, encoded in cached(*rows, dataset_config=None)] == [0, 0]
    assert cached(*reversed(rows)) == []
    # which of two that differ has a folder is not left to their order
    (project.folder / "large.toml").write_text((SMALL % 1).replace("64", "128"))
    (project.folder / "runs.tsv").write_text("output_name\tdataset_config\na\tlarge.toml\nb\tonce.toml\n")
    refused = project.run("--dry-run")
    assert refused.code != 0 and "once.toml: cache_directory: its folder" in refused.text
    assert cached(("a", "large.toml"), ("b", ""), dataset_config="once.toml")[0] == (1, 4)
    (large,) = (project.folder / "cache").glob("large-????????")
    assert len(list(large.iterdir())) == 4


def test_caches_that_are_not_kept_go_once_for_all_runs(many, tmp_path):
    project = many[0]
    header, *rows = (project.folder / "runs.tsv").read_text().splitlines()
    said = []
    for moved in (rows, rows[::-1]):
        (tmp_path / "moved.tsv").write_text("\n".join([header, *moved]))
        changes = [f"runs={tmp_path / 'moved.tsv'}", *(f"caching_{one}_keep_cache=False" for one in ("latent", "teo"))]
        result = project.run("--dry-run", "--printshellcmds", "--config", *changes)
        assert result.code == 0, result.text
        assert len(re.findall(r"Job \d+: clear_cache", result.text)) == 1
        assert trained(result) == {"a", "bad", "own_latents"}  # their caches are made again, so they might differ
        said += re.findall(r"clear_cache\.py [^>]*?--table", result.text, re.DOTALL)
    # the order of rows does not have it done again
    assert len(said) == 2 and said[0] == said[1]


def test_a_bad_table_stops_before_anything_runs(many, tmp_path):
    project = many[0]
    (tmp_path / "bad.tsv").write_text("output_name\tlearning_rat\na\t1\n")
    result = project.run("--config", f"runs={tmp_path / 'bad.tsv'}")
    assert result.code != 0 and not result.rules
    assert "learning_rat: is not a known key" in result.text and "did you mean learning_rate?" in result.text
