"""Prompt files: the field's switches, words that are none, TOML and JSON, and every mistake told with its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_image.problems import InputError
from qwen_image.sampling.prompts import SWITCHES, load_prompts

ROOT = Path(__file__).parents[2]


def read(tmp_path, text, name="prompts.txt", **more):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return load_prompts(file, **more)


def problems(tmp_path, text, name="prompts.txt"):
    with pytest.raises(InputError) as error:
        read(tmp_path, text, name)
    return [(problem.key, f"{problem.found}; {problem.mend}") for problem in error.value.problems]


def test_every_switch_of_the_field_that_has_a_meaning_here(tmp_path):
    text = "# a comment\n\na red fox --w 640 --H 480 --d 7 --s 30 --l 2.5 --fs 3 --f 1 --n blurry, text\n"
    (prompt,) = read(tmp_path, text)
    assert prompt.prompt == "a red fox"
    assert (prompt.width, prompt.height, prompt.seed, prompt.sample_steps) == (640, 480, 7, 30)
    assert (prompt.cfg_scale, prompt.discrete_flow_shift, prompt.negative_prompt) == (2.5, 3.0, "blurry, text")
    assert prompt.texts == ("a red fox", "blurry, text")


def test_defaults_are_the_fields_but_for_the_shift(tmp_path):
    (prompt,) = read(tmp_path, "a red fox")
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.cfg_scale) == (256, 256, 20, 4.0)
    assert prompt.negative_prompt == " "
    assert prompt.discrete_flow_shift is None
    (plain,) = read(tmp_path, "a red fox --l 1")
    assert plain.texts == ("a red fox",)


@pytest.mark.parametrize("size, used", [(256, 256), (263, 256), (271, 256), (272, 272), (16, 16)])
def test_sizes_are_rounded_down(tmp_path, size, used):
    (prompt,) = read(tmp_path, f"a fox --w {size}")
    assert prompt.width == used


@pytest.mark.parametrize(
    "line, text",
    [
        ("w 3 tigers", "w 3 tigers"),
        ("I saw n of them --w 512", "I saw n of them"),
        ("a dash -- and another --- here --w 512", "a dash -- and another --- here"),
        ("well-known--so --w 512", "well-known--so"),
        ("from 1990 --1999 --w 512", "from 1990 --1999"),
        (r"a sign \--n that says \--w --w 512", "a sign --n that says --w"),
        ("a sign that says --anything --w 512", "a sign that says --anything"),
        ("  a fox\t--w 512", "a fox"),
        ("\N{PARAGRAPH SEPARATOR}a\N{LINE SEPARATOR}fox --w 512", "a\N{LINE SEPARATOR}fox"),
    ],
)
def test_the_prompts_own_words_are_no_switches(tmp_path, line, text):
    (prompt,) = read(tmp_path, line)
    assert prompt.prompt == text
    assert prompt.width == (512 if "--w 512" in line else 256)


def test_a_seed_follows_from_the_trainings_and_the_place(tmp_path):
    text = "a fox\na fox\na fox --d 9\n"
    first, second, given = read(tmp_path, text, seed=42)
    assert [first, second, given] == read(tmp_path, text, seed=42)
    assert first.seed != second.seed
    assert given.seed == 9
    assert read(tmp_path, text, seed=43)[0].seed != first.seed
    assert read(tmp_path, text, seed=43)[2] == given


def test_toml_and_json_say_the_same_as_text(tmp_path):
    line = "a fox --w 512 --s 10 --l 3 --n dull --fs 2"
    wanted = read(tmp_path, f"{line}\n{line} --d 4")
    toml = (
        '[prompt]\nwidth = 512\nsample_steps = 10\ncfg_scale = 3\ndiscrete_flow_shift = 2\nnegative_prompt = "dull"\n'
        '[[prompt.subset]]\nprompt = "a fox"\n[[prompt.subset]]\nprompt = "a fox"\nseed = 4\n'
    )
    assert read(tmp_path, toml, "prompts.toml") == wanted
    one = {
        "prompt": "a fox", "width": 512, "sample_steps": 10, "cfg_scale": 3, "discrete_flow_shift": 2.0, "seed": 4,
        "negative_prompt": "dull", "image_path": None,
    }  # fmt: skip
    assert read(tmp_path, json.dumps([line, one]), "prompts.json") == wanted
    (literal,) = read(tmp_path, json.dumps([{"prompt": "a fox --w 512"}]), "prompts.json")
    assert literal.prompt == "a fox --w 512", "an object's prompt is nothing but words"
    assert literal.width == 256


def test_every_mistake_of_a_file_with_its_line(tmp_path):
    lines = [
        "a fox --w 8",
        "a fox --width 512",
        "a fox --s 0 --l nan",
        "--w 512",
        "a fox --w 512 --w 256",
        "a fox --l=4",
        "a fox --n",
        "a fox --q 3",
        "a fox --l 1 --n dull",
        "a good one --w 64",
        "a fox --fs 0 --d -1 --h 12.5",
        "a fox --f 25",
    ]
    found = problems(tmp_path, "\n".join(lines))
    assert sorted({key for key, _ in found}, key=lambda key: int(key.split()[1])) == [
        f"line {number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)
    ]
    texts = {key: " | ".join(text for other, text in found if other == key) for key, _ in found}
    assert "did you mean --w" in texts["line 2"]
    assert r"\--width" in texts["line 2"]
    assert "sample_steps is 0" in texts["line 3"]
    assert "cfg_scale" in texts["line 3"]
    assert "no prompt" in texts["line 4"]
    assert "stands twice" in texts["line 5"]
    assert "write --l 4" in texts["line 6"]
    assert "no value" in texts["line 7"]
    assert "--q is no switch" in texts["line 8"]
    assert "changes nothing" in texts["line 9"]
    assert len([key for key, _ in found if key == "line 11"]) == 3


@pytest.mark.parametrize("switch", ["g", "i", "ei", "cn", "ci", "of"])
def test_switches_of_other_models_are_refused_with_a_reason(tmp_path, switch):
    ((key, text),) = problems(tmp_path, f"a fox --{switch} 4")
    assert key == "line 1"
    assert SWITCHES[switch] in text
    assert "remove it" in text or "cfg_scale" in text


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("prompts.yaml", "a fox", ".txt, .toml or .json"),
        ("prompts.txt", "# nothing\n\n", "holds no prompt"),
        ("prompts.toml", "[prompt", "is no TOML file"),
        ("prompts.toml", 'prompt = "a fox"', "[[prompt.subset]]"),
        ("prompts.toml", '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nwidth = 32', "stands in [prompt]"),
        ("prompts.toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwidht = 32', "did you mean width?"),
        ("prompts.toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwidth = "32"', "number of pixels"),
        ("prompts.toml", "[prompt]\n[[prompt.subset]]\nseed = 4", "has no prompt"),
        ("prompts.json", "{}", "no list of prompts"),
        ("prompts.json", "[4]", "is no prompt"),
        ("prompts.json", '[{"prompt": "\\ud800"}]', "give a text"),
        ("prompts.json", '[{"prompt": "a", "seed": true}]', "whole number"),
        ("prompts.json", '["a --s 2000"]', "from 1 to 1000"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, name, text, words):
    assert any(words in found for _, found in problems(tmp_path, text, name))


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("ein Käse".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


def test_the_example_is_good_and_reading_it_takes_no_torch():
    code = (
        "import sys; from qwen_image.sampling.prompts import load_prompts\n"
        "print(len(load_prompts(sys.argv[1])), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "config/sample_prompts.txt"], stdout=subprocess.PIPE, text=True, check=True,
        cwd=ROOT / "scripts",
    )  # fmt: skip
    assert done.stdout.split() == ["3", "False"]
