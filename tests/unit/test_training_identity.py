"""What a training follows from: every setting is sorted, inputs count by their content and not by their place."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toml
import torch
from safetensors.torch import load_file
from training_data import write_tiny_training

from qwen_image.cache.fingerprint import fingerprint_metadata
from qwen_image.cache.manifest import TEXT_COLUMNS, write_manifest
from qwen_image.cache.prompts import prompts_folder, text_sha256
from qwen_image.container import data_sha256, write_safetensors
from qwen_image.dataset.config import DatasetSettings
from qwen_image.models import identity as model_identity_module
from qwen_image.models.identity import model_identity
from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, argument_names, parse_arguments, with_defaults
from qwen_image.training.identity import BESIDE, IN_THE_MANIFESTS, INPUTS, LENGTH, inputs_digest, result_settings
from qwen_image.training.loop import train
from qwen_image.training.schema import key_schemas

# settings that change the trained weights; a new one belongs here or in one of identity.py's lists
BEARING = """
    network_module network_dim network_alpha network_dropout network_args dim_from_weights scale_weight_norms
    base_weights_multiplier gradient_accumulation_steps seed mixed_precision optimizer_type optimizer_args
    learning_rate max_grad_norm lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
    lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_scheduler_type lr_scheduler_args
    timestep_sampling discrete_flow_shift sigmoid_scale min_timestep max_timestep preserve_distribution_shape
    num_timestep_buckets weighting_scheme logit_mean logit_std mode_scale loss_type huber_delta ema_decay
    validation_split caption_dropout_rate
