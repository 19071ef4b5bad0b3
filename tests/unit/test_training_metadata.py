"""What a LoRA's own file says about how it was made, and that this is enough to make it again."""

import json
import os
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import toml
from training_data import TinyTraining, write_tiny_training

import qwen_image
from qwen_image.cache.fingerprint import fingerprint_metadata
from qwen_image.container import read_header, write_safetensors
from qwen_image.files import sha256_file
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.identity import inputs_digest, result_settings
from qwen_image.training.items import CacheFile
from qwen_image.training.loop import train
from qwen_image.training.provenance import PREFIX, _made_by
from qwen_image.training.schema import key_schemas

SECRETS = {"HF_TOKEN": "hf_plantedplantedplanted", "WANDB_API_KEY": "deadbeef" * 5}
MORE = {
    "max_train_steps": 2, "network_dim": 2, "max_data_loader_n_workers": 0, "lr_scheduler": "cosine",
    "optimizer_args": ["weight_decay=0.1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """In a folder whose name would show."""
    return write_tiny_training(tmp_path_factory.mktemp("secret place"), num_repeats=2)


def trained(tiny: TinyTraining, folder: Path, **more):
    return train(parse_arguments(tiny.flags(**MORE | {"output_dir": folder} | more)))


@pytest.fixture(scope="module")
def lora(tiny):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        return trained(tiny, tiny.folder / "models", vae="/elsewhere/secret/the_vae.safetensors")


def own(path):
    """The file's own keys, read."""
    metadata = read_header(path).metadata
    texts = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    return {key: value if key in ("version", "run") else json.loads(value) for key, value in texts.items()}


def test_versions_inputs_and_settings_stand_in_the_file(tiny, lora):
    ours = own(lora)
    assert ours["version"] == qwen_image.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", ours["version"])
    assert ours["software"].pop("python") + "." in platform.python_version()
    assert ours["software"] == {name: version(name) for name in ours["software"]}
    assert {"torch", "diffusers", "transformers", "peft", "accelerate"} <= ours["software"].keys()
    digest = inputs_digest(parse_arguments(tiny.flags()))
    assert ours["inputs"]["dit"] == digest["dit"]
    assert ours["inputs"]["latents_manifest"] == sha256_file(tiny.folder / "latents.tsv")
    assert ours["inputs"]["text_encoder_outputs_manifest"] == sha256_file(tiny.folder / "text.tsv")
    settings = ours["settings"]
    assert (settings["learning_rate"], settings["optimizer_args"]) == (1e-3, ["weight_decay=0.1"])
    assert (settings["dit"], settings["vae"], settings["output_name"]) == ("dit", "the_vae.safetensors", "lora")
    assert settings["mixed_precision"] == "no" and ours["num_processes"] == 1
    bearing = result_settings(parse_arguments(tiny.flags()))
    assert settings.keys() >= {key for key in bearing if "x-refused" not in key_schemas()[key]}
    assert ours["datasets"] == [
        {
            "resolution": [64, 64], "enable_bucket": True, "bucket_no_upscale": False, "caption_extension": ".txt",
            "batch_size": 2, "num_repeats": 2, "image_directory": "pictures", "cache_directory": "cache",
            "multiple_target": False, "no_resize_control": False, "alpha_background": "white",
            "multiple_captions": False, "loss_weight": 1.0,
        }
    ]  # fmt: skip


def test_no_path_and_no_secret_stands_in_any_file(tiny, lora):
    paths = [path for path in lora.parent.rglob("*") if path.is_file()]
    assert {"lora.safetensors", "lora.loss.csv", "state.json"} <= {path.name for path in paths}
    for path in paths:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path
        assert b"secret" not in content, path


def test_the_same_again_elsewhere_has_the_same_bytes(tiny, lora, tmp_path):
    """Where it is written and logged, and where the VAE lies, does not show."""
    again = trained(tiny, tmp_path / "other", vae="/another/place/the_vae.safetensors", logging_dir=tmp_path / "logs")
    assert again.read_bytes() == lora.read_bytes()
    table = "lora.loss.csv"
    assert again.with_name(table).read_bytes() == lora.with_name(table).read_bytes()


def test_the_file_alone_is_enough_to_make_it_again(tiny, lora, tmp_path):
    """The inputs are found by their hashes; all else is read from the file."""
    shutil.copytree(tiny.folder / "cache", tmp_path / "other cache")
    ours = own(lora)
    settings, inputs = ours["settings"], ours["inputs"]
    manifests = {sha256_file(path): path for path in tiny.folder.glob("*.tsv")}
    # a folder's last name is not enough to find it again, so the datasets get theirs from whoever has the inputs
    datasets = [table | {"cache_directory": str(tmp_path / "other cache")} for table in ours["datasets"]]
    (tmp_path / "dataset.toml").write_text(toml.dumps({"datasets": datasets}))
    paths = {
        "dataset_config": str(tmp_path / "dataset.toml"), "output_dir": str(tmp_path / "made again"),
        "dit": str(tiny.folder / settings["dit"]), "logging_dir": None,
        **{key: str(manifests[inputs[key]]) for key in ("latents_manifest", "text_encoder_outputs_manifest")},
    }  # fmt: skip
    chosen = {key: value for key, value in (settings | paths).items() if value is not None}
    (tmp_path / "train.toml").write_text(toml.dumps(chosen))
    again = train(parse_arguments(["--config_file", str(tmp_path / "train.toml"), "--max_data_loader_n_workers", "0"]))
    assert read_header(again).metadata["sshs_model_hash"] == read_header(lora).metadata["sshs_model_hash"]
    differing = {key for key, value in own(lora).items() if own(again)[key] != value} - {"run"}
    assert differing <= {"datasets", "settings"}
    assert own(again)["datasets"][0]["cache_directory"] == "other cache"


def test_without_metadata_nothing_of_it_is_there(tiny, tmp_path):
    path = trained(tiny, tmp_path, no_metadata=True, max_train_steps=1)
    assert own(path).keys() == {"run"}
    assert {key for key in read_header(path).metadata if key.startswith("ss_")} == {
        "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    }  # fmt: skip


def test_what_made_the_cache_is_told_and_no_item(tmp_path):
    parts = {"kind": "latents", "source": "s", "bucket": "64x64", "model": "m" * 64, "encoder": "2"}
    write_safetensors(tmp_path / "a", {}, fingerprint_metadata(parts))
    assert _made_by(CacheFile(os.fspath(tmp_path / "a"), "")) == {"kind": "latents", "model": "m" * 64, "encoder": "2"}
