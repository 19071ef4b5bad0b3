"""Caching in shards: as many jobs as asked for, the same files for any number, and no job runs for another's items."""

import shutil
import time

import pytest
from bench import mortal

from qwen_image.cache.shards import shard_of

DEMO = "resources/demo"
CACHE_STAGES = ["cache_latents", "cache_text_encoder_outputs"]
CACHE_ONLY = ("--", "cache_only")


@pytest.fixture
def small(project):
    """The project with a dataset of eight of its pictures, small ones, encoded so that bytes can be compared."""
    chosen = project.folder / "chosen"
    chosen.mkdir()
    for path in sorted((project.folder / f"{DEMO}/images").glob("00[1-8]*")):
        shutil.copy(path, chosen)
    (project.folder / "small.toml").write_text(
        '[general]\nresolution = 64\ncaption_extension = ".txt"\n'
        '[[datasets]]\nimage_directory = "chosen"\ncache_directory = "cache"\n'
    )
    project.configure(dataset_config="small.toml", deterministic=True)
    return project


def made(project, *folders):
    """The content of all files directly in these folders."""
    paths = [path for folder in folders for path in sorted((project.folder / folder).iterdir())]
    return {str(path.relative_to(project.folder)): path.read_bytes() for path in paths if path.is_file()}


def test_the_number_of_shards_changes_neither_cache_nor_manifest_and_a_change_concerns_one_shard(project):
    manifests = made(project, "results/manifests/dataset")
    project.configure(caching_shards=5)
    result = project.run()
    assert result.code == 0, result.text
    for stage in CACHE_STAGES:
        assert result.rules.count(stage) == 5
        assert project.encoded(stage) == 0
    assert "train" not in result.rules
    assert made(project, "results/manifests/dataset") == manifests

    time.sleep(0.1)
    images = project.folder / f"{DEMO}/images"
    shutil.copy(images / "004_star.png", images / "new.png")
    (images / "new.txt").write_text("one more")
    result = project.run(*CACHE_ONLY)
    assert result.code == 0, result.text
    assert sorted(result.rules) == sorted(
        ["check_config", *CACHE_STAGES, "merge_latents", "merge_text_encoder_outputs"]
    ), "one shard of each"
    for stage in CACHE_STAGES:
        logs = project.folder / f"results/logs/{stage}/dataset"
        assert "1 encoded" in (logs / f"{shard_of('new.png', 5)}-of-5.log").read_text()
        assert project.encoded(stage) == 1

    time.sleep(0.1)
    (images / "new.txt").write_text("another caption")
    result = project.run(*CACHE_ONLY)
    assert result.rules == ["cache_text_encoder_outputs", "merge_text_encoder_outputs"], result.text
    assert project.run(*CACHE_ONLY).nothing_done


def test_a_shard_that_fails_leaves_the_others_work_and_the_bytes_are_those_of_one_shard(small):
    assert small.run(*CACHE_ONLY).code == 0
    assert small.encoded("cache_latents") == small.encoded("cache_text_encoder_outputs") == 8
    whole = made(small, "cache", "results/manifests/small")
    assert len(whole) == 2 * 8 + 2 * 3

    shutil.rmtree(small.folder / "cache")
    bad = small.folder / "chosen/004_star.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:1000])
    small.configure(caching_shards=2)
    result = small.run("--keep-going", *CACHE_ONLY)
    assert result.code != 0
    assert "chosen/004_star.png" in result.text[result.text.rindex("Stage cache_latents failed with return code 2") :]
    assert f"results/logs/cache_latents/small/{shard_of(bad.name, 2)}-of-2.log" in result.text
    assert result.rules.count("cache_latents") == 1
    assert result.rules.count("cache_text_encoder_outputs") == 2
    assert "merge_latents" not in result.rules

    time.sleep(0.1)
    bad.write_bytes(good)
    result = small.run(*CACHE_ONLY)
    assert result.code == 0, result.text
    assert result.rules.count("cache_latents") == 1
    assert small.encoded("cache_latents") == 1
    assert made(small, "cache", "results/manifests/small") == whole


def test_cache_only_makes_both_manifests_and_trains_nothing_also_where_the_cache_is_not_to_be_kept(small):
    small.configure(caching_latent_keep_cache=False, caching_teo_keep_cache=False, caching_shards=2)
    (small.folder / "results/train").rename(small.folder / "trained_before")
    for _ in range(2):
        result = small.run(*CACHE_ONLY)
        assert result.code == 0, result.text
        assert not {"train", "train_config", "clear_cache"} & set(result.rules)
    assert result.nothing_done
    assert {"small/latents.tsv", "small/text_encoder_outputs.tsv"} <= {
        str(path.relative_to(small.folder / "results/manifests"))
        for path in (small.folder / "results/manifests").rglob("*.tsv")
    }
    for name in ("004_star.png", "004_star.txt"):
        (small.folder / "chosen" / name).unlink()
    assert small.run(*CACHE_ONLY).code == 0
    left = [path.name for path in (small.folder / "cache").iterdir()]
    assert len(left) == 2 * 7
    assert not [name for name in left if name.startswith("004_star")], "nobody's files are removed where all are known"


def test_a_cache_that_cannot_be_written_to_is_used_as_long_as_it_is_complete(project):
    (project.folder / "results/cache/demo").chmod(0o555)
    # who may not write is a matter of the process
    project.python = None
    result = project.run("--forcerun", "cache_latents", "cache_text_encoder_outputs", preexec_fn=mortal)
    assert result.code == 0, result.text
    assert project.encoded("cache_latents") == project.encoded("cache_text_encoder_outputs") == 0
    assert "train" not in result.rules


def test_progress_is_shown_on_the_terminal_and_logs_hold_no_control_characters(finished):
    project, result = finished
    for unit in ("img", "caption"):
        assert f"{unit}/s" in result.text or f"s/{unit}" in result.text
    logs = list((project.folder / "results/logs").rglob("*.log"))
    assert len(logs) >= 7
    for log in logs:
        controls = {byte for byte in log.read_bytes() if byte < 0x20} - set(b"\n\t")
        assert not controls, log
