"""Several runs from one configuration: the table, the grid, what is refused, and which caches the runs share."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from qwen_image.cache.program import subfolder_name
from qwen_image.config import known_keys, load_config, resolve_config
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.listing import limit
from qwen_image.problems import InputError
from qwen_image.runs.caches import (
    LATENT_MODEL,
    TEXT_MODEL,
    cache_sets,
    dataset_name,
    home,
    own_values,
    prompt_sets,
)
from qwen_image.runs.folders import LATENT_SETTINGS, TEXT_SETTINGS, folder_problems, makers_before, subfolder
from qwen_image.runs.keys import MAX_RUNS, SHARED
from qwen_image.runs.table import expand_runs, key_problems
from qwen_image.training.file_names import best_name, lora_name

ROOT = Path(__file__).parents[2]
GOOD = {
    "dataset_config": "d.toml",
    "dit": "dit.safetensors",
    "vae": "vae.safetensors",
    "text_encoder": "te",
    "output_dir": "out",
    "output_name": "lora",
    "learning_rate": 1e-4,
}
ROWS_NAME = ("dataset_config", "vae", "text_encoder", "output_name")
"""Keys that a configuration may leave to its rows, and that caches are named after."""


def table(tmp_path: Path, text: str, name: str = "runs.tsv") -> dict:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return {**GOOD, "runs": str(tmp_path / name)}


def check_keys(config: dict) -> None:
    """Raise as the workflow does for a table or keys that are wrong."""
    if problems := key_problems(config, "my.yaml"):
        raise InputError(limit(problems))


def refused(config: dict) -> str:
    """The message of a configuration that is refused, for its table or for its keys."""
    with pytest.raises(InputError) as error:
        check_keys(config)
    return str(error.value)


# ---- the table


def test_the_shipped_table_is_one():
    config = load_config(ROOT / "config/config.yaml") | {"runs": str(ROOT / "config/runs.tsv")}
    assert key_problems(config, "config.yaml") == []
    assert len(expand_runs(config, "config.yaml")) > 1


def test_without_a_table_the_configuration_is_the_run():
    (run,) = expand_runs(GOOD, "my.yaml")
    assert (run.name, run.config, run.own) == ("lora", GOOD, frozenset())


@pytest.mark.parametrize("name, separator", [("runs.tsv", "\t"), ("runs.csv", ","), ("RUNS.TSV", "\t")])
def test_a_row_sets_its_keys_and_leaves_the_rest(tmp_path, name, separator):
    rows = [["output_name", "learning_rate", "network_dim"], ["a", "5e-5", ""], ["b", "", "8"]]
    text = "".join(separator.join(row) + "\n" for row in rows)
    a, b = expand_runs(table(tmp_path, text, name), "my.yaml")
    assert a.config == {**GOOD, "output_name": "a", "learning_rate": "5e-5"}  # as YAML reads it; see config.normalise
    assert resolve_config(a.config)["learning_rate"] == 5e-5
    assert b.config == {**GOOD, "output_name": "b", "network_dim": 8}
    assert key_problems(table(tmp_path, text, name), "my.yaml") == []


def test_cells_mean_what_they_would_mean_in_the_configuration(tmp_path):
    header = "output_name\tnetwork_args\tgradient_checkpointing\tmixed_precision\tdit\tmetadata_title\n"
    row = 'a\t"[loraplus_lr_ratio=4, x=y]"\ttrue\tno\t007\t  yes: it is \n'
    (run,) = expand_runs(table(tmp_path, header + row), "my.yaml")
    assert run.config["network_args"] == ["loraplus_lr_ratio=4", "x=y"]
    assert run.config["gradient_checkpointing"] is True
    assert resolve_config(run.config)["mixed_precision"] == "no"
    # a text stays the text that it is, but for the space around it
    assert (run.config["dit"], run.config["metadata_title"]) == ("007", "yes: it is")


def test_a_table_may_begin_with_a_byte_order_mark_and_have_blank_lines(tmp_path):
    names = [run.name for run in expand_runs(table(tmp_path, "\ufeffoutput_name\n\na\n\nb\n"), "my.yaml")]
    assert names == ["a", "b"]


@pytest.mark.parametrize("null", ["null", "~", "Null", "NULL"])
def test_null_unsets_a_key_as_in_the_configuration(tmp_path, null):
    text = f"output_name\tsample_prompts\ttokenizer\tlogging_dir\tdit\na\t{null}\t {null} \t{null}\t{null}\n"
    config = table(tmp_path, text) | {"sample_prompts": "p.txt", "tokenizer": "t", "logging_dir": "l"}
    (run,) = expand_runs(config, "my.yaml")
    assert [run.config[key] for key in ("sample_prompts", "tokenizer", "logging_dir")] == [None] * 3
    resolved = resolve_config(run.config)
    assert "sample_prompts" not in resolved and resolved["tokenizer"] is None
    # a key that must have a text has this one
    assert resolved["dit"] == null


def test_lines_are_those_that_an_editor_counts(tmp_path):
    text = '\n\noutput_name\tmetadata_title\tseed\n\na\t"two\nlines"\t1\n   \nb\t\tmany\nc\t"\r\n\r\n"\tx\nd\t\ty'
    message = refused(table(tmp_path, text))
    for line, found in ((8, "many"), (9, "x"), (12, "y")):
        assert f"runs.tsv: line {line}: seed: '{found}'" in message
    assert text.splitlines()[7].startswith("b") and text.splitlines()[11].startswith("d")


def test_every_key_may_be_a_column_but_those_that_hold_for_all_runs(tmp_path):
    """Each key is either accepted as a column or refused with its reason."""
    for key in known_keys():
        text = f"output_name\t{key}\na\t\n" if key != "output_name" else "output_name\na\n"
        config = table(tmp_path, text)
        if key in SHARED:
            assert f"{key}: holds for all runs: {SHARED[key]}" in refused(config)
        else:
            assert [run.name for run in expand_runs(config, "my.yaml")] == ["a"]
    assert SHARED.keys() < set(known_keys())


def test_all_faults_of_a_table_come_in_one_message_with_their_places(tmp_path):
    text = "output_name\tlearning_rat\tresolution\tnonsense_xyz\na\t\t\t\n"
    message = refused(table(tmp_path, text))
    assert "learning_rat: is not a known key\n    -> did you mean learning_rate?" in message
    assert "resolution: is a key of the dataset file" in message and "column dataset_config" in message
    assert "nonsense_xyz: is not a known key" in message
    assert message.startswith("3 problems")


def test_names_must_be_there_be_safe_and_be_the_runs_own(tmp_path):
    message = refused(table(tmp_path, "output_name\tlearning_rate\na\t\nA\t\n../x\t\n\t1\n"))
    assert "line 3: output_name: 'A' is the name of another run" in message  # one file on some file systems
    assert "line 4: output_name: '../x' is no name for a run" in message
    assert "line 5: output_name: is missing" in message
    assert "output_name: the column is missing" in refused(table(tmp_path, "learning_rate\n1\n"))


@pytest.mark.parametrize(
    "other, file",
    [
        ("x-best", best_name("x")),
        ("x-000001", lora_name("x", epoch=1)),
        ("X-1234567", lora_name("X", epoch=1234567)),
        ("x-step00000004", lora_name("x", step=4)),
        ("x.diffusers", "x.diffusers.safetensors"),
        ("x-best.diffusers", "x-best.diffusers.safetensors"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_no_run_is_called_like_a_file_that_another_saves(tmp_path, other, file, first):
    names = ["x", other] if first else [other, "x"]
    message = refused(table(tmp_path, "output_name\n" + "\n".join(names)))
    assert message.startswith("1 problem")
    line = 2 + names.index(other)
    assert f"runs.tsv: line {line}: output_name: {file} is also a file that the run 'x' may save" in message
    expand_runs(table(tmp_path, f"output_name\n{other}\ny\n"), "my.yaml")


def test_names_that_only_look_alike_are_different_runs(tmp_path):
    names = ["x", "x-bests", "x-00001", "x-step0000001", "x-best-", "best", "best2", "x-000001a"]
    runs = expand_runs(table(tmp_path, "output_name\n" + "\n".join(names)), "my.yaml")
    assert [run.name for run in runs] == names


def test_a_bad_value_is_told_of_its_row_and_a_bad_shared_key_once(tmp_path):
    config = table(tmp_path, "output_name\tlearning_rate\na\tfast\nb\t1e-4\n") | {"network_dim": "many"}
    message = refused(config)
    assert "runs.tsv: line 2: learning_rate:" in message
    assert message.count("network_dim") == 1 and "my.yaml: network_dim" in message
    assert "line 3" not in message


@pytest.mark.parametrize(
    "content, name, said",
    [
        (b"", "runs.tsv", "is no such table"),
        (b"output_name\n", "runs.tsv", "has no row"),
        (b"output_name\tseed\na\t1\t2\n", "runs.tsv", "is no such table"),
        (b"output_name\tseed\tseed\na\t1\t2\n", "runs.tsv", "stand there twice: 'seed'"),
        (b"output_name\n\xff\xfe\n", "runs.tsv", "is no such table"),
        (b"output_name\tnetwork_args\na\t[1, \n", "runs.tsv", "'[1,' is no value"),
        (b"output_name\na\n", "runs.txt", "name a table that ends in .tsv or .csv"),
        (b'output_name\n"a\n', "runs.tsv", "is no such table"),
        pytest.param(b"a" * (2**20 + 1), "runs.tsv", "cannot be read: it is larger than 1 MiB", id="too large"),
        (None, "runs.tsv", "No such file"),
    ],
)
def test_what_is_no_table(tmp_path, content, name, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refused({**GOOD, "runs": str(tmp_path / name)})


def test_a_pipe_or_a_device_is_no_table_and_holds_nothing_up(tmp_path):
    os.mkfifo(tmp_path / "pipe.tsv")
    (tmp_path / "zero.tsv").symlink_to("/dev/zero")
    (tmp_path / "folder.tsv").mkdir()
    for name, said in (("pipe", "no ordinary file"), ("zero", "no ordinary file"), ("folder", "Is a directory")):
        assert f"{name}.tsv: cannot be read: " in (message := refused({**GOOD, "runs": str(tmp_path / f"{name}.tsv")}))
        assert said in message


UNKNOWN = "\t".join(f"learning_rate_{number}" for number in range(20_000))


@pytest.mark.parametrize(
    "text",
    [
        f"output_name\t{UNKNOWN}\na\n",
        "\t".join(["output_name", *(f"learning_rate_{number}" for number in range(150))]) + "\na\n",
        f"output_name\t{'learning_rate' * 9000}\na\n",
        f"output_name\tseed\na\t{'[' * 100_000}\n",
        "output_name\tseed\n" + "".join(f"a{number}\tmany\n" for number in range(MAX_RUNS)),
        "output_name\tseed\n" + "".join(f"a{number}\t[\n" for number in range(MAX_RUNS)),
        "output_name\n" + "a\n" * MAX_RUNS,
        f"output_name\n{'/' * 100_000}\n",
        "output_name\n" + "".join(f"a{number}\n" for number in range(MAX_RUNS + 1)),
    ],
    ids=["columns", "unknown", "long name", "value", "bad rows", "no values", "twice", "name", "rows"],
)
def test_no_table_makes_a_long_message(tmp_path, text):
    assert len(refused(table(tmp_path, text))) < 20_000


def test_of_very_many_columns_none_is_guessed_at(tmp_path, monkeypatch):
    monkeypatch.delattr("difflib.get_close_matches")
    assert "it has 20001 columns" in refused(table(tmp_path, f"output_name\t{UNKNOWN}\na\n"))


@pytest.mark.parametrize("count", [150, 100_000])
def test_no_grid_makes_a_long_message(count):
    grid = {f"learning_rate_{number}": [1, 2] for number in range(count)}
    assert len(refused({**GOOD, "runs_grid": grid})) < 30_000
    assert len(refused({**GOOD, "runs_grid": {"seed": "x" * count}})) < 1000


# ---- the grid


def test_a_grid_is_every_combination_named_after_what_differs():
    grid = {"learning_rate": ["1e-4", 5e-05], "network_dim": [8], "optimizer_type": ["AdamW", "Lion"]}
    runs = expand_runs({**GOOD, "runs_grid": grid}, "my.yaml")
    assert [run.name for run in runs] == [
        "lora-learning_rate_1e-4-optimizer_type_AdamW",
        "lora-learning_rate_1e-4-optimizer_type_Lion",
        "lora-learning_rate_5e-05-optimizer_type_AdamW",
        "lora-learning_rate_5e-05-optimizer_type_Lion",
    ]
    assert all(run.config["network_dim"] == 8 for run in runs)
    assert runs[3].config["learning_rate"] == 5e-05 and runs[3].config["optimizer_type"] == "Lion"
    assert key_problems({**GOOD, "runs_grid": grid}, "my.yaml") == []


def test_paths_and_lists_in_a_grid_give_short_safe_names():
    grid = {"dataset_config": ["/data/one two.toml", "/data/b.toml"], "network_args": [["a=1"], ["a=2", "b=3"]]}
    names = [run.name for run in expand_runs({**GOOD, "runs_grid": grid}, "my.yaml")]
    assert len(set(names)) == 4 and names[3] == "lora-dataset_config_b-network_args_a_2_b_3"
    assert names[0] == "lora-dataset_config_one_two-network_args_a_1"
    # beyond what a file name should have, a hash tells them apart
    many = {"network_args": [[f"name_{number}=value" for number in range(end)] for end in (20, 21)]}
    long = [run.name for run in expand_runs({**GOOD, "runs_grid": many}, "my.yaml")]
    assert len(set(long)) == 2 and all(len(name) <= 120 for name in long)


@pytest.mark.parametrize(
    "grid, said",
    [
        ({}, "write it as key: [value, value]"),
        ([1], "write it as key: [value, value]"),
        ({"learning_rate": 1}, "runs_grid.learning_rate: found 1"),
        ({"learning_rate": []}, "runs_grid.learning_rate: found []"),
        ({"learning_rate": [1, 1]}, "a value stands there twice"),
        ({"output_name": ["a", "b"]}, "runs_grid.output_name"),
        ({"learning_rat": [1]}, "did you mean learning_rate?"),
        ({"caching_shards": [1, 2]}, "holds for all runs"),
        ({"network_dim": [4, "many"]}, "my.yaml: runs_grid: network_dim"),
    ],
)
def test_bad_grids(grid, said):
    assert said in refused({**GOOD, "runs_grid": grid})


@pytest.mark.parametrize(
    "key, values, expected",
    [
        # as little as explains the difference
        ("vae", ["/m/a/vae.safetensors", "/m/b/vae.safetensors"], ["a_vae", "b_vae"]),
        ("network_weights", ["x/lora.safetensors", "y/lora.safetensors", "z/other.safetensors"],
         ["x_lora", "y_lora", "other"]),
        ("network_weights", [None, "y/none.safetensors"], ["None", "y_none"]),
        # the folder's name is the same, or there is none
        ("vae", ["/m/a/vae.safetensors", "/n/a/vae.safetensors"], ["a_vae_HASH", "a_vae_HASH"]),
        ("optimizer_type", ["adamw", "AdamW", "Lion"], ["adamw_HASH", "AdamW_HASH", "Lion"]),
        ("metadata_title", ["a b", "a_b"], ["a_b_HASH", "a_b_HASH"]),
        ("network_args", [["a=(1)"], ["a=[1]"]], ["a_1__HASH", "a_1__HASH"]),
        # the training of the first may save a file that is called like the second
        ("network_weights", ["x/cat.safetensors", "x/cat-best.safetensors", "x/cat-000010.safetensors"],
         ["cat", "x_cat-best", "x_cat-000010"]),
        ("metadata_title", ["a", "a-best", "a-best.diffusers"], ["a", "a-best_HASH", "a-best.diffusers_HASH"]),
    ],
)  # fmt: skip
def test_values_whose_names_would_be_the_same_are_told_apart(key, values, expected):
    runs = expand_runs({**GOOD, "runs_grid": {key: values}}, "my.yaml")
    assert len({run.name.lower() for run in runs}) == len(values)
    for run, value, label in zip(runs, values, expected, strict=True):
        assert re.fullmatch(re.escape(f"lora-{key}_{label}").replace("HASH", "[0-9a-f]{8}"), run.name)
        assert run.config[key] == value


def test_names_that_read_the_same_across_keys_are_told_apart():
    grid = {"metadata_title": ["a", "a-metadata_tags_b"], "metadata_tags": ["b-metadata_tags_b", "b"]}
    names = [run.name for run in expand_runs({**GOOD, "runs_grid": grid}, "my.yaml")]
    assert len({name.lower() for name in names}) == 4


@pytest.mark.parametrize(
    "key, values",
    [
        ("learning_rate", ["1e-4", 0.0001]),
        ("network_dim", [4, 4.0]),
        ("network_dim", ["4", 4]),
        ("mixed_precision", [False, "no"]),
        ("max_grad_norm", [None, 1.0]),
        ("base_weights_multiplier", [["1.0"], [1]]),
    ],
)
def test_one_value_in_two_spellings_is_refused(key, values):
    message = refused({**GOOD, "runs_grid": {key: values}})
    assert f"runs_grid.{key}: a value stands there twice: {values[0]!r} and {values[1]!r}" in message


def test_a_table_and_a_grid_are_not_given_together(tmp_path):
    assert "together" in refused(table(tmp_path, "output_name\na\n") | {"runs_grid": {"seed": [1, 2]}})


# ---- shared caches


def runs_of(*changes: dict) -> dict[str, dict]:
    return {f"r{number}": resolve_config({**GOOD, **change}) for number, change in enumerate(changes)}


def names(runs: dict, model=LATENT_MODEL, own=GOOD) -> list[str]:
    return [one.name for one in cache_sets(runs, own_values(own), model).values()]


def test_runs_that_train_differently_share_every_cache():
    runs = runs_of({}, {"learning_rate": 1.0}, {"dit": "other"}, {"network_dim": 4})
    assert names(runs) == names(runs, TEXT_MODEL) == ["d"] * 4


def test_another_vae_has_its_own_latents_and_no_text_of_its_own():
    runs = runs_of({}, {"vae": "x/other.safetensors"}, {"vae": "y/other.safetensors"}, {"vae": "third"})
    assert names(runs, TEXT_MODEL) == ["d"] * 4
    plain, *others = names(runs)
    assert plain == "d" and len(set(others)) == 3
    for name, label in zip(others, ("other", "other", "third"), strict=True):
        assert re.fullmatch(rf"d\.vae-{label}-[0-9a-f]{{8}}", name)


def test_another_text_encoder_precision_or_tokenizer_has_its_own_texts():
    runs = runs_of({}, {"caching_teo_fp8_vl": False}, {"tokenizer": "t"}, {"text_encoder": "te2"})
    assert names(runs) == ["d"] * 4
    plain, precision, tokenizer, encoder = names(runs, TEXT_MODEL)
    assert (plain, precision) == ("d", "d.caching_teo_fp8_vl-false")
    assert re.fullmatch("d.tokenizer-t-[0-9a-f]{8}", tokenizer)
    assert re.fullmatch("d.caching_teo_text_encoder-te2-[0-9a-f]{8}", encoder)
    # one that is left out is no folder called none
    runs = runs_of({"tokenizer": None}, {"tokenizer": "none"})
    left_out, folder = names(runs, TEXT_MODEL, own={**GOOD, "tokenizer": "t"})
    assert left_out == "d.tokenizer-none" and folder != left_out


OWN = [GOOD, *({key: value for key, value in GOOD.items() if key != left_out} for left_out in ROWS_NAME)]


@pytest.mark.parametrize("own", OWN, ids=["all", *(f"without {key}" for key in ROWS_NAME)])
def test_no_name_depends_on_other_rows_or_on_their_order(own):
    """Whatever is added, moved or removed: every run keeps its caches."""
    changes = [
        {}, {"vae": "x/two.safetensors"}, {"vae": "y/two.safetensors"}, {"dataset_config": "a/d.toml"},
        {"dataset_config": "b/d.toml", "text_encoder": "x/te"}, {"text_encoder": "y/te", "sample_prompts": "p.txt"},
        {"sample_prompts": "q/p.txt"}, {"sample_prompts": "p.txt", "caption_dropout_rate": 0.1},
    ]  # fmt: skip
    runs = runs_of(*changes)

    def told(several: dict) -> dict[str, tuple]:
        latents, texts = (cache_sets(several, own_values(own), model) for model in (LATENT_MODEL, TEXT_MODEL))
        prompts = prompt_sets(several, own_values(own), texts)
        return {run: (latents[run].name, texts[run].name, prompts.get(run)) for run in several}

    everything = told(runs)
    assert told(dict(reversed(runs.items()))) == everything
    for run in runs:
        assert told({run: runs[run]})[run] == everything[run]
        assert told({other: config for other, config in runs.items() if other != run}) == {
            other: name for other, name in everything.items() if other != run
        }
    # and what differs has another name
    assert len({latents for latents, _, _ in everything.values()}) == 5
    assert len({texts for _, texts, _ in everything.values()}) == 4
    assert len({prompts for _, _, prompts in everything.values()}) == 4  # none is one


def test_a_table_takes_over_the_caches_of_the_training_before():
    config = {**GOOD, "sample_prompts": "p.txt", "caption_dropout_rate": "0.1"}
    own, run = own_values(config), resolve_config(config)
    for runs in ({"a": run}, {"a": run, "b": resolve_config({**config, "vae": "x"})}):
        latents, texts = (cache_sets(runs, own, model) for model in (LATENT_MODEL, TEXT_MODEL))
        assert latents["a"].name == texts["a"].name == home(own) == "d"
        assert prompt_sets(runs, own, texts)["a"] == "lora"


def test_dataset_files_of_one_name_are_told_apart():
    named = [dataset_name(file, own_values(GOOD)) for file in ("d.toml", "a/d.toml", "b/d.toml", "e.toml")]
    assert named[0] == "d" and len(set(named)) == 4
    assert re.fullmatch("e-[0-9a-f]{8}", named[3])


def test_prompts_are_shared_by_runs_of_the_same_ones():
    runs = runs_of(
        {"sample_prompts": "p.txt"}, {"sample_prompts": "p.txt", "learning_rate": 1.0}, {"sample_prompts": "q/p.txt"},
        {"caption_dropout_rate": 0.1, "sample_prompts": "p.txt"}, {"caption_dropout_rate": 0.1}, {},
    )  # fmt: skip
    sets = prompt_sets(runs, own_values(GOOD), cache_sets(runs, own_values(GOOD), TEXT_MODEL))
    assert sets["r0"] == sets["r1"] and "r5" not in sets
    assert len({sets[name] for name in ("r0", "r2", "r3", "r4")}) == 4


@pytest.fixture
def datasets(tmp_path):
    """Dataset files beside each other: the same twice, another resolution, another folder for the cache."""
    files = [
        write_dataset(tmp_path / "base.toml", 256, "c"),
        write_dataset(tmp_path / "repeats.toml", 256, "c", "num_repeats = 3\n"),
        write_dataset(tmp_path / "large.toml", 512, f"{os.curdir}/c"),
        write_dataset(tmp_path / "apart.toml", 512, "elsewhere"),
    ]
    return {file: load_dataset_config(file) for file in files}


def write_dataset(path: Path, resolution: int, cache: str, more: str = "") -> str:
    text = f'[[datasets]]\nimage_directory = "i"\ncaption_extension = ".txt"\nresolution = {resolution}\n'
    path.write_text(f'{text}cache_directory = "{cache}"\n{more}')
    return str(path)


def folders(datasets: dict, own: dict, model=LATENT_MODEL, settings=LATENT_SETTINGS) -> dict[str, str]:
    """The subfolder of each run: one for each dataset file, and one with another VAE."""
    runs = {file: resolve_config({**GOOD, "dataset_config": file}) for file in datasets}
    runs["vae"] = resolve_config({**GOOD, "dataset_config": next(iter(datasets)), "vae": "other"})
    sets = cache_sets(runs, own_values(own), model)
    return {run: subfolder(one, datasets, own_values(own), settings) for run, one in sets.items()}


def test_only_what_would_take_anothers_place_goes_into_a_subfolder(datasets):
    base, repeats, large, apart = datasets
    own = {**GOOD, "dataset_config": base}
    latents = folders(datasets, own)
    assert (latents[base], latents[repeats], latents[apart]) == ("", "", "")
    assert re.fullmatch("large-[0-9a-f]{8}", latents[large]) and re.fullmatch("vae-other-[0-9a-f]{8}", latents["vae"])
    # whichever other files there are, and in which order
    assert folders(dict(reversed(datasets.items())), own)[large] == latents[large]
    assert folders({large: datasets[large]}, own)[large] == latents[large]
    assert folders({file: datasets[file] for file in (large, apart)}, own)[apart] == ""
    # captions are the same at any resolution
    assert not any(folders(datasets, own, TEXT_MODEL, TEXT_SETTINGS).values())


def test_subfolders_have_names_that_the_caching_programs_take(tmp_path):
    base, long = (write_dataset(tmp_path / f"{name}.toml", size, "c") for name, size in (("b", 256), ("x" * 60, 512)))
    both = {file: load_dataset_config(file) for file in (base, long)}
    name = folders(both, {**GOOD, "dataset_config": base})[long]
    assert subfolder_name(name) == name != ""


def test_whose_files_stay_in_a_folder_is_not_left_to_the_order_of_rows(datasets):
    base, repeats, large, _ = datasets
    (problem,) = folder_problems(datasets, own_values({}), "my.yaml")
    assert problem.file == large and f"is that of {base} too" in problem.found
    assert "set dataset_config in my.yaml" in problem.mend
    others = folder_problems(dict(reversed(datasets.items())), own_values({}), "my.yaml")
    assert {problem.file for problem in others} == {base, repeats}
    assert folder_problems(datasets, own_values({**GOOD, "dataset_config": base}), "my.yaml") == []


def test_sets_that_share_files_are_made_one_after_the_other(datasets):
    base, repeats, large, apart = datasets
    own = own_values({**GOOD, "dataset_config": base})
    runs = {file: resolve_config({**GOOD, "dataset_config": file}) for file in datasets}
    runs |= {f"{file}, vae": {**runs[file], "vae": "other"} for file in (base, repeats)}
    latents, texts = cache_sets(runs, own, LATENT_MODEL), cache_sets(runs, own, TEXT_MODEL)
    waiting = makers_before(latents.values(), datasets, own, LATENT_SETTINGS)
    # the configuration's own comes first, else the first by name
    expected = {run: [] for run in runs} | {repeats: ["base"], f"{repeats}, vae": [latents[f"{base}, vae"].name]}
    assert waiting == {latents[run].name: names for run, names in expected.items()}
    waiting = makers_before(texts.values(), datasets, own, TEXT_SETTINGS)
    assert waiting["base"] == waiting[texts[apart].name] == []
    assert waiting[texts[repeats].name] == waiting[texts[large].name] == ["base"]


def test_the_settings_that_tell_caches_apart_are_all_that_bear_on_them(datasets):
    """Whoever adds a key to dataset files has to decide where it belongs."""
    training_alone = {"index", "batch_size", "num_repeats", "loss_weight"}
    of_other_models = {"control_directory", "multiple_target", "no_resize_control", "control_resolution"}
    fields = {field.name for field in dataclasses.fields(next(iter(datasets.values()))[0])}
    assert fields == {*LATENT_SETTINGS, *TEXT_SETTINGS} | training_alone | of_other_models
