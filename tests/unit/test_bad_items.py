"""Odd and bad input through the real programs: each kind is cached as people see it, or left out by name and reason."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import qwen_image_cache_latents
from bench import Bench, mortal
from image_files import photo
from odd_files import BAD, BAD_CAPTIONS, GOOD_CAPTIONS, ODD, SEEN, SMALL
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from qwen_image.cache.latents import LatentStage
from qwen_image.cache.manifest import LATENT_COLUMNS, REJECT_COLUMNS, read_manifest, write_manifest
from qwen_image.container import read_header
from qwen_image.problems import InputError, run

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")


def cases(table):
    """The table's names for parametrize."""
    for name in table:
        yield pytest.param(name, id=ascii(name)[1:40].rstrip("'"))


class Outcome:
    """One run of both programs over everything above, each dataset by its name."""

    def __init__(self, bench, datasets, output):
        self.bench, self.output = bench, output
        self._index = {name: index for index, name in enumerate(datasets)}
        self._tables = {kind: (bench.manifest(kind), bench.manifest(kind, "rejects.tsv")) for kind in output}

    def row(self, dataset, key, kind="latents"):
        (row,) = self._rows(0, dataset, key, kind)
        return row

    def reason(self, dataset, key, kind="latents"):
        assert not self._rows(0, dataset, key, kind), "a reject is in the manifest as well"
        (row,) = self._rows(1, dataset, key, kind)
        assert f"{key}: {row['reason']}" in self.output[kind]
        return row["reason"]

    def cached(self, dataset, key, kind="latents"):
        return self.bench.folder / "caches" / dataset / self.row(dataset, key, kind)["cache_file"]

    def _rows(self, table, dataset, key, kind):
        rows = self._tables[kind][table].to_dict("records")
        return [row for row in rows if (row["dataset"], row["key"]) == (self._index[dataset], key)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Everything in one dataset file, with on_bad_item: skip, by processes whose rights modes can limit."""
    bench = Bench(tmp_path_factory.mktemp("bad"))
    datasets = {name: bench.folder / name for name in ("odd", "seen", "bad", "small", "captions")}
    for folder in datasets.values():
        folder.mkdir()
    for name, make in ODD.items():
        make(datasets["odd"] / name).save(datasets["seen"] / (os.path.splitext(name)[0] + ".png"))
    for name, (make, _) in BAD.items():
        make(datasets["bad"] / name)
    for name, (size, _) in SMALL.items():
        photo(size=size).save(datasets["small"] / name)
    for name in GOOD_CAPTIONS | BAD_CAPTIONS:
        SEEN.save(datasets["captions"] / f"{name}.png")
    for name in bench.names:  # good items among the bad
        shutil.copy(bench.images / f"{name}.png", datasets["bad"])
    for dataset in ("odd", "seen", "bad", "small"):
        for image in list(datasets[dataset].iterdir()):
            if not image.name.startswith("no_caption") and image.suffix != ".hidden":
                (image.parent / f"{os.path.splitext(image.name)[0]}.txt").write_text("a caption")
    for name, (content, _) in GOOD_CAPTIONS.items():
        (datasets["captions"] / f"{name}.txt").write_bytes(content)
    for name, (make, _) in BAD_CAPTIONS.items():
        make(datasets["captions"] / f"{name}.txt")
    tables = [
        f"[[datasets]]\nimage_directory = {json.dumps(str(folder))}\n"
        f'cache_directory = "{bench.folder}/caches/{name}"\nbucket_no_upscale = {str(name == "small").lower()}\n'
        for name, folder in datasets.items()
    ]
    general = '[general]\nresolution = 64\nenable_bucket = true\ncaption_extension = ".txt"\n'
    bench.config.write_text(general + "".join(tables))
    output = {}
    processes = {
        kind: bench.process(kind, "--on_bad_item", "skip", preexec_fn=mortal)
        for kind in ("latents", "text_encoder_outputs")
    }
    for kind, process in processes.items():
        output[kind], _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[kind]
    return Outcome(bench, datasets, output)


@pytest.mark.parametrize("name", cases(ODD))
def test_an_odd_image_is_cached_as_what_people_see(outcome, name):
    """Its cache file has the name, the bucket and the values of a plain PNG file of the picture as it is seen."""
    odd = outcome.cached("odd", name)
    seen = outcome.cached("seen", os.path.splitext(name)[0] + ".png")
    assert odd.name == seen.name
    odd_tensors, seen_tensors = load_file(odd), load_file(seen)
    assert odd_tensors.keys() == seen_tensors.keys()
    for tensor in odd_tensors:
        assert (odd_tensors[tensor] == seen_tensors[tensor]).all()


@pytest.mark.parametrize("name", cases(BAD))
def test_a_bad_image_is_left_out_and_told(outcome, name):
    reason = outcome.reason("bad", os.fsencode(name).decode("utf-8", "backslashreplace"))
    assert re.search(BAD[name][1], reason), reason
    assert not list((outcome.bench.folder / "caches/bad").glob(f"{name[:-4]}_*x*_qi.safetensors"))


def test_the_good_images_among_the_bad_are_cached_and_the_bad_are_counted(outcome):
    for name in outcome.bench.names:
        assert outcome.cached("bad", f"{name}.png").exists()
    rejects = outcome.bench.manifest("latents", "rejects.tsv")
    assert f" {len(rejects)} rejected" in outcome.output["latents"].splitlines()[-1]
    assert list(outcome.bench.folder.glob("caches/*/.tmp*")) == []


@pytest.mark.parametrize("name", SMALL)
def test_an_image_smaller_than_a_bucket_without_enlarging(outcome, name):
    size, expected = SMALL[name]
    if isinstance(expected, str):
        assert expected in outcome.reason("small", name)
    else:
        row = outcome.row("small", name)
        assert (row["width"], row["height"]) == size
        assert (row["bucket_width"], row["bucket_height"]) == expected


@pytest.mark.parametrize("name", GOOD_CAPTIONS)
def test_an_odd_caption_is_cached(outcome, name):
    header = read_header(outcome.cached("captions", f"{name}.png", "text_encoder_outputs"))
    assert header.metadata["caption1"] == GOOD_CAPTIONS[name][1]
    tokens = outcome.row("captions", f"{name}.png", "text_encoder_outputs")["tokens"]
    closing = outcome.row("captions", "empty.png", "text_encoder_outputs")["tokens"]
    assert tokens == 1024 if name == "long" else closing <= tokens < 200


@pytest.mark.parametrize("name", cases(BAD_CAPTIONS))
def test_a_bad_caption_is_left_out_and_told(outcome, name):
    assert re.search(BAD_CAPTIONS[name][1], outcome.reason("captions", f"{name}.png", "text_encoder_outputs"))


def test_every_image_is_in_one_of_the_two_tables(outcome):
    folders = (outcome.bench.folder / name for name in ("odd", "seen", "bad", "small", "captions"))
    files = [path for folder in folders for path in folder.iterdir() if path.suffix not in (".txt", ".hidden")]
    for kind in outcome.output:
        table = read_manifest(outcome.bench.folder / f"m/{kind}.tsv", {"dataset": int, "key": str})
        assert len(table) + len(outcome.bench.manifest(kind, "rejects.tsv")) == len(files)


def test_the_manifest_can_be_read_whatever_the_images_are_called(outcome):
    table = read_manifest(outcome.bench.folder / "m/latents.tsv", LATENT_COLUMNS)
    assert set(ODD) <= set(table["key"])


def test_the_manifest_can_be_read_when_a_name_holds_a_carriage_return(tmp_path):
    write_manifest(tmp_path / "m.tsv", [{"dataset": 0, "key": "a\rb.png", "reason": "c\r\nd"}], REJECT_COLUMNS)
    (row,) = read_manifest(tmp_path / "m.tsv", REJECT_COLUMNS).to_dict("records")
    assert (row["key"], row["reason"]) == ("a\rb.png", "c\r\nd")


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


# ---- JSONL files -----------------------------------------------------------------------------------------------------


def jsonl(bench, *lines, mark=b""):
    file = bench.folder / "rows.jsonl"
    file.write_bytes(
        mark + b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    bench.config.write_text(
        f'[[datasets]]\nresolution = 64\nimage_jsonl_file = "{file}"\ncache_directory = "{bench.cache}"\n'
    )
    return file


def test_jsonl_with_a_mark_and_blank_lines_is_read_and_its_bad_images_are_left_out(bench):
    paths = [str(bench.images / f"{name}.png") for name in bench.names]
    rows = [{"image_path": path, "caption": "<|im_end|>" * index} for index, path in enumerate(paths)]
    missing = {"image_path": "gone.png", "caption": "x"}
    (bench.images / "empty.png").touch()
    empty = {"image_path": str(bench.images / "empty.png"), "caption": "x"}
    os.mkfifo(bench.images / "pipe.png")
    pipe = {"image_path": str(bench.images / "pipe.png"), "caption": "x"}
    jsonl(bench, b"", *rows, b"  \r", missing, empty, pipe, b"", mark=b"\xef\xbb\xbf")
    counts = bench.latents("--on_bad_item", "skip")
    assert (counts["encoded"], counts["rejected"]) == (len(paths), 3)
    assert list(bench.manifest()["key"]) == paths
    reasons = dict(bench.manifest(ending="rejects.tsv")[["key", "reason"]].values.tolist())
    assert reasons["gone.png"] == "there is no such file"
    assert reasons[empty["image_path"]] == "the file is empty"
    assert reasons[pipe["image_path"]] == "it is not a regular file"
    counts = bench.texts("--on_bad_item", "skip")
    assert (counts["encoded"], counts["rejected"]) == (len(paths) + 1, 2), "an empty image still has a caption"


@pytest.mark.parametrize("kind", ["latents", "text_encoder_outputs"])
def test_the_program_fails_once_the_good_lines_are_cached_and_then_encodes_only_the_mended(bench, kind):
    rows = [{"image_path": str(bench.images / f"{name}.png"), "caption": name} for name in bench.names]
    *good, last = rows
    broken = [b'{"image_path": ', good[0], {"image_path": last["image_path"], "caption": 5}, b"{}"]
    file = jsonl(bench, *good, b"", *broken)
    runs = {"latents": bench.latents, "text_encoder_outputs": bench.texts}
    with pytest.raises(InputError) as error:
        runs[kind]()
    lines = [f"{file}: line {len(good) + 1 + number}" for number in (1, 2, 4)]
    assert {problem.file for problem in error.value.problems} == {*lines, last["image_path"]}
    assert {row["key"] for row in bench.manifest(kind, "rejects.tsv").to_dict("records")} == {
        last["image_path"], *(line.removeprefix(f"{file}: ") for line in lines)
    }  # fmt: skip
    assert len(bench.files()) == len(good)
    jsonl(bench, *good, last)
    assert runs[kind]() == {"encoded": 1, "up to date": len(good), "rejected": 0}


def test_a_repeated_line_leaves_its_image_in_and_other_captions_leave_it_out(bench):
    first, other, *_ = [{"image_path": str(bench.images / f"{name}.png"), "caption": "x"} for name in bench.names]
    jsonl(bench, first, other, first, other | {"caption": "y"})
    counts = bench.texts("--on_bad_item", "skip")
    assert (counts["encoded"], counts["rejected"]) == (1, 2)
    assert list(bench.manifest("text_encoder_outputs")["key"]) == [first["image_path"]]
    assert set(bench.manifest("text_encoder_outputs", "rejects.tsv")["key"]) == {"line 3", other["image_path"]}


@pytest.mark.parametrize(("content", "found"), [(None, "No such file"), (b"\xff\xfe{\0", "not UTF-8"), (b"", "0 rows")])
def test_a_jsonl_file_that_is_none_is_told(bench, content, found):
    file = jsonl(bench)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=found):
        bench.latents()


# ---- the table itself ------------------------------------------------------------------------------------------------


def test_modes_do_not_hold_for_the_tests_by_accident(tmp_path):
    """Else `unreadable.png` would prove nothing."""
    path = tmp_path / "closed"
    unreadable_file = path.write_text("x")
    path.chmod(0)
    assert unreadable_file and subprocess.run(["cat", path], preexec_fn=mortal, capture_output=True).returncode == 1
