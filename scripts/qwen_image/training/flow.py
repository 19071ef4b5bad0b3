"""Flow matching: noise levels, noisy latents, the model's prediction and the loss, as functions of tensors alone.

Tensors are named with their shape: B items, C latent channels (16), h and w latent sides, N = (h/2)(w/2) image tokens,
L text tokens, D hidden size of the text, P = 4C values of a packed patch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

NORMAL_LAWS = ("qwen_shift", "shift", "sigmoid")
LAWS = (*NORMAL_LAWS, "uniform")


def noise_level(
    law: str,
    draw: float,
    *,
    tokens: int,
    sigmoid_scale: float = 1.0,
    shift: float = 1.0,
    low: int = 0,
    high: int = 1000,
) -> float:
    """Return t in [0, 1] from one random number: standard normal for the NORMAL_LAWS, uniform for ``uniform``.

    `shift` counts for the law ``shift`` alone; ``qwen_shift`` takes its own from the number of image tokens. `low` and
    `high` squeeze the law into a part of the range, in thousandths.
    """
    if law == "uniform":
        t = draw
    else:
        assert law in NORMAL_LAWS, law
        t = _sigmoid(sigmoid_scale * draw)
        if law != "sigmoid":
            k = shift if law == "shift" else qwen_shift(tokens)
            t = k * t / (1 + (k - 1) * t)
    return (low + t * (high - low)) / 1000


def qwen_shift(tokens: int) -> float:
    """Return e^mu, mu on the line through (256 tokens, 0.5) and (8192, 0.9): the model's own scheduler's shift."""
    return math.exp(0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256))


def noisy_latents(z0_bc1hw: torch.Tensor, noise_bc1hw: torch.Tensor, t_b: torch.Tensor) -> torch.Tensor:
    """Return z_t = (1 - t) z0 + t noise, in float32."""
    t_b1111 = t_b.view(-1, 1, 1, 1, 1)
    return (1 - t_b1111) * z0_bc1hw.float() + t_b1111 * noise_bc1hw


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    z_bc1hw: torch.Tensor,
    t_b: torch.Tensor,
    text_bld: torch.Tensor,
    mask_bl: torch.Tensor | None,
) -> torch.Tensor:
    """Return the model's velocity as (B, C, 1, h, w). It is given t itself, as diffusers' pipeline gives it."""
    batch, _, _, height, width = z_bc1hw.shape
    velocity_bnp = transformer(
        hidden_states=pack(z_bc1hw),
        timestep=t_b,
        encoder_hidden_states=text_bld,
        encoder_hidden_states_mask=mask_bl,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return unpack(velocity_bnp, height, width)


def flow_loss(velocity_bc1hw: torch.Tensor, z0_bc1hw: torch.Tensor, noise_bc1hw: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error to the target noise - z0 over all elements, in float32."""
    target_bc1hw = noise_bc1hw - z0_bc1hw.float()
    return torch.nn.functional.mse_loss(velocity_bc1hw.float(), target_bc1hw)


def pack(z_bc1hw: torch.Tensor) -> torch.Tensor:
    """Return (B, N, P): patches of 2 x 2 in rows, each ordered channel, dy, dx, as diffusers packs them."""
    batch, channels, _, height, width = z_bc1hw.shape
    patches = z_bc1hw.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(z_bnp: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return (B, C, 1, h, w), the inverse of `pack`; height and width are those of the latent."""
    batch, _, values = z_bnp.shape
    patches = z_bnp.reshape(batch, height // 2, width // 2, values // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, values // 4, 1, height, width)


def _sigmoid(x: float) -> float:
    # the two forms keep exp from overflowing
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
