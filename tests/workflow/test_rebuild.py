"""The workflow as a file-target build: after each change exactly what has to run runs, and no item more is encoded."""

import json
import os
import shutil
import time
import tomllib

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_image.container import read_header

LATENTS = {"cache_latents", "merge_latents"}
TEXTS = {"cache_text_encoder_outputs", "merge_text_encoder_outputs"}
CACHES = LATENTS | TEXTS
DEMO = "resources/demo"
PICTURE = f"{DEMO}/images/004_star.png"
CAPTION = f"{DEMO}/images/004_star.txt"


def test_the_first_run_goes_through_every_stage_once(finished):
    project, result = finished
    assert sorted(result.rules) == sorted({"demo", "check_config", *CACHES, "train_config", "train"})
    assert result.rules.index("demo") < result.rules.index("check_config")
    assert result.rules[-1] == "train", "training comes after both caches"
    assert project.encoded("cache_latents") == project.encoded("cache_text_encoder_outputs") == 18
    assert read_header(project.folder / "results/models/demo.safetensors").metadata["ss_steps"] == "2"
    assert "The LoRA is results/models/demo.safetensors" in result.text


def test_a_python_that_starts_at_once_makes_the_same_bytes(finished, project):
    """The first run's programs were started one by one; those of most others here are not (warm_python.py)."""
    shutil.rmtree(project.folder / "results")
    assert project.run().code == 0
    for pattern in ("results/cache/**/*.safetensors", "results/models/*.safetensors"):
        paths = [path.relative_to(finished[0].folder) for path in finished[0].folder.glob(pattern)]
        assert paths
        for path in paths:
            assert (project.folder / path).read_bytes() == (finished[0].folder / path).read_bytes(), path


def test_the_second_run_has_nothing_to_do(project):
    result = project.run()
    assert (result.code, result.rules) == (0, [])
    assert result.nothing_done


def test_the_toml_is_filtered_and_the_resolved_configuration_lies_beside_it(finished):
    from qwen_image.training.arguments import argument_names

    project, _ = finished
    arguments = tomllib.loads((project.folder / "results/train/demo/config.toml").read_text())
    assert set(arguments) <= set(argument_names())
    assert not [key for key in arguments if key.startswith("caching_") or key in ("num_processes", "mixed_precision")]
    assert arguments["latents_manifest"] == "results/manifests/dataset/latents.tsv"
    assert "caching_teo_fp8_vl: true" in (project.folder / "results/train/demo/resolved.yaml").read_text()


def test_no_output_names_the_machine(finished):
    project, _ = finished
    for pattern in ("results/manifests/**/*.tsv", "results/train/**/*", "results/models/*", "results/cache/**/*"):
        for path in project.folder.glob(pattern):
            if path.is_file():
                assert str(project.folder).encode() not in path.read_bytes(), path


# ---- changes ---------------------------------------------------------------------------------------------------------


def touch(project):
    os.utime(project.folder / PICTURE)
    os.utime(project.folder / CAPTION)


def edit_caption(project):
    (project.folder / CAPTION).write_text("a star of another kind")


def edit_image(project):
    path = project.folder / PICTURE
    image = Image.open(path)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)


def exchange_images(project):
    """As `mv` does it: the same names, sizes and times, but not of the same files."""
    first, second = (project.folder / f"{DEMO}/images/{name}.png" for name in ("004_star", "005_ring"))
    spare = first.rename(first.with_suffix(".spare"))
    second.rename(first)
    spare.rename(second)


def add(project):
    shutil.copy(project.folder / PICTURE, project.folder / f"{DEMO}/images/new.png")
    (project.folder / f"{DEMO}/images/new.txt").write_text("one more")


def remove(project):
    (project.folder / PICTURE).unlink()
    (project.folder / CAPTION).unlink()


def rename_folder(project):
    (project.folder / f"{DEMO}/images").rename(project.folder / f"{DEMO}/pictures")
    edit_dataset(project, f"{DEMO}/images", f"{DEMO}/pictures")


def change_resolution(project):
    edit_dataset(project, "256, 256", "192, 192")


def change_repeats(project):
    edit_dataset(project, "[general]", "[general]\nnum_repeats = 2")


def change_learning_rate(project):
    project.configure(learning_rate=2.0e-3)


def change_workers(project):
    project.configure(caching_latent_num_workers=1, caching_teo_batch_size=2, caching_latent_device="cpu")


