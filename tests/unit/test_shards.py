"""Shards: which item is in which, merged tables that do not tell how many there were, and which files are orphans."""

import hashlib
from pathlib import Path

import merge_manifests
import numpy
import pytest
import torch

from qwen_image.cache.fingerprint import fingerprint_metadata
from qwen_image.cache.manifest import REJECT_COLUMNS, TEXT_COLUMNS, write_digest, write_manifest
from qwen_image.cache.merge import cache_paths, merge_shards, remove_orphans
from qwen_image.cache.names import LATENT_SUFFIX, TEXT_SUFFIX, latent_file_name, text_file_name
from qwen_image.cache.shards import shard_manifest, shard_of, split_listing
from qwen_image.container import write_safetensors
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import Item, Listing, Reject
from qwen_image.problems import InputError

STRANGE = ["a\tb.png", 'say "x".png', "line\nbreak.png", "NA", "  space .png", "#1.png", "漢字 🎨.png", "\udcff.png"]


# ---- which item is in which shard ------------------------------------------------------------------------------------


def test_a_shard_is_a_fixed_function_of_the_key():
    # changing these would make every shard of every user run again
    assert [shard_of(key, 5) for key in ("001_circle.jpg", "images/a b.png", "漢字.webp", "\udcff.png")] == [5, 1, 4, 5]
    assert [shard_of("001_circle.jpg", count) for count in (1, 2, 999)] == [1, 2, 373]


def test_shards_are_of_about_the_same_size():
    sizes = numpy.bincount([shard_of(f"{number}.png", 10) for number in range(10_000)], minlength=11)
    assert sizes[0] == 0
    assert sizes[1:].min() > 850
    assert sizes.sum() == 10_000


def test_a_listing_is_split_by_the_keys_of_items_and_rejects():
    listing = listing_of(
        [f"{number}.png" for number in range(20)], rejects=[f"bad{number}.png" for number in range(20)]
    )
    assert split_listing(listing, 1) == [listing]
    parts = split_listing(listing, 3)
    assert len(parts) == 3
    for shard, part in enumerate(parts, start=1):
        assert part.items == [item for item in listing.items if shard_of(item.key, 3) == shard]
        assert part.rejects == [reject for reject in listing.rejects if shard_of(reject.key, 3) == shard]


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_tables_of_another_count_do_not_come_back(tmp_path):
    """They would pass for up to date if that count were set again, and describe files that are gone."""
    manifest = tmp_path / "text_encoder_outputs.tsv"
    for count in (1, 12, 2):
        write_shards(manifest, count, [row(0, "a.png"), row(0, "b.png")], bad=[])
        merge_shards(manifest, count)
        names = {path.name for path in (tmp_path / "shards").iterdir()}
        assert names == {f"text_encoder_outputs.{shard}-of-{count}.{ending}" for shard in range(1, count + 1)
                         for ending in ("tsv", "rejects.tsv")}  # fmt: skip


def test_the_merged_tables_are_the_same_for_any_number_of_shards(tmp_path):
    keys = sorted([*STRANGE, *(f"{number:03d}.png" for number in range(30))])
    written = {}
    for count in (1, 5, 40):
        manifest = tmp_path / str(count) / "text_encoder_outputs.tsv"
        write_shards(manifest, count, [row(index, key) for index in (0, 1) for key in keys], bad=["x.png", "y\tz.png"])
        merge_shards(manifest, count)
        files = [path for path in sorted(manifest.parent.iterdir()) if path.is_file()]
        written[count] = {path.name: path.read_bytes() for path in files}
    assert written[1] == written[5] == written[40]
    names = ["text_encoder_outputs.rejects.tsv", "text_encoder_outputs.sha256", "text_encoder_outputs.tsv"]
    assert sorted(written[1]) == names
    whole = tmp_path / "whole.tsv"
    write_manifest(whole, [row(index, key) for index in (0, 1) for key in keys], TEXT_COLUMNS)
    assert written[1]["text_encoder_outputs.tsv"] == whole.read_bytes()
    assert written[1]["text_encoder_outputs.sha256"].decode() == f"{hashlib.sha256(whole.read_bytes()).hexdigest()}\n"
    assert b"x.png\tno good" in written[1]["text_encoder_outputs.rejects.tsv"]


def test_a_dataset_of_nothing_but_rejects_is_an_error_that_names_them(tmp_path):
    manifest = tmp_path / "text_encoder_outputs.tsv"
    write_shards(manifest, 2, [], bad=["x.png", "y.png", "z.png"])
    with pytest.raises(InputError) as error:
        merge_shards(manifest, 2)
    assert len(error.value.problems) == 3
    assert "y.png: no good" in str(error.value)
    assert not manifest.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_shard_that_is_missing_is_an_error_that_names_it(tmp_path, count):
    manifest = tmp_path / "text_encoder_outputs.tsv"
    write_shards(manifest, count, [row(0, "a.png")])
    shard_manifest(manifest, count, count).unlink()
    with pytest.raises(InputError, match=rf"text_encoder_outputs\.{count}-of-{count}\.tsv"):
        merge_shards(manifest, count)


