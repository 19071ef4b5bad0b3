"""Files that a training starts from: as the adapter (network_weights) or in the base (base_weights)."""

import pickle
import re

import pytest
import torch
from adapters import KIND_SETTINGS, adapted, fill, inputs, settings
from training_data import tiny_transformer

from qwen_image.adapter.network import add_adapter
from qwen_image.adapter.schemes import to_diffusers, to_diffusion_model
from qwen_image.adapter.tensors import adapted_layers, named_tensors
from qwen_image.adapter.weights import check_weight_files, merge_base_weights
from qwen_image.container import write_safetensors
from qwen_image.problems import InputError

TO_Q = "lora_unet_transformer_blocks_0_attn_to_q"


def save(folder, tensors, name="start.safetensors"):
    write_safetensors(folder / name, {key: tensor.contiguous() for key, tensor in tensors.items()})
    return str(folder / name)


def trained(name, *, seed=0, **values):
    """Return the tensors of a trained adapter and what the model with it computes."""
    transformer, _ = adapted(name, **values)
    fill(transformer, seed)
    with torch.no_grad():
        return named_tensors(transformer), transformer(**inputs()).sample


def start(name, file, **values):
    return adapted(name, network_weights=file, **values)


@pytest.mark.parametrize("name", KIND_SETTINGS)
def test_goes_on_from_a_file(name, tmp_path):
    tensors, output = trained(name)
    transformer, _ = start(name, save(tmp_path, tensors), seed=7)
    again = named_tensors(transformer)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    with torch.no_grad():
        assert torch.equal(transformer(**inputs()).sample, output)


@pytest.mark.parametrize("name", KIND_SETTINGS)
def test_takes_everything_from_a_file(name, tmp_path):
    tensors, output = trained(name, network_dim=3, network_alpha=5, network_args=["include_patterns=['.*_mod.*']"])
    file = save(tmp_path, tensors)
    transformer = tiny_transformer(layers=1)
    values = {"network_weights": file, "dim_from_weights": True, "network_dim": None, "network_alpha": None}
    network = add_adapter(transformer, settings(**values))
    assert (network.kind, network.rank, network.alpha) == (name.split()[0], 3, 5)
    assert len(network.targets) == 14
    again = named_tensors(transformer)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    with torch.no_grad():
        assert torch.equal(transformer(**inputs()).sample, output)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_files_in_other_namings_are_read(name, tmp_path):
    tensors, output = trained(name)
    for scheme, rename in (("diffusers", to_diffusers), ("diffusion_model", to_diffusion_model)):
        file = save(tmp_path, rename(tensors), f"{scheme}.safetensors")
        # alpha is in the matrices of the first, which then counts as the rank
        transformer, _ = start(name, file, network_alpha=4 if scheme == "diffusers" else 2)
        base = tiny_transformer(layers=1)
        merge_base_weights(base, settings(base_weights=[file]))
        with torch.no_grad():
            torch.testing.assert_close(transformer(**inputs()).sample, output, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(base(**inputs()).sample, output, rtol=1e-3, atol=1e-3)


def test_a_lokr_of_whole_factors_has_the_rank_that_its_alpha_says(tmp_path):
    tensors, _ = trained("lokr of whole factors")
    transformer = tiny_transformer(layers=1)
    network = add_adapter(
        transformer,
        settings(network_weights=save(tmp_path, tensors), dim_from_weights=True, network_dim=None, network_alpha=None),
    )
    assert (network.rank, network.alpha) == (64, 64)
    assert {layer.scaling["default"] for _, layer in adapted_layers(transformer)} == {1.0}


def test_modules_of_a_file_may_differ_in_rank_and_alpha(tmp_path):
    tensors, _ = trained("lora")
    down, up = f"{TO_Q}.lora_down.weight", f"{TO_Q}.lora_up.weight"
    tensors |= {down: torch.ones(6, 128), up: torch.ones(128, 6), f"{TO_Q}.alpha": torch.tensor(3.0)}
    del tensors["lora_unet_transformer_blocks_0_attn_to_k.alpha"]  # stands for the rank
    transformer = tiny_transformer(layers=1)
    network = add_adapter(
        transformer, settings(network_weights=save(tmp_path, tensors), dim_from_weights=True, network_alpha=None)
    )
    assert (network.rank, network.alpha) == (4, 2)
    layers = dict(adapted_layers(transformer))
    assert layers["transformer_blocks.0.attn.to_q"].scaling["default"] == 0.5
    assert layers["transformer_blocks.0.attn.to_k"].scaling["default"] == 1.0
    assert torch.equal(
        layers["transformer_blocks.0.attn.to_q"].get_delta_weight("default"), torch.full((128, 128), 3.0)
    )


def test_modules_that_the_file_lacks_start_anew(tmp_path):
    tensors, _ = trained("lora")
    fresh = named_tensors(adapted("lora")[0])
    part = {key: tensor for key, tensor in tensors.items() if key.startswith(TO_Q)}
    again = named_tensors(start("lora", save(tmp_path, part))[0])
    assert all(torch.equal(tensor, part.get(key, fresh[key])) for key, tensor in again.items())


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        (("lora", {}), ("loha", {}), "is a LoRA, the settings say LoHa"),
        (("lora", {}), ("dora", {}), "is a LoRA, the settings say DoRA"),
        (("lora", {"network_dim": 8}), ("lora", {}), "network_dim: has modules of rank 8, the settings say 4"),
        (("lora", {"network_alpha": 8}), ("lora", {}), "network_alpha: has an alpha of 8, the settings say 2"),
        (("lokr", {}), ("lokr of equal factors", {}), "has factors of other sizes"),
        (
            ("lora", {"network_args": ["include_patterns=['.*_mod.*']"]}), ("lora", {}),
            "network_args: has modules that the settings leave out: transformer_blocks.0.img_mod.1",
        ),
    ],
)  # fmt: skip
def test_a_file_of_other_settings_is_refused(made, asked, message, tmp_path):
    tensors, _ = trained(made[0], **made[1])
    with pytest.raises(InputError, match="set dim_from_weights") as error:
        start(asked[0], save(tmp_path, tensors), **asked[1])
    assert message in str(error.value)
    assert "start.safetensors" in str(error.value)


