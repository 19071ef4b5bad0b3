"""Several captions an item: what counts as one, the names of their cache files, and what is encoded when."""

import fnmatch
import json
import shutil
from dataclasses import replace
from pathlib import Path

import merge_manifests
import pytest
from bench import Bench
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_image.cache.fingerprint import fingerprint
from qwen_image.cache.names import latent_file_name, split_text_file_name, text_file_name
from qwen_image.cache.shards import shard_manifest
from qwen_image.cache.text_encoder_outputs import TextEncoderStage
from qwen_image.check import summary
from qwen_image.container import read_header
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import Item, Listing, list_items, read_captions
from qwen_image.problems import InputError

SEVERAL = "multiple_captions = true"
CAPTIONS = ["an astronaut", "a woman in an orange suit", "a portrait before a flag"]
FILES = ["astronaut_qi_te.safetensors", "astronaut_qi_te2.safetensors", "astronaut_qi_te3.safetensors"]


# ---- what is a caption -----------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A folder dataset and a JSONL dataset with the key, and one without it."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("d.toml").write_text(
        f'[general]\ncaption_extension = ".txt"\n{SEVERAL}\n'
        '[[datasets]]\nimage_directory = "photos"\n'
        '[[datasets]]\nimage_jsonl_file = "rows.jsonl"\ncache_directory = "c"\n'
        '[[datasets]]\nimage_jsonl_file = "rows.jsonl"\ncache_directory = "d"\nmultiple_captions = false\n'
    )
    return load_dataset_config("d.toml")


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("one", ["one"]),
        ("one\ntwo", ["one", "two"]),
        ("\ufeff\n  one \r\n\r\n\ttwo\t\r   \rone\nthree\n", ["one", "two", "three"]),
        ("", [""]),
        (" \n\n\t\n", [""]),
        ("a\u2028b\x0bc\x85d\ne", ["a\u2028b\x0bc\x85d", "e"]),
    ],
)
def test_each_line_that_is_not_blank_is_a_caption_once(settings, content, captions):
    Path("photos/a.txt").write_bytes(content.encode())
    item = Item(0, "a.png", "photos/a.png", "photos/a.txt", None)
    assert read_captions(item, settings[0]) == captions
    assert read_captions(item, settings[2]) == [content.removeprefix("\ufeff").strip()]


@pytest.mark.parametrize(
    ("caption", "captions"),
    [
        (["one", " two\n", "one", ""], ["one", "two"]),
        (["one\nwith a second line", "two"], ["one\nwith a second line", "two"]),
        (["", " "], [""]),
        (" one\ntwo ", [" one\ntwo "]),
    ],
)
def test_a_jsonl_file_gives_several_as_a_list_and_text_is_one(settings, caption, captions):
    Path("photos/a.png").touch()
    Path("rows.jsonl").write_text(json.dumps({"image_path": "photos/a.png", "caption": caption}))
    (item,) = list_items(settings[1]).items
    assert read_captions(item, settings[1]) == captions
    if isinstance(caption, list):
        (reject,) = list_items(settings[2]).rejects
        assert "set multiple_captions = true for this dataset" in reject.reason


@pytest.mark.parametrize("caption", [[], ["one", 2], [["one"]], [None]])
def test_a_list_that_is_not_one_of_texts_is_told(settings, caption):
    Path("photos/a.png").touch()
    Path("rows.jsonl").write_text(json.dumps({"image_path": "photos/a.png", "caption": caption}))
    (reject,) = list_items(settings[1]).rejects
    assert "write a list of texts" in reject.reason


@pytest.mark.parametrize(("text", "found"), [("a\0b", "NUL"), ("\ud83d", "surrogate pair")])
def test_each_text_of_a_list_must_be_one_that_a_file_can_hold(settings, text, found):
    Path("photos/a.png").touch()
    Path("rows.jsonl").write_text(json.dumps({"image_path": "photos/a.png", "caption": ["sound", text]}))
    (reject,) = list_items(settings[1]).rejects
    assert found in reject.reason


def test_the_check_stage_s_report_says_what_is_out_of_the_ordinary(settings):
    lines = summary([(settings[0], Listing([], [])), (replace(settings[2], loss_weight=0.25), Listing([], []))])
    first, second = lines.splitlines()
    assert first.endswith("batch size 1, 1 repeats, several captions an item")
    assert second.endswith("batch size 1, 1 repeats, loss weight 0.25")


# ---- names -----------------------------------------------------------------------------------------------------------

