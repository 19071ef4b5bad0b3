"""When a cache file is up to date: every way to change what it is made from, and every way that changes nothing.

The rows that any cache has to get right stand in test_cache.py; here are the less plain ones.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from bench import mortal, moved
from image_files import photo, turned
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_image.cache import latents as latents_module
from qwen_image.cache import text_encoder_outputs as texts_module

ALL = "all"


@pytest.fixture
def bench(tmp_path):
    return moved(tmp_path / "elsewhere")


# ---- what a file is made from ----------------------------------------------------------------------------------------


def nothing(bench, monkeypatch):
    pass


def delete_manifests(bench, monkeypatch):
    bench.encoded()
    shutil.rmtree(bench.folder / "m")


def link_everything(bench, monkeypatch):
    for name in ("images", "cache", "te", "vae.safetensors"):
        (bench.folder / name).rename(bench.folder / f"real_{name}")
        (bench.folder / name).symlink_to(f"real_{name}")


def white_space_around_the_captions(bench, monkeypatch):
    for path in bench.images.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf \r\n" + path.read_bytes() + b"\r\n\n")


def white_space_inside_a_caption(bench, monkeypatch):
    path = bench.images / "astronaut.txt"
    path.write_text(path.read_text().replace(" ", "  ", 1))


def another_caption_extension(bench, monkeypatch):
    for path in bench.images.glob("*.txt"):
        path.rename(path.with_suffix(".caption"))
    bench.settings("resolution = 64", caption_extension='".caption"')


def jsonl_instead_of_a_folder(bench, monkeypatch):
    rows = [
        {"image_path": str(bench.images / f"{name}.png"), "caption": (bench.images / f"{name}.txt").read_text()}
        for name in reversed(bench.names)
    ]
    (bench.folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    bench.config.write_text(
        f'[[datasets]]\nimage_jsonl_file = "{bench.folder}/rows.jsonl"\ncache_directory = "{bench.cache}"\n'
        "resolution = 64\nenable_bucket = true\n"
    )


def behind_another_dataset(bench, monkeypatch):
    """The same dataset, now the second of its file. The first has two items of its own."""
    other = bench.folder / "other"
    other.mkdir()
    for name, content in (("x.png", "astronaut.png"), ("y.png", "small.png")):
        shutil.copy(bench.images / content, other / name)
        (other / name).with_suffix(".txt").write_text(name)
    general, _, dataset = bench.config.read_text().partition("[[datasets]]")
    first = f'image_directory = "{other}"\ncache_directory = "{bench.folder}/other_cache"\n'
    bench.config.write_text(f"{general}[[datasets]]\n{first}[[datasets]]{dataset}")


def same_content_under_another_name(bench, monkeypatch):
    for suffix in (".png", ".txt"):
        (bench.images / "astronaut").with_suffix(suffix).rename((bench.images / "renamed").with_suffix(suffix))


def turn_by_exif(bench, monkeypatch):
    path = bench.images / "motorcycle_left.png"
    if not path.exists():
        path = bench.images / "small.png"
    Image.open(path).save(path, exif=turned(6))


def alpha_background(bench, monkeypatch):
    bench.settings("resolution = 64", alpha_background='"black"')


def alpha_background_spelt_out(bench, monkeypatch):
    bench.settings("resolution = 64", alpha_background='"white"', bucket_no_upscale="false")


def resolution_spelt_out(bench, monkeypatch):
    bench.settings("resolution = [64, 64]")


def area_of_other_sides(bench, monkeypatch):
    """With buckets only the area counts: the buckets are the same ones."""
    bench.settings("resolution = [128, 32]")


def no_upscale(bench, monkeypatch):
    """Of the images only `small` has fewer pixels than the resolution."""
    bench.settings("resolution = 64", bucket_no_upscale="true")


def no_buckets(bench, monkeypatch):
    """Every image gets the bucket 64x64, which the square photograph has already."""
    bench.settings("resolution = 64", enable_bucket="false")


def vae_of_another_dtype(bench, monkeypatch):
    tensors = {name: tensor.float() for name, tensor in load_file(bench.vae).items()}
    save_file(tensors, bench.vae, metadata={"format": "pt"})


def vae_in_a_folder(bench, monkeypatch):
    folder = bench.folder / "pipeline" / "vae"
    folder.mkdir(parents=True)
    bench.vae = Path(shutil.move(bench.vae, folder / "diffusion_pytorch_model.safetensors"))


def tokenizer_changed(bench, monkeypatch):
    path = bench.text_encoder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))


def notes_beside_the_text_encoder(bench, monkeypatch):
    (bench.text_encoder / "README.md").write_text("# Notes")


def preprocessing_version(bench, monkeypatch):
    monkeypatch.setattr(latents_module, "PREPROCESSING_VERSION", "next")


def latent_encoder_version(bench, monkeypatch):
    monkeypatch.setattr(latents_module, "LATENT_ENCODER_VERSION", "next")


def text_encoder_version(bench, monkeypatch):
    monkeypatch.setattr(texts_module, "TEXT_ENCODER_VERSION", "next")


@pytest.mark.parametrize(
    ("change", "latents", "texts"),
    [
        (nothing, 0, 0),
        (delete_manifests, 0, 0),
        (link_everything, 0, 0),
        (white_space_around_the_captions, 0, 0),
        (white_space_inside_a_caption, 0, 1),
        (another_caption_extension, 0, 0),
        (jsonl_instead_of_a_folder, 0, 0),
        (behind_another_dataset, 2, 2),
        (same_content_under_another_name, 1, 1),
        (turn_by_exif, 1, 0),
        (alpha_background, ALL, 0),
        (alpha_background_spelt_out, 0, 0),
        (resolution_spelt_out, 0, 0),
        (area_of_other_sides, 0, 0),
        (no_upscale, 1, 0),
        (vae_of_another_dtype, ALL, 0),
        (vae_in_a_folder, 0, 0),
        (tokenizer_changed, 0, ALL),
        (notes_beside_the_text_encoder, 0, 0),
        (preprocessing_version, ALL, 0),
        (latent_encoder_version, ALL, 0),
        (text_encoder_version, 0, ALL),
    ],
)
def test_exactly_what_changed_is_encoded(bench, monkeypatch, change, latents, texts):
    change(bench, monkeypatch)
    expected = tuple(len(bench.names) if count == ALL else count for count in (latents, texts))
    assert bench.encoded() == expected
    assert bench.encoded() == (0, 0)


def test_without_buckets_only_images_whose_bucket_changes_are_encoded(bench):
    bench.latents()
    buckets = bench.manifest()[["bucket_width", "bucket_height"]].values.tolist()
    no_buckets(bench, None)
    others = sum(bucket != [64, 64] for bucket in buckets)
    assert 0 < others < len(bench.names)
    assert bench.latents()["encoded"] == others


def test_the_weights_precision_of_the_text_encoder_counts_both_ways(bench):
    everything = len(bench.names)
    assert [bench.texts(*more)["encoded"] for more in (["--fp8_vl"], ["--fp8_vl"], [], [])] == [
        everything, 0, everything, 0,
    ]  # fmt: skip


def test_turning_an_image_by_exif_turns_its_cache_file(bench):
    turn_by_exif(bench, None)
    (path,) = (path for path in bench.images.glob("*.png") if Image.open(path).getexif())
    width, height = Image.open(path).size
    bench.latents()
    (row,) = bench.manifest().query(f"key == '{path.name}'").to_dict("records")
    assert row["cache_file"] == f"{path.stem}_{height:04d}x{width:04d}_qi.safetensors"
    assert (row["bucket_width"] < row["bucket_height"]) == (height < width)


def test_equal_content_gives_equal_bytes_under_every_name_and_in_every_dataset(bench):
    before = bench.files()
    behind_another_dataset(bench, None)
    bench.encoded()
    (name,) = (name for name in before if name.startswith("astronaut_") and name.endswith("x0160_qi.safetensors"))
    twin = bench.folder / "other_cache" / name.replace("astronaut", "x")
    assert twin.read_bytes() == before[name]
    assert bench.files() == before


@pytest.mark.parametrize("kind", ["latents", "text_encoder_outputs"])
def test_without_skip_existing_everything_is_encoded_to_what_it_was(bench, kind):
    before = {path.name: load_file(path) for path in bench.cache.iterdir()}
    command = [word for word in bench.command(kind) if word != "--skip_existing"]
    assert bench.run(kind, command)["encoded"] == len(bench.names)
    for name, tensors in before.items():
        for tensor, value in load_file(bench.cache / name).items():
            torch.testing.assert_close(value, tensors[tensor])


def test_nothing_is_decoded_that_is_not_to_be_encoded(bench, monkeypatch):
    for name in ("load", "convert", "resize"):
        monkeypatch.setattr(Image.Image, name, lambda *_, **__: pytest.fail("pixels were decoded"))
    assert bench.encoded() == (0, 0)


# ---- places that cannot be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latents", "text_encoder_outputs"])
def test_from_a_read_only_place_nothing_is_encoded_and_the_manifest_is_the_same(bench, tmp_path, kind):
    bench.encoded()
    manifest = (bench.folder / f"m/{kind}.tsv").read_bytes()
    for folder, _, names in os.walk(bench.folder):
        for name in names:
            os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)
    target = tmp_path / "manifests" / f"{kind}.tsv"
    target.parent.mkdir()
    process = bench.process(kind, "--manifest", str(target), preexec_fn=mortal)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert f" 0 encoded, {len(bench.names)} up to date" in output
    assert target.read_bytes() == manifest


def test_a_read_only_cache_that_needs_a_file_is_a_clear_error(bench):
    (bench.images / "astronaut.txt").write_text("another caption")
    bench.cache.chmod(0o555)
    process = bench.process("text_encoder_outputs", preexec_fn=mortal)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and f"{bench.cache}: cannot be written to" in output
    assert "Traceback" not in output


# ---- a file that another program wrote -------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "data" / "img_0001_0960x0640_qi.safetensors"


@pytest.fixture
def golden(bench):
    """A dataset of one image, and the latent that musubi-tuner wrote for one of this name, size and bucket."""
    for folder in (bench.images, bench.cache):
        for path in folder.iterdir():
            path.unlink()
    photo("coffee.png", (960, 640)).save(bench.images / "img_0001.png")
    (bench.images / "img_0001.txt").write_text("a cup")
    shutil.copy(GOLDEN, bench.cache)
    bench.settings("resolution = 512")
    return bench


def test_what_musubi_tuner_wrote_is_encoded_anew_and_kept(golden):
    assert golden.latents()["encoded"] == 1
    ours, theirs = load_file(golden.cache / GOLDEN.name), load_file(GOLDEN)
    assert ours.keys() == theirs.keys()
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in theirs.values()]
    assert (golden.cache / f"{GOLDEN.name}.replaced").read_bytes() == GOLDEN.read_bytes()


def test_what_musubi_tuner_wrote_is_adopted_when_asked(golden):
    assert golden.latents("--adopt_existing") == {"encoded": 0, "up to date": 0, "rejected": 0, "adopted": 1}
    ours, theirs = load_file(golden.cache / GOLDEN.name), load_file(GOLDEN)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert golden.latents()["encoded"] == 0
    golden.settings("resolution = 256")
    assert golden.latents("--adopt_existing")["encoded"] == 1, "once adopted, the bucket counts as for every file"


def test_what_musubi_tuner_wrote_for_another_bucket_is_not_adopted(golden):
    golden.settings("resolution = 256")
    assert golden.latents("--adopt_existing") == {"encoded": 1, "up to date": 0, "rejected": 0}
    assert (golden.cache / f"{GOLDEN.name}.replaced").exists()
