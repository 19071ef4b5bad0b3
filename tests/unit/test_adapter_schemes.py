"""Naming schemes of adapters: names to and fro, and what every weight's change is afterwards."""

import json
from pathlib import Path

import pytest
import torch
from adapters import KIND_SETTINGS, adapted, fill
from training_data import tiny_transformer

from qwen_image.adapter.compare import distance, magnitude_distance, size, tolerance
from qwen_image.adapter.delta import change
from qwen_image.adapter.files import adapter_tensors, files_of
from qwen_image.adapter.schemes import (
    BLOCK_MODULES,
    CONVERSIONS,
    OTHER_MODULES,
    SchemeError,
    dotted_path,
    folded,
    held,
    scheme_of,
    to_diffusers,
    to_diffusion_model,
    to_kohya,
)
from qwen_image.adapter.tensors import by_module, module_name, named_tensors

FIELD = json.loads((Path(__file__).parents[1] / "data" / "lora_2_blocks_rank_16.json").read_text())["tensors"]
TO_Q, PATH = "lora_unet_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"


def one_module(alpha=2.0, dtype=torch.float32, *, rank=4, name=TO_Q, up_scale=1.0):
    random = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(rank, 8, generator=random).to(dtype),
        f"{name}.lora_up.weight": (up_scale * torch.randn(6, rank, generator=random)).to(dtype),
        f"{name}.alpha": torch.tensor(alpha),
    }


def trained(kind, precision="fp32", **settings):
    transformer, _ = adapted(kind, **settings)
    fill(transformer)
    return adapter_tensors(transformer, precision=precision)


def test_the_field_s_names():
    assert {name.split(".", 1)[1] for name in FIELD} == {"lora_down.weight", "lora_up.weight", "alpha"}
    ours = {
        f"{module_name(f'transformer_blocks.{block}.{path}')}.{part}"
        for block in (0, 1)
        for path in BLOCK_MODULES
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert ours == set(FIELD)
    tensors = {name: torch.zeros(()) if name.endswith(".alpha") else torch.zeros(2, 2) for name in FIELD}
    assert set(to_kohya(to_diffusers(tensors))) == set(to_kohya(to_diffusion_model(tensors))) == set(FIELD)
    names = set(to_diffusers(tensors))
    assert len(names) == 2 * 28
    assert f"transformer.{PATH}.lora_A.weight" in names
    assert "transformer.transformer_blocks.1.img_mlp.net.0.proj.lora_B.weight" in names
    assert "transformer.transformer_blocks.1.attn.to_add_out.lora_B.weight" in names
    assert "diffusion_model.transformer_blocks.1.attn.to_out.0.alpha" in to_diffusion_model(tensors)


def test_every_linear_of_the_model_is_found_again():
    linears = [path for path, module in tiny_transformer().named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 2 * len(BLOCK_MODULES) + len(OTHER_MODULES)
    assert [dotted_path(module_name(path)) for path in linears] == linears


@pytest.mark.parametrize("block", [0, 7, 59, 60, 123])
def test_any_number_of_blocks(block):
    for path in BLOCK_MODULES:
        whole = f"transformer_blocks.{block}.{path}"
        assert dotted_path(module_name(whole)) == whole


@pytest.mark.parametrize(
    "name", ["transformer_blocks_0_attn_to_x", "transformer_blocks__attn_to_q", "transformer_blocks_0_img_in",
             "attn_to_q", "double_blocks_0_img_attn_qkv", "transformer_blocks_0_attn_to_q_1", ""],
)  # fmt: skip
def test_other_names_have_no_path(name):
    assert dotted_path(f"lora_unet_{name}") is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KIND_SETTINGS)
def test_diffusion_model_and_back_changes_no_bit(kind, precision):
    tensors = trained(kind, precision, network_alpha=3)
    renamed = to_diffusion_model(tensors)
    assert scheme_of(renamed) == "diffusion_model"
    again = to_kohya(renamed)
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_and_back_changes_no_weight_otherwise(kind, precision):
    tensors = trained(kind, precision, network_alpha=3)
    renamed = to_diffusers(tensors)
    assert scheme_of(renamed) == "diffusers"
    before, after = by_module(tensors), by_module(to_kohya(renamed))
    assert before.keys() == after.keys()
    for name, parts in before.items():
        assert after[name]["alpha"] == 4  # the rank
        assert distance(parts, after[name]) <= tolerance(parts, after[name]) <= 2**-7
        assert magnitude_distance(parts, after[name]) == 0
        # and the plain formula agrees with the one without the whole matrix
        gap = torch.linalg.norm(change(parts) - change(after[name])) / torch.linalg.norm(change(parts))
        assert float(gap) == pytest.approx(distance(parts, after[name]), rel=0.05, abs=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.25, 1, 2, 4, 8, 64])
def test_powers_of_two_are_folded_exactly(alpha, dtype):
    parts = by_module(one_module(alpha, dtype))[TO_Q]
    down, up = folded(parts)
    assert down.dtype == up.dtype == dtype
    exact = alpha / 4 * parts["lora_up.weight"].double() @ parts["lora_down.weight"].double()
    assert torch.equal(up.double() @ down.double(), exact)