def change_vae(project):
    path = project.folder / f"{DEMO}/vae.safetensors"
    tensors = load_file(path)
    tensors["encoder.conv_in.bias"] += 0.5
    save_file(tensors, path)


def edit_dataset(project, old, new):
    path = project.folder / f"{DEMO}/dataset.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "rules", "latents", "texts"),
    [
        (touch, set(), None, None),
        (edit_caption, {*TEXTS, "train"}, None, 1),
        (edit_image, {*LATENTS, "train"}, 1, None),
        (exchange_images, {*LATENTS, "train"}, 2, None),
        (add, {"check_config", *CACHES, "train"}, 1, 1),
        (remove, {"check_config", *CACHES, "train"}, 0, 0),
        (rename_folder, {"check_config", *CACHES}, 0, 0),
        (change_resolution, {"check_config", *LATENTS, "train"}, 18, None),
        (change_repeats, {"check_config", "train"}, None, None),
        (change_learning_rate, {"check_config", "train_config", "train"}, None, None),
        (change_workers, {"check_config", "train_config"}, None, None),
        (change_vae, {"check_config", *LATENTS, "train"}, 18, None),
    ],
)
def test_a_change_runs_what_depends_on_it_and_no_more(project, change, rules, latents, texts):
    time.sleep(0.1)  # the change gets a later time than the outputs
    change(project)
    result = project.run()
    assert result.code == 0, result.text
    assert set(result.rules) == rules
    assert len(result.rules) == len(rules)
    if latents is not None:
        assert project.encoded("cache_latents") == latents
    if texts is not None:
        assert project.encoded("cache_text_encoder_outputs") == texts
    again = project.run()
    assert again.nothing_done, again.text


def test_a_large_file_that_was_only_touched_is_not_encoded_and_nothing_is_trained(project):
    """Snakemake compares only small files by content; of the others only the fingerprint knows."""
    path = project.folder / PICTURE
    path.write_bytes(path.read_bytes() + b"\0" * 1_500_000)  # behind a PNG's end nothing is read
    assert project.run().code == 0
    time.sleep(0.1)
    os.utime(path)
    result = project.run()
    assert result.rules == ["cache_latents", "merge_latents"]
    assert project.encoded("cache_latents") == 0


def test_a_moved_project_does_nothing(project, tmp_path):
    moved = type(project)(project.folder.rename(tmp_path / "elsewhere"), project.python)
    assert moved.run().nothing_done


def test_a_dry_run_says_what_would_run_and_why(project):
    edit_caption(project)
    result = project.run("--dry-run")
    assert result.code == 0
    assert "cache_text_encoder_outputs: encode new and changed captions" in result.text
    assert f"Updated input files: {CAPTION}" in result.text
    assert "cache_latents:" not in result.text


def test_keep_cache_false_clears_the_cache_after_training_and_makes_it_again_when_needed(project):
    project.configure(caching_latent_keep_cache=False, caching_teo_keep_cache=False)
    foreign = project.folder / "results/cache/demo/mine_qi.safetensors"
    foreign.write_bytes(b"mine")
    result = project.run()
    assert result.code == 0, result.text
    assert "clear_cache" in result.rules
    assert [path.name for path in foreign.parent.iterdir()] == [foreign.name]
    again = project.run()
    assert again.nothing_done, again.text
    project.configure(learning_rate=3.0e-3)
    result = project.run()
    assert result.code == 0, result.text
    assert set(result.rules) == {"check_config", "train_config", *CACHES, "train", "clear_cache"}
    assert project.encoded("cache_latents") == 18


def test_a_jsonl_dataset_is_rebuilt_by_the_item_too(project):
    images = project.folder / f"{DEMO}/images"
    rows = [
        {"image_path": f"{DEMO}/images/{path.name}", "caption": path.with_suffix(".txt").read_text().strip()}
        for path in sorted(images.glob("00[1-4]*.*g"))
    ]
    listing = project.folder / "list.jsonl"
    dataset = {"image_jsonl_file": "list.jsonl", "cache_directory": "cache", "resolution": 128}
    (project.folder / "data.json").write_text(json.dumps({"datasets": [dataset]}))
    listing.write_text("\n\n".join(map(json.dumps, rows)))
    project.configure(dataset_config="data.json", caching_shards=2)
    assert project.run().code == 0
    assert project.encoded("cache_latents") == project.encoded("cache_text_encoder_outputs") == len(rows) == 4

    rows[2]["caption"] = "another caption"
    listing.write_text("\n".join(map(json.dumps, rows)))
    result = project.run()
    assert sorted(result.rules) == sorted([*TEXTS, "train"]), "one shard: " + result.text
    assert project.encoded("cache_text_encoder_outputs") == 1
    assert project.run().nothing_done


