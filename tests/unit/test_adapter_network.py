"""The adapter: which modules, how it starts, that the base stays as it is, and the names in the file."""

import json
import math
from pathlib import Path

import pytest
import torch
from adapters import KIND_SETTINGS, adapted, fill, inputs, settings
from diffusers import QwenImageTransformer2DModel
from training_data import tiny_transformer

from qwen_image.adapter.delta import change
from qwen_image.adapter.network import add_adapter, parameter_groups, trainable_parameters
from qwen_image.adapter.norms import limit_weight_norms
from qwen_image.adapter.tensors import adapted_layers, by_module, named_tensors
from qwen_image.container import data_sha256
from qwen_image.problems import InputError

FIELD = json.loads((Path(__file__).parents[1] / "data" / "lora_2_blocks_rank_16.json").read_text())["tensors"]
MODULATION = ["include_patterns=['.*_mod.*']"]
TO_Q = "lora_unet_transformer_blocks_0_attn_to_q"


@pytest.mark.parametrize(("network_args", "modules"), [(MODULATION, 14), (None, 12)])
def test_names_and_shapes_are_the_field_s(network_args, modules):
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=2)
    network = add_adapter(transformer, settings(network_dim=16, network_args=network_args))
    assert len(network.targets) == 2 * modules
    ours = {name: list(tensor.shape) for name, tensor in named_tensors(transformer).items()}
    wanted = {name: entry["shape"] for name, entry in FIELD.items() if modules == 14 or "_mod_" not in name}
    assert ours == wanted
    assert len(ours) == 2 * 3 * modules


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("dora", {"lora_down.weight": (4, 128), "lora_up.weight": (512, 4), "dora_scale": (512, 1)}),
        (
            "loha",
            {"hada_w1_a": (512, 4), "hada_w1_b": (4, 128), "hada_w2_a": (512, 4), "hada_w2_b": (4, 128)},
        ),
        ("lokr", {"lokr_w1": (4, 4), "lokr_w2_a": (128, 4), "lokr_w2_b": (4, 32)}),
        ("lokr of equal factors", {"lokr_w1": (16, 8), "lokr_w2_a": (32, 4), "lokr_w2_b": (4, 16)}),
        (
            "lokr of products",
            {"lokr_w1_a": (16, 4), "lokr_w1_b": (4, 8), "lokr_w2_a": (32, 4), "lokr_w2_b": (4, 16)},
        ),
    ],
)
def test_shapes_of_the_other_kinds(name, shapes):
    """Of a module with 128 inputs and 512 outputs."""
    transformer, _ = adapted(name)
    parts = by_module(named_tensors(transformer))["lora_unet_transformer_blocks_0_img_mlp_net_0_proj"]
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == {**shapes, "alpha": ()}
    assert float(parts["alpha"]) == 2


def test_a_lokr_of_high_rank_is_whole_and_not_scaled():
    transformer, network = adapted("lokr of whole factors", network_alpha=1)
    assert (network.rank, network.alpha) == (64, 1)
    for parts in by_module(named_tensors(transformer)).values():
        assert parts.keys() == {"lokr_w1", "lokr_w2", "alpha"}
        assert float(parts["alpha"]) == 64  # as the field writes it, which stands for a scale of 1
    assert {layer.scaling["default"] for _, layer in adapted_layers(transformer)} == {1.0}


@pytest.mark.parametrize(
    ("network_args", "count"),
    [
        (["exclude_patterns=['.*mlp.*']"], 16),
        (["exclude_patterns=['.*']", r"include_patterns=['.*\.attn\.to_q']"], 2),
        (["exclude_patterns=['attn']"], 24),  # whole paths are matched
        ([r"exclude_patterns=['transformer_blocks\.0\..*']"], 12),
    ],
)
@pytest.mark.parametrize("name", ["lora", "lokr"])
def test_patterns_do_what_they_say(name, network_args, count):
    transformer, network = adapted(name, layers=2, network_args=network_args)
    assert [path for path, _ in adapted_layers(transformer)] == network.targets
    assert len(network.targets) == count


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="exclude every module"):
        adapted("lora", network_args=["exclude_patterns=['.*']"])


