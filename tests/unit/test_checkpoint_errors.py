"""A wrong checkpoint or tokenizer is named for what it is, with what was expected and how to mend it."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from qwen_image.models.checkpoint import check_checkpoint, open_checkpoint
from qwen_image.models.tokenizer import check_tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from qwen_image.problems import InputError

ROLES = ("dit", "vae", "text_encoder")
NAMES = {"dit": "Qwen-Image's transformer", "vae": "Qwen-Image's VAE", "text_encoder": "the Qwen2.5-VL text encoder"}


def zeros(*names):
    return {name: torch.zeros(1) for name in names}


def only_problem(path, role):
    (problem,) = check_checkpoint(path, role)
    assert problem.key == role
    assert problem.mend
    return problem


# --- another model


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("given", ROLES)
def test_one_of_the_three_in_place_of_another(role, given):
    if role == given:
        assert check_checkpoint(tiny.path(given), role) == []
        return
    problem = only_problem(tiny.path(given), role)
    assert f"this is {NAMES[given]}, not {NAMES[role]}" in problem.found
    assert f"belongs in {given}" in problem.mend and NAMES[role] in problem.mend
    assert problem.file == str(tiny.path(given))


OTHERS = {
    "LoRA": zeros("transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_B.weight"),
    "adapter": zeros("lora_unet_transformer_blocks_0_attn_to_q.alpha"),
    "Flux model": zeros("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"),
    "Stable Diffusion XL model": zeros(
        "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"
    ),
    "Stable Diffusion model": zeros(
        "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.0.weight"
    ),
    "Wan video model": zeros("blocks.0.self_attn.q.weight", "patch_embedding.weight"),
    "Stable Diffusion or Flux VAE": zeros("encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight"),
    "T5 text encoder": zeros("encoder.block.0.layer.0.SelfAttention.q.weight"),
    "Qwen3 language model": zeros("model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.weight"),
    "cache file of latents": zeros("latents_1x32x32_bfloat16"),
    "unknown model (2 tensors: a.weight, b.weight)": zeros("b.weight", "a.weight"),
    "file without tensors": {},
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(tmp_path, role, name):
    problem = only_problem(tiny.save(tmp_path / "other.safetensors", OTHERS[name]), role)
    assert name in problem.found and NAMES[role] in problem.found and NAMES[role] in problem.mend


def test_lookalikes_of_our_models_are_told_apart(tmp_path):
    control = tiny.stored("dit") | zeros("controlnet_blocks.0.weight")
    assert "ControlNet" in only_problem(tiny.save(tmp_path / "control.safetensors", control), "dit").found
    older = tiny.stored("text_encoder") | zeros("visual.blocks.0.mlp.fc1.weight")
    assert "Qwen2-VL" in only_problem(tiny.save(tmp_path / "older.safetensors", older), "text_encoder").found


# --- the right model, stored in a way that cannot be trained on


@pytest.mark.parametrize("role", ROLES)
def test_fp8_weights_are_refused(tmp_path, role):
    tensors = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in tiny.stored(role).items()}
    problem = only_problem(tiny.save(tmp_path / "fp8.safetensors", tensors), role)
    assert problem.found == f"this is {NAMES[role]} with weights stored as fp8"
    assert "bf16, fp16 or fp32" in problem.mend
    assert ("fp8_vl" in problem.mend) == (role == "text_encoder")


@pytest.mark.parametrize("mark", ["scaled_fp8", "layers.0.self_attn.q_proj.scale_weight", "x.weight_scale"])
def test_scaled_fp8_weights_are_refused(tmp_path, mark):
    path = tiny.save(tmp_path / "scaled.safetensors", tiny.stored("text_encoder") | zeros(mark))
    assert "stored as scaled fp8" in only_problem(path, "text_encoder").found


def test_quantized_weights_are_refused(tmp_path):
    tensors = tiny.stored("dit") | zeros("transformer_blocks.0.attn.to_q.weight.absmax")
    assert "bitsandbytes" in only_problem(tiny.save(tmp_path / "a.safetensors", tensors), "dit").found
    tensors = tiny.stored("dit") | {"txt_in.weight": torch.zeros(4, 4, dtype=torch.int8)}
    assert "I8, not floating point" in only_problem(tiny.save(tmp_path / "b.safetensors", tensors), "dit").found


# --- files that are no whole safetensors file, whatever their name


def _zip_pickle():
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, stream)
    return stream.getvalue()


CONTENTS = {
    "GGUF": (b"GGUF" + bytes(100), "a GGUF file (quantized weights), not safetensors"),
    "pickle": (pickle.dumps({"w": [0.0] * 10}), "a Python pickle, which can run code when it is read"),
    "PyTorch zip": (_zip_pickle(), "a PyTorch pickle or zip archive, which can run code"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    "web page": (b"<!doctype html><html><body>Sign in</body></html>", "a web page"),
    "empty": (b"", "an empty file"),
    "short": (b"\x10", "only 1 bytes long"),
    "garbage header": ((50).to_bytes(8, "little") + b"x" * 60, "not a safetensors file (broken header"),
    "random": (bytes(range(255, 0, -1)), "not a safetensors file"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", CONTENTS)
def test_content_counts_not_the_name(tmp_path, name, suffix):
    content, words = CONTENTS[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    problem = only_problem(path, "dit")
    assert words in problem.found
    assert NAMES["dit"] in problem.mend


@pytest.mark.parametrize("role", ROLES)
def test_truncated_file(tmp_path, role):
    whole = tiny.path(role) if role != "text_encoder" else tiny.path(role) / "model.safetensors"
    for share in (0.5, 0.999):
        path = tmp_path / f"{share}.safetensors"
        path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        problem = only_problem(path, role)
        assert "truncated" in problem.found and "download it again" in problem.mend
    path.write_bytes(whole.read_bytes()[:100])
    assert "truncated: the header needs" in only_problem(path, role).found


# --- paths, folders and sets


def test_missing_path(tmp_path):
    problem = only_problem(tmp_path / "nothing.safetensors", "vae")
    assert problem.found == "no such file or folder" and problem.file.endswith("nothing.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    assert "a link to a file that does not exist" in only_problem(tmp_path / "link.safetensors", "vae").found


def test_folders_without_usable_weights(tmp_path):
    assert only_problem(tmp_path, "dit").found == "an empty folder"
    (tmp_path / "notes.txt").touch()
    assert only_problem(tmp_path, "dit").found == "a folder without .safetensors files"
    (tmp_path / "model.gguf").touch()
    assert "GGUF" in only_problem(tmp_path, "dit").found
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickled weights only (pytorch_model.bin)" in only_problem(tmp_path, "dit").found


def test_folder_with_several_checkpoints(tmp_path):
    for name in ("one", "two"):
        tiny.save(tmp_path / f"{name}.safetensors", zeros("a"))
    problem = only_problem(tmp_path, "vae")
    assert "several checkpoints (one.safetensors, two.safetensors)" in problem.found
    assert "the file you mean" in problem.mend


def test_pipeline_without_the_wanted_model(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert "a diffusers pipeline without its vae/ folder" in only_problem(tmp_path, "vae").found


@pytest.fixture
def sharded(tmp_path):
    """The transformer in three shards with their index."""
    tensors = tiny.stored("dit")
    names = sorted(tensors)
    for i in range(3):
        tiny.save(tmp_path / f"dit-0000{i + 1}-of-00003.safetensors", {name: tensors[name] for name in names[i::3]})
    weight_map = {name: f"dit-0000{i + 1}-of-00003.safetensors" for i in range(3) for name in names[i::3]}
    (tmp_path / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert check_checkpoint(tmp_path, "dit") == []
    return tmp_path


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shards_are_named(sharded, with_index):
    (sharded / "dit-00002-of-00003.safetensors").unlink()
    if not with_index:
        (sharded / "dit.safetensors.index.json").unlink()
    for path in (sharded, sharded / "dit-00001-of-00003.safetensors"):
        problem = only_problem(path, "dit")
        assert "1 of 3 shards missing: dit-00002-of-00003.safetensors" in problem.found


def test_every_broken_shard_is_reported(sharded):
    (sharded / "dit-00001-of-00003.safetensors").write_bytes(b"GGUF")
    (sharded / "dit-00003-of-00003.safetensors").write_bytes(b"")
    problems = check_checkpoint(sharded, "dit")
    assert [Path(problem.file).name[:9] for problem in problems] == ["dit-00001", "dit-00003"]


def test_index_that_does_not_fit_its_shards(sharded):
    first, second = (sharded / f"dit-0000{i}-of-00003.safetensors" for i in (1, 2))
    keep = first.read_bytes()
    first.write_bytes(second.read_bytes())
    found = " ".join(problem.found for problem in check_checkpoint(sharded, "dit"))
    assert "stand both in" in found and "are not where the index says" in found
    first.write_bytes(keep)
    index = sharded / "dit.safetensors.index.json"
    for broken in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../up.safetensors"}}'):
        index.write_text(broken)
        assert "not a readable index" in only_problem(sharded, "dit").found


# --- config.json and the tensors


def test_config_of_another_model(tmp_path):
    shutil.copy(tiny.path("vae"), tmp_path / "diffusion_pytorch_model.safetensors")
    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "AutoencoderKLWan"}')
    problem = only_problem(tmp_path, "vae")
    assert problem.file == str(config) and "describes AutoencoderKLWan, not Qwen-Image's VAE" in problem.found
    for broken in ("{", "[]", "{}"):
        config.write_text(broken)
        assert only_problem(tmp_path, "vae").file == str(config)


@pytest.mark.parametrize(
    ("role", "change", "words"),
    [
        ("dit", {"num_layers": 60}, "num_layers is 60 there and 2 in the tensors"),
        ("vae", {"base_dim": 96}, "base_dim is 96 there and 16 in the tensors"),
        ("text_encoder", {"hidden_size": 3584}, "hidden_size is 3584 there and 256 in the tensors"),
    ],
)
def test_config_that_contradicts_the_tensors(tmp_path, role, change, words):
    names = {"dit": "QwenImageTransformer2DModel", "vae": "AutoencoderKLQwenImage"}
    tiny.save(tmp_path / "model.safetensors", tiny.stored(role))
    kind = {"_class_name": names[role]} if role in names else {"model_type": "qwen2_5_vl"}
    (tmp_path / "config.json").write_text(json.dumps(kind | change))
    problem = only_problem(tmp_path, role)
    assert "config.json does not belong to these weights" in problem.found and words in problem.found


def test_a_bare_file_of_an_unusual_model_asks_for_its_config(tmp_path):
    tensors = tiny.stored("dit") | {"transformer_blocks.0.attn.norm_q.weight": torch.zeros(64)}
    problem = only_problem(tiny.save(tmp_path / "narrow.safetensors", tensors), "dit")
    assert "heads are 64 wide" in problem.found and "config.json" in problem.mend


def test_a_gap_in_the_blocks(tmp_path):
    tensors = {
        name.replace("transformer_blocks.1.", "transformer_blocks.3."): t for name, t in tiny.stored("dit").items()
    }
    problem = only_problem(tiny.save(tmp_path / "gap.safetensors", tensors), "dit")
    assert "transformer_blocks 1, 2 missing" in problem.found


def test_missing_extra_and_misshapen_tensors_are_all_reported_before_reading(tmp_path):
    from qwen_image.models.transformer import load_transformer

    tensors = tiny.stored("dit") | {"proj_out.bias": torch.zeros(7), "surplus.weight": torch.zeros(1)}
    del tensors["txt_in.bias"]
    path = tiny.save(tmp_path / "dit.safetensors", tensors)
    with pytest.raises(InputError) as error:
        load_transformer(path)
    found = [problem.found for problem in error.value.problems]
    assert len(found) == 3
    assert "lacks 'txt_in.bias'" in found[0]
    assert "has 'surplus.weight', unknown to this model" in found[1]
    assert "has 'proj_out.bias', of another shape" in found[2]


def test_loaders_say_the_same_as_the_check(tmp_path):
    from qwen_image.models.text_encoder import load_text_encoder
    from qwen_image.models.transformer import load_transformer
    from qwen_image.models.vae import load_vae

    for role, load in zip(ROLES, (load_transformer, load_vae, load_text_encoder), strict=True):
        for path in (tmp_path / "absent", *(tiny.path(other) for other in ROLES if other != role)):
            with pytest.raises(InputError) as error:
                load(path)
            assert error.value.problems == check_checkpoint(path, role)


def test_the_wan_layout_is_checked_for_its_role_without_torch(tmp_path):
    names = ("encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "conv1.weight")
    path = tiny.save(tmp_path / "wan.safetensors", zeros(*names))
    assert check_checkpoint(path, "vae") == []
    assert "this is Qwen-Image's VAE" in only_problem(path, "dit").found
    with pytest.raises(InputError, match="has 1 axes, not 5"):
        open_checkpoint(path, "vae").model_config()


# --- the tokenizer


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, so that nothing on the developer's machine is found."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def copy_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.path("text_encoder") / name, folder)
    return folder


def put_in_hub_cache(cache, repository, subfolder):
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    return copy_tokenizer(root / "snapshots" / ("0" * 40) / subfolder)


def bare_encoder(folder):
    return tiny.save(folder / "qwen_2.5_vl_7b.safetensors", tiny.stored("text_encoder"))


def test_no_tokenizer_says_how_to_get_it(tmp_path):
    encoder = bare_encoder(tmp_path)
    with pytest.raises(InputError) as error:
        load_tokenizer(encoder)
    (problem,) = error.value.problems
    assert problem.key == "tokenizer" and "neither beside the text encoder nor in the local hub cache" in problem.found
    assert 'hf download Qwen/Qwen-Image --include "tokenizer/*"' in problem.mend
    assert check_tokenizer(encoder) == [problem]


@pytest.mark.parametrize("place", ["beside", "subfolder", "sibling", "pipeline"])
def test_tokenizer_is_found_where_the_encoder_is(tmp_path, place):
    encoder = bare_encoder(tmp_path / "models" / "text_encoder")
    folder = {"beside": "text_encoder", "subfolder": "text_encoder/tokenizer"}.get(place, "tokenizer")
    expected = copy_tokenizer(tmp_path / "models" / folder)
    paths = [tmp_path / "models"] if place == "pipeline" else [encoder, encoder.parent]
    for path in paths:
        assert find_tokenizer(path) == expected
        assert [file.name for file in tokenizer_files(path)] == ["tokenizer.json", "tokenizer_config.json"]
        assert check_tokenizer(path) == []


@pytest.mark.parametrize(
    ("repository", "subfolder"), [("Qwen/Qwen-Image", "tokenizer"), ("Qwen/Qwen2.5-VL-7B-Instruct", "")]
)
def test_tokenizer_from_the_local_hub_cache(tmp_path, hub_cache, repository, subfolder):
    encoder = bare_encoder(tmp_path)
    expected = put_in_hub_cache(hub_cache, repository, subfolder)
    assert find_tokenizer(encoder) == expected
    assert find_tokenizer(encoder, repository) == expected
    assert load_tokenizer(encoder)("<|im_start|>system").input_ids == [567, 260]


def test_the_tokenizer_key_goes_first(tmp_path):
    chosen = copy_tokenizer(tmp_path / "chosen")
    assert find_tokenizer(tiny.path("text_encoder"), chosen) == chosen
    assert find_tokenizer(tiny.path("text_encoder"), chosen / "tokenizer.json") == chosen
    for wrong, words in ((tmp_path, "has no tokenizer files"), ("a--b/c", "neither a folder nor in the hub cache")):
        (problem,) = check_tokenizer(tiny.path("text_encoder"), wrong)
        assert words in problem.found and problem.file == str(wrong)


def test_the_old_files_make_the_same_tokenizer(tmp_path):
    """vocab.json and merges.txt, as the published folder has them."""
    whole = json.loads((tiny.path("text_encoder") / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in whole["model"]["merges"]) + "\n")
    shutil.copy(tiny.path("text_encoder") / "tokenizer_config.json", tmp_path)
    old, new = load_tokenizer(tiny.path("text_encoder"), tmp_path), load_tokenizer(tiny.path("text_encoder"))
    for text in ("<|im_start|>system\nDescribe the image", "東京 e\u0301 it's 2024\n\n", "<|im_end|>"):
        assert old(text).input_ids == new(text).input_ids


def test_damaged_or_foreign_tokenizers(tmp_path):
    folder = copy_tokenizer(tmp_path / "tokenizer")
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    cases = {
        "{": "its files cannot be read",
        "[1]": "its files cannot be read",
        json.dumps(whole | {"added_tokens": []}): "not Qwen's tokenizer (it has no <|endoftext|>",
        json.dumps(whole | {"added_tokens": [*whole["added_tokens"], {"content": "far", "id": 151664}]}): (
            "its ids go up to 151664, but the text encoder has only 640 embeddings"
        ),
    }
    for content, words in cases.items():
        (folder / "tokenizer.json").write_text(content)
        (problem,) = check_tokenizer(tiny.path("text_encoder"), folder)
        assert words in problem.found and problem.key == "tokenizer"
        with pytest.raises(InputError):
            load_tokenizer(tiny.path("text_encoder"), folder)
