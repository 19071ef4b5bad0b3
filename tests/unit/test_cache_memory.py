"""What the cache remembers of files, and cache files that are no longer what they were."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from bench import moved
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_image.cache import latents as latents_module
from qwen_image.cache.fingerprint import DATA_KEY, FINGERPRINT_KEY, PARTS_KEY, fingerprint
from qwen_image.cache.latents import LatentStage, is_hash_and_size
from qwen_image.cache.update import CacheOptions, usable_header
from qwen_image.container import read_header, write_safetensors
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import list_items
from qwen_image.files import FileMemo, sha256_files
from qwen_image.models import identity as identity_module
from qwen_image.problems import InputError
from qwen_image.training.items import LATENT_PREFIX, CacheFile
from qwen_image.training.loading import read_tensor

OLD = 1_600_000_000


@pytest.fixture
def bench(tmp_path):
    return moved(tmp_path / "elsewhere")


@pytest.fixture(autouse=True)
def one_thread():
    """The same number in every run whose bytes are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- what is remembered of files -------------------------------------------------------------------------------------


def age(bench):
    """Let every file be older than what the memo is careful about."""
    for path in [bench.vae, *bench.images.iterdir(), *bench.text_encoder.iterdir()]:
        os.utime(path, (OLD, OLD))


def memos(bench):
    return sorted((bench.folder / "m").glob(".*.json"))


@pytest.fixture
def hashed(monkeypatch):
    """The files whose content is read for its hash, in order."""
    paths = []

    def remembering(real):
        return lambda path: paths.append(Path(path).name) or real(path)

    for module, name in ((latents_module, "sha256_file"), (identity_module, "_hash_with_progress")):
        monkeypatch.setattr(module, name, remembering(getattr(module, name)))
    return paths


def test_a_models_identity_is_computed_once_a_file_and_remembered(bench, hashed):
    age(bench)
    bench.latents()
    assert hashed.count("vae.safetensors") == 1
    bench.texts()
    assert hashed.count("model.safetensors") == 1 and hashed.count("tokenizer.json") == 1
    count = len(hashed)
    assert bench.encoded() == (0, 0)
    assert len(hashed) == count, "neither a model nor an image is read twice"
    os.utime(bench.vae, (OLD + 1, OLD + 1))
    assert bench.encoded() == (0, 0)
    assert hashed[count:] == ["vae.safetensors"]


def test_the_model_is_known_by_its_content_not_by_its_date(bench):
    age(bench)
    bench.encoded()
    tensors = load_file(bench.vae)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, bench.vae)
    os.utime(bench.vae, (OLD - 100, OLD - 100))
    assert bench.latents()["encoded"] == len(bench.names), "an older file is as much another one"
    shutil.copy(tiny.path("vae"), bench.vae)
    assert bench.latents()["encoded"] == len(bench.names)