@pytest.mark.parametrize("name", KIND_SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_exactly_nothing_with_the_base_frozen_and_the_adapter_in_float32(name, dtype):
    transformer = tiny_transformer(layers=1).to(dtype).train()
    base = {key for key, _ in transformer.named_parameters()}
    # training computes in bf16 with a bf16 base
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast, torch.no_grad():
        before = transformer(**inputs(dtype)).sample
    add_adapter(transformer, settings(**KIND_SETTINGS[name]))
    with autocast:
        after = transformer(**inputs(dtype)).sample
    assert torch.equal(before, after)
    after.square().mean().backward()
    trainable = trainable_parameters(transformer)
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    # 8 of the 12 modules learn something from the first step on: of the last block the text's outputs go nowhere
    learning = [parameter for parameter in trainable if parameter.grad is not None and parameter.grad.any()]
    assert len(learning) >= 8
    assert all(parameter.grad.isfinite().all() for parameter in learning)
    adapter = {id(parameter) for parameter in trainable}
    for key, parameter in transformer.named_parameters():
        assert parameter.requires_grad == (id(parameter) in adapter) == (key.replace(".base_layer", "") not in base)


def test_a_lora_starts_as_ever():
    """Bit for bit: files trained before and a training that goes on rely on it."""
    transformer = tiny_transformer()
    add_adapter(transformer, settings(network_dim=16, network_alpha=1))
    digest = data_sha256(named_tensors(transformer))
    assert digest == "6f5070f8230c23802224e7515cdcf5506082e640b04a3377f4d806d2b2698c3c"


@pytest.mark.parametrize("name", KIND_SETTINGS)
def test_initial_values_depend_on_seed_and_module_alone(name):
    def start(seed, network_args=None, dtype=torch.float32):
        transformer = tiny_transformer(layers=1).to(dtype)
        values = {**KIND_SETTINGS[name], "seed": seed}
        values["network_args"] = [*values.get("network_args", []), *(network_args or [])]
        add_adapter(transformer, settings(**values))
        return {key: tensor for key, tensor in named_tensors(transformer).items() if "dora_scale" not in key}

    first = start(1)
    again, other = start(1, MODULATION, torch.bfloat16), start(2)
    # neither the base's dtype nor the other modules change how a module starts
    assert len(again) > len(first)
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    drawn = [key for key, tensor in first.items() if tensor.ndim == 2 and tensor.any()]
    assert drawn and not any(torch.equal(first[key], other[key]) for key in drawn)


def test_initial_values_have_the_field_s_spread():
    for key, tensor in named_tensors(adapted("lora", network_dim=16)[0]).items():
        if key.endswith("lora_down.weight"):
            bound = 1 / math.sqrt(tensor.shape[1])  # Kaiming-uniform with a = sqrt(5)
            assert 0.9 * bound < tensor.abs().max() <= bound
        elif key.endswith("lora_up.weight"):
            assert not tensor.any()
    loha = by_module(named_tensors(adapted("loha")[0]))[TO_Q]
    assert 0.08 < loha["hada_w1_a"].std() < 0.12
    assert 0.85 < loha["hada_w1_b"].std() < 1.15
    assert not loha["hada_w2_a"].any()


def test_alpha():
    transformer, network = adapted("lora", network_dim=16, network_alpha=8)
    assert (network.kind, network.rank, network.alpha) == ("lora", 16, 8)
    assert {layer.scaling["default"] for _, layer in adapted_layers(transformer)} == {0.5}
    alphas = {float(tensor) for key, tensor in named_tensors(transformer).items() if key.endswith(".alpha")}
    assert alphas == {8.0}
    assert adapted("lora", network_dim=16, network_alpha=0)[1].alpha == 16


def test_groups_of_the_optimizer():
    transformer, _ = adapted("dora")
    (group,) = parameter_groups(transformer, settings())
    assert group["params"] == trainable_parameters(transformer)
    assert group["lr_ratio"] == 1.0
    plus = settings(network_args=["use_dora=True", "loraplus_lr_ratio=16"])
    plain, up = parameter_groups(transformer, plus)
    assert (plain["lr_ratio"], up["lr_ratio"]) == (1.0, 16.0)
    assert len(plain["params"]) == 24
    assert {id(parameter) for parameter in up["params"]} == {
        id(layer.lora_B["default"].weight) for _, layer in adapted_layers(transformer)
    }


@pytest.mark.parametrize("name", [name for name in KIND_SETTINGS if name != "dora"])
def test_a_change_above_the_limit_is_scaled_down_to_it(name):
    transformer, _ = adapted(name)
    fill(transformer)
    before = by_module(named_tensors(transformer))
    norms = {module: change(parts).norm() for module, parts in before.items()}
    limit = float(torch.stack(list(norms.values())).median()) * 1.001
    above = [module for module, norm in norms.items() if norm > limit]
    assert 0 < len(above) < 12
    assert limit_weight_norms(transformer, limit) == len(above)
    for module, parts in by_module(named_tensors(transformer)).items():
        if module in above:
            # the direction stays
            wanted = change(before[module]) * (limit / norms[module])
            torch.testing.assert_close(change(parts), wanted, rtol=1e-4, atol=1e-5)
        else:
            assert all(torch.equal(tensor, before[module][part]) for part, tensor in parts.items())
    # a fresh adapter's change has no size at all
    assert limit_weight_norms(adapted(name)[0], 1.0) == 0


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_dropouts_of_rows_and_modules(name):
    transformer, _ = adapted(name, network_args=["rank_dropout=0.5"])
    fill(transformer)
    layer = dict(adapted_layers(transformer))["transformer_blocks.0.attn.to_q"].train()
    x = torch.eye(128)
    with torch.no_grad():
        changed = layer(x) - layer.get_base_layer()(x)
    kept = changed.abs().sum(0) > 1e-3
    assert 0.3 < kept.float().mean() < 0.7
    # what stays makes up for what goes
    torch.testing.assert_close(
        changed.T[kept], layer.get_delta_weight("default")[kept] / kept.float().mean(), rtol=1e-3, atol=1e-3
    )
    transformer, _ = adapted(name, network_args=["module_dropout=0.999999"])
    fill(transformer)
    layer = dict(adapted_layers(transformer))["transformer_blocks.0.attn.to_q"].train()
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert not torch.equal(layer.eval()(x), layer.get_base_layer()(x))


def test_neuron_dropout():
    for name in ("lora", "dora"):
        transformer, _ = adapted(name, network_dropout=0.25)
        assert {layer.lora_dropout["default"].p for _, layer in adapted_layers(transformer)} == {0.25}


def test_modules_are_not_dropped_where_processes_wait_for_all_gradients(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="module_dropout does not work with several processes"):
        adapted("loha", network_args=["module_dropout=0.1"])
    adapted("loha", network_args=["rank_dropout=0.1"])
