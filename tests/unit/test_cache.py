"""The cache on real tiny models: what is encoded when, what is written, what is left alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from bench import Bench
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_image.cache.fingerprint import FINGERPRINT_KEY, PARTS_KEY, fingerprint
from qwen_image.container import read_header
from qwen_image.problems import InputError


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def encoded(counts):
    return counts["encoded"]


# ---- what the files are ----------------------------------------------------------------------------------------------


def test_a_latent_file_is_the_fields_format_with_a_fingerprint(bench):
    assert encoded(bench.latents()) == len(bench.names) >= 2
    width, height = Image.open(bench.images / "astronaut.png").size
    path = bench.cache / f"astronaut_{width:04d}x{height:04d}_qi.safetensors"
    header = read_header(path)
    assert {key: header.metadata[key] for key in ("architecture", "format_version", "width", "height")} == {
        "architecture": "qwen_image", "format_version": "1.0.1", "width": str(width), "height": str(height),
    }  # fmt: skip
    (row,) = bench.manifest().query("key == 'astronaut.png'").to_dict("records")
    (name,) = header.tensors
    h, w = row["bucket_height"] // 8, row["bucket_width"] // 8
    assert name == f"latents_1x{h}x{w}_bfloat16"
    assert header.tensors[name].shape == (16, 1, h, w)
    assert header.metadata[FINGERPRINT_KEY] == fingerprint(json.loads(header.metadata[PARTS_KEY])) == row["fingerprint"]


def test_a_text_file_is_the_fields_format_with_a_fingerprint(bench):
    (bench.images / "astronaut.txt").write_text("  une fusée ✿ 漢字\n")
    assert encoded(bench.texts()) == len(bench.names)
    header = read_header(bench.cache / "astronaut_qi_te.safetensors")
    assert header.metadata["caption1"] == "une fusée ✿ 漢字"
    assert header.metadata["architecture"] == "qwen_image"
    ((name, info),) = header.tensors.items()
    assert name == "varlen_vl_embed_bfloat16"
    (row,) = bench.manifest("text_encoder_outputs").query("key == 'astronaut.png'").to_dict("records")
    assert info.shape == (row["tokens"], 256)


def test_the_golden_files_layout_is_ours(bench):
    """A cache file that another tool wrote has the name and tensor that we would give."""
    from qwen_image.cache.names import latent_file_name, latent_tensor_name

    header = read_header(Path(__file__).parents[1] / "data" / "img_0001_0960x0640_qi.safetensors")
    assert latent_file_name("img_0001", (960, 640)) == "img_0001_0960x0640_qi.safetensors"
    assert list(header.tensors) == [latent_tensor_name((624, 416), "bfloat16")]


def test_the_manifest_has_every_item_sorted_and_no_machine_path(bench):
    bench.latents()
    table = bench.manifest()
    assert list(table["key"]) == [f"{name}.png" for name in bench.names]
    assert str(bench.folder) not in (bench.folder / "m/latents.tsv").read_text()
    assert list(bench.manifest(ending="rejects.tsv")["key"]) == []


# ---- when something is encoded ---------------------------------------------------------------------------------------


def test_nothing_is_encoded_twice_and_no_model_is_loaded_for_it(bench, monkeypatch):
    bench.latents()
    bench.texts()
    before = {path: path.stat().st_mtime_ns for path in bench.cache.iterdir()}
    manifest = (bench.folder / "m/latents.tsv").read_bytes()
    import qwen_image.models.text_encoder
    import qwen_image.models.vae

    for module, name in ((qwen_image.models.vae, "load_vae"), (qwen_image.models.text_encoder, "load_text_encoder")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was loaded for nothing"))
    assert bench.latents() == {"encoded": 0, "up to date": len(bench.names), "rejected": 0}
    assert bench.texts() == {"encoded": 0, "up to date": len(bench.names), "rejected": 0}
    assert {path: path.stat().st_mtime_ns for path in bench.cache.iterdir()} == before
    assert (bench.folder / "m/latents.tsv").read_bytes() == manifest


def touch(bench):
    os.utime(bench.images / "astronaut.png", (1, 1))
    os.utime(bench.images / "astronaut.txt", (1, 1))


def edit_caption(bench):
    (bench.images / "astronaut.txt").write_text("another caption")


def edit_image(bench):
    path = bench.images / "astronaut.png"
    image = Image.open(path)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)


def add(bench):
    shutil.copy(bench.images / "astronaut.png", bench.images / "copy.png")
    (bench.images / "copy.txt").write_text("a copy")


def remove(bench):
    (bench.images / "astronaut.png").unlink()


def rename_folder(bench):
    bench.images = bench.images.rename(bench.folder / "renamed")
    bench.settings("resolution = 64")


def move_cache(bench):
    bench.cache = Path(shutil.copytree(bench.cache, bench.folder / "elsewhere"))
    bench.settings("resolution = 64")


def resolution(bench):
    bench.settings("resolution = 96")


def batch_and_repeats(bench):
    bench.settings("resolution = 64", "batch_size = 3", "num_repeats = 5")


def change_vae(bench):
    tensors = load_file(bench.vae)
    tensors["encoder.conv_in.bias"] += 0.5
    save_file(tensors, bench.vae)


def change_text_encoder(bench):
    path = bench.text_encoder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.bias"))
    tensors[name] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


def touch_models(bench):
    os.utime(bench.vae, (5, 5))
    os.utime(bench.text_encoder / "model.safetensors", (5, 5))


def rename_models(bench):
    bench.vae = Path(bench.vae).rename(bench.folder / "other.safetensors")
    bench.text_encoder = bench.text_encoder.rename(bench.folder / "other")


def truncate(bench):
    for path in bench.cache.glob("astronaut*"):
        path.write_bytes(path.read_bytes()[:-5])


def delete_memo(bench):
    for path in (bench.folder / "m").glob(".*"):
        path.unlink()


ALL = "all"


@pytest.mark.parametrize(
    ("change", "latents", "texts"),
    [
        (touch, 0, 0),
        (edit_caption, 0, 1),
        (edit_image, 1, 0),
        (add, 1, 1),
        (remove, 0, 0),
        (rename_folder, 0, 0),
        (move_cache, 0, 0),
        (resolution, ALL, 0),
        (batch_and_repeats, 0, 0),
        (change_vae, ALL, 0),
        (change_text_encoder, 0, ALL),
        (touch_models, 0, 0),
        (rename_models, 0, 0),
        (truncate, 1, 1),
        (delete_memo, 0, 0),
    ],
)
def test_exactly_what_changed_is_encoded(bench, change, latents, texts):
    bench.latents()
    bench.texts()
    change(bench)
    everything = len(bench.names)
    assert encoded(bench.latents()) == (everything if latents == ALL else latents)
    assert encoded(bench.texts()) == (everything if texts == ALL else texts)
    assert encoded(bench.latents()) == encoded(bench.texts()) == 0


def test_another_precision_of_the_text_encoder_is_another_cache(bench):
    bench.texts()
    assert encoded(bench.texts("--fp8_vl")) == len(bench.names)
    assert encoded(bench.texts("--fp8_vl")) == 0


def test_another_tools_file_is_not_trusted_but_encoded_anew(bench):
    bench.latents()
    path = next(bench.cache.glob("astronaut_*"))
    tensors = load_file(path)
    save_file(tensors, path, metadata={"architecture": "qwen_image", "format_version": "1.0.1"})
    assert encoded(bench.latents()) == 1


# ---- what stays and what goes ----------------------------------------------------------------------------------------


def test_a_removed_item_leaves_the_manifest_at_once_and_the_disk_only_if_asked(bench):
    bench.latents()
    (bench.images / "astronaut.png").unlink()
    bench.latents()
    assert "astronaut.png" not in set(bench.manifest()["key"])
    assert list(bench.cache.glob("astronaut_*"))
    foreign = bench.cache / "mylora_qi.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    counts = bench.latents(keep=False)
    assert counts["removed"] == 1
    assert not list(bench.cache.glob("astronaut_*"))
    assert foreign.exists(), "a file that this project did not write is never deleted"


def test_clean_up_of_latents_leaves_the_texts(bench):
    bench.texts()
    bench.latents()
    (bench.images / "astronaut.png").unlink()
    bench.latents(keep=False)
    assert (bench.cache / "astronaut_qi_te.safetensors").exists()


# ---- bad items -------------------------------------------------------------------------------------------------------


def test_a_bad_image_fails_the_stage_after_the_good_ones_are_cached(bench):
    (bench.images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (bench.images / "broken.txt").write_text("broken")
    with pytest.raises(InputError, match=r"broken\.png") as error:
        bench.latents()
    assert len(error.value.problems) == 1
    assert len(list(bench.cache.glob("*_qi.safetensors"))) == len(bench.names)
    shutil.copy(bench.images / "astronaut.png", bench.images / "broken.png")
    assert encoded(bench.latents()) == 1


def test_a_bad_image_can_be_left_out_and_is_listed(bench):
    (bench.images / "broken.png").write_bytes(b"")
    (bench.images / "broken.txt").write_text("broken")
    assert bench.latents("--on_bad_item", "skip")["rejected"] == 1
    (row,) = bench.manifest(ending="rejects.tsv").to_dict("records")
    assert row["key"] == "broken.png"
    assert row["reason"]
    assert "broken.png" not in set(bench.manifest()["key"])


def test_a_caption_that_is_not_utf8_is_a_bad_item(bench):
    (bench.images / "astronaut.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"astronaut.*UTF-8"):
        bench.texts()


def test_numbers_that_are_none_are_never_saved(bench, monkeypatch):
    from qwen_image.models.image_vae import ImageVae

    real = ImageVae.encode_pixels
    monkeypatch.setattr(ImageVae, "encode_pixels", lambda *a: real(*a) * float("nan"))
    with pytest.raises(InputError, match="NaN"):
        bench.latents()
    assert not list(bench.cache.glob("*.safetensors"))


def test_the_cached_bytes_do_not_depend_on_the_other_images_or_the_workers(bench):
    bench.latents("--batch_size", "3", "--num_workers", "2")
    first = {path.name: path.read_bytes() for path in bench.cache.glob("*_qi.safetensors")}
    shutil.rmtree(bench.cache)
    for name in bench.names[1:]:
        (bench.images / f"{name}.png").unlink()
    bench.latents("--batch_size", "1", "--num_workers", "1")
    (alone,) = bench.cache.glob("*_qi.safetensors")
    assert alone.read_bytes() == first[alone.name]