GARBAGE = {
    "cut": lambda rows: json.dumps(rows)[:-20],
    "not JSON": lambda rows: "\0\xff garbage",
    "empty": lambda rows: "",
    "a list": lambda rows: json.dumps(list(rows)),
    "rows that are text": lambda rows: json.dumps(dict.fromkeys(rows, "text")),
    "rows without values": lambda rows: json.dumps({key: row[:3] for key, row in rows.items()}),
    "rows of other values": lambda rows: json.dumps(
        {key: [*row[:3], *["1"] * len(row[3:])] for key, row in rows.items()}
    ),
    "rows with more values": lambda rows: json.dumps({key: [*row, 1] for key, row in rows.items()}),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_spoilt_memo_does_no_harm(bench, garbage):
    age(bench)
    bench.encoded()
    assert memos(bench)
    before = {path.name: path.read_bytes() for path in (bench.folder / "m").glob("*.tsv")}
    for path in memos(bench):
        path.write_text(GARBAGE[garbage](json.loads(path.read_text())), encoding="latin-1")
    assert bench.encoded() == (0, 0)
    assert {path.name: path.read_bytes() for path in (bench.folder / "m").glob("*.tsv")} == before


def test_a_memo_that_is_a_folder_does_no_harm(bench):
    age(bench)
    bench.encoded()
    for path in memos(bench):
        path.unlink()
        path.mkdir()
    assert bench.encoded() == (0, 0)


def test_an_edit_that_hides_its_size_and_date_is_seen(bench):
    """As a tool does it that keeps dates; the file system still knows that something was changed."""
    path = bench.images / "astronaut.png"
    Image.open(path).convert("RGB").save(path.with_suffix(".bmp"), "bmp")
    path.with_suffix(".bmp").replace(path)
    age(bench)
    bench.latents()
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    assert bench.latents()["encoded"] == 1


# ---- cache files that are not what they were -------------------------------------------------------------------------


def rewrite(path, **metadata):
    header = read_header(path)
    write_safetensors(path, load_file(path), header.metadata | metadata)


def other_parts(path, **changes):
    return json.loads(read_header(path).metadata[PARTS_KEY]) | changes


def canonical(parts):
    return json.dumps(dict(sorted(parts.items())), separators=(",", ":"))


def neighbour(path):
    return next(path.parent.glob("small_qi_te*" if "_te." in path.name else "small_0*"))


SPOILT = {
    "another fingerprint": lambda path: rewrite(path, **{FINGERPRINT_KEY: "0" * 64}),
    "no fingerprint": lambda path: rewrite(path, **{FINGERPRINT_KEY: ""}),
    "the fingerprint of other parts": lambda path: rewrite(
        path,
        **{
            FINGERPRINT_KEY: fingerprint(other_parts(path, model="0" * 64)),
            PARTS_KEY: canonical(other_parts(path, model="0" * 64)),
        },
    ),
    "other parts, the old fingerprint": lambda path: rewrite(
        path, **{PARTS_KEY: canonical(other_parts(path, model="0" * 64))}
    ),
    "another item's file": lambda path: shutil.copy(neighbour(path), path),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("kind", ["latents", "texts"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_file_that_is_not_what_it_should_be_is_encoded_anew(bench, kind, spoilt):
    run = getattr(bench, kind)
    run("--deterministic")
    before = bench.files()
    (path,) = bench.cache.glob({"latents": "astronaut_*x*_qi.safetensors", "texts": "astronaut_qi_te*"}[kind])
    SPOILT[spoilt](path)
    assert run("--deterministic")["encoded"] == 1
    assert bench.files() == before
    assert not path.is_symlink() and not (bench.cache / "nowhere").exists()


def test_of_files_without_an_item_only_those_that_are_surely_ours_are_removed(bench):
    (path,) = bench.cache.glob("astronaut_*x*_qi.safetensors")
    spoilt = ("no fingerprint", "other parts, the old fingerprint", "cut by a byte", "empty", "a link to nothing")
    gone = [bench.cache / f"gone{number}_0160x0160_qi.safetensors" for number in range(len(spoilt) + 1)]
    for one in gone:
        shutil.copy(path, one)
    for one, kind in zip(gone, spoilt, strict=False):
        SPOILT[kind](one)
    assert bench.latents(keep=False)["removed"] == 1
    assert [os.path.lexists(one) for one in gone] == [True] * len(spoilt) + [False]


def test_a_link_to_a_whole_file_is_as_good_as_the_file(bench):
    (bench.folder / "store").mkdir()
    for path in list(bench.cache.iterdir()):
        path.symlink_to(path.rename(bench.folder / "store" / path.name))
    assert bench.encoded() == (0, 0)


@pytest.mark.parametrize("pattern", ["astronaut_*x*_qi.safetensors", "astronaut_qi_te.safetensors"])
def test_a_folder_in_a_files_place_is_told_and_left_alone(bench, pattern):
    (path,) = bench.cache.glob(pattern)
    path.unlink()
    path.mkdir()
    run = bench.texts if "_te" in pattern else bench.latents
    with pytest.raises(ValueError, match=r"astronaut\.png: its cache file .* cannot be written"):
        run()
    assert path.is_dir()


def latent_entry(bench, key):
    """Return the stage, the entry and the options of the latent program for one image."""
    memo = FileMemo(bench.folder / "memo", is_hash_and_size)
    stage = LatentStage(
        vae=str(bench.vae), model_identity=sha256_files([bench.vae], FileMemo("", bool)), device="cpu",
        batch_size=1, num_workers=1, deterministic=False, memo=memo,
    )  # fmt: skip
    (settings,) = load_dataset_config(bench.config)
    (item,) = [item for item in list_items(settings).items if item.key == key]
    tables = {"manifest": bench.folder / "x", "rejects": bench.folder / "y"}
    (entry,) = stage.plan(item, settings)
    return stage, entry, CacheOptions(skip_existing=True, keep_cache=True, on_bad_item="error", **tables)


def test_a_flipped_bit_in_a_header_is_noticed_or_means_nothing(bench):
    (path,) = bench.cache.glob("astronaut_*x*_qi.safetensors")
    content, header = path.read_bytes(), read_header(path)
    stage, entry, options = latent_entry(bench, "astronaut.png")
    assert usable_header(stage, entry, options) == header
    unnoticed = []
    for place in range(header.data_start):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if (found := usable_header(stage, entry, options)) and found != header and not noticed_by_training(path, found):
            unnoticed.append(content[max(0, place - 20) : place + 1])
    assert unnoticed == []


def noticed_by_training(path, header):
    """Whether the hash of the values differs, which only who reads them can tell; without its name nothing is lost."""
    if DATA_KEY not in header.metadata:
        return True
    try:
        read_tensor(CacheFile(str(path), ""), LATENT_PREFIX)
    except InputError:
        return True
    return False


def test_a_program_that_is_told_to_stop_remembers_what_it_has_read(bench):
    age(bench)
    for number in range(300):
        shutil.copy2(bench.images / "astronaut.png", bench.images / f"more{number}.png")
        (bench.images / f"more{number}.txt").write_text("one more")
    shutil.rmtree(bench.cache)
    process = bench.process("latents")
    seen = ""
    while " to encode" not in seen:  # everything was looked at
        seen += process.stdout.readline()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    (memo,) = [path for path in memos(bench) if "latents" in path.name]
    assert len(json.loads(memo.read_text())) >= 300
    assert all(read_header(path).is_ours for path in bench.cache.glob("*"))