"""
BEARING_OF_A_DATASET = {"index", "batch_size", "num_repeats", "loss_weight"}


def test_every_setting_is_sorted_exactly_once():
    refused = {name for name, schema in key_schemas().items() if "x-refused" in schema}
    lists = (LENGTH, INPUTS, BESIDE, set(BEARING.split()))
    for name in argument_names():
        times = sum(name in one for one in lists)
        assert times == 1 or (times == 0 and name in refused), f"{name} stands in {times} of the lists"
    assert set().union(*lists) <= set(argument_names())


def test_every_setting_of_a_dataset_is_sorted_exactly_once():
    names = {field.name for field in dataclasses.fields(DatasetSettings)}
    assert names == IN_THE_MANIFESTS | BEARING_OF_A_DATASET
    assert not IN_THE_MANIFESTS & BEARING_OF_A_DATASET


def test_result_settings_are_plain_values_without_paths_and_length():
    given = {"learning_rate": 1e-3, "max_train_steps": 7, "dit": "/d", "output_dir": "/o", "seed": 3}
    found = result_settings(Settings(**with_defaults(given)))
    assert json.loads(json.dumps(found)) == found
    assert found.keys() >= set(BEARING.split()) and (found["learning_rate"], found["seed"]) == (1e-3, 3)
    assert not found.keys() & {*LENGTH, *INPUTS, *BESIDE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("tiny"))


def digest(tiny, **more):
    return inputs_digest(parse_arguments(tiny.flags(**more)))


def moved(tiny, folder):
    """A copy of everything in another folder."""
    shutil.copytree(tiny.folder, folder)
    arguments = {key: value.replace(str(tiny.folder), str(folder)) for key, value in tiny.arguments.items()}
    table = (folder / "dataset.toml").read_text().replace(str(tiny.folder), str(folder))
    (folder / "dataset.toml").write_text(table)
    return dataclasses.replace(tiny, folder=folder, arguments=arguments)


def test_moving_everything_changes_nothing(tiny, tmp_path):
    other = moved(tiny, tmp_path / "elsewhere")
    (other.folder / "dit").rename(other.folder / "renamed")
    other.arguments["dit"] = str(other.folder / "renamed")
    assert digest(other) == digest(tiny)
    assert str(tiny.folder) not in str(digest(tiny))


@pytest.mark.parametrize("changed", ["latents.tsv", "text.tsv", "dit/diffusion_pytorch_model.safetensors"])
def test_changed_content_changes_its_digest_alone(tiny, tmp_path, changed):
    before, other = digest(tiny), moved(tiny, tmp_path / "changed")
    with open(other.folder / changed, "r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"7")
    after = digest(other)
    assert [key for key in before if before[key] != after[key]] == [
        {"latents.tsv": "latents_manifest", "text.tsv": "text_encoder_outputs_manifest"}.get(changed, "dit")
    ]


def test_of_the_dataset_s_settings_those_count_that_the_manifests_do_not_hold(tiny, tmp_path):
    other = moved(tiny, tmp_path / "changed")
    table = toml.loads((other.folder / "dataset.toml").read_text())
    table["datasets"][0] |= {"caption_extension": ".cap", "alpha_background": "black"}
    (other.folder / "dataset.toml").write_text(toml.dumps(table))
    assert digest(other) == digest(tiny)
    table["datasets"][0]["num_repeats"] = 2
    (other.folder / "dataset.toml").write_text(toml.dumps(table))
    assert digest(other) != digest(tiny)
    assert json.loads(digest(other)["datasets"])[0]["num_repeats"] == 2


def test_adapters_to_start_from_count_by_content(tiny, tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (digest(tiny, base_weights=[tmp_path / name, tmp_path / "b"]) for name in "abc")
    assert a == c != b and a["base_weights[1]"] == b["base_weights[1]"]
    assert digest(tiny, network_weights=tmp_path / "a")["network_weights"] == a["base_weights[0]"]


def prompt_row(manifest, key, model):
    """A cached text, and the row of the manifest that lists it."""
    file, metadata = f"{key}_qi_te.safetensors", fingerprint_metadata({"model": model, "caption": key})
    write_safetensors(prompts_folder(manifest) / file, {"varlen_vl_embed_bfloat16": torch.zeros(5, 64)}, metadata)
    return {"dataset": 0, "key": key, "cache_file": file, "tokens": 5, "fingerprint": metadata["fingerprint"]}


def test_of_the_prompts_the_empty_caption_counts_where_captions_are_dropped(tiny, tmp_path):
    found = []
    for number, model in enumerate("ffg"):
        prompts = tmp_path / f"{number}.tsv"
        rows = [prompt_row(prompts, text_sha256(""), model), prompt_row(prompts, str(number), model)]
        write_manifest(prompts, rows, TEXT_COLUMNS)
        assert digest(tiny, prompts_manifest=prompts) == digest(tiny)
        found.append(digest(tiny, prompts_manifest=prompts, caption_dropout_rate=0.1))
    assert found[0] == found[1] != found[2]
    with pytest.raises(InputError, match="prompts_manifest is not set"):
        digest(tiny, caption_dropout_rate=0.1)


def test_an_input_that_cannot_be_read_is_named(tiny):
    with pytest.raises(InputError, match=r"nowhere\.tsv: cannot be read"):
        digest(tiny, text_encoder_outputs_manifest=tiny.folder / "nowhere.tsv")


def test_a_model_is_read_once_and_a_large_one_shows_it(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"x" * 5000)
    os.utime(model, (1, 1))
    monkeypatch.setattr(model_identity_module, "LARGE", 1000)
    first = model_identity([model], tmp_path / "manifests")
    assert "model.safetensors" in capsys.readouterr().err
    monkeypatch.setattr(model_identity_module, "_hash_with_progress", None)
    assert model_identity([model], tmp_path / "manifests") == first
    shutil.rmtree(tmp_path / "manifests")
    with pytest.raises(TypeError):
        model_identity([model], tmp_path / "manifests")


def test_no_torch_is_imported():
    code = "import sys, qwen_image.training.identity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2] / "scripts", check=True)


@pytest.mark.parametrize(
    "beside",
    [
        {"gradient_checkpointing": True},
        {"max_data_loader_n_workers": 1, "persistent_data_loader_workers": True},
        {
            "ddp_gradient_as_bucket_view": True,
            "save_every_n_steps": 1,
            "no_metadata": True,
            "vae": "v",
            "num_layers": 2,
        },
    ],
)
def test_settings_beside_the_result_change_no_weight(tiny, tmp_path, beside):
    assert beside.keys() <= BESIDE
    given = {"network_dim": 2, "network_dropout": 0.1, "save_precision": "float", "max_data_loader_n_workers": 0}
    found = [
        train(parse_arguments(tiny.flags(output_dir=tmp_path / name, **given | more)))
        for name, more in (("without", {}), ("with", beside))
    ]
    assert len({data_sha256(load_file(path)) for path in found}) == 1
