"""Flow matching: noisy latents, the model's prediction and the loss, as functions of tensors alone.

Tensors are named with their shape: B items, C latent channels (16), h and w latent sides, N = (h/2)(w/2) image tokens,
L text tokens, D hidden size of the text, P = 4C values of a packed patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


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


def flow_loss(
    velocity_bc1hw: torch.Tensor,
    z0_bc1hw: torch.Tensor,
    noise_bc1hw: torch.Tensor,
    weight_b: torch.Tensor,
    *,
    loss_type: str = "mse",
    huber_delta: float = 0.1,
) -> torch.Tensor:
    """Return the mean over all elements of the items' weights times the error to the target noise - z0, in float32.

    An element's error e counts as e^2 with ``mse``. With ``huber`` it counts as 2 d^2 (sqrt(1 + (e/d)^2) - 1), d being
    `huber_delta`: as e^2 where e is small, as 2 d |e| where it is large. Unlike Huber's own law in two pieces, it is
    smooth, and where errors are small it needs no other learning rate than mse.
    """
    target_bc1hw = noise_bc1hw - z0_bc1hw.float()
    error_bc1hw = torch.nn.functional.mse_loss(velocity_bc1hw.float(), target_bc1hw, reduction="none")
    if loss_type == "huber":
        # the same number as above, written so that no digits cancel where e is small
        root_bc1hw = (error_bc1hw + huber_delta**2).sqrt()
        error_bc1hw = error_bc1hw * (2 * huber_delta / (root_bc1hw + huber_delta))
    return (error_bc1hw * weight_b.view(-1, 1, 1, 1, 1)).mean()


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
