"""What a weight file is, told from its tensors' names and dtypes, so that a wrong one is named and not just refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_image.bounded import open_file
from qwen_image.container import TensorInfo
from qwen_image.models.roles import EXPECTED

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")

LAYOUT_ANCHORS = {
    ("dit", "diffusers"): ("transformer_blocks.0.img_mod.1.weight", "txt_in.weight", "img_in.weight"),
    ("vae", "diffusers"): ("encoder.conv_in.weight", "encoder.down_blocks.0.norm1.gamma", "quant_conv.weight"),
    ("vae", "wan"): ("encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "conv1.weight"),
    # Qwen2's attention has biases on q, k and v, which Llama and Qwen3 do not have
    ("text_encoder", "transformers"): ("layers.0.self_attn.q_proj.bias", "embed_tokens.weight", "norm.weight"),
}
"""Tensors that stand in every checkpoint of a role and layout, behind the same prefix; the first finds the prefix."""

ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".hada_w1", ".lokr_w")

# (what it is, parts that must all occur in some tensor's name)
LOOKALIKES = (
    ("a ControlNet", ("controlnet_blocks.0.",)),
    ("a ControlNet", ("controlnet_x_embedder.",)),
    ("the Qwen2-VL model, the predecessor of Qwen2.5-VL", ("visual.blocks.0.mlp.fc1.",)),
)
"""Models that have the anchors of one of ours and something more."""

OTHER_MODELS = (
    ("a Flux model", ("double_blocks.0.", "single_blocks.0.", "img_in.")),
    ("a Flux model", ("transformer_blocks.0.", "single_transformer_blocks.0.")),
    ("a Stable Diffusion XL model", ("input_blocks.0.", "label_emb.")),
    ("a Stable Diffusion XL model", ("down_blocks.0.resnets.0.time_emb_proj.", "add_embedding.")),
    ("a Stable Diffusion model", ("input_blocks.0.", "middle_block.")),
    ("a Stable Diffusion model", ("down_blocks.0.resnets.0.time_emb_proj.",)),
    ("a Stable Diffusion 3 model", ("joint_blocks.0.",)),
    ("a Stable Diffusion 3 model", ("transformer_blocks.0.norm1_context.", "pos_embed.proj.")),
    ("a Wan video model", ("blocks.0.self_attn.q.", "patch_embedding.")),
    ("a Wan video model", ("blocks.0.attn1.to_q.", "condition_embedder.")),
    ("the Wan 2.2 VAE", ("encoder.downsamples.0.downsamples.",)),
    ("a Stable Diffusion or Flux VAE", ("encoder.down.0.block.0.",)),
    ("a Stable Diffusion or Flux VAE", ("encoder.down_blocks.0.resnets.0.norm1.weight",)),
    ("a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.",)),
    ("a Qwen3 language model", ("layers.0.self_attn.q_norm.",)),
    ("another language model", ("layers.0.self_attn.q_proj.",)),
    ("a cache file of latents", ("latents_1x",)),
    ("a cache file of text-encoder outputs", ("varlen_",)),
)

QUANTIZED_MARKS = (
    ("scaled fp8", ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".comfy_quant")),
    ("bitsandbytes 4- or 8-bit", (".absmax", ".weight_format", ".SCB")),
    ("quantized (packed integers)", (".qweight", ".wscales", ".qzeros")),
)

_MAGIC = (
    (b"GGUF", "a GGUF file (quantized weights)"),
    (b"PK\x03\x04", "a PyTorch pickle or zip archive, which can run code when it is read"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "a web page, not the file itself"),
    (b"<html", "a web page, not the file itself"),
)


@dataclass(frozen=True)
class Recognised:
    """What a set of tensors is."""

    description: str
    """In words, with an article."""
    role: str | None = None
    """The role it can play, even when its weights are of a kind that is not supported."""
    layout: str = ""
    prefix: str = ""
    """What stands before every official tensor name."""
    unsupported: str = ""
    """How the weights are stored, when it is a way that cannot be loaded."""


def recognise(tensors: Mapping[str, TensorInfo]) -> Recognised:
    """Tell what these tensors are: one of the three models, an adapter, another known model, or an unknown one."""
    adapter = next((name for name in tensors if _is_adapter(name)), None)
    if adapter is not None:
        return Recognised(f"a LoRA or other adapter (it has {adapter!r})")
    if not tensors:
        return Recognised("a file without tensors")
    for description, parts in LOOKALIKES:
        if _matches(tensors, parts):
            return Recognised(description)
    for (role, layout), anchors in LAYOUT_ANCHORS.items():
        prefix = _prefix(tensors, anchors)
        if prefix is not None:
            return Recognised(EXPECTED[role].name, role, layout, prefix, _storage(tensors, prefix))
    for description, parts in OTHER_MODELS:
        if _matches(tensors, parts):
            return Recognised(description)
    return Recognised(_unknown(tensors), unsupported=_storage(tensors, ""))


def recognise_foreign(path: str | Path) -> str | None:
    """Tell what a file that is no safetensors file is, from its first bytes; None when they say nothing."""
    try:
        with open_file(path) as stream:
            head = stream.read(64)
    except ValueError:
        return None
    if not head:
        return "an empty file"
    for magic, description in _MAGIC:
        if head.lower().startswith(magic.lower()):
            return description
    # pickle protocols 2 to 5 start with their number; a header of exactly that many bytes is not to be expected
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which can run code when it is read"
    return None


def _is_adapter(name: str) -> bool:
    return name.startswith(("lora_unet_", "lora_te_", "lycoris_")) or any(mark in name for mark in ADAPTER_MARKS)


def _prefix(names: Collection[str], anchors: tuple[str, ...]) -> str | None:
    """The shortest prefix behind which all anchors stand, or None."""
    first, *others = anchors
    candidates = sorted((name.removesuffix(first) for name in names if name.endswith(first)), key=len)
    for prefix in candidates:
        if (not prefix or prefix.endswith(".")) and all(prefix + other in names for other in others):
            return prefix
    return None


def _matches(names: Collection[str], parts: tuple[str, ...]) -> bool:
    return all(any(part in name for name in names) for part in parts)


def _storage(tensors: Mapping[str, TensorInfo], prefix: str) -> str:
    """How the weights are stored, when it is in a way that cannot be loaded; otherwise nothing."""
    for description, marks in QUANTIZED_MARKS:
        if any(name.endswith(marks) for name in tensors):
            return description
    others = sorted({info.dtype for name, info in tensors.items() if name.startswith(prefix)} - set(WEIGHT_DTYPES))
    if not others:
        return ""
    return "fp8" if others[0].startswith("F8") else f"{others[0]}, not floating point"


def _unknown(tensors: Mapping[str, TensorInfo]) -> str:
    names = sorted(tensors)
    return f"an unknown model ({len(names)} tensors: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
