"""Qwen-Image's VAE for single pictures, as fast as a CPU lets it be: pixels to normalised latents and back.

Shapes: B pictures, H and W their sides in pixels, h = H/8 and w = W/8 with the published four levels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from qwen_image.models.image_vae_blocks import FrameConv, MidBlock, ResidualBlock, RmsNorm, Unused, UpsampleConv

if TYPE_CHECKING:
    import numpy

BASE_DIM = 96
"""Base width of the published model."""
COMPILE_WORTH_PIXELS = 20_000_000
"""From how many pixels on compiling the encoder pays on a CPU with AMX: 76 pictures of 512x512."""


def worth_compiling(total_pixels: int, base_dim: int, device: str | torch.device) -> bool:
    """Whether encoding this many pixels takes so long that compiling first is faster; on a CPU with AMX only.

    Measured with the full-size encoder on two cores without AMX (benchmarks/vae.py): compiled it is no faster than
    eager, in bf16 and fp32, for convolutions take nearly all the time. With AMX they take a fraction of it, and the
    passes over memory between them, which compiling saves and which grow with the model's base width, weigh more.
    Compiling took 37 to 47 s the first time and 14 s from the cache on disk.
    """
    has_amx = torch.device(device).type == "cpu" and torch.cpu._is_amx_tile_supported()
    return has_amx and total_pixels * base_dim >= COMPILE_WORTH_PIXELS * BASE_DIM


class ImageVae(nn.Module):
    """AutoencoderKLQwenImage for one frame. Empty until it is filled with weights of `dtype`.

    `config` holds that class's arguments, all of them.
    """

    def __init__(self, config: Mapping, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = dict(config)
        z_dim = config["z_dim"]
        self.encoder = Encoder(config)
        # the posterior's mode is the first half of the output; nobody asks for its variance
        self.quant_conv = FrameConv(2 * z_dim, z_dim, 1, stored_channels=2 * z_dim)
        self.post_quant_conv = FrameConv(z_dim, z_dim, 1)
        self.decoder = Decoder(config, merged=dtype == torch.float32)
        self._encode: Callable[[torch.Tensor], torch.Tensor] = self._mode
        self._decode: Callable[[torch.Tensor], torch.Tensor] = self._picture

    @property
    def dtype(self) -> torch.dtype:
        """What convolutions compute in, and the dtype of latents."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_conv.weight.device

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide and high a latent's position is; sides of pictures are multiples of it."""
        return 2 ** (len(self.config["dim_mult"]) - 1)

    @torch.inference_mode()
    def encode_pixels(self, pixels_bhwc: numpy.ndarray) -> torch.Tensor:
        """Encode uint8 RGB pixels (B, H, W, 3) to normalised latents (B, 16, 1, h, w) in the VAE's dtype.

        The posterior's mode, then (z - mean) * (1/std) with both vectors cast to the VAE's dtype first, as the field's
        training code expects it. On a CPU at a fixed number of threads the result depends on the picture alone.
        Raises ValueError for sides that are not multiples of `pixels_per_latent`.
        """
        height, width = pixels_bhwc.shape[1:3]
        if height % self.pixels_per_latent or width % self.pixels_per_latent:
            raise ValueError(f"{width}x{height} pixels: both sides must be multiples of {self.pixels_per_latent}")
        x_bhwc = torch.from_numpy(pixels_bhwc).to(self.device).float() / 127.5 - 1
        z_bchw = self._encode(x_bhwc.to(self.dtype).permute(0, 3, 1, 2))
        mean, std = self._statistics()
        return ((z_bchw - mean) * (1.0 / std)).contiguous().unsqueeze(2)

    @torch.inference_mode()
    def decode_latents(self, latents_bcfhw: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents (B, 16, 1, h, w) to fp32 pictures (B, 3, H, W) from -1 to 1."""
        mean, std = self._statistics()
        z_bchw = latents_bcfhw.squeeze(2).to(self.device, self.dtype) / (1.0 / std) + mean
        return self._decode(z_bchw.contiguous(memory_format=torch.channels_last)).float().contiguous()

    def compile(self, cache_folder: str | Path, part: Literal["encoder", "decoder"] = "encoder") -> bool:
        """Compile one part for every size at once; return whether it could be done, else it stays as it was.

        What is compiled is kept in TORCHINDUCTOR_CACHE_DIR or, where that is not set, in `cache_folder`. A reason not
        to compile is printed on stderr.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache_folder).absolute()))
        encodes = part == "encoder"
        channels, inner = (3, self._mode) if encodes else (self.config["z_dim"], self._picture)
        compiled = torch.compile(inner, dynamic=True, fullgraph=True)
        # A batch of one and two sides that differ, so that a square is no special case; large enough for the ordinary
        # convolution, or fp32 pictures of more than about 40,000 pixels would be compiled for a second time.
        unit = self.pixels_per_latent if encodes else 1
        try:
            with torch.inference_mode():  # the example must be an inference tensor too, or the first picture recompiles
                example_bhwc = torch.zeros(1, 40 * unit, 56 * unit, channels, dtype=self.dtype, device=self.device)
                compiled(example_bhwc.permute(0, 3, 1, 2))
        except Exception as error:  # whatever a compiler may stumble over, the eager model gives the same values
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"the VAE's {part} runs uncompiled: {reason}", file=sys.stderr)
            return False
        setattr(self, "_encode" if encodes else "_decode", compiled)
        return True

    def _mode(self, x_bchw: torch.Tensor) -> torch.Tensor:
        # the encoder works on a picture turned by 180 degrees
        return self.quant_conv(self.encoder(x_bchw.flip(2, 3))).flip(2, 3)

    def _picture(self, z_bchw: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z_bchw)).clamp(-1, 1)

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(self.config[name], dtype=self.dtype, device=self.device).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, std


