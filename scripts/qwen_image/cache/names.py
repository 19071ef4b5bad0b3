"""The field's names for cache files and the tensors in them (musubi-tuner's format 1.0.1, byte-compatible)."""

from __future__ import annotations

import re

ARCHITECTURE_TAG = "qi"  # the original text-to-image model; edit and layered have their own tags
ARCHITECTURE = "qwen_image"
FORMAT_VERSION = "1.0.1"
LATENT_SUFFIX = f"_{ARCHITECTURE_TAG}.safetensors"
TEXT_SUFFIX = f"_{ARCHITECTURE_TAG}_te.safetensors"
TEXT_FILE = re.compile(rf"(?P<stem>.*)_{ARCHITECTURE_TAG}_te(?P<number>[2-9]|[1-9][0-9]+)?\.safetensors", re.DOTALL)
VAE_SCALE = 8  # pixels a side behind one latent value
LATENT_CHANNELS = 16


def latent_file_name(stem: str, image_size: tuple[int, int]) -> str:
    """Name of an image's latent file; `image_size` is (W, H) of the source in pixels, upright."""
    width, height = image_size
    return f"{stem}_{width:04d}x{height:04d}{LATENT_SUFFIX}"


def text_file_name(stem: str, caption: int = 1) -> str:
    """Name of the text-encoder output file of an image's n-th caption, from 1.

    The first has the field's name. The others', with the number before the ending, are none that the field looks for,
    and belong to no other stem.
    """
    return f"{stem}{TEXT_SUFFIX}" if caption == 1 else f"{stem}_{ARCHITECTURE_TAG}_te{caption}.safetensors"


def split_text_file_name(name: str) -> tuple[str, int] | None:
    """Return the stem and the caption's number that a text-encoder output file is named by; None for other names."""
    match = TEXT_FILE.fullmatch(name)
    return match and (match["stem"], int(match["number"] or 1))


def latent_tensor_name(bucket: tuple[int, int], dtype: str) -> str:
    """Name of the latent tensor of shape (16, 1, H/8, W/8) for a bucket (W, H) in pixels."""
    width, height = bucket
    return f"latents_1x{height // VAE_SCALE}x{width // VAE_SCALE}_{dtype}"


def text_tensor_name(dtype: str) -> str:
    """Name of the embedding tensor of shape (tokens, hidden size)."""
    return f"varlen_vl_embed_{dtype}"