def test_up_takes_a_power_of_two_only():
    parts = by_module(one_module(0.3, torch.bfloat16))[TO_Q]
    _, up = folded(parts)
    ratio = (up.float() / parts["lora_up.weight"].float()).unique()
    assert ratio.tolist() == [0.25]


def test_what_fp16_loses_near_zero_is_allowed_for():
    parts = by_module(one_module(1, torch.float16, rank=128, up_scale=1e-6))[TO_Q]
    down, up = folded(parts)
    after = {"lora_down.weight": down, "lora_up.weight": up}
    assert torch.finfo(torch.float16).eps < distance(parts, after) <= tolerance(parts, after)


def test_distances():
    first = by_module(one_module(2))[TO_Q]
    other = {**first, "alpha": torch.tensor(3.0)}
    assert distance(first, first) == 0
    assert distance(first, other) == pytest.approx(0.5)
    assert size(first) == pytest.approx(float(torch.linalg.norm(change(first))))
    assert tolerance(first, other) == pytest.approx(2**-23)
    none = {**first, "lora_up.weight": torch.zeros(6, 4)}
    assert (size(none), distance(none, none), distance(none, first)) == (0, 0, float("inf"))
    assert tolerance(none, first) == 2**-23
    assert magnitude_distance(first, {**first, "dora_scale": torch.ones(6, 1)}) == float("inf")


@pytest.mark.parametrize(
    "name", [f"transformer.{PATH}.lora_{{}}.weight", f"diffusion_model.{PATH}.lora_{{}}.weight",
             f"{PATH}.lora_{{}}.weight", f"transformer.{PATH}.lora_{{}}.default.weight",
             f"base_model.model.{PATH}.lora_{{}}.weight"],
)  # fmt: skip
def test_reads_what_others_call_it(name):
    given = one_module(alpha=4)
    renamed = {
        name.format("A"): given[f"{TO_Q}.lora_down.weight"], name.format("B"): given[f"{TO_Q}.lora_up.weight"],
    }  # fmt: skip
    again = to_kohya(renamed)
    assert again.keys() == given.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in given.items())
    assert to_kohya({key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in given.items()}) == given


def test_names_of_no_scheme_stay_and_no_tensor_is_lost():
    given = one_module()
    odd = {**given, "something": torch.ones(1), f"transformer.{PATH}.lora_A.weight": torch.ones(2, 2)}
    again = to_kohya(odd)
    assert again.keys() == odd.keys()
    assert all(again[key] is tensor for key, tensor in odd.items())


@pytest.mark.parametrize("target", CONVERSIONS)
@pytest.mark.parametrize(
    "name, broken, reason", [
        ("lora_unet_transformer_blocks_0_attn_to_x", (), "Qwen-Image has no such modules: .*attn_to_x"),
        (TO_Q, ("lora_up.weight",), "no whole LoRA"), (TO_Q, ("lora_down.weight",), "no whole LoRA"),
    ],
)  # fmt: skip
def test_what_no_scheme_can_hold(target, name, broken, reason):
    tensors = {key: tensor for key, tensor in one_module(name=name).items() if not key.endswith(broken or ("-",))}
    with pytest.raises(SchemeError, match=reason):
        CONVERSIONS[target](tensors)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_diffusers_has_no_names_for_some_kinds(kind):
    with pytest.raises(SchemeError, match=r"this scheme holds LoRA and DoRA only: lora_unet_.* and 9 more"):
        to_diffusers(trained(kind))


def test_an_alpha_that_the_precision_cannot_hold_stays_exact():
    transformer, _ = adapted("lora", network_alpha=0.3)
    tensors = adapter_tensors(transformer, precision="bf16")
    alphas = {tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
    assert {alpha.dtype for alpha in alphas} == {torch.float32}
    assert {alpha.item() for alpha in alphas} == {torch.tensor(0.3).item()}
    assert tensors[f"{TO_Q}.lora_down.weight"].dtype == torch.bfloat16
    assert held(torch.tensor(16.0), torch.bfloat16).dtype == torch.bfloat16


def test_a_dora_keeps_its_magnitudes_exact():
    transformer, _ = adapted("dora")
    exact = named_tensors(transformer)[f"{TO_Q}.dora_scale"]
    saved = adapter_tensors(transformer, precision="bf16")
    assert torch.equal(saved[f"{TO_Q}.dora_scale"], exact)
    assert saved[f"{TO_Q}.lora_up.weight"].dtype == torch.bfloat16


def test_files_of_a_format():
    tensors = trained("lora")
    path = Path("models/a.b.safetensors")
    ((only, kohya),) = files_of(path, tensors, "kohya")
    assert (only, scheme_of(kohya)) == (path, "kohya")
    ((only, diffusers),) = files_of(path, tensors, "diffusers")
    assert (only, scheme_of(diffusers)) == (path, "diffusers")
    # the file that tells that a training is finished comes last
    (beside, first), (last, second) = files_of(path, tensors, "both")
    assert (beside, scheme_of(first)) == (Path("models/a.b.diffusers.safetensors"), "diffusers")
    assert (last, scheme_of(second)) == (path, "kohya")
    assert [file for file, _ in files_of(path, {}, "both")] == [beside, path]
