"""Loading Qwen-Image's transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from qwen_image.models.checkpoint import open_checkpoint
from qwen_image.models.streaming import empty_model, fill


def load_transformer(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> QwenImageTransformer2DModel:
    """Load the transformer from a file, sharded set, folder or pipeline.

    Returns it in eval mode without gradients. Raises InputError.
    """
    checkpoint = open_checkpoint(path, "dit")
    config = checkpoint.model_config()
    return fill(empty_model(lambda: QwenImageTransformer2DModel.from_config(config)), checkpoint, device, dtype)
