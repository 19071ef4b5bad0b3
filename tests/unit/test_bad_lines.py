"""Bad lines of a JSONL file through the real programs: the other lines are cached, the bad ones are told."""

import json
import os

import pytest
from bench import Bench

from qwen_image.problems import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


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
