"""The three checkpoints a run needs: what each is called, and how to tell the user what belongs there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["dit", "vae", "text_encoder"]
"""The config key that names the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one config key wants."""

    name: str
    """The model in words."""
    subfolder: str
    """Its folder in a diffusers pipeline."""
    class_names: tuple[str, ...]
    """What ``_class_name`` or ``model_type`` may be in its config.json."""
    example: str
    """Where people get it."""


EXPECTED: dict[str, Expected] = {
    "dit": Expected(
        name="Qwen-Image's transformer",
        subfolder="transformer",
        class_names=("QwenImageTransformer2DModel",),
        example="qwen_image_bf16.safetensors, or the transformer/ folder of Qwen/Qwen-Image",
    ),
    "vae": Expected(
        name="Qwen-Image's VAE",
        subfolder="vae",
        class_names=("AutoencoderKLQwenImage",),
        example="qwen_image_vae.safetensors, or the vae/ folder of Qwen/Qwen-Image",
    ),
    "text_encoder": Expected(
        name="the Qwen2.5-VL text encoder",
        subfolder="text_encoder",
        class_names=("qwen2_5_vl", "qwen2_5_vl_text"),
        example="qwen_2.5_vl_7b.safetensors, or the text_encoder/ folder of Qwen/Qwen-Image",
    ),
}


def wanted(role: str) -> str:
    """Return the sentence that tells the user what to put there; ``role`` may be empty when it is not known."""
    if not role:
        return "give a safetensors checkpoint"
    expected = EXPECTED[role]
    return f"set {role} to {expected.name} in bf16, fp16 or fp32 safetensors ({expected.example})"