def test_a_file_in_bf16_may_round_its_alpha(tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in trained("lora", network_alpha=0.3)[0].items()}
    transformer, _ = start("lora", save(tmp_path, tensors), network_alpha=0.3)
    assert {float(tensor) for key, tensor in named_tensors(transformer).items() if "alpha" in key} == {
        float(torch.tensor(0.3))
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network_module": "networks.loha"}, "network_module asks for another kind"),
        ({"network_args": ["loraplus_lr_ratio=4"]}, "loraplus_lr_ratio is not supported"),
        ({"network_dropout": 0.1}, "LoKr has no inputs"),
    ],
)
def test_settings_that_the_file_s_kind_does_not_have(values, message, tmp_path):
    file = save(tmp_path, trained("lokr")[0])
    with pytest.raises(InputError, match=re.escape(message)):
        add_adapter(tiny_transformer(layers=1), settings(network_weights=file, dim_from_weights=True, **values))


def spoilt(change):
    """Return a trained LoRA's tensors after a change."""
    tensors, _ = trained("lora")
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{TO_Q}9.alpha": torch.ones(())}), f"not have: {TO_Q}9"),
        (lambda t: t.update({f"{TO_Q}.diff": torch.ones(2)}), "is no LoRA, DoRA, LoHa or LoKr"),
        (lambda t: t.pop(f"{TO_Q}.lora_up.weight"), "is no LoRA"),
        (lambda t: t.update({f"{TO_Q}.lora_up.weight": torch.ones(64, 4)}), "shapes that do not fit"),
        (lambda t: t.update({f"{TO_Q}.lora_up.weight": torch.ones(128, 5)}), "shapes that do not fit"),
        (lambda t: t.update({f"{TO_Q}.alpha": torch.ones(2)}), "shapes that do not fit"),
        (lambda t: t.update({f"{TO_Q}.alpha": torch.tensor(float("nan"))}), "no numbers"),
        (lambda t: t.update({f"{TO_Q}.alpha": torch.tensor(0.0)}), "is 0 or less"),
        (lambda t: t[f"{TO_Q}.lora_up.weight"].fill_(float("inf")), "no numbers"),
    ],
)  # fmt: skip
def test_a_spoilt_file_is_refused(change, message, tmp_path):
    file = save(tmp_path, spoilt(change))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        start("lora", file)
    assert file in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "lora.ckpt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 3)
    files = [str(tmp_path / name) for name in ("lora.ckpt", "cut.safetensors", "missing.safetensors")]
    for check in (check_weight_files, lambda given: merge_base_weights(tiny_transformer(layers=1), given)):
        with pytest.raises(InputError) as error:
            check(settings(base_weights=files))
        assert len(error.value.problems) == 3
        assert all(file in str(error.value) for file in files)
    with pytest.raises(InputError, match=r"missing\.safetensors: network_weights: cannot be read"):
        check_weight_files(settings(network_weights=files[2]))
    check_weight_files(settings())
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        start("lora", files[2])


