"""Loading Qwen-Image's VAE, without the library that defines it, whose import takes longer than a small picture."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_image.container import TORCH_DTYPES
from qwen_image.models.checkpoint import Checkpoint, open_checkpoint
from qwen_image.models.image_vae import ImageVae
from qwen_image.models.streaming import empty_model, fill
from qwen_image.problems import InputError

DEFAULTS = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "input_channels": 3,
    "latents_mean": [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ],
    "latents_std": [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ],
}  # fmt: skip
"""Arguments of diffusers' AutoencoderKLQwenImage, for which a config.json or a bare file gives no value."""


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> ImageVae:
    """Load the VAE from a file, sharded set, folder or pipeline; ``dtype`` None keeps the dtype of the stored weights.

    Takes diffusers' names and Wan's. Returns it in eval mode without gradients. Raises InputError.
    """
    checkpoint = open_checkpoint(path, "vae")
    config = DEFAULTS | checkpoint.model_config()
    _check_supported(checkpoint, config)
    if dtype is None:
        dtype = getattr(torch, TORCH_DTYPES[checkpoint.main_dtype()])
    return fill(empty_model(lambda: ImageVae(config, dtype)), checkpoint, device, dtype)


def _check_supported(checkpoint: Checkpoint, config: dict) -> None:
    problems = []
    if config["input_channels"] != 3:
        found = f"this VAE takes pictures of {config['input_channels']} channels; pictures here have 3 (RGB)"
        problems.append(checkpoint.problem(found, "use the VAE of Qwen-Image, not that of its layered model"))
    if config["attn_scales"]:
        found = "this VAE has attention between its levels (attn_scales), which no published one has"
        problems.append(checkpoint.problem(found, "use the VAE of Qwen-Image"))
    lengths = dict.fromkeys(("latents_mean", "latents_std"), config["z_dim"])
    for name, length in (lengths | {"temperal_downsample": len(config["dim_mult"]) - 1}).items():
        if len(config[name]) != length:
            found = f"its config.json gives {len(config[name])} values of {name}, and the model needs {length}"
            problems.append(checkpoint.problem(found, "download the folder again, all from one place"))
    if problems:
        raise InputError(problems)
