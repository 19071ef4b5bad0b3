"""Whole trainings of every kind of adapter, and what they start from."""

import pytest
from adapters import KIND_SETTINGS
from safetensors.torch import load_file
from training_data import write_tiny_training

from qwen_image.adapter.delta import change, kind_of
from qwen_image.adapter.options import MODULES
from qwen_image.adapter.tensors import by_module
from qwen_image.container import read_header
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.loop import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("kinds"))


def trained(tiny, folder, **arguments):
    """Train and return the LoRA's modules and its metadata."""
    flags = {"max_train_steps": 2, "save_precision": "fp32", "max_data_loader_n_workers": 0, "learning_rate": "1e-2"}
    train(parse_arguments(tiny.flags(output_dir=folder, **{**flags, **arguments})))
    path = folder / "lora.safetensors"
    return by_module(load_file(path)), read_header(path).metadata


def differences(first, second):
    """Return how far the changes of two adapters are apart, module by module."""
    assert first.keys() == second.keys()
    return {name: float((change(parts) - change(second[name])).norm()) for name, parts in first.items()}


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_every_kind_learns_and_goes_on_from_its_file(kind, tiny, tmp_path):
    modules, metadata = trained(tiny, tmp_path / "first", network_dim=3, network_alpha=2, **KIND_SETTINGS[kind])
    assert {kind_of(parts) for parts in modules.values()} == {kind}
    assert len(modules) == 24
    # the text's outputs of the last block go nowhere
    assert sum(bool(change(parts).any()) for parts in modules.values()) == 20
    assert metadata["ss_network_module"] == MODULES[kind]
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("3", 2)
    first = tmp_path / "first" / "lora.safetensors"
    again, metadata = trained(
        tiny, tmp_path / "second", network_weights=first, dim_from_weights=True, learning_rate="1e-9", max_train_steps=1
    )
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == (MODULES[kind], "3")
    assert max(differences(modules, again).values()) < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {"network_args": ["use_dora=True", "loraplus_lr_ratio=4"], "network_dropout": 0.3},
        {
            "network_module": "networks.loha", "network_args": ["rank_dropout=0.2", "module_dropout=0.2"],
            "scale_weight_norms": 0.5,
        },
        {"network_module": "networks.lokr", "network_args": ["module_dropout=0.2", "decompose_both=True"]},
    ],
    ids=["dora", "loha", "lokr"],
)  # fmt: skip
def test_going_on_equals_never_having_stopped(arguments, tiny, tmp_path):
    trained(tiny, tmp_path / "whole", max_train_steps=3, **arguments)
    for steps in (1, 3):
        trained(tiny, tmp_path / "parts", max_train_steps=steps, **arguments)
    whole, parts = ((tmp_path / name / "lora.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert len((tmp_path / "parts" / "lora.loss.csv").read_text().splitlines()) == 4


def test_loraplus_limits_and_a_merged_base_change_what_is_learnt(tiny, tmp_path):
    plain, _ = trained(tiny, tmp_path / "plain")
    plus, _ = trained(tiny, tmp_path / "plus", network_args=["loraplus_lr_ratio=16"])
    ups = [{name: parts["lora_up.weight"].norm() for name, parts in modules.items()} for modules in (plain, plus)]
    assert all(ups[1][name] > 4 * norm for name, norm in ups[0].items() if norm > 0)
    limited, _ = trained(tiny, tmp_path / "limited", network_args=["loraplus_lr_ratio=16"], scale_weight_norms="0.1")
    norms = {name: float(change(parts).norm()) for name, parts in plus.items()}
    assert max(norms.values()) > 0.2
    assert max(float(change(parts).norm()) for parts in limited.values()) <= 0.1 * 1.001
    base = tmp_path / "plus" / "lora.safetensors"
    on_top, _ = trained(tiny, tmp_path / "top", base_weights=[base, base], base_weights_multiplier=["3", "3"])
    assert max(differences(plain, on_top).values()) > 1e-3
    undone, _ = trained(tiny, tmp_path / "undone", base_weights=[base, base], base_weights_multiplier=["1", "-1"])
    assert max(differences(plain, undone).values()) < 1e-3
