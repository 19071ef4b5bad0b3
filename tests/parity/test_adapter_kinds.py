"""What peft computes with an adapter is what the tensors of its file mean by the field's formulas."""

import pytest
import torch
from adapters import KIND_SETTINGS, adapted, fill, inputs
from peft.tuners.lokr.layer import factorization
from training_data import tiny_transformer

from qwen_image.adapter.delta import change, kind_of, merged
from qwen_image.adapter.initial import divisors
from qwen_image.adapter.network import trainable_parameters
from qwen_image.adapter.tensors import adapted_layers, by_module, load_tensors, module_name, named_tensors


@pytest.mark.parametrize("name", KIND_SETTINGS)
def test_forward_is_the_merged_weight(name):
    transformer, network = adapted(name)
    fill(transformer)
    parts = by_module(named_tensors(transformer))
    assert len(parts) == len(network.targets) == 12
    for path, layer in adapted_layers(transformer):
        mine = parts[module_name(path)]
        assert kind_of(mine) == network.kind == name.split()[0]
        weight, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = layer(x)
        torch.testing.assert_close(theirs, x @ merged(weight, mine).T + bias, rtol=1e-4, atol=1e-4)
        assert (theirs - layer.get_base_layer()(x)).abs().max() > 0.1
        if network.kind != "dora":
            torch.testing.assert_close(layer.get_delta_weight("default"), change(mine), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KIND_SETTINGS)
def test_tensors_put_into_another_adapter_make_it_the_same(name):
    transformer, _ = adapted(name)
    fill(transformer)
    tensors = named_tensors(transformer)
    other, _ = adapted(name.split()[0], network_dim=2, network_alpha=7)
    load_tensors(other, tensors)
    again = named_tensors(other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    layers = dict(adapted_layers(other))
    for path, layer in adapted_layers(transformer):
        x = torch.randn(3, layer.get_base_layer().weight.shape[1], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(layer(x), layers[path](x))


@pytest.mark.parametrize("dimension", [64, 127, 128, 360, 3072, 12288, 18432])
@pytest.mark.parametrize("factor", [-1, 1, 2, 7, 8, 16, 50])
def test_factors_of_a_dimension(dimension, factor):
    # peft gives the factor first even where it is the larger one
    assert divisors(dimension, factor) == tuple(sorted(factorization(dimension, factor)))


def test_a_merged_dora_has_the_rows_lengths():
    weight = tiny_transformer(layers=1).transformer_blocks[0].attn.to_q.weight.detach()
    down, up = torch.randn(2, 128), torch.randn(128, 2)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": torch.rand(128, 1) + 0.5}
    by_rows = merged(weight, parts)
    assert torch.allclose(by_rows.norm(dim=1), parts["dora_scale"][:, 0], atol=1e-5)
    by_columns = merged(weight, {**parts, "dora_scale": parts["dora_scale"].T})
    assert torch.allclose(by_columns.norm(dim=0), parts["dora_scale"][:, 0], atol=1e-5)
    assert torch.allclose(merged(weight, parts, 0.5), weight + 0.5 * (by_rows - weight), atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "loha", "lokr"])
def test_blocks_computed_twice_drop_the_same(name):
    """With gradient checkpointing, in bf16: the second pass sees the first one's dropouts."""
    args = [] if name == "dora" else ["rank_dropout=0.3", "module_dropout=0.3"]
    gradients = []
    for checkpointing in (False, True):
        transformer, _ = adapted(name, network_args=args, network_dropout=0.0 if args else 0.3)
        fill(transformer)
        transformer.train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            transformer(**inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(transformer)])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)
    learning = [gradient for gradient in gradients[0] if gradient is not None and gradient.any()]
    assert learning and all(gradient.isfinite().all() for gradient in learning)
