"""The check of a trained LoRA's file: it passes every kind and scheme, and refuses each way a file can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import KIND_SETTINGS, adapted, fill
from check_lora import main
from training_data import tiny_transformer

from qwen_image.adapter.check import check_adapter_file
from qwen_image.adapter.files import adapter_tensors, files_of, save_adapter
from qwen_image.adapter.schemes import scheme_of, to_diffusers, to_diffusion_model
from qwen_image.container import read_header, write_safetensors
from qwen_image.problems import InputError

TO_Q = "lora_unet_transformer_blocks_0_attn_to_q"
ALPHA, RANK = 3, 4


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    tiny_transformer(layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora():
    transformer, _ = adapted("lora", network_alpha=ALPHA)
    fill(transformer)
    return adapter_tensors(transformer, precision="bf16")


def metadata(rank=RANK, alpha=ALPHA):
    return {
        "ss_base_model_version": "qwen_image", "ss_network_module": "networks.lora_qwen_image",
        "ss_network_dim": str(rank), "ss_network_alpha": str(alpha),
    }  # fmt: skip


def save(folder, tensors, name="lora.safetensors", **given):
    path = Path(folder) / name
    save_adapter(path, {key: tensor.contiguous() for key, tensor in tensors.items()}, {**metadata(), **given})
    return path


def found(path, dit, other=None):
    return "\n".join(problem.found for problem in check_adapter_file(path, dit, other))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", KIND_SETTINGS)
def test_passes_what_training_writes(tmp_path, dit, kind, precision):
    transformer, network = adapted(kind, network_alpha=ALPHA)
    fill(transformer)
    tensors = adapter_tensors(transformer, precision=precision)
    formats = ("kohya", "diffusers", "both") if network.kind in ("lora", "dora") else ("kohya",)
    for save_format in formats:
        files = files_of(tmp_path / f"{save_format}.safetensors", tensors, save_format)
        for path, named in files:
            save_adapter(path, named, metadata(network.rank, network.alpha))
        other = files[0][0] if len(files) == 2 else None
        assert found(files[-1][0], dit, other) == ""
    renamed = save(tmp_path, to_diffusion_model(tensors), "dotted.safetensors", **metadata(network.rank, network.alpha))
    assert found(tmp_path / "kohya.safetensors", dit, renamed) == ""


def test_a_module_that_learnt_nothing_is_no_mistake(tmp_path, dit, lora):
    # the last block's text stream leads nowhere, so its modules never change
    idle = {**lora, f"{TO_Q}.lora_up.weight": torch.zeros_like(lora[f"{TO_Q}.lora_up.weight"])}
    assert found(save(tmp_path, idle), dit, save(tmp_path, to_diffusers(idle), "d.safetensors")) == ""


def test_modules_taken_over_from_a_file_may_differ(tmp_path, dit, lora):
    own = {f"{TO_Q}.lora_down.weight": torch.ones(6, 128), f"{TO_Q}.lora_up.weight": torch.ones(128, 6)}
    mixed = {**lora, **own, f"{TO_Q}.alpha": torch.tensor(5.0)}
    assert found(save(tmp_path, mixed), dit, save(tmp_path, to_diffusers(mixed), "d.safetensors")) == ""


def zero(tensors):
    return {key: torch.zeros_like(tensor) if "lora_up" in key else tensor for key, tensor in tensors.items()}


def without(*parts):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in {f"{TO_Q}.{p}" for p in parts}}


def replaced(part, value, name=TO_Q):
    return lambda tensors: {**tensors, f"{name}.{part}": value}


def nan(tensors):
    broken = tensors[f"{TO_Q}.lora_up.weight"].clone()
    broken[3, 1] = torch.nan
    return {**tensors, f"{TO_Q}.lora_up.weight": broken}


def extra_module(name):
    return lambda tensors: {
        **tensors,
        **{key.replace(TO_Q, name): tensor for key, tensor in tensors.items() if key.startswith(TO_Q)},
    }


def all_alphas(value):
    return lambda tensors: {
        key: torch.tensor(value) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "damage, expected", [
        (zero, "changes nothing: every module's change is 0"),
        (without("lora_up.weight"), "no LoRA, DoRA, LoHa or LoKr of these modules: transformer_blocks.0.attn.to_q"),
        (without("lora_down.weight"), "no LoRA, DoRA, LoHa or LoKr of these modules: transformer_blocks.0.attn.to_q"),
        (without("alpha"), f"is missing for {TO_Q}"),
        (extra_module("lora_unet_transformer_blocks_1_attn_to_q"), "modules that this model does not have"),
        (extra_module("lora_unet_transformer_blocks_0_attn_to_x"), "modules that this model does not have"),
        (extra_module("lora_te_text_model_layers_0"), "modules that this model does not have"),
        (replaced("lora_mid.weight", torch.ones(4, 4)), "is no LoRA, DoRA, LoHa or LoKr of these modules"),
        (replaced("lora_up.weight", torch.ones(64, RANK)), "has shapes that do not fit these modules"),
        (replaced("lora_down.weight", torch.ones(RANK, 64)), "has shapes that do not fit these modules"),
        (replaced("alpha", torch.ones(2)), "has shapes that do not fit these modules"),
        (nan, "holds values that are no numbers for these modules"),
        (all_alphas(6.0), "says 3, the tensors of most modules say 6"),
        (all_alphas(float("inf")), "holds values that are no numbers"),
        (lambda tensors: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_refuses_tensors(tmp_path, dit, lora, damage, expected):
    assert expected in found(save(tmp_path, damage(dict(lora))), dit)


@pytest.mark.parametrize("key", list(metadata()))
def test_refuses_metadata_that_lacks_something(tmp_path, dit, lora, key):
    given = {name: value for name, value in metadata().items() if name != key}
    save_adapter(tmp_path / "lora.safetensors", lora, given)
    assert found(tmp_path / "lora.safetensors", dit) == f"lacks the metadata {key}"


def test_refuses_a_rank_that_is_not_that_of_the_tensors(tmp_path, dit, lora):
    assert found(save(tmp_path, lora, ss_network_dim="8"), dit) == "says 8, the tensors of most modules say 4"


def test_refuses_a_damaged_hash_and_damaged_data(tmp_path, dit, lora):
    path = save(tmp_path, lora)
    header = read_header(path)
    write_safetensors(tmp_path / "hash.safetensors", lora, {**header.metadata, "sshs_model_hash": "0" * 64})
    assert "is not the hash of the file's data" in found(tmp_path / "hash.safetensors", dit)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "is not the hash of the file's data" in found(path, dit)
    path.write_bytes(content[:-1])
    assert "truncated" in found(path, dit)
    write_safetensors(tmp_path / "none.safetensors", lora, metadata())
    assert found(tmp_path / "none.safetensors", dit) == "lacks the metadata sshs_model_hash"


@pytest.mark.parametrize(
    "damage, expected", [
        (lambda d: {**d, next(iter(d)): 1.05 * next(iter(d.values()))}, "changes 1 weights otherwise than it should"),
        (lambda d: {key: 2 * value if "lora_A" in key else value for key, value in d.items()}, "by 100 %"),
        (lambda d: {key: value for key, value in d.items() if ".to_q." not in key}, "lacks transformer_blocks.0.attn."),
        (lambda d: {key: value for key, value in d.items() if ".to_q.lora_A" not in key}, "no LoRA, DoRA"),
        (lambda d: {key.replace("transformer.", "", 1): value for key, value in d.items()}, "diffusers reads it lacks"),
    ],
)  # fmt: skip
def test_refuses_another_format_that_is_not_equal(tmp_path, dit, lora, damage, expected):
    other = to_diffusers(lora)
    assert found(save(tmp_path, lora), dit, save(tmp_path, damage(dict(other)), "d.safetensors")) != ""
    assert expected in found(tmp_path / "lora.safetensors", dit, tmp_path / "d.safetensors")


def test_refuses_one_module_whose_alpha_is_wrong(tmp_path, dit, lora):
    wrong = save(tmp_path, replaced("alpha", torch.tensor(6.0))(lora))
    problem = found(wrong, dit, save(tmp_path, to_diffusers(lora), "d.safetensors"))
    assert problem.startswith(
        f"from {wrong} changes 1 weights otherwise than it should, transformer_blocks.0.attn.to_q"
    )


def test_refuses_an_alpha_that_only_diffusers_would_read(tmp_path, dit, lora):
    path = tmp_path / "d.safetensors"
    named = to_diffusers(lora)
    targets = sorted({name.removeprefix("transformer.").partition(".lora_")[0] for name in named})
    config = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.target_modules": targets}
    save(tmp_path, named, path.name, lora_adapter_metadata=json.dumps(config))
    assert "as ComfyUI reads it changes 12 weights otherwise than it should" in found(path, dit)


def test_refuses_a_dora_that_lost_its_magnitudes(tmp_path, dit):
    transformer, _ = adapted("dora", network_alpha=ALPHA)
    fill(transformer)
    tensors = adapter_tensors(transformer, precision="bf16")
    plain = {key: tensor for key, tensor in to_diffusers(tensors).items() if "magnitude" not in key}
    assert "by inf %" in found(save(tmp_path, tensors), dit, save(tmp_path, plain, "d.safetensors"))


def test_program_writes_the_digest_last(tmp_path, dit, lora, capsys):
    path, digest = save(tmp_path, lora), tmp_path / "made" / "lora.sha256"
    other = save(tmp_path, to_diffusers(lora), "d.safetensors")
    flags = ["--lora", str(path), "--diffusers", str(other), "--dit", str(dit), "--digest", str(digest)]
    assert main(flags) == 0
    with open(path, "rb") as stream:
        assert digest.read_bytes() == subprocess.run(["sha256sum"], stdin=stream, capture_output=True).stdout
    assert "no problems found" in capsys.readouterr().err
    digest.unlink()
    save(tmp_path, zero(lora))
    with pytest.raises(InputError, match="changes nothing") as error:
        main(flags)
    # everything in one message
    assert len(error.value.problems) == 2
    assert not digest.exists()


def test_program_looks_at_its_arguments_first(tmp_path, dit):
    with pytest.raises(InputError) as error:
        main(["--lora", str(tmp_path / "none.safetensors"), "--dit", str(tmp_path / "no_dit")])
    assert [problem.file for problem in error.value.problems] == [
        str(tmp_path / "none.safetensors"), str(tmp_path / "no_dit"),
    ]  # fmt: skip


@pytest.mark.parametrize("program", ["check_lora.py", "convert_lora.py"])
def test_programs_answer_without_torch(tmp_path, program):
    script = Path(__file__).parents[2] / "scripts" / program
    file = str(tmp_path / "none.safetensors")
    flags = ["--lora", file, "--dit", file] if program == "check_lora.py" else ["--input", file, "--output", file]
    flags += [] if program == "check_lora.py" else ["--target", "other"]
    code = "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1])\n"
    code += "del sys.argv[:2]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, script.parent, script, *flags], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"{file}" in done.stderr and "Traceback" not in done.stderr


def test_schemes_are_told(lora):
    assert [scheme_of(named) for named in (lora, to_diffusers(lora), to_diffusion_model(lora))] == [
        "kohya", "diffusers", "diffusion_model",
    ]  # fmt: skip
