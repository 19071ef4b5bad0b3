"""Odd and bad input through the real programs: each kind is cached as people see it, or left out by name and reason."""

import json
import os
import re
import shutil
import subprocess

import pytest
from bench import Bench, mortal
from image_files import photo
from odd_files import BAD, BAD_CAPTIONS, GOOD_CAPTIONS, ODD, SEEN, SMALL
from safetensors.torch import load_file

from qwen_image.cache.manifest import LATENT_COLUMNS, REJECT_COLUMNS, read_manifest, write_manifest
from qwen_image.container import read_header

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


# ---- the table itself ------------------------------------------------------------------------------------------------


def test_modes_do_not_hold_for_the_tests_by_accident(tmp_path):
    """Else `unreadable.png` would prove nothing."""
    path = tmp_path / "closed"
    unreadable_file = path.write_text("x")
    path.chmod(0)
    assert unreadable_file and subprocess.run(["cat", path], preexec_fn=mortal, capture_output=True).returncode == 1
