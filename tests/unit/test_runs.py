"""Several runs from one configuration: the table, the grid, what is refused, and which caches the runs share."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from qwen_image.config import known_keys, load_config, resolve_config
from qwen_image.dataset.config import load_dataset_config
from qwen_image.problems import InputError
from qwen_image.runs.caches import (
    LATENT_MODEL,
    LATENT_SETTINGS,
    TEXT_MODEL,
    TEXT_SETTINGS,
    cache_sets,
    dataset_names,
    prompt_sets,
    subfolder,
)
from qwen_image.runs.table import SHARED, expand_runs, key_problems

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


def table(tmp_path: Path, text: str, name: str = "runs.tsv") -> dict:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return {**GOOD, "runs": str(tmp_path / name)}


def refused(config: dict) -> str:
    """The message of a configuration that is refused, for its table or for its keys."""
    with pytest.raises(InputError) as error:
        if problems := key_problems(config, "my.yaml"):
            raise InputError(problems)
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
        (None, "runs.tsv", "No such file"),
    ],
)
def test_what_is_no_table(tmp_path, content, name, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refused({**GOOD, "runs": str(tmp_path / name)})


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


def test_a_table_and_a_grid_are_not_given_together(tmp_path):
    assert "together" in refused(table(tmp_path, "output_name\na\n") | {"runs_grid": {"seed": [1, 2]}})


# ---- shared caches


def runs_of(*changes: dict) -> dict[str, dict]:
    return {f"r{number}": resolve_config({**GOOD, **change}) for number, change in enumerate(changes)}


def names(runs: dict, model=LATENT_MODEL) -> list[str]:
    return [one.name for one in cache_sets(runs, resolve_config(GOOD), model).values()]


def test_runs_that_train_differently_share_every_cache():
    runs = runs_of({}, {"learning_rate": 1.0}, {"dit": "other"}, {"network_dim": 4})
    assert names(runs) == names(runs, TEXT_MODEL) == ["d"] * 4


def test_another_vae_has_its_own_latents_and_no_text_of_its_own():
    runs = runs_of({}, {"vae": "x/other.safetensors"}, {"vae": "y/other.safetensors"}, {"vae": "third"})
    assert names(runs, TEXT_MODEL) == ["d"] * 4
    plain, other, same_stem, third = names(runs)
    assert (plain, third) == ("d", "d.vae-third")
    assert other != same_stem and other.startswith("d.vae-other-")
    # whichever other runs there are, the configuration's own keeps its place
    assert names(runs_of({"vae": "third"})) == ["d.vae-third"]


def test_another_text_encoder_precision_or_tokenizer_has_its_own_texts():
    runs = runs_of({}, {"caching_teo_fp8_vl": False}, {"tokenizer": "t"}, {"text_encoder": "te2"})
    assert names(runs) == ["d"] * 4
    assert names(runs, TEXT_MODEL) == [
        "d", "d.caching_teo_fp8_vl-false", "d.tokenizer-t", "d.caching_teo_text_encoder-te2",
    ]  # fmt: skip


def test_dataset_files_of_one_name_are_told_apart():
    named = dataset_names(["d.toml", "a/d.toml", "b/d.toml", "e.toml"])
    assert (named["d.toml"], named["e.toml"]) == ("d", "e")
    assert len(set(named.values())) == 4


def test_prompts_are_shared_by_runs_of_the_same_ones():
    runs = runs_of(
        {"sample_prompts": "p.txt"}, {"sample_prompts": "p.txt", "learning_rate": 1.0}, {"sample_prompts": "q/p.txt"},
        {"caption_dropout_rate": 0.1, "sample_prompts": "p.txt"}, {"caption_dropout_rate": 0.1}, {},
    )  # fmt: skip
    sets = prompt_sets(runs, cache_sets(runs, resolve_config(GOOD), TEXT_MODEL))
    assert sets["r0"] == sets["r1"] and "r5" not in sets
    assert len({sets[name] for name in ("r0", "r2", "r3", "r4")}) == 4
    alone = runs_of({"sample_prompts": "p.txt"})
    assert prompt_sets(alone, cache_sets(alone, resolve_config(GOOD), TEXT_MODEL)) == {"r0": "r0"}


@pytest.fixture
def datasets(tmp_path):
    """Dataset files beside each other: the same twice, another resolution, another folder for the cache."""

    def write(name: str, resolution: int, cache: str, more: str = "") -> str:
        text = f'[[datasets]]\nimage_directory = "i"\ncaption_extension = ".txt"\nresolution = {resolution}\n'
        (tmp_path / name).write_text(f'{text}cache_directory = "{cache}"\n{more}')
        return str(tmp_path / name)

    files = [
        write("base.toml", 256, "c"), write("repeats.toml", 256, "c", "num_repeats = 3\n"),
        write("large.toml", 512, f"{os.curdir}/c"), write("apart.toml", 512, "elsewhere"),
    ]  # fmt: skip
    return {file: load_dataset_config(file) for file in files}


def test_only_what_would_take_anothers_place_goes_into_a_subfolder(datasets):
    base, repeats, large, apart = datasets
    runs = {
        file: resolve_config({**GOOD, "dataset_config": file}) for file in datasets
    } | {"vae": resolve_config({**GOOD, "dataset_config": base, "vae": "other"})}  # fmt: skip
    shared = resolve_config({**GOOD, "dataset_config": base})
    latents = cache_sets(runs, shared, LATENT_MODEL)
    folders = {run: subfolder(one, datasets, LATENT_SETTINGS) for run, one in latents.items()}
    assert folders == {base: "", repeats: "", large: "large", apart: "", "vae": "vae-other"}
    # captions are the same at any resolution
    texts = cache_sets(runs, shared, TEXT_MODEL)
    assert not any(subfolder(one, datasets, TEXT_SETTINGS) for one in texts.values())


def test_the_settings_that_tell_caches_apart_are_all_that_bear_on_them(datasets):
    """Whoever adds a key to dataset files has to decide where it belongs."""
    training_alone = {"index", "batch_size", "num_repeats", "loss_weight"}
    of_other_models = {"control_directory", "multiple_target", "no_resize_control", "control_resolution"}
    fields = {field.name for field in dataclasses.fields(next(iter(datasets.values()))[0])}
    assert fields == {*LATENT_SETTINGS, *TEXT_SETTINGS} | training_alone | of_other_models
