"""The dataset file: every key, inheritance, old names, and one clear message for each way to get it wrong."""

import json
import os
import re

import pytest

from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.keys import KEYS
from qwen_image.problems import InputError

SOUND = {"image_directory": "photos", "caption_extension": ".txt"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(content, name="dataset.json"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))
    return load_dataset_config(name)


def problems(content, name="dataset.json"):
    with pytest.raises(InputError) as caught:
        load(content, name)
    assert all(problem.file == name for problem in caught.value.problems)
    return caught.value.problems


def only_problem(content, name="dataset.json"):
    found = problems(content, name)
    assert len(found) == 1, found
    return found[0]


def one(**keys):
    return {"datasets": [SOUND | keys]}


def test_the_smallest_file_gets_all_defaults():
    (settings,) = load('[[datasets]]\nimage_directory = "photos"\ncaption_extension = ".txt"\n', "dataset.toml")
    assert settings.index == 0
    assert settings.resolution == (960, 544)
    assert settings.enable_bucket is settings.bucket_no_upscale is False
    assert settings.batch_size == settings.num_repeats == settings.loss_weight == 1
    assert settings.multiple_captions is False
    assert settings.cache_directory == settings.image_directory == "photos"
    assert settings.image_jsonl_file is settings.control_directory is settings.control_resolution is None
    assert settings.multiple_target is settings.no_resize_control is False
    assert settings.alpha_background == "white"


def test_each_key_falls_back_from_dataset_to_general_to_default():
    general = {"resolution": 768, "enable_bucket": True, "batch_size": 3, "caption_extension": ".caption.txt"}
    own = {"resolution": [1024, 512], "enable_bucket": False, "num_repeats": 2, "alpha_background": "#AABBCC"}
    first, second = load(
        {"general": general, "datasets": [{"image_directory": "a"}, {"image_directory": "b", "batch_size": None} | own]}
    )
    assert (first.index, first.resolution, first.enable_bucket, first.batch_size) == (0, (768, 768), True, 3)
    assert (second.index, second.resolution, second.enable_bucket, second.batch_size) == (1, (1024, 512), False, 3)
    assert (first.num_repeats, second.num_repeats) == (1, 2)
    assert first.caption_extension == second.caption_extension == ".caption.txt"
    assert (first.alpha_background, second.alpha_background) == ("white", "#aabbcc")


def test_captions_and_weight_fall_back_too():
    general = {"multiple_captions": True, "loss_weight": 2, "caption_extension": ".txt"}
    own = {"multiple_captions": False, "loss_weight": 0.25}
    first, second = load({"general": general, "datasets": [{"image_directory": "a"}, {"image_directory": "b"} | own]})
    assert (first.multiple_captions, second.multiple_captions) == (True, False)
    assert (first.loss_weight, second.loss_weight) == (2.0, 0.25)
    assert type(first.loss_weight) is float


def test_a_jsonl_dataset_needs_no_caption_extension():
    (settings,) = load({"datasets": [{"image_jsonl_file": "a.jsonl", "cache_directory": "cache"}]})
    assert (settings.image_jsonl_file, settings.image_directory) == ("a.jsonl", None)
    assert (settings.cache_directory, settings.caption_extension) == ("cache", None)


def test_old_names_and_keys_of_other_models_are_accepted():
    (settings,) = load(
        one(
            flux_kontext_no_resize_control=True,
            qwen_image_edit_control_resolution=[512, 768],
            control_directory="control",
            multiple_target=False,
            fp_latent_window_size=9,
            fp_1f_clean_indices=[0, 13],
            fp_1f_target_index=1,
            fp_1f_no_post=True,
        )
    )
    assert settings.no_resize_control is True
    assert settings.control_resolution == (512, 768)
    assert settings.control_directory == "control"
    assert load(one(qwen_image_edit_no_resize_control=True))[0].no_resize_control is True


def test_byte_order_mark_and_upper_case_ending_are_no_obstacle():
    text = '[[datasets]]\nimage_directory = "写真 📷"\ncaption_extension = ".txt"\n'
    assert load("\ufeff" + text, "dataset.TOML")[0].image_directory == "写真 📷"


