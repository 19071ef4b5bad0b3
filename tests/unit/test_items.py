"""Listing a dataset: which images are items, which are rejects and why, from folders and from JSONL files."""

import builtins
import json
import os
import time

import pytest
from PIL import Image

from qwen_image.dataset import items as items_module
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Item, list_datasets, list_items, read_captions
from qwen_image.dataset.listing import MAX_PROBLEMS
from qwen_image.problems import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def settings(index=0, **keys):
    defaults = {
        "resolution": (512, 512),
        "enable_bucket": True,
        "bucket_no_upscale": False,
        "caption_extension": ".txt",
        "batch_size": 1,
        "num_repeats": 1,
        "multiple_captions": False,
        "loss_weight": 1.0,
        "image_directory": "photos",
        "image_jsonl_file": None,
        "cache_directory": "cache",
        "control_directory": None,
        "multiple_target": False,
        "no_resize_control": False,
        "control_resolution": None,
        "alpha_background": "white",
    }
    return DatasetSettings(index=index, **(defaults | keys))


def fill(folder, *names, content="x"):
    for name in names:
        (folder / name).write_text(content)


def jsonl(*rows, name="rows.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    return settings(image_directory=None, image_jsonl_file=name, caption_extension=None)


def problems(given):
    with pytest.raises(InputError) as caught:
        list_items(given)
    return caught.value.problems


def reasons(listing):
    return {reject.key: reject.reason for reject in listing.rejects}


def test_images_with_captions_are_items_in_the_order_of_their_names(folder, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    names = [
        "b.png",
        "a.JPG",
        "c.jPeG",
        "d.webp",
        "Z.bmp",
        "é ü.avif",
        "写真📷.png",
        "x_y.z.png",
        "q'\"${}; [a-z]*.png",
    ]
    fill(folder, *names, *(os.path.splitext(name)[0] + ".txt" for name in names))
    fill(folder, "notes.txt", "thumbs.db", "animation.gif", ".hidden.png", ".hidden.txt", "noextension")
    listing = list_items(settings(index=3))
    assert [item.key for item in listing.items] == sorted(names)
    assert listing.rejects == []
    assert listing.items[0] == Item(3, "Z.bmp", "photos/Z.bmp", "photos/Z.txt", None)
    assert {item.stem for item in listing.items} >= {"x_y.z", "写真📷"}


def test_a_caption_extension_of_two_parts_belongs_to_its_image(folder):
    fill(folder, "a.png", "a.caption.txt", "b.png", "b.txt")
    listing = list_items(settings(caption_extension=".caption.txt"))
    assert [item.caption_path for item in listing.items] == ["photos/a.caption.txt"]
    assert "b.caption.txt is missing" in reasons(listing)["b.png"]


def test_what_cannot_be_an_item_is_rejected_with_its_reason(folder):
    fill(folder, "lone.png", "dir.txt", "dangling.txt", "badcaption.png", "pipe.txt", "good.png", "good.txt")
    (folder / "dir.jpg").mkdir()
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "badcaption.txt").mkdir()
    (folder / "linked.png").symlink_to("good.png")
    (folder / "linked.txt").symlink_to("good.txt")
    os.mkfifo(folder / "pipe.webp")
    listing = list_items(settings())
    assert [item.key for item in listing.items] == ["good.png", "linked.png"]
    found = reasons(listing)
    assert list(found) == ["badcaption.png", "dangling.png", "dir.jpg", "lone.png", "loop.png", "pipe.webp"]
    assert found["lone.png"] == "its caption file lone.txt is missing"
    assert "badcaption.txt is not a file" in found["badcaption.png"]
    assert "folder, not an image" in found["dir.jpg"]
    assert "does not exist" in found["dangling.png"]
    assert "not a regular file" in found["pipe.webp"]
    assert listing.rejects[2].path == "photos/dir.jpg"


def test_names_that_the_cache_cannot_carry_are_rejected_and_printable(folder):
    long = "長" * 76
    fill(folder, f"{long}.png", f"{long}.txt")
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("x")
    listing = list_items(settings())
    assert listing.items == []
    found = reasons(listing)
    assert "not valid UTF-8" in found["caf\\xe9.png"]
    assert "too long (228 bytes)" in found[f"{long}.png"]
    assert all(reject.path.encode("utf-8") for reject in listing.rejects)


@pytest.mark.parametrize("installed", [True, False])
def test_jpeg_xl_needs_its_plugin(folder, monkeypatch, installed):
    fill(folder, "a.jxl", "a.txt")
    spec = object() if installed else None
    monkeypatch.setattr(items_module.importlib.util, "find_spec", lambda name: spec if name == "pillow_jxl" else None)
    listing = list_items(settings())
    if installed:
        assert [item.key for item in listing.items] == ["a.jxl"]
    else:
        assert "plugin" in reasons(listing)["a.jxl"]


def test_images_that_would_share_cache_files_are_an_error_that_names_both(folder):
    fill(folder, "a.png", "a.jpg", "a.txt", "b.webp", "b.PNG", "b.txt", "A.png", "A.txt")
    first, second = problems(settings())
    assert "`a.jpg` and `a.png`" in first.found and "rename" in first.mend
    assert "`b.PNG` and `b.webp`" in second.found
    assert first.file == "photos"


def test_a_folder_that_cannot_be_listed_is_told(folder):
    fill(folder, "file")
    for directory, found in [("nowhere", "No such file"), ("photos/file", "Not a directory")]:
        (problem,) = problems(settings(index=2, image_directory=directory))
        assert (problem.file, problem.key) == (directory, "datasets[2].image_directory")
        assert found in problem.found and os.getcwd() in problem.mend


def test_captions_are_stripped_utf8(folder):
    item = Item(0, "a.png", "photos/a.png", "photos/a.txt", None)
    for content in ["  Ein Fuß, 猫 🐈\r\n\n".encode(), b"\xef\xbb\xbf" + " Ein Fuß, 猫 🐈".encode()]:
        (folder / "a.txt").write_bytes(content)
        assert read_captions(item, settings()) == ["Ein Fuß, 猫 🐈"]
    (folder / "a.txt").write_bytes(b"")
    assert read_captions(item, settings()) == [""]
    for content, reason in [("猫".encode("utf-16"), "UTF-16"), ("Fuß".encode("latin-1"), "a.txt is not UTF-8")]:
        (folder / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            read_captions(item, settings())
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: No such file"):
        read_captions(item, settings())
    assert read_captions(Item(0, "a", "a", None, "  as it stands\n"), settings()) == ["  as it stands\n"]


def test_jsonl_rows_are_items_sorted_by_path(folder):
    fill(folder, "b.png", "a.tiff", "c.png")
    given = jsonl(
        {"image_path": "photos/b.png", "caption": " verbatim\n "},
        "",
        "   \r",
        {"image_path_0": "photos/a.tiff", "caption": "猫\u2028🐈", "control_path": "x", "control_path_3": 5, "note": 1},
        {"image_path": "./photos/c.png", "caption": ""},
        {"image_path": "photos/gone.png", "caption": "x"},
        {"image_path": "photos", "caption": "x"},
    )
    listing = list_items(given)
    assert [(item.key, item.caption) for item in listing.items] == [
        ("./photos/c.png", ""),
        ("photos/a.tiff", "猫\u2028🐈"),
        ("photos/b.png", " verbatim\n "),
    ]
    assert listing.items[1] == Item(0, "photos/a.tiff", "photos/a.tiff", None, "猫\u2028🐈")
    assert reasons(listing) == {"photos": "it is a folder, not an image", "photos/gone.png": "there is no such file"}


def test_a_byte_order_mark_before_jsonl_is_no_obstacle(folder):
    fill(folder, "a.png")
    with open("rows.jsonl", "wb") as file:
        file.write(b'\xef\xbb\xbf{"image_path": "photos/a.png", "caption": "x"}')
    assert len(list_items(settings(image_directory=None, image_jsonl_file="rows.jsonl")).items) == 1


@pytest.mark.parametrize(
    ("row", "key", "found", "mend"),
    [
        ('{"image_path": "a.png", "caption": "x"', None, "not valid JSON", "complete JSON object"),
        ("[1]", None, "[1] is no JSON object", '"image_path"'),
        ({"caption": "x"}, None, "`image_path` is missing", "add `image_path`"),
        ({"image_path": "a.png"}, "a.png", "`caption` is missing", "add `caption`"),
        ({"image_path": "a.png", "captoin": "x"}, "a.png", "`caption` is missing", "`captoin`"),
        ({"image_path": 3, "caption": "x"}, None, "`image_path` is 3", "double quotes"),
        ({"image_path": "a.png", "caption": None}, "a.png", "`caption` is null", "double quotes"),
        ({"image_path": "a.png", "caption": ["x"]}, "a.png", '`caption` is ["x"]', "multiple_captions = true"),
        ({"image_path": "", "caption": "x"}, None, "image_path is empty", "path of the image"),
        ({"image_path": "a\0", "caption": "x"}, None, "NUL", "path of the image"),
        ('{"image_path": "a\\ud83d.png", "caption": "x"}', None, "surrogate pair", "UTF-8"),
        ('{"image_path": "a.png", "caption": "\\ud83d"}', "a.png", "surrogate pair", "UTF-8"),
        ({"image_path": "a.png", "caption": "a\0b"}, "a.png", "`caption` holds a NUL", "without it"),
        ({"image_path": "a.png", "image_path_0": "a.png", "caption": "x"}, None, "both image_path and", "keep one"),
        ({"image_path": "a.png", "image_path_1": "b.png", "caption": "x"}, "a.png", "layered model", "path alone"),
        ({"image_path": "photos/good.png"}, None, "`caption` is missing", "add `caption`"),
        ({"image_path": "photos/good.png", "caption": "x"}, None, "stands in line 1 already", "remove one"),
        ({"image_path": "./photos/good.png", "caption": "x"}, None, "stands in line 1 already", "remove one"),
    ],
)
def test_a_wrong_jsonl_line_is_rejected_with_its_number_and_the_others_are_items(folder, row, key, found, mend):
    """By the name of its image where that is known, unless an item has that name: it would be left out as well."""
    fill(folder, "good.png", "last.png")
    good, last = ({"image_path": f"photos/{name}.png", "caption": "x"} for name in ("good", "last"))
    listing = list_items(jsonl(good, "", row, last))
    assert [item.key for item in listing.items] == ["photos/good.png", "photos/last.png"]
    (reject,) = listing.rejects
    assert reject.key == (key or "line 3")
    assert reject.path == (key or "rows.jsonl: line 3")
    assert found in reject.reason and mend in reject.reason
    assert reject.reason.startswith("line 3 of rows.jsonl: ") == (key is not None)


def test_an_image_with_several_captions_is_rejected_since_none_may_win(folder):
    fill(folder, "a.png", "b.png")
    captions = [("photos/a.png", "x"), ("photos/b.png", "x"), ("photos/a.png", "x"), (f"{folder}/a.png", "y")]
    listing = list_items(jsonl(*({"image_path": path, "caption": caption} for path, caption in captions)))
    assert [item.key for item in listing.items] == ["photos/b.png"]
    reason = "lines 1, 3 and 4 of rows.jsonl give it different captions; keep one line"
    assert reasons(listing) == {"photos/a.png": reason}


def test_different_images_of_a_jsonl_file_that_would_share_cache_files_are_an_error_that_names_both(folder, tmp_path):
    (tmp_path / "other").mkdir()
    fill(folder, "a.png", "b.png")
    fill(tmp_path / "other", "a.jpg")
    paths = ["photos/a.png", "photos/b.png", "other/a.jpg"]
    (problem,) = problems(jsonl(*({"image_path": path, "caption": "x"} for path in paths), "{"))
    assert (problem.file, problem.key) == ("rows.jsonl", "line 3")
    assert "`other/a.jpg` and `photos/a.png` (line 1)" in problem.found and "rename one" in problem.mend
    (tmp_path / "other/a.jpg").unlink()
    listing = list_items(jsonl(*({"image_path": path, "caption": "x"} for path in paths)))
    assert len(listing.items) == 2 and reasons(listing) == {"other/a.jpg": "there is no such file"}


def test_clashes_are_told_at_once_but_not_without_end(folder, tmp_path):
    (tmp_path / "other").mkdir()
    names = [f"{number}.png" for number in range(100)]
    fill(folder, *names)
    fill(tmp_path / "other", *names)
    paths = [f"{where}/{name}" for name in names for where in ("photos", "other")]
    found = problems(jsonl(*({"image_path": path, "caption": "x"} for path in paths)))
    assert len(found) == MAX_PROBLEMS + 1
    assert "50 more" in found[-1].found


def test_a_jsonl_file_of_broken_lines_alone_is_told():
    with pytest.raises(InputError) as caught:
        list_datasets([jsonl("{", "", "1", "{}")], "dataset.toml")
    (problem,) = caught.value.problems
    assert "0 usable images: `rows.jsonl` has 3 rows; for example line 1: it is not valid JSON" in problem.found


def test_a_jsonl_file_of_another_format_is_told():
    (problem,) = problems(jsonl('[\n{"image_path": "a", "caption": "x"}\n]'))
    assert "JSON list" in problem.found
    with open("rows.jsonl", "wb") as file:
        file.write(b"{}\n{}\n\xff\n")
    given = settings(image_directory=None, image_jsonl_file="rows.jsonl")
    (problem,) = problems(given)
    assert (problem.key, problem.found) == ("line 3", "is not UTF-8 text")
    (problem,) = problems(settings(index=1, image_directory=None, image_jsonl_file="gone.jsonl"))
    assert problem.key == "datasets[1].image_jsonl_file" and "No such file" in problem.found


def test_listing_all_datasets_tells_all_problems_and_empty_datasets(folder, tmp_path):
    fill(folder, "a.png", "a.jpg", "a.txt")
    for name in ("empty", "bare"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "bare", "one.png", "two.png")
    rows = jsonl({"image_path": "photos/gone.png", "caption": "x"})
    given = [
        settings(0),
        settings(1, image_directory="empty"),
        settings(2, image_directory="bare", caption_extension=".caption"),
        settings(3, image_directory="nowhere"),
        settings(4, image_directory=None, image_jsonl_file=rows.image_jsonl_file),
    ]
    with pytest.raises(InputError) as caught:
        list_datasets(given, "dataset.toml")
    clash, empty, bare, nowhere, gone = caught.value.problems
    assert "`a.jpg` and `a.png`" in clash.found
    assert (empty.file, empty.key) == ("dataset.toml", "datasets[1].image_directory")
    assert "0 usable images: 0 images and 0 caption files (*.txt) in `empty`" in empty.found
    assert "png" in empty.mend and ".txt" in empty.mend
    assert "2 images and 0 caption files (*.caption)" in bare.found
    assert "one.caption is missing" in bare.found and "one.caption" in bare.mend
    assert nowhere.file == "nowhere"
    assert gone.key == "datasets[4].image_jsonl_file" and "no such file" in gone.found


def test_listing_all_datasets_keeps_their_order(folder, tmp_path):
    fill(folder, "a.png", "a.txt")
    fill(tmp_path, "b.png", "b.txt")
    listings = list_datasets([settings(0), settings(1, image_directory=".")], "dataset.toml")
    assert [[item.image_path for item in listing.items] for listing in listings] == [["photos/a.png"], ["./b.png"]]


def test_a_large_folder_is_listed_without_a_call_for_each_file(folder, monkeypatch):
    for number in range(5000):
        os.close(os.open(folder / f"{number:05}.jpg", os.O_CREAT))
        os.close(os.open(folder / f"{number:05}.txt", os.O_CREAT))
    with monkeypatch.context() as patch:
        for module, name in [(os, "stat"), (os, "lstat"), (os.path, "isfile"), (builtins, "open")]:
            patch.setattr(module, name, lambda *_, **__: pytest.fail("a file was looked at"))
        start = time.perf_counter()
        listing = list_items(settings())
        seconds = time.perf_counter() - start
    assert len(listing.items) == 5000
    assert seconds < 1  # 0.02 on the machine this was written on