@pytest.mark.parametrize("count", [1, 2])
def test_a_shard_that_was_edited_is_an_error_that_names_it(tmp_path, count):
    manifest = tmp_path / "text_encoder_outputs.tsv"
    write_shards(manifest, count, [row(0, "a.png"), row(0, "b.png")], bad=[])
    for shard in range(1, count + 1):
        table = shard_manifest(manifest, shard, count)
        write_digest(table, table.read_bytes())
    merge_shards(manifest, count)
    edited = shard_manifest(manifest, count, count)
    edited.write_text(edited.read_text().replace("dataset", "DATASET"))
    with pytest.raises(InputError, match=rf"{edited.name}: was changed after it was written\n *-> delete it"):
        merge_shards(manifest, count)


def test_the_program_refuses_another_kind_of_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        merge_manifests.main(["--dataset_config", "d.toml", "--manifest", "other.tsv", "--num_shards", "1"])
    assert "other.tsv is neither of latents.tsv, text_encoder_outputs.tsv" in capsys.readouterr().err


# ---- orphans ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder with a usable image, one that has no caption, and the settings that go with them."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("cache").mkdir()
    for name in ("good.png", "good.txt", "uncaptioned.png"):
        Path("images", name).touch()
    Path("d.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nimage_directory = "images"\ncache_directory = "cache"\n'
    )
    return load_dataset_config("d.toml")[0]


def test_orphans_are_our_files_of_no_item_and_nothing_else(dataset):
    listing = listing_of(["good.png", "damaged.png"], rejects=["uncaptioned.png"])
    stay = [
        latent_file_name("good", (64, 48)),
        latent_file_name("damaged", (64, 48)),  # it was good once; where it is mended, the file is right again
        latent_file_name("uncaptioned", (64, 48)),
        text_file_name("gone"),  # the other stage's
    ]
    go = [latent_file_name("good", (32, 48)), latent_file_name("gone", (64, 48)), latent_file_name("a_good", (64, 48))]
    for name in (*stay, *go):
        ours(Path("cache", name))
    foreign, broken = Path("cache", latent_file_name("theirs", (8, 8))), Path("cache", latent_file_name("cut", (8, 8)))
    write_safetensors(foreign, {"x": torch.zeros(1)}, {"format": "pt"})
    broken.write_bytes(b"half a file")
    assert remove_orphans(LATENT_SUFFIX, [(dataset, listing)], {Path("cache", stay[0])}) == len(go)
    assert {path.name for path in Path("cache").iterdir()} == {*stay, foreign.name, broken.name}
    assert remove_orphans(TEXT_SUFFIX, [(dataset, listing)], set()) == 1


def test_a_cache_folder_that_does_not_exist_has_no_orphans(dataset):
    Path("cache").rmdir()
    assert remove_orphans(TEXT_SUFFIX, [(dataset, listing_of(["good.png"]))], set()) == 0


@pytest.mark.parametrize(("keep", "left"), [(["--keep_cache"], ["good", "gone"]), ([], ["good"])])
def test_the_program_merges_and_cleans_up_where_it_is_told_to(dataset, capsys, keep, left):
    manifest = Path("m/text_encoder_outputs.tsv")
    write_shards(manifest, 2, [row(0, "good.png")])
    for stem in ("good", "gone"):
        ours(Path("cache", text_file_name(stem)))
    arguments = ["--dataset_config", "d.toml", "--manifest", str(manifest), "--num_shards", "2", *keep]
    assert merge_manifests.main(arguments) == 0
    assert {path.name for path in Path("cache").iterdir()} == {text_file_name(stem) for stem in left}
    assert "merged from 2" in capsys.readouterr().err
    assert cache_paths(manifest, [(dataset, listing_of([]))]) == {Path("cache", text_file_name("good"))}


def listing_of(keys, rejects=()):
    items = [Item(0, key, f"images/{key}", f"images/{Path(key).stem}.txt", None) for key in keys]
    return Listing(items, [Reject(0, key, f"images/{key}", "no good") for key in rejects])


def row(dataset, key):
    return {
        "dataset": dataset, "key": key, "cache_file": text_file_name(Path(key).stem), "tokens": 7, "dtype": "bfloat16",
        "caption_sha256": "c" * 64, "fingerprint": "f" * 64, "arithmetic": "fast",
    }  # fmt: skip


def write_shards(manifest, count, rows, bad=()):
    rejects = [{"dataset": 0, "key": key, "reason": "no good"} for key in bad]
    for shard in range(1, count + 1):
        table = shard_manifest(manifest, shard, count)
        write_manifest(table, [one for one in rows if shard_of(one["key"], count) == shard], TEXT_COLUMNS)
        mine = [one for one in rejects if shard_of(one["key"], count) == shard]
        write_manifest(table.with_suffix(".rejects.tsv"), mine, REJECT_COLUMNS)


def ours(path):
    write_safetensors(path, {"x": torch.zeros(1)}, fingerprint_metadata({"name": path.name}))