@pytest.mark.parametrize(
    ("key", "value", "found", "mend"),
    [
        ("resolution", 512.0, "512.0", "whole number"),
        ("resolution", True, "true", "whole number"),
        ("resolution", [512], "[512]", "[width, height]"),
        ("resolution", [512, "512"], '[512, "512"]', "[width, height]"),
        ("resolution", [512, True], "[512, true]", "[width, height]"),
        ("resolution", "512", '"512"', "whole number"),
        ("resolution", 0, "0", "16 to 8192"),
        ("resolution", [-512, 512], "[-512, 512]", "16 to 8192"),
        ("resolution", 1048576, "1048576", "16 to 8192"),
        ("control_resolution", 512.5, "512.5", "whole number"),
        ("enable_bucket", 1, "1", "true or false"),
        ("enable_bucket", "true", '"true"', "without quotes"),
        ("bucket_no_upscale", 0, "0", "true or false"),
        ("batch_size", True, "true", "whole number of at least 1"),
        ("batch_size", 0, "0", "at least 1"),
        ("batch_size", 1.0, "1.0", "whole number"),
        ("num_repeats", -1, "-1", "at least 1"),
        ("num_repeats", "2", '"2"', "whole number"),
        ("loss_weight", 0, "0", "above 0"),
        ("loss_weight", -0.5, "-0.5", "above 0"),
        ("loss_weight", 1e9, "1000000000.0", "at most 1000"),
        ("loss_weight", float("nan"), "NaN", "above 0"),
        ("loss_weight", True, "true", "a number above 0"),
        ("loss_weight", "0.5", '"0.5"', "a number above 0"),
        ("multiple_captions", "yes", '"yes"', "true or false"),
        ("caption_extension", "txt", '"txt"', '".txt"'),
        ("caption_extension", "", '""', '".txt"'),
        ("caption_extension", "/x.txt", '"/x.txt"', '".txt"'),
        ("caption_extension", 1, "1", '".txt"'),
        ("image_directory", "", '""', "is empty"),
        ("image_directory", "a\0b", "u0000", "NUL"),
        ("image_directory", "\ud800", "", "no file name can have"),
        ("cache_directory", ["a"], '["a"]', "path in quotes"),
        ("control_directory", 3, "3", "path in quotes"),
        ("multiple_target", "no", '"no"', "true or false"),
        ("multiple_target", True, "layered model", "false"),
        ("no_resize_control", 1, "1", "true or false"),
        ("alpha_background", "pink", '"pink"', '"white"'),
        ("alpha_background", "#12345", '"#12345"', "#7f7f7f"),
        ("fp_1f_clean_indices", [0, 1.5], "[0, 1.5]", "list of whole numbers"),
        ("fp_latent_window_size", "9", '"9"', "whole number"),
    ],
)
def test_a_wrong_value_is_told_with_its_mend(key, value, found, mend):
    problem = only_problem(one(**{key: value}))
    assert problem.key == f"datasets[0].{key}"
    assert found in problem.found
    assert mend in str(problem.mend)


@pytest.mark.parametrize(
    ("table", "key", "found", "mend"),
    [
        ({"resolutoin": 512}, "general.resolutoin", "not a known key", "`resolution`"),
        ({"Enable-Bucket": True}, "general.Enable-Bucket", "not a known key", "`enable_bucket`"),
        ({"zzz": 1}, "general.zzz", "not a known key", "one of: resolution"),
        ({"cache_directory": "c"}, "general.cache_directory", "may not stand in [general]", "[[datasets]]"),
        ({"debug_dataset": True}, "general.debug_dataset", "not a key of dataset files", "remove"),
        ({"target_frames": [1]}, "general.target_frames", "video", "image_directory"),
        ({"batch_size": "x"}, "general.batch_size", '"x"', "whole number"),
    ],
)
def test_a_wrong_key_in_general_is_told(table, key, found, mend):
    problem = only_problem({"general": table, "datasets": [SOUND]})
    assert problem.key == key
    assert found in problem.found
    assert mend in str(problem.mend)


def test_every_key_is_either_allowed_in_general_or_refused_there():
    for name, key in KEYS.items():
        value = {"resolution": 512, "caption_extension": ".txt"}.get(name, key.default)
        content = {"general": {name: "x" if value is None else value}, "datasets": [SOUND]}
        if key.in_general:
            load(content)
        else:
            assert "may not stand" in only_problem(content).found


def test_an_old_name_beside_the_new_one_is_refused():
    problem = only_problem(one(no_resize_control=True, flux_kontext_no_resize_control=False))
    assert problem.key == "datasets[0].flux_kontext_no_resize_control"
    assert "second time" in problem.found


@pytest.mark.parametrize(
    ("table", "key", "found"),
    [
        ({"caption_extension": ".txt"}, "datasets[0]", "neither image_directory nor image_jsonl_file"),
        (SOUND | {"image_jsonl_file": "a.jsonl"}, "datasets[0].image_jsonl_file", "together with image_directory"),
        ({"image_directory": "a"}, "datasets[0].caption_extension", "missing"),
        ({"image_jsonl_file": "a.jsonl"}, "datasets[0].cache_directory", "missing"),
        ({"video_directory": "v", "caption_extension": ".txt"}, "datasets[0].video_directory", "video"),
        (SOUND | {"image_directory": None}, "datasets[0]", "neither"),
        (SOUND | {"resolution": 500}, "datasets[0].resolution", "500x500"),
        (SOUND | {"resolution": 16, "enable_bucket": True}, "datasets[0].resolution", "too small for buckets"),
        (7, "datasets[0]", "7 is no table"),
    ],
)
def test_keys_that_do_not_fit_together_are_told(table, key, found):
    problem = only_problem({"datasets": [table]})
    assert problem.key == key
    assert found in problem.found


