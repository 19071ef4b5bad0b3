"""Loading Qwen-Image's VAE."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage

from qwen_image.models.checkpoint import open_checkpoint
from qwen_image.models.streaming import empty_model, fill


def load_vae(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKLQwenImage:
    """Load the VAE from a file, sharded set, folder or pipeline; ``dtype`` None keeps the dtype of the stored weights.

    Takes diffusers' names and Wan's. Returns it in eval mode without gradients. Raises InputError.
    """
    checkpoint = open_checkpoint(path, "vae")
    config = checkpoint.model_config()
    if dtype is None:
        # files may keep a few norms in fp32; one dtype for all, that of the most values
        sizes = Counter()
        for _, _, info in checkpoint.tensors():
            sizes[info.torch_dtype] += info.end - info.start
        dtype = getattr(torch, sizes.most_common(1)[0][0])
    return fill(empty_model(lambda: AutoencoderKLQwenImage.from_config(config)), checkpoint, device, dtype)