@pytest.mark.parametrize("name", KIND_SETTINGS)
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_merging_is_what_the_adapter_does(name, multiplier, tmp_path):
    tensors, output = trained(name)
    base = tiny_transformer(layers=1)
    with torch.no_grad():
        plain = base(**inputs()).sample
    merge_base_weights(base, settings(base_weights=[save(tmp_path, tensors)], base_weights_multiplier=[multiplier]))
    with torch.no_grad():
        merged = base(**inputs()).sample
    assert (output - plain).abs().max() > 0.02
    if multiplier == 1:
        torch.testing.assert_close(merged, output, rtol=1e-3, atol=1e-3)
    else:
        assert (merged - output).abs().max() > 0.02
    assert not any("lora" in key or "hada" in key or "lokr" in key for key in base.state_dict())


def test_several_are_added_up_and_rounded_once(tmp_path):
    files = [save(tmp_path, trained("lora", seed=seed)[0], f"{seed}.safetensors") for seed in (1, 2)]
    both, by_hand = tiny_transformer(layers=1).bfloat16(), tiny_transformer(layers=1).bfloat16().float()
    merge_base_weights(both, settings(base_weights=files, base_weights_multiplier=[0.5, 2]))
    for file, multiplier in zip(files, (0.5, 2), strict=True):
        merge_base_weights(by_hand, settings(base_weights=[file], base_weights_multiplier=[multiplier]))
    assert both.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    for key, value in by_hand.bfloat16().state_dict().items():
        assert torch.equal(both.state_dict()[key], value)


def test_nothing_is_merged_when_one_file_does_not_fit(tmp_path):
    good = save(tmp_path, trained("lora")[0], "good.safetensors")
    bad = save(tmp_path, spoilt(lambda t: t.update({"lora_unet_nowhere.alpha": torch.ones(())})), "bad.safetensors")
    base = tiny_transformer(layers=1)
    with pytest.raises(InputError, match=r"bad\.safetensors.*lora_unet_nowhere"):
        merge_base_weights(base, settings(base_weights=[good, bad]))
    fresh = tiny_transformer(layers=1).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in base.state_dict().items())


def test_a_new_adapter_on_a_merged_base_starts_as_nothing(tmp_path):
    tensors, output = trained("loha")
    base = tiny_transformer(layers=1)
    merge_base_weights(base, settings(base_weights=[save(tmp_path, tensors)]))
    add_adapter(base, settings(**KIND_SETTINGS["dora"]))
    with torch.no_grad():
        torch.testing.assert_close(base(**inputs()).sample, output, rtol=1e-3, atol=1e-3)
