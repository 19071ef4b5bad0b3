"""Every way in which people have the checkpoints loads to the same weights, and computes what the libraries compute.

The layouts are made by saving the tiny models in them, with the libraries' own writers where they have one.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from qwen_image.models.checkpoint import check_checkpoint, checkpoint_files, open_checkpoint
from qwen_image.models.dimensions import text_config, transformer_config, vae_config
from qwen_image.models.streaming import empty_model
from qwen_image.models.text_encoder import load_text_encoder
from qwen_image.models.transformer import load_transformer
from qwen_image.models.vae import load_vae

LOADERS = {"dit": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder}
LIBRARY_CLASSES = {"dit": QwenImageTransformer2DModel, "vae": AutoencoderKLQwenImage}


# --- the layouts: each takes an empty folder and returns the path a user would put in the config


def prefixed(role, prefix):
    def build(folder):
        return tiny.save(folder / "model.safetensors", {prefix + name: t for name, t in tiny.stored(role).items()})

    return build


def library_folder(role, **options):
    """The folder that diffusers writes, with config.json, whole or sharded."""

    def build(folder):
        model = library_vae() if role == "vae" else LOADERS[role](tiny.path(role))
        model.save_pretrained(folder / "saved", **options)
        return folder / "saved"

    return build


def library_vae():
    model = AutoencoderKLQwenImage(base_dim=16).bfloat16().eval()
    model.load_state_dict(tiny.stored("vae"))
    return model


def inside(build, pattern):
    """The file of that name in a layout's folder."""
    return lambda folder: next(iter(sorted(build(folder).glob(pattern))))


def without_index(build):
    def strip(folder):
        path = build(folder)
        next(path.glob("*.index.json")).unlink()
        return path

    return strip