pieces = st.lists(
    st.sampled_from(["a", "_qi", "_te", "_", "1", "2", "0", "10", ".safetensors", "*", "[", "\n", "\udc80", "٢"]),
    max_size=8,
)
stems, numbers = pieces.map("".join), st.integers(1, 120)


@given(stem=stems, number=numbers, other=stems, other_number=numbers)
def test_no_two_captions_share_a_file_whatever_the_stems(stem, number, other, other_number):
    name = text_file_name(stem, number)
    assert split_text_file_name(name) == (stem, number)
    assert (name == text_file_name(other, other_number)) == ((stem, number) == (other, other_number))
    assert name != latent_file_name(other, (64, 64))


@given(stem=stems, number=st.integers(2, 120))
def test_further_captions_files_are_none_that_the_field_looks_for(stem, number):
    name = text_file_name(stem, number)
    assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in ("*_qi_te.safetensors", "*_qi.safetensors"))


@pytest.mark.parametrize("name", ["a.safetensors", "a_qi.safetensors", "a_qi_te2.safetensors.replaced"])
@pytest.mark.parametrize("number", ["0", "1", "02", "٢", " 2"])
def test_other_names_are_of_no_caption(name, number):
    assert split_text_file_name(name) is None
    assert split_text_file_name(f"a_qi_te{number}.safetensors") is None


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bench whose astronaut has three captions, cached to the bit. Copy it before you change anything."""
    bench = Bench(tmp_path_factory.mktemp("captions"))
    write(bench, *CAPTIONS)
    bench.settings("resolution = 64", SEVERAL)
    assert bench.texts("--deterministic")["encoded"] == len(bench.names) + 2
    return bench


@pytest.fixture
def bench(made, tmp_path):
    copy = made.copy(tmp_path / "copy")
    copy.settings("resolution = 64", SEVERAL)
    return copy


def write(bench, *captions):
    (bench.images / "astronaut.txt").write_text("\n\n".join(captions) + "\n")


def rows(bench):
    return bench.manifest("text_encoder_outputs").query("key == 'astronaut.png'").to_dict("records")


def caption_of(bench, name):
    return read_header(bench.cache / name).metadata["caption1"]


def test_each_caption_is_a_row_and_a_file_in_its_order(bench):
    assert [row["cache_file"] for row in rows(bench)] == FILES
    assert [caption_of(bench, name) for name in FILES] == CAPTIONS
    assert len(bench.manifest("text_encoder_outputs")) == len(bench.names) + 2


def test_nothing_is_encoded_twice_and_the_manifest_is_the_same(bench):
    before = (bench.folder / "m/text_encoder_outputs.tsv").read_bytes()
    shutil.rmtree(bench.folder / "m")
    assert bench.texts("--deterministic")["encoded"] == 0
    assert f"{len(bench.names)} items with {len(bench.names) + 2} captions, nothing to encode" in bench.output
    assert (bench.folder / "m/text_encoder_outputs.tsv").read_bytes() == before


def test_editing_one_line_encodes_one_text(bench):
    before = bench.files()
    write(bench, CAPTIONS[0], "another", CAPTIONS[2])
    assert bench.texts("--deterministic")["encoded"] == 1
    assert {name for name, content in bench.files().items() if before[name] != content} == {FILES[1]}
    assert caption_of(bench, FILES[1]) == "another"


def test_a_file_s_bytes_depend_on_its_caption_alone(bench):
    """Neither on its number, nor on its item, nor on the other captions."""
    (bench.images / f"{bench.names[1]}.txt").write_text(CAPTIONS[1])
    write(bench, CAPTIONS[2], CAPTIONS[1], CAPTIONS[0])
    before = bench.files()
    assert bench.texts("--deterministic")["encoded"] == 3
    after = bench.files()
    assert [after[name] for name in FILES] == [before[name] for name in reversed(FILES)]
    assert after[f"{bench.names[1]}_qi_te.safetensors"] == before[FILES[1]]


@pytest.mark.parametrize("keep", [True, False])
def test_a_removed_line_s_file_is_no_longer_listed_and_removed_where_that_is_asked_for(bench, keep):
    write(bench, *CAPTIONS[:2])
    (bench.cache / "stranger_qi_te2.safetensors").write_bytes((bench.cache / FILES[0]).read_bytes())
    save_file(load_file(bench.cache / FILES[0]), bench.cache / "theirs_qi_te3.safetensors")
    counts = bench.texts(keep=keep)
    assert counts["encoded"] == 0 and counts.get("removed", 0) == (0 if keep else 2)
    assert [row["cache_file"] for row in rows(bench)] == FILES[:2]
    assert (bench.cache / FILES[2]).exists() == (bench.cache / "stranger_qi_te2.safetensors").exists() == keep
    assert (bench.cache / "theirs_qi_te3.safetensors").exists()


def test_without_the_key_the_file_is_one_caption_again(bench):
    bench.settings("resolution = 64")
    counts = bench.texts(keep=False)
    assert (counts["encoded"], counts["removed"]) == (1, 2)
    assert caption_of(bench, FILES[0]) == "\n\n".join(CAPTIONS)
    assert [row["cache_file"] for row in rows(bench)] == FILES[:1]


def test_without_the_key_nothing_is_other_than_it_ever_was(bench):
    """The manifest's bytes, spelt out here, and the same with the key where every caption is one line."""
    for number, name in enumerate(bench.names):
        (bench.images / f"{name}.txt").write_text(f"a photograph, number {number}")
    bench.settings("resolution = 64")
    bench.texts("--deterministic")
    parts = json.loads(read_header(bench.cache / FILES[0]).metadata["fingerprint_parts"])
    assert set(parts) == {"kind", "architecture", "caption", "encoder", "max_tokens", "model", "weights"}
    lines = ["dataset\tkey\tcache_file\ttokens\tdtype\tcaption_sha256\tfingerprint\tarithmetic\n"]
    for name in bench.names:
        (tensor,) = load_file(bench.cache / f"{name}_qi_te.safetensors").values()
        metadata = read_header(bench.cache / f"{name}_qi_te.safetensors").metadata
        caption = json.loads(metadata["fingerprint_parts"])["caption"]
        mark = fingerprint(parts | {"caption": caption})
        lines.append(
            f"0\t{name}.png\t{name}_qi_te.safetensors\t{len(tensor)}\tbfloat16\t{caption}\t{mark}\tdeterministic\n"
        )
    manifest = bench.folder / "m/text_encoder_outputs.tsv"
    assert manifest.read_text() == "".join(lines)
    bench.settings("resolution = 64", SEVERAL)
    assert bench.texts("--deterministic")["encoded"] == 0
    assert manifest.read_text() == "".join(lines)


