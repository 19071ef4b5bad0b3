"""The program that converts a LoRA's file, and reading files that are none."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from adapters import adapted, fill
from convert_lora import main

from qwen_image.adapter.compare import distance, tolerance
from qwen_image.adapter.files import adapter_tensors, open_adapter, read_adapter, save_adapter
from qwen_image.adapter.schemes import scheme_of, to_kohya
from qwen_image.adapter.tensors import by_module
from qwen_image.container import read_header, write_safetensors
from qwen_image.problems import InputError
from qwen_image.training.metadata import with_hashes

METADATA = {
    "ss_network_dim": "4", "ss_network_alpha": "3", "ss_network_module": "networks.lora_qwen_image",
    "modelspec.title": "mine", "qwen_image.run": "digest",
}  # fmt: skip


def write_lora(path, kind="lora", precision="bf16"):
    transformer, _ = adapted(kind, network_alpha=3)
    fill(transformer)
    save_adapter(path, adapter_tensors(transformer, precision=precision), METADATA)
    return path


def convert(source, target, output="converted.safetensors"):
    path = source.with_name(output)
    assert main(["--input", str(source), "--output", str(path), "--target", target]) == 0
    return path


@pytest.mark.parametrize("target, scheme", [
    ("diffusers", "diffusers"), ("diffusion_model", "diffusion_model"), ("other", "diffusion_model"),
    ("kohya", "kohya"), ("default", "kohya"),
])  # fmt: skip
def test_there_and_back(tmp_path, target, scheme):
    source = write_lora(tmp_path / "lora.safetensors")
    there = convert(source, target)
    assert scheme_of(read_adapter(there)) == scheme
    back = convert(there, "default", "back.safetensors")
    first, again = by_module(read_adapter(source)), by_module(read_adapter(back))
    assert first.keys() == again.keys()
    assert all(distance(parts, again[name]) <= tolerance(parts, again[name]) for name, parts in first.items())
    if scheme != "diffusers":
        assert (
            back.read_bytes()[read_header(back).data_start :] == source.read_bytes()[read_header(source).data_start :]
        )


@pytest.mark.parametrize("target, alpha", [("diffusers", "4"), ("other", "3"), ("kohya", "3")])
def test_metadata_is_kept_and_nothing_in_it_is_stale(tmp_path, target, alpha):
    source = write_lora(tmp_path / "lora.safetensors")
    there = convert(source, target)
    header = read_header(there)
    own = {key: value for key, value in header.metadata.items() if not key.startswith("sshs_")}
    assert own == {**{key: METADATA[key] for key in METADATA if key != "qwen_image.run"}, "ss_network_alpha": alpha}
    data = there.read_bytes()[header.data_start :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    legacy = with_hashes(open_adapter(there).tensors, own)["sshs_legacy_hash"]
    assert header.metadata["sshs_legacy_hash"] == legacy


def test_an_alpha_in_the_metadata_moves_to_the_tensors(tmp_path):
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(4, 8),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(8, 4),
    }
    config = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})
    write_safetensors(tmp_path / "peft.safetensors", tensors, {"lora_adapter_metadata": config})
    there = convert(tmp_path / "peft.safetensors", "kohya")
    assert read_adapter(there)["lora_unet_transformer_blocks_0_attn_to_q.alpha"] == 8
    assert "lora_adapter_metadata" not in read_header(there).metadata
    folded = read_adapter(convert(tmp_path / "peft.safetensors", "diffusers"))
    up, down = (folded[f"transformer.transformer_blocks.0.attn.to_q.lora_{letter}.weight"] for letter in "BA")
    torch.testing.assert_close(up @ down, 2 * tensors[next(reversed(tensors))] @ tensors[next(iter(tensors))])


@pytest.mark.parametrize("config", ["no json", "[1]", "{}", '{"transformer.lora_alpha": "many"}'])
def test_a_config_in_the_metadata_that_cannot_be_read(tmp_path, config):
    tensors = {"transformer.proj_out.lora_A.weight": torch.ones(4, 8)}
    write_safetensors(tmp_path / "peft.safetensors", tensors, {"lora_adapter_metadata": config})
    with pytest.raises(InputError, match="lora_adapter_metadata: holds no config of peft that has an alpha"):
        read_adapter(tmp_path / "peft.safetensors")


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_kinds_keep_every_bit(tmp_path, kind):
    source = write_lora(tmp_path / "lora.safetensors", kind)
    there = convert(source, "other")
    first, again = read_adapter(source), to_kohya(read_adapter(there))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_diffusers_cannot_hold_every_kind(tmp_path):
    source = write_lora(tmp_path / "lora.safetensors", "loha")
    with pytest.raises(InputError, match=r"lora.safetensors: this scheme holds LoRA and DoRA only"):
        convert(source, "diffusers")
    assert not (tmp_path / "converted.safetensors").exists()


@pytest.mark.parametrize("name", ["lora.safetensors", "./x/../lora.safetensors", "link.safetensors"])
def test_the_input_is_never_written_over(tmp_path, name):
    source = write_lora(tmp_path / "lora.safetensors")
    (tmp_path / "x").mkdir()
    os.symlink(source, tmp_path / "link.safetensors")
    before = source.read_bytes()
    with pytest.raises(InputError, match="is the input itself"):
        main(["--input", str(source), "--output", f"{tmp_path}/{name}", "--target", "other"])
    assert source.read_bytes() == before


def test_equal_inputs_give_equal_bytes(tmp_path):
    source = write_lora(tmp_path / "lora.safetensors")
    assert convert(source, "other").read_bytes() == convert(source, "other", "again.safetensors").read_bytes()


def _damaged(folder: Path) -> dict[str, bytes]:
    whole = write_lora(folder / "whole.safetensors").read_bytes()
    return {
        "truncated": whole[:-1], "empty": b"", "pickle": pickle.dumps({"a": [1, 2]}), "short": whole[:100],
    }  # fmt: skip


@pytest.mark.parametrize(
    "what, found", [
        ("truncated", "truncated: "), ("empty", "an empty file, not safetensors"), ("short", "truncated: "),
        ("pickle", "a Python pickle, which can run code when it is read, not safetensors"),
    ],
)  # fmt: skip
def test_files_that_are_no_adapter(tmp_path, what, found):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(_damaged(tmp_path)[what])
    with pytest.raises(InputError, match=found):
        read_adapter(file)


def test_no_file_a_folder_and_no_tensors(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read .No such file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"cannot be read .Is a directory"):
        read_adapter(tmp_path)
    write_safetensors(tmp_path / "nothing.safetensors", {})
    with pytest.raises(InputError, match="holds no tensors"):
        convert(tmp_path / "nothing.safetensors", "kohya")