def pipeline(role, subfolder):
    def build(folder):
        library_folder(role)(folder / "new")
        shutil.move(folder / "new" / "saved", folder / "root" / subfolder)
        (folder / "root" / "tokenizer").mkdir()
        for other in {"transformer", "vae", "text_encoder"} - {subfolder}:
            tiny.save(folder / "root" / other / "model.safetensors", {"something.else": torch.zeros(1)})
        (folder / "root" / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
        return folder / "root"

    return build


def wan(prefix=""):
    """ComfyUI's qwen_image_vae: the names of the Wan VAE, which this one is derived from."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}

    def rename(name):
        side, _, rest = name.partition(".")
        part = rest.split(".")
        if side in ("quant_conv", "post_quant_conv"):
            return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
        if part[0] in ("conv_in", "norm_out", "conv_out"):
            return f"{side}.{ {'conv_in': 'conv1', 'norm_out': 'head.0', 'conv_out': 'head.2'}[part[0]] }.{part[1]}"
        if part[:2] == ["mid_block", "attentions"]:
            return ".".join([side, "middle.1", *part[3:]])
        if part[:2] == ["mid_block", "resnets"]:
            return ".".join([side, f"middle.{2 * int(part[2])}", residual[part[3]], part[4]])
        if part[0] == "down_blocks":
            stem, tail = f"encoder.downsamples.{part[1]}", part[2:]
        else:  # three residual blocks and an upsampler a level, in one flat list
            position = 4 * int(part[1]) + (3 if part[2] == "upsamplers" else int(part[3]))
            stem, tail = f"decoder.upsamples.{position}", part[4:]
        return ".".join([stem, residual.get(tail[0], tail[0].replace("conv_shortcut", "shortcut")), *tail[1:]])

    def build(folder):
        tensors = {prefix + rename(name): tensor for name, tensor in tiny.stored("vae").items()}
        assert f"{prefix}decoder.upsamples.4.shortcut.weight" in tensors
        return tiny.save(folder / "qwen_image_vae.safetensors", tensors)

    return build


def text_only(folder):
    return tiny.save(folder / "text.safetensors", tiny.official("text_encoder"))


def new_transformers_folder(folder):
    """transformers 5: model.language_model.*, model.visual.*, and the text part nested in config.json."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path("text_encoder"), dtype=torch.bfloat16)
    tiny.save(folder / "new" / "model.safetensors", {name: t.clone() for name, t in model.state_dict().items()})
    model.config.save_pretrained(folder / "new")
    return folder / "new"


def old_transformers_folder(folder):
    """The published folder: sharded, and a flat config.json with the old spelling of the rotary settings."""
    tensors = tiny.stored("text_encoder")
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        tiny.save(folder / "old" / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "old" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    nested = json.loads((tiny.path("text_encoder") / "config.json").read_text())
    text = nested.pop("text_config")
    flat = nested | {name: value for name, value in text.items() if name not in ("rope_parameters", "model_type")}
    flat |= {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    (folder / "old" / "config.json").write_text(json.dumps(flat))
    return folder / "old"


def vision_last(folder):
    """ComfyUI's qwen_2.5_vl_7b: model.*, visual.*, lm_head in one bare file."""
    return tiny.save(folder / "qwen_2.5_vl_7b.safetensors", tiny.stored("text_encoder"))


SHARDED_DIT = library_folder("dit", max_shard_size="4MB")
LAYOUTS = {
    "dit bare": ("dit", prefixed("dit", "")),
    "dit model.diffusion_model.": ("dit", prefixed("dit", "model.diffusion_model.")),
    "dit diffusion_model.": ("dit", prefixed("dit", "diffusion_model.")),
    "dit transformer.": ("dit", prefixed("dit", "transformer.")),
    "dit folder": ("dit", library_folder("dit")),
    "dit file in its folder": ("dit", inside(library_folder("dit"), "*.safetensors")),
    "dit sharded folder": ("dit", SHARDED_DIT),
    "dit index": ("dit", inside(SHARDED_DIT, "*.index.json")),
    "dit first shard": ("dit", inside(SHARDED_DIT, "*-00001-of-*.safetensors")),
    "dit shards without index": ("dit", without_index(SHARDED_DIT)),
    "dit pipeline": ("dit", pipeline("dit", "transformer")),
    "vae bare": ("vae", prefixed("vae", "")),
    "vae vae.": ("vae", prefixed("vae", "vae.")),
    "vae first_stage_model.": ("vae", prefixed("vae", "first_stage_model.")),
    "vae folder": ("vae", library_folder("vae")),
    "vae pipeline": ("vae", pipeline("vae", "vae")),
    "vae wan": ("vae", wan()),
    "vae wan with prefix": ("vae", wan("first_stage_model.")),
    "text hub folder": ("text_encoder", lambda folder: tiny.path("text_encoder")),
    "text file in its folder": ("text_encoder", lambda folder: tiny.path("text_encoder") / "model.safetensors"),
    "text comfy": ("text_encoder", vision_last),
    "text prefix": ("text_encoder", prefixed("text_encoder", "text_encoder.")),
    "text transformers 5": ("text_encoder", new_transformers_folder),
    "text old sharded folder": ("text_encoder", old_transformers_folder),
    "text model only": ("text_encoder", text_only),
    "text model only folder": ("text_encoder", library_folder("text_encoder")),
    "text pipeline": ("text_encoder", pipeline("text_encoder", "text_encoder")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_to_identical_weights(name, tmp_path):
    role, build = LAYOUTS[name]
    path = build(tmp_path)
    assert check_checkpoint(path, role) == []
    model = LOADERS[role](path)
    # our VAE keeps its tensors in another form than they are stored in
    expected = load_vae(tiny.path(role)).state_dict() if role == "vae" else tiny.official(role)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("role", LIBRARY_CLASSES)
def test_a_bare_file_gets_the_config_that_the_library_saved(role, tmp_path):
    folder = library_folder(role)(tmp_path)
    saved, bare = LIBRARY_CLASSES[role].from_pretrained(folder).config, LOADERS[role](tiny.path(role)).config
    ours = {name: value for name, value in bare.items() if not name.startswith("_")}
    assert ours.keys() == {name for name in saved if not name.startswith("_")}
    assert json.dumps(ours) == json.dumps({name: saved[name] for name in ours})


def test_a_bare_text_encoder_gets_the_config_of_its_folder(tmp_path):
    bare, folder = load_text_encoder(vision_last(tmp_path)).config, load_text_encoder(tiny.path("text_encoder")).config
    ignored = {"bos_token_id", "eos_token_id"}
    assert {k: v for k, v in bare.to_dict().items() if k not in ignored} == {
        k: v for k, v in folder.to_dict().items() if k not in ignored
    }


def test_transformer_computes_what_diffusers_computes(tmp_path):
    library = QwenImageTransformer2DModel.from_pretrained(library_folder("dit")(tmp_path), torch_dtype=torch.float32)
    ours = load_transformer(tiny.path("dit"), dtype=torch.float32)
    inputs = {
        "hidden_states": torch.randn(1, 24, 64),
        "encoder_hidden_states": torch.randn(1, 5, 256),
        "timestep": torch.tensor([0.3]),
        "img_shapes": [[(1, 4, 6)]],
    }
    with torch.no_grad():
        assert torch.equal(ours(**inputs).sample, library(**inputs).sample)


def test_vae_computes_what_diffusers_computes(tmp_path):
    library = AutoencoderKLQwenImage.from_pretrained(library_folder("vae")(tmp_path / "a"), torch_dtype=torch.float32)
    ours = load_vae(wan()(tmp_path / "b"), dtype=torch.float32)
    pixels = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(library.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = library.encode(pixels.permute(0, 3, 1, 2).unsqueeze(2) / 127.5 - 1).latent_dist.mode()
        picture = library.decode(latents).sample.squeeze(2)
    normalised = (latents - mean) / std
    torch.testing.assert_close(ours.encode_pixels(pixels.numpy()), normalised, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.decode_latents(normalised), picture, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [vision_last, old_transformers_folder])
def test_text_encoder_computes_what_transformers_computes(tmp_path, layout):
    library = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.path("text_encoder"), dtype=torch.bfloat16)
    ours = load_text_encoder(layout(tmp_path))
    ids = torch.arange(60).view(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.no_grad():
        expected = library(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        found = ours(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_dtype_is_the_stored_one_for_the_vae_and_the_wanted_one_otherwise(tmp_path):
    tensors = {
        name: tensor.to(torch.float32 if "norm" in name else torch.float16)
        for name, tensor in tiny.stored("vae").items()
    }
    path = tiny.save(tmp_path / "vae.safetensors", tensors)
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        vae = load_vae(path, dtype=dtype)
        dtypes = {name: parameter.dtype for name, parameter in vae.named_parameters() if "gamma" not in name}
        assert {vae.dtype, *dtypes.values()} == {expected}


def test_weights_do_not_depend_on_the_file_once_loaded(tmp_path):
    path = shutil.copy(tiny.path("vae"), tmp_path / "vae.safetensors")
    model = load_vae(path)
    with open(path, "r+b") as stream:  # a mapped tensor would change or crash here
        stream.write(b"\0" * Path(path).stat().st_size)
    Path(path).write_bytes(b"")
    expected = load_vae(tiny.path("vae")).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


# --- identity


def test_identity_is_the_weights_and_the_config_but_not_the_index(tmp_path):
    folder = SHARDED_DIT(tmp_path)
    names = [path.name for path in checkpoint_files(folder, "dit")]
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert names == [*shards, "config.json"]
    for other in (folder / shards[0], next(folder.glob("*.index.json"))):
        assert checkpoint_files(other, "dit") == checkpoint_files(folder, "dit")
    assert checkpoint_files(tiny.path("vae")) == [tiny.path("vae")]


def test_identity_in_a_pipeline_is_that_of_the_role(tmp_path):
    root = pipeline("vae", "vae")(tmp_path)
    assert {path.parent.name for path in checkpoint_files(root, "vae")} == {"vae"}
    assert {path.parent.name for path in checkpoint_files(root)} == {"vae", "transformer", "text_encoder"}


# --- full size, without its weights


def test_dimensions_of_the_real_models_are_told_from_shapes_alone():
    def shapes(build):
        return {name: tuple(tensor.shape) for name, tensor in empty_model(build).state_dict().items()}

    # the defaults of the two diffusers classes are the published models
    found = transformer_config(shapes(QwenImageTransformer2DModel))
    assert (found["num_layers"], found["num_attention_heads"], found["joint_attention_dim"]) == (60, 24, 3584)
    assert (found["in_channels"], found["out_channels"], found["attention_head_dim"]) == (64, 16, 128)
    found = vae_config(shapes(AutoencoderKLQwenImage))
    assert (found["base_dim"], found["z_dim"], found["num_res_blocks"]) == (96, 16, 2)
    assert (found["dim_mult"], found["temperal_downsample"]) == ([1, 2, 4, 4], [False, True, True])
    published = Qwen2_5_VLTextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    found = text_config(shapes(lambda: Qwen2_5_VLTextModel(published)))
    assert (found["num_hidden_layers"], found["hidden_size"], found["intermediate_size"]) == (28, 3584, 18944)
    assert (found["num_attention_heads"], found["num_key_value_heads"], found["vocab_size"]) == (28, 4, 152064)


def test_opening_needs_no_torch():
    code = (
        "import sys; from qwen_image.models.checkpoint import check_checkpoint, checkpoint_files;"
        "from qwen_image.models.tokenizer import check_tokenizer, tokenizer_files;"
        f"folder = {str(tiny.folder())!r};"
        "assert not check_checkpoint(folder + '/dit.safetensors', 'dit');"
        "assert not check_checkpoint(folder + '/text_encoder', 'text_encoder');"
        "assert not check_tokenizer(folder + '/text_encoder') and tokenizer_files(folder + '/text_encoder');"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2] / "scripts", check=True)


def test_repackaged_edit_and_layered_models_are_told_by_their_marks(tmp_path):
    tensors = tiny.stored("dit") | {"__index_timestep_zero__": torch.zeros(0)}
    path = tiny.save(tmp_path / "edit.safetensors", tensors)
    assert open_checkpoint(path, "dit").model_config()["zero_cond_t"] is True
    assert load_transformer(path).config.zero_cond_t is True
    tensors = tiny.stored("dit") | {"time_text_embed.addition_t_embedding.weight": torch.zeros(2, 256)}
    config = load_transformer(tiny.save(tmp_path / "layered.safetensors", tensors)).config
    assert config.use_additional_t_cond and config.use_layer3d_rope


def test_a_config_may_say_what_shapes_cannot(tmp_path):
    """The folder of the newest edit model has no mark in its weights, only in config.json."""
    folder = library_folder("dit")(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"zero_cond_t": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert check_checkpoint(folder, "dit") == []
    assert load_transformer(folder).config.zero_cond_t is True
