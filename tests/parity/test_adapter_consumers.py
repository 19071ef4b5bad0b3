"""Adapter files as diffusers' own loader reads them: the same weights, and the same pictures, as in training."""

import json

import pytest
import torch
from adapters import adapted, fill, inputs
from diffusers.loaders import QwenImageLoraLoaderMixin
from training_data import tiny_transformer

from qwen_image.adapter.compare import distance
from qwen_image.adapter.files import adapter_tensors, read_adapter, save_adapter
from qwen_image.adapter.schemes import CONVERSIONS, to_diffusers, to_kohya
from qwen_image.adapter.tensors import by_module
from qwen_image.container import write_safetensors


def load_in_diffusers(file):
    """Return a fresh tiny transformer with the file loaded as the pipeline loads it."""
    transformer = tiny_transformer(layers=1)
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, transformer, adapter_name="loaded", metadata=metadata)
    return transformer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("alpha", [1, 2, 3, 0.3, 50])
def test_names_and_bits_are_those_that_diffusers_makes_of_kohya_s(tmp_path, precision, alpha):
    transformer, _ = adapted("lora", network_alpha=alpha, network_args=["include_patterns=['.*_mod.*']"])
    fill(transformer)
    tensors = adapter_tensors(transformer, precision=precision)
    save_adapter(tmp_path / "lora.safetensors", tensors, {})
    theirs = QwenImageLoraLoaderMixin.lora_state_dict(str(tmp_path / "lora.safetensors"))
    ours = to_diffusers(tensors)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 14
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "kind, scheme",
    [("lora", "kohya"), ("lora", "diffusers"), ("lora", "diffusion_model"), ("dora", "diffusers")],
)
def test_the_loaded_model_computes_what_the_trained_one_does(tmp_path, kind, scheme):
    transformer, _ = adapted(kind, network_alpha=3)
    fill(transformer)
    file = tmp_path / "lora.safetensors"
    save_adapter(file, CONVERSIONS[scheme](adapter_tensors(transformer, precision="fp32")), {})
    with torch.no_grad():
        theirs = load_in_diffusers(file)(**inputs()).sample
        torch.testing.assert_close(theirs, transformer(**inputs()).sample, rtol=1e-4, atol=1e-4)
        assert (theirs - tiny_transformer(layers=1)(**inputs()).sample).abs().max() > 0.05


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_an_alpha_in_diffusers_metadata_is_read_as_diffusers_reads_it(tmp_path, rank_stabilised):
    transformer, network = adapted("lora")
    fill(transformer)
    tensors = to_diffusers(adapter_tensors(transformer, precision="fp32"))
    config = {
        "r": 4, "lora_alpha": 6, "alpha_pattern": {"attn.to_q": 3}, "use_rslora": rank_stabilised,
        "target_modules": network.targets,
    }  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    write_safetensors(tmp_path / "lora.safetensors", tensors, metadata)
    ours = by_module(to_kohya(read_adapter(tmp_path / "lora.safetensors")))
    layers = load_in_diffusers(tmp_path / "lora.safetensors").transformer_blocks[0].attn
    for name in ("to_q", "to_k"):
        layer = getattr(layers, name)
        theirs = {
            "lora_down.weight": layer.lora_A["loaded"].weight.detach(),
            "lora_up.weight": layer.lora_B["loaded"].weight.detach(),
            "alpha": torch.tensor(layer.scaling["loaded"] * 4),
        }
        assert distance(theirs, ours[f"lora_unet_transformer_blocks_0_attn_{name}"]) < 1e-6
    assert layers.to_q.scaling["loaded"] != layers.to_k.scaling["loaded"] != 1
