"""The adapter: which modules, how it starts, that the base stays as it is, and the names in the file."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from training_data import HIDDEN_SIZE, tiny_transformer

from qwen_image.adapter.files import lora_tensors
from qwen_image.adapter.network import add_adapter, effective_alpha, lora_layers, trainable_parameters
from qwen_image.problems import InputError
from qwen_image.training.key_values import target_patterns

FIELD = json.loads((Path(__file__).parents[1] / "data" / "lora_2_blocks_rank_16.json").read_text())["tensors"]
MODULATION = ["include_patterns=['.*_mod.*']"]


def adapt(transformer, network_args=None, rank=16, alpha=1, dropout=0.0, seed=42):
    patterns = target_patterns(network_args)
    return add_adapter(transformer, rank=rank, alpha=alpha, dropout=dropout, patterns=patterns, seed=seed)


@pytest.mark.parametrize(("network_args", "modules"), [(MODULATION, 14), (None, 12)])
def test_names_and_shapes_are_the_field_s(network_args, modules):
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=2)
    assert len(adapt(transformer, network_args)) == 2 * modules
    ours = {name: list(tensor.shape) for name, tensor in lora_tensors(transformer, precision="fp32").items()}
    wanted = {name: entry["shape"] for name, entry in FIELD.items() if modules == 14 or "_mod_" not in name}
    assert ours == wanted
    assert len(ours) == 2 * 3 * modules


@pytest.mark.parametrize(
    ("network_args", "count"),
    [
        (["exclude_patterns=['.*mlp.*']"], 16),
        (["exclude_patterns=['.*']", r"include_patterns=['.*\.attn\.to_q']"], 2),
        (["exclude_patterns=['attn']"], 24),  # whole paths are matched
        ([r"exclude_patterns=['transformer_blocks\.0\..*']"], 12),
    ],
)
def test_patterns_do_what_they_say(network_args, count):
    transformer = tiny_transformer()
    assert len(adapt(transformer, network_args)) == count
    assert len(list(lora_layers(transformer))) == count


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="exclude every module"):
        adapt(tiny_transformer(), ["exclude_patterns=['.*']"])


def test_starts_as_identity_with_the_base_frozen_and_the_adapter_in_float32():
    transformer = tiny_transformer().bfloat16()
    base = {name for name, _ in transformer.named_parameters()}
    inputs = {
        "hidden_states": torch.randn(1, 4, 64).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 3, HIDDEN_SIZE).bfloat16(),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 2)]],
    }
    before = transformer(**inputs).sample
    adapt(transformer, rank=4)
    with torch.autocast("cpu", torch.bfloat16):
        after = transformer(**inputs).sample
    assert torch.allclose(before, after, atol=0.05)
    trainable = trainable_parameters(transformer)
    assert len(trainable) == 2 * 24
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    assert sum(name.replace(".base_layer", "") in base for name, _ in transformer.named_parameters()) == len(base)


def test_initial_values():
    def start(seed, network_args=None, dtype=torch.float32):
        transformer = tiny_transformer().to(dtype)
        adapt(transformer, network_args, seed=seed)
        return lora_tensors(transformer, precision="fp32")

    first = start(1)
    for name, tensor in first.items():
        if name.endswith("lora_down.weight"):
            bound = 1 / math.sqrt(tensor.shape[1])  # Kaiming-uniform with a = sqrt(5)
            assert 0.9 * bound < tensor.abs().max() <= bound
        elif name.endswith("lora_up.weight"):
            assert not tensor.any()
    again, other = start(1, MODULATION, torch.bfloat16), start(2)
    # neither the base's dtype nor the other modules change how a module starts
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    name = "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"
    assert not torch.equal(first[name], other[name])


def test_alpha():
    assert effective_alpha(0, 16) == effective_alpha(None, 16) == 16
    assert effective_alpha(8.0, 16) == 8.0
    transformer = tiny_transformer()
    adapt(transformer, rank=16, alpha=8.0)
    assert {layer.scaling["default"] for _, layer in lora_layers(transformer)} == {0.5}
    alphas = {float(t) for name, t in lora_tensors(transformer, precision="bf16").items() if name.endswith(".alpha")}
    assert alphas == {8.0}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float", torch.float32), ("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_save_precision_holds_for_every_tensor(precision, dtype):
    transformer = tiny_transformer(layers=1)
    adapt(transformer)
    assert {tensor.dtype for tensor in lora_tensors(transformer, precision=precision).values()} == {dtype}