def test_shards_give_the_same_manifest_and_the_merge_removes_what_no_caption_has(bench):
    manifest = bench.folder / "m/text_encoder_outputs.tsv"
    write(bench, *CAPTIONS[:2])
    bench.texts()
    whole = manifest.read_bytes()
    for shard in (1, 2):
        table = shard_manifest(manifest, shard, 2)
        more = ["--shard", str(shard), "--num_shards", "2", "--manifest", str(table)]
        assert bench.texts(*more, keep=False)["encoded"] == 0
        assert (bench.cache / FILES[2]).exists()
    arguments = ["--dataset_config", str(bench.config), "--manifest", str(manifest), "--num_shards", "2"]
    assert merge_manifests.main(arguments) == 0
    assert manifest.read_bytes() == whole
    assert {path.name for path in bench.cache.glob("astronaut*")} == set(FILES[:2])


def test_an_item_with_a_caption_that_cannot_be_encoded_is_left_out_whole_and_keeps_its_files(bench, monkeypatch):
    write(bench, CAPTIONS[0], "first bad", "second bad")
    real = TextEncoderStage.encode

    def encode(stage, entries):
        for result in real(stage, entries):
            entry = result.entry
            yield entry.reject("no good") if "bad" in entry.payload else result

    monkeypatch.setattr(TextEncoderStage, "encode", encode)
    with pytest.raises(InputError) as caught:
        bench.texts(keep=False)
    assert [problem.found for problem in caught.value.problems] == ["no good"]
    assert bench.texts("--on_bad_item", "skip", keep=False)["rejected"] == 1
    assert rows(bench) == []
    assert all((bench.cache / name).exists() for name in FILES)


def test_another_program_s_file_under_a_further_caption_s_name_is_adopted_or_set_aside(bench):
    path = bench.cache / FILES[1]
    field = {key: read_header(path).metadata[key] for key in ("architecture", "format_version", "caption1")}
    save_file(load_file(path), path, metadata=field)
    assert bench.texts("--adopt_existing")["adopted"] == 1
    save_file(load_file(path), path, metadata=field | {"caption1": "something else"})
    assert bench.texts("--adopt_existing")["encoded"] == 1
    assert caption_of(bench, FILES[1]) == CAPTIONS[1]
    assert (bench.cache / f"{FILES[1]}.replaced").exists()
