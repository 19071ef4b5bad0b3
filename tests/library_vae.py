"""diffusers' VAE with the demo's weights, and what it makes of pictures: what ours is held against."""

import numpy
import tiny
import torch
from diffusers import AutoencoderKLQwenImage


def library_vae() -> AutoencoderKLQwenImage:
    """Return the demo's VAE in fp32."""
    model = AutoencoderKLQwenImage(base_dim=16).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in tiny.stored("vae").items()})
    return model


def normalised_mode(library: AutoencoderKLQwenImage, pixels_bhwc: numpy.ndarray) -> torch.Tensor:
    """Encode uint8 pixels (B, H, W, 3) to normalised latents (B, 16, 1, h, w), on its device and in its dtype."""
    x_bcfhw = torch.from_numpy(pixels_bhwc).to(library.device).permute(0, 3, 1, 2).float().unsqueeze(2) / 127.5 - 1
    mean, std = _statistics(library)
    with torch.no_grad():
        return (library.encode(x_bcfhw.to(library.dtype)).latent_dist.mode() - mean) * (1.0 / std)


def decoded(library: AutoencoderKLQwenImage, latents_bcfhw: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents (B, 16, 1, h, w) to fp32 pictures (B, 3, H, W)."""
    mean, std = _statistics(library)
    with torch.no_grad():
        return library.decode(latents_bcfhw.to(library.dtype) / (1.0 / std) + mean).sample.squeeze(2).float()


def _statistics(library: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(library.config[name], dtype=library.dtype, device=library.device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return mean, std