class Encoder(nn.Module):
    """A picture turned by 180 degrees to the posterior's mean and log-variance, before the last 1x1 convolution.

    The published encoder halves a picture with a stride of 2 over one row and column of zeros at the bottom right. No
    convolution pads that side alone, so there it would take a padded copy of its largest tensors; at the top left it
    needs none, because of an even side the last row or column of padding is not reached.
    """

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        widths = [config["base_dim"] * factor for factor in (1, *config["dim_mult"])]
        self.conv_in = FrameConv(3, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (channels, width) in enumerate(pairwise(widths)):
            for index in range(config["num_res_blocks"]):
                self.down_blocks.append(ResidualBlock(width if index else channels, width))
            if level + 2 < len(widths):
                self.down_blocks.append(Downsample(width, over_time=config["temperal_downsample"][level]))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = FrameConv(widths[-1], 2 * config["z_dim"])
        for module in self.modules():
            if isinstance(module, FrameConv):
                module.mirrored = True

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 32, h, w)."""
        x_bchw = self.conv_in(x_bchw)
        for block in self.down_blocks:
            x_bchw = block(x_bchw)
        return self.conv_out(self.norm_out(self.mid_block(x_bchw), in_place=True))


class Decoder(nn.Module):
    """Latents to a picture, which may leave the range from -1 to 1; `merged` is for its UpsampleConvs."""

    def __init__(self, config: Mapping, *, merged: bool) -> None:
        super().__init__()
        widths = [config["base_dim"] * factor for factor in (config["dim_mult"][-1], *config["dim_mult"][::-1])]
        over_time = config["temperal_downsample"][::-1]
        self.conv_in = FrameConv(config["z_dim"], widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (channels, width) in enumerate(pairwise(widths)):
            # an upsampler has halved the channels
            block = UpBlock(channels // 2 if level else channels, width, config["num_res_blocks"] + 1)
            if level + 2 < len(widths):
                block.upsamplers.append(Upsample(width, merged=merged, over_time=over_time[level]))
            self.up_blocks.append(block)
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = FrameConv(widths[-1], 3)

    def forward(self, z_bchw: torch.Tensor) -> torch.Tensor:
        """(B, 16, h, w) to (B, 3, H, W)."""
        x_bchw = self.mid_block(self.conv_in(z_bchw))
        for block in self.up_blocks:
            x_bchw = block(x_bchw)
        return self.conv_out(self.norm_out(x_bchw, in_place=True))


class Downsample(nn.Module):
    """Half the sides."""

    def __init__(self, channels: int, *, over_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(channels, channels, frames=0, stride=2)})
        self.time_conv = Unused(channels, channels) if over_time else None

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return self.resample["1"](x_bchw)


class Upsample(nn.Module):
    """Twice the sides, half the channels."""

    def __init__(self, channels: int, *, merged: bool, over_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": UpsampleConv(channels, channels // 2, merged=merged)})
        self.time_conv = Unused(channels, 2 * channels) if over_time else None

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C/2, 2H, 2W)."""
        return self.resample["1"](x_bchw)


class UpBlock(nn.Module):
    """A level of the decoder; the last one gets no upsampler."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(out_channels if index else in_channels, out_channels) for index in range(blocks)]
        )
        self.upsamplers = nn.ModuleList()

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H, W), or (B, C'/2, 2H, 2W) with an upsampler."""
        for block in (*self.resnets, *self.upsamplers):
            x_bchw = block(x_bchw)
        return x_bchw