def test_another_weight_trains_again_and_a_further_caption_is_one_text_more(project):
    edit_dataset(project, "[general]", "[general]\nloss_weight = 0.5")
    planned = project.run("--dry-run").text
    assert "train: train the LoRA" in planned
    assert "cache_latents:" not in planned and "cache_text_encoder_outputs:" not in planned

    edit_dataset(project, "[general]", "[general]\nmultiple_captions = true")
    first = (project.folder / CAPTION).read_text().strip()
    for second in ("a star, drawn", "a star, painted"):
        (project.folder / CAPTION).write_text(f"{first}\n{second}\n")
        result = project.run("--", "cache_only")
        assert (result.code, set(result.rules) - {"check_config"}) == (0, TEXTS), result.text
        assert project.encoded("cache_text_encoder_outputs") == 1
        further = project.folder / "results/cache/demo/004_star_qi_te2.safetensors"
        assert read_header(further).metadata["caption1"] == second


def test_a_file_replaced_by_an_older_one_is_seen(project):
    """As `mv`, `cp -p` or `rsync -t` leave it: other content, an earlier time than everything that was made."""
    for name, content in ((CAPTION, b"an older caption, longer than the new one"), (PICTURE, None)):
        path = project.folder / name
        path.write_bytes(content or (project.folder / f"{DEMO}/images/005_ring.png").read_bytes())
        os.utime(path, (1_500_000_000, 1_500_000_000))
    result = project.run()
    assert set(result.rules) == {*CACHES, "train"}, result.text
    assert project.encoded("cache_latents") == project.encoded("cache_text_encoder_outputs") == 1


@pytest.mark.parametrize("name", ["dataset.toml", "dit.safetensors"])
def test_a_missing_demo_file_is_made_again_and_what_was_changed_beside_it_stays(project, name):
    path = project.folder / DEMO / name
    content = path.read_bytes()
    path.unlink()
    beside = project.folder / DEMO / "dataset.toml"
    if path != beside:
        edit_dataset(project, "batch_size = 2", "batch_size = 3")
    project.configure(learning_rate=2e-3)
    result = project.run()
    assert result.code == 0, result.text
    assert {"demo", "train"} <= set(result.rules)
    assert path.read_bytes() == content
    assert "batch_size = 3" in beside.read_text() or path == beside
    metadata = read_header(project.folder / "results/models/demo.safetensors").metadata
    assert metadata["ss_learning_rate"] == "0.002"


def test_an_item_that_is_left_out_later_enters_the_rejects_table(project):
    project.configure(on_bad_item="skip")
    assert project.run().code == 0
    shutil.copy(project.folder / PICTURE, project.folder / f"{DEMO}/images/zz.png")
    result = project.run()
    assert {"check_config", *CACHES} == set(result.rules), result.text
    assert "zz.png" in (project.folder / "results/manifests/dataset/latents.rejects.tsv").read_text()
    assert "zz.png" in (project.folder / "results/check/dataset.txt").read_text()


def test_the_toml_is_written_only_when_its_content_changes(project):
    path = project.folder / "results/train/demo/config.toml"
    before = path.stat().st_ino, path.read_bytes()
    project.configure(caching_latent_num_workers=1)
    assert "train_config" in project.run().rules
    # Snakemake sets the time of every output; the file itself is the old one
    assert (path.stat().st_ino, path.read_bytes()) == before
    project.configure(learning_rate=2e-3)
    assert "train_config" in project.run().rules
    assert (path.stat().st_ino, path.read_bytes()) != before


def test_what_finds_nothing_to_do_imports_no_model_library(project, tmp_path, monkeypatch):
    """Neither the workflow's own process nor a stage: importing torch takes longer than all else that they do."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in {'torch', 'transformers', 'diffusers'}:\n"
        "            raise RuntimeError(f'{name} was imported for nothing')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert project.run().nothing_done
    result = project.run("--forcerun", *LATENTS, *TEXTS, "--", "cache_only")
    assert result.code == 0, result.text
    assert set(result.rules) == CACHES
    assert project.encoded("cache_latents") == project.encoded("cache_text_encoder_outputs") == 0
    edit_caption(project)
    result = project.run()
    assert "was imported for nothing" in result.text, "the refusal works"
