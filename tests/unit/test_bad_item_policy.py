"""What a bad item does to a run: the others are cached, then it fails or goes on; also when it turns bad meanwhile."""

import shutil
from pathlib import Path

import pytest
import qwen_image_cache_latents
from bench import Bench
from image_files import photo
from odd_files import BAD
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from qwen_image.cache.latents import LatentStage
from qwen_image.problems import InputError, run

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")


# ---- on_bad_item: error ----------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def spoil(bench, *names):
    for name in names:
        make, _ = BAD[name]
        make(bench.images / name)
        (bench.images / name).with_suffix(".txt").write_text("a bad image")


def test_the_program_fails_once_the_good_images_are_cached_and_then_encodes_only_the_mended(bench, capsys):
    bad = ("cut_jpeg.jpg", "empty.png", "folder.jpg", "pipe.png", "bomb.png")
    spoil(bench, *bad)
    assert run(lambda: qwen_image_cache_latents.main(bench.command("latents"))) == 2
    message = capsys.readouterr().err
    assert "5 problems" in message and all(f"{bench.images / name}: " in message for name in bad)
    assert len(bench.files()) == len(bench.names)
    for name in bad:
        path = bench.images / name
        path.rmdir() if path.is_dir() else path.unlink()
        if name == "cut_jpeg.jpg":
            photo(size=(70, 60)).save(path)
    assert bench.latents() == {"encoded": 1, "up to date": len(bench.names), "rejected": 0}


def test_the_text_program_fails_once_the_good_captions_are_cached_and_then_encodes_only_the_mended(bench):
    captions = {"astronaut": b"caf\xe9", "motorcycle_left": b"\xff\xfea\0"}
    for name, content in captions.items():
        shutil.copy(bench.images / f"{bench.names[-1]}.png", bench.images / f"{name}.png")
        (bench.images / f"{name}.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        bench.texts()
    assert [Path(problem.file).stem for problem in error.value.problems] == list(captions)
    good = len(bench.files())
    assert good == len(set(bench.names) - captions.keys()) >= 1
    for name in captions:
        (bench.images / f"{name}.txt").write_text("mended")
    assert bench.texts()["encoded"] == len(captions)


def test_a_dataset_of_bad_images_alone_is_an_error_even_with_skip(bench):
    for path in bench.images.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        bench.latents("--on_bad_item", "skip")
    assert len(error.value.problems) == len(bench.names)


# ---- what changes while the program runs -----------------------------------------------------------------------------


def while_running(monkeypatch, change):
    """Do something once the images are listed and looked at, and before one is decoded."""
    encode = LatentStage.encode

    def changed(self, entries):
        change()
        return encode(self, entries)

    monkeypatch.setattr(LatentStage, "encode", changed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "there is no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cut short"),
        (lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
    ],
    ids=["vanished", "truncated", "replaced"],
)
def test_an_image_that_is_spoilt_while_the_program_runs_is_left_out(bench, monkeypatch, change, reason):
    while_running(monkeypatch, lambda: change(bench.images / "astronaut.png"))
    counts = bench.latents("--on_bad_item", "skip")
    assert counts["rejected"] == 1 and counts["encoded"] == len(bench.names) - 1
    (row,) = bench.manifest(ending="rejects.tsv").to_dict("records")
    assert row["key"] == "astronaut.png" and reason in row["reason"]


@pytest.mark.parametrize(
    "listed",
    [
        pytest.param(True, id="before it is looked at"),
        pytest.param(False, id="before it is decoded"),
    ],
)
def test_an_image_that_vanishes_fails_the_program_but_not_the_others(bench, monkeypatch, listed):
    vanish = (bench.images / "astronaut.png").unlink
    if listed:
        plan = LatentStage.plan

        def planned(self, item, settings):
            if item.key == "astronaut.png":
                vanish()
            return plan(self, item, settings)

        monkeypatch.setattr(LatentStage, "plan", planned)
    else:
        while_running(monkeypatch, vanish)
    with pytest.raises(InputError, match="no such file") as error:
        bench.latents()
    assert len(error.value.problems) == 1
    assert len(bench.files()) == len(bench.names) - 1


def test_an_image_that_changes_while_the_program_runs_is_not_cached_as_what_it_was(bench, monkeypatch):
    path = bench.images / "astronaut.png"
    before = path.read_bytes()
    while_running(monkeypatch, lambda: ImageOps.invert(Image.open(path)).save(path))
    bench.latents("--on_bad_item", "skip")
    monkeypatch.undo()
    path.write_bytes(before)
    bench.latents()
    after = bench.files()
    shutil.rmtree(bench.cache)
    bench.latents()
    assert after == bench.files()


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_latent_of_no_numbers_is_left_out_and_the_others_are_saved(bench, monkeypatch, value):
    from qwen_image.models.image_vae import ImageVae

    Image.new("RGB", (64, 64)).save(bench.images / "black.png")
    (bench.images / "black.txt").write_text("nothing")
    real = ImageVae.encode_pixels

    def encode(self, pixels):
        latents = real(self, pixels).clone()
        for index, one in enumerate(pixels):
            if not one.any():
                latents[index, 3, 0, 2, 5] = value
        return latents

    monkeypatch.setattr(ImageVae, "encode_pixels", encode)
    with pytest.raises(InputError, match=r"black\.png: the VAE gave NaN or Inf") as error:
        bench.latents()
    assert len(error.value.problems) == 1
    assert len(bench.files()) == len(bench.names)
    assert not list(bench.cache.glob("black*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_embedding_of_no_numbers_is_left_out_and_the_others_are_saved(bench, value):
    """The embedding of one token is broken in the checkpoint, and one caption has that token."""
    path = bench.text_encoder / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if "embed_tokens" in name)
    captions = {name: (bench.images / f"{name}.txt").read_text() for name in bench.names}
    (bench.images / "astronaut.txt").write_text("Ω")
    from qwen_image.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bench.text_encoder, None)
    others = {token for caption in captions.values() for token in tokenizer(caption).input_ids}
    own = [token for token in tokenizer("Ω").input_ids if token not in others]
    tensors[name][own] = value
    save_file(tensors, path, metadata={"format": "pt"})
    counts = bench.texts("--on_bad_item", "skip")
    assert (counts["rejected"], counts["encoded"]) == (1, len(bench.names) - 1)
    (row,) = bench.manifest("text_encoder_outputs", "rejects.tsv").to_dict("records")
    assert row["key"] == "astronaut.png" and "NaN or Inf" in row["reason"]
    assert not list(bench.cache.glob("astronaut*"))