def test_a_resolution_that_buckets_round_is_fine():
    assert load(one(resolution=500, enable_bucket=True))[0].resolution == (500, 500)
    assert "[496, 752]" in only_problem(one(resolution=[500, 750])).mend


@pytest.mark.parametrize("spelling", ["cc", "cc/", "./cc", "x/../cc", "link", "{absolute}"])
@pytest.mark.parametrize("exists", [True, False])
def test_one_cache_directory_spelled_two_ways_is_refused(tmp_path, spelling, exists):
    (tmp_path / "link").symlink_to("cc")
    if exists:
        (tmp_path / "cc").mkdir()
    spelling = spelling.replace("{absolute}", str(tmp_path / "cc"))
    problem = only_problem({"datasets": [SOUND | {"cache_directory": name} for name in ("cc", "dd", spelling)]})
    assert problem.key == "datasets[2].cache_directory"
    assert f"`{spelling}`" in problem.found and "`cc`" in problem.found and "datasets[0]" in problem.found


def test_an_image_directory_that_is_the_cache_of_another_dataset_is_refused():
    problem = only_problem({"datasets": [SOUND, SOUND | {"image_directory": "b", "cache_directory": "./photos"}]})
    assert "`./photos` is the same folder as `photos`" in problem.found
    assert len(load({"datasets": [SOUND, SOUND | {"cache_directory": "other"}]})) == 2


@pytest.mark.parametrize(
    ("name", "content", "key", "found", "mend"),
    [
        ("d.toml", "[general]\nresolution = \n", "line 2", "not valid TOML", "correct the TOML"),
        ("d.toml", '[[datasets]]\nimage_directory = "C:\\Users"\n', "line 2", "not valid TOML", "single quotes"),
        ("d.toml", "[general]\nbatch_size = 1\nbatch_size = 2\n", "line 3", "not valid TOML", "correct"),
        ("d.json", '{"datasets": [\n{"batch_size": 1,}\n]}', "line 2", "not valid JSON", "commas"),
        ("d.json", '{"datasets": [], "datasets": []}', "", "`datasets` stands twice", "correct"),
        ("d.json", "[" * 100_000, "", "not valid JSON", "correct"),
        ("d.json", "[1]", "", "[1] stands where an object", "general"),
        ("d.json", "{}", "datasets", "is missing", "[[datasets]]"),
        ("d.json", '{"datasets": []}', "datasets", "has no entry", "[[datasets]]"),
        ("d.json", '{"datasets": "a"}', "datasets", '"a" is no list', "[[datasets]]"),
        ("d.toml", '[datasets]\nimage_directory = "a"\n', "datasets", "one table", "two brackets"),
        ("d.yaml", "datasets:", "", "`.yaml`", ".toml or .json"),
    ],
)
def test_a_broken_file_is_told_with_its_line(name, content, key, found, mend):
    problem = only_problem(content, name)
    assert problem.key == key
    assert found in problem.found
    assert mend in str(problem.mend)


@pytest.mark.parametrize(
    ("name", "found", "mend"),
    [
        ("general", "5 is no table", "keys that all datasets share"),
        ("dataset", "no entry of a dataset file", "`datasets`"),
        ("batch_size", "outside of any table", "[general] or [[datasets]]"),
        ("image_directory", "outside of any table", "below [[datasets]]"),
        ("flux_kontext_no_resize_control", "outside of any table", "below [[datasets]]"),
    ],
)
def test_a_wrong_entry_at_the_top_is_told(name, found, mend):
    problem = only_problem({name: 5, "datasets": [SOUND]})
    assert problem.key == name
    assert found in problem.found and mend in str(problem.mend)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    for name, found in [("absent.toml", "No such file"), ("folder.toml", "directory"), ("latin.toml", "not UTF-8")]:
        (tmp_path / "folder.toml").mkdir(exist_ok=True)
        (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
        with pytest.raises(InputError) as caught:
            load_dataset_config(name)
        (problem,) = caught.value.problems
        assert problem.file == name
        assert found in problem.found
    with pytest.raises(InputError, match=re.escape(os.getcwd())):
        load_dataset_config("absent.toml")


def test_all_problems_of_a_file_come_at_once():
    found = problems(
        {
            "extra": 1,
            "general": {"resolution": "large"},
            "datasets": [{"image_directory": "a"}, SOUND | {"batch_size": 0, "bach_size": 2}, {}],
        }
    )
    assert [problem.key for problem in found] == [
        "extra",
        "general.resolution",
        "datasets[0].caption_extension",
        "datasets[1].batch_size",
        "datasets[1].bach_size",
        "datasets[2]",
    ]
