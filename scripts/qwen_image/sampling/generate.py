"""From noise to pictures: the model's own schedule of noise levels, guidance, Euler steps, and the VAE's decoder.

C latent channels (16), h and w latent sides, L text tokens, D hidden size of the text, H and W sides in pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from qwen_image.bounded import parse_json, read_text
from qwen_image.cache.names import LATENT_CHANNELS, VAE_SCALE
from qwen_image.models.locate import is_pipeline
from qwen_image.problems import InputError, Problem
from qwen_image.training.flow import predict_velocity
from qwen_image.training.randomness import generator

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.models.image_vae import ImageVae
    from qwen_image.sampling.prompts import SamplePrompt

PUBLISHED = {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True, "time_shift_type": "exponential",
    "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip
"""The scheduler that the public Qwen-Image model comes with."""


def scheduler_config(dit: str | Path) -> dict:
    """Return the configuration of the scheduler: that of the pipeline that `dit` is or lies in, else the published one.

    Raises InputError when the pipeline's cannot be read.
    """
    pipeline = next((folder for folder in (Path(dit), Path(dit).parent) if is_pipeline(folder)), Path(dit))
    file = pipeline / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return PUBLISHED
    try:
        config = dict(parse_json(read_text(file)))
    except (OSError, ValueError, TypeError) as error:
        mend = "download the folder again, all from one place"
        raise InputError([Problem(file=str(file), found=f"cannot be read ({error})", mend=mend)]) from error
    return {key: value for key, value in config.items() if not key.startswith("_")}


def make_schedule(config: dict, prompt: SamplePrompt) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler at the start of the prompt's steps, with the shift for its size or its own fixed one."""
    more: dict[str, object] = {}
    if prompt.discrete_flow_shift is not None:
        more |= {"use_dynamic_shifting": False, "shift": prompt.discrete_flow_shift}
    if prompt.sample_steps == 1:
        # one level, full noise, cannot be stretched to end elsewhere
        more["shift_terminal"] = None
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config | more)
    mu = dynamic_shift(scheduler.config, image_tokens(prompt)) if scheduler.config.use_dynamic_shifting else None
    sigmas = numpy.linspace(1.0, 1 / prompt.sample_steps, prompt.sample_steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler


def dynamic_shift(config: dict, tokens: int) -> float:
    """Return the shift's logarithm for a picture of so many image tokens: a straight line through two sizes."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return config["base_shift"] + slope * (tokens - low)


def image_tokens(prompt: SamplePrompt) -> int:
    """Number of the model's 2 x 2 patches of the prompt's picture."""
    return prompt.width * prompt.height // (2 * VAE_SCALE) ** 2


def initial_noise(prompt: SamplePrompt) -> torch.Tensor:
    """Return (1, C, 1, h, w) from the prompt's seed, the same on every device and whatever was drawn before."""
    shape = (1, LATENT_CHANNELS, 1, prompt.height // VAE_SCALE, prompt.width // VAE_SCALE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))


@torch.no_grad()
def generate_latents(
    transformer: QwenImageTransformer2DModel,
    noise_bc1hw: torch.Tensor,
    text_ld: torch.Tensor,
    negative_ld: torch.Tensor | None,
    scheduler: FlowMatchEulerDiscreteScheduler,
    *,
    cfg_scale: float,
    seed: int = 0,
) -> torch.Tensor:
    """Denoise one picture; returns its normalised latents in float32 on the transformer's device.

    Without a negative embedding there is no guidance. `seed` is for a scheduler that adds noise between steps. Not
    inference mode: the model keeps tables of positions between calls, and training could not use tables made in it.
    """
    weight = transformer.txt_in.weight
    device, dtype = weight.device, weight.dtype
    z_bc1hw = noise_bc1hw.to(device)
    text_bld = text_ld[None].to(device, dtype)
    negative_bld = None if negative_ld is None else negative_ld[None].to(device, dtype)
    random = generator("noise between steps", seed)
    for t in scheduler.timesteps:
        t_b = (t / scheduler.config.num_train_timesteps).expand(1).to(device)
        # as in training: float32 latents, and the model's own precision inside
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            velocity_bc1hw = predict_velocity(transformer, z_bc1hw, t_b, text_bld, None).float()
            if negative_bld is not None:
                negative_bc1hw = predict_velocity(transformer, z_bc1hw, t_b, negative_bld, None).float()
                velocity_bc1hw = guided(velocity_bc1hw, negative_bc1hw, cfg_scale)
        z_bc1hw = scheduler.step(velocity_bc1hw, t, z_bc1hw, generator=random, return_dict=False)[0]
    return z_bc1hw


def guided(velocity_bc1hw: torch.Tensor, negative_bc1hw: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the velocity moved away from the negative one, each image token at its former length.

    A token is a patch of 2 x 2 latent values, all channels.
    """
    moved_bc1hw = negative_bc1hw + scale * (velocity_bc1hw - negative_bc1hw)
    return moved_bc1hw * (_token_norms(velocity_bc1hw) / _token_norms(moved_bc1hw))


def decode(vae: ImageVae, latents_bc1hw: torch.Tensor) -> Image.Image:
    """Return the picture of one latent."""
    pixels_chw = vae.decode_latents(latents_bc1hw)[0]
    # NaN has no colour: it would become black without a word
    if not torch.isfinite(pixels_chw).all():
        raise ValueError("the picture is no number (NaN or Inf)")
    pixels_hwc = ((pixels_chw + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels_hwc.cpu().numpy())


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every part of a model into eval mode and back into the one it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _token_norms(velocity_bc1hw: torch.Tensor) -> torch.Tensor:
    """The length of each token, at each of its places: (B, 1, 1, h, w)."""
    squares_b1hw = velocity_bc1hw.square().sum(1)
    means_b1hw = torch.nn.functional.avg_pool2d(squares_b1hw, 2)
    norms_b1hw = (4 * means_b1hw).sqrt()
    return norms_b1hw.repeat_interleave(2, -1).repeat_interleave(2, -2).unsqueeze(1)
