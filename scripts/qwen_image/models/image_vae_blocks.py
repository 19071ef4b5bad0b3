"""The layers of Qwen-Image's VAE for a single picture: 2D convolutions on channels_last memory.

Every causal 3D convolution of the published model sees one frame behind frames of zeros, so only the last temporal
slice of its kernel meets data, and a 2D convolution with that slice gives the same values. Shapes: B pictures, C
channels, H and W the sides at that layer, N = B*H*W positions.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from qwen_image.models.streaming import StoredDifferently

CHUNK_VALUES = 1 << 20
"""How many values are normalised at a time: 4 MB of fp32 stay in a cache, and threads wait for each other rarely."""
TINY = 1e-12
"""What a vector's length is at least taken for, as functional.normalize does."""


class FrameConv(StoredDifferently, nn.Conv2d):
    """A convolution stored with a time axis of `frames` (0: stored as it is), of which one frame meets the last.

    Of the stored output channels only the first `out_channels` are kept. A `mirrored` one is turned by 180 degrees.
    """

    mirrored = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        frames: int | None = None,
        stored_channels: int | None = None,
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        padding = kernel // 2 if padding is None else padding
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=padding)
        self.frames = kernel if frames is None else frames
        self.stored_channels = stored_channels or out_channels

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the checkpoint."""
        time = (self.frames,) if self.frames else ()
        kernel = (self.stored_channels, self.in_channels, *time, *self.kernel_size)
        return {"weight": kernel, "bias": (self.stored_channels,)}

    def kept(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The slice of the kernel that meets the picture."""
        stored = stored[: self.out_channels]
        if name == "bias":
            return stored.clone()
        kernel = stored[:, :, -1] if self.frames else stored
        return (kernel.flip(2, 3) if self.mirrored else kernel).clone(memory_format=torch.channels_last)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x); `residual` may be overwritten."""
        if torch.compiler.is_compiling():
            return residual + self(x)
        if not _adds_inside(x.device.type, x.dtype):
            return residual.add_(self(x))
        # the sum happens inside the convolution, before it rounds: a pass over memory less, and closer
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups,
            "add", 1.0, None, [], None,
        )  # fmt: skip


class UpsampleConv(StoredDifferently, nn.Module):
    """Doubling by nearest neighbour and a 3x3 convolution; `merged`, as one 2x2 convolution at the small size.

    Each of the four outputs of a pixel sees 2x2 different pixels only. Kernel weights that meet the same one are added
    up once, which leaves 16 products of 36. The sums would lose digits in bf16, whose weights are stored exactly.
    """

    def __init__(self, in_channels: int, out_channels: int, *, merged: bool) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.merged = in_channels, out_channels, merged
        kernels, side = (4 * out_channels, 2) if merged else (out_channels, 3)
        self.weight = nn.Parameter(torch.empty(kernels, in_channels, side, side))
        self.bias = nn.Parameter(torch.empty(kernels))

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the checkpoint."""
        return {"weight": (self.out_channels, self.in_channels, 3, 3), "bias": (self.out_channels,)}

    def kept(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Where merged, the sums of the weights that meet the same pixel, for each of the four outputs."""
        if name == "bias":
            return stored.repeat(4) if self.merged else stored.clone()
        if not self.merged:
            return stored.clone(memory_format=torch.channels_last)
        # [output, pixel, weight] along one axis: the first output sees the pixel before and its own, the second its
        # own and the one after
        sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
        weight = torch.einsum("ypk,xql,oikl->yxoipq", sums, sums, stored.float())
        return weight.flatten(0, 2).contiguous(memory_format=torch.channels_last)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', 2H, 2W)."""
        _, _, height, width = x_bchw.shape
        if not self.merged:
            x_bhwc = x_bchw.permute(0, 2, 3, 1)
            return functional.conv2d(_interleaved([x_bhwc] * 4), self.weight, self.bias, padding=1)
        outputs = functional.conv2d(x_bchw, self.weight, self.bias, padding=1).permute(0, 2, 3, 1)
        # one row and one column more than there are pixels: an output's 2x2 begin before its pixel or at it
        quarters = [outputs[:, y : y + height, x : x + width] for y in range(2) for x in range(2)]
        parts = [part.chunk(4, dim=3)[index] for index, part in enumerate(quarters)]
        return _interleaved(parts)


class RmsNorm(StoredDifferently, nn.Module):
    """Every position's channels divided by their root mean square and multiplied by gamma; computed in fp32.

    `silu` applies that function to the result. `axes` is how many axes of length 1 follow the stored gamma's first.
    """

    keeps_float32 = True

    def __init__(self, channels: int, *, silu: bool = True, axes: int = 3) -> None:
        super().__init__()
        self.channels, self.silu, self.axes = channels, silu, axes
        self.gamma = nn.Parameter(torch.empty(channels))

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the checkpoint."""
        return {"gamma": (self.channels,) + (1,) * self.axes}

    def kept(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Gamma times the root of the channels, so that a vector need only be divided by its length."""
        return stored.float().flatten() * self.channels**0.5

    def forward(self, x_bchw: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        """Return the normalised values in the dtype of `x_bchw`, which is overwritten where `in_place`."""
        if torch.compiler.is_compiling() or x_bchw.device.type != "cpu":
            return self._in_one(x_bchw)
        out_bchw = x_bchw if in_place else torch.empty_like(x_bchw)
        self._in_chunks(_rows(x_bchw), _rows(out_bchw))
        return out_bchw

    def _in_one(self, x_bchw: torch.Tensor) -> torch.Tensor:
        values = x_bchw.permute(0, 2, 3, 1).float()
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_min(TINY)
        values = values / length * self.gamma
        values = functional.silu(values) if self.silu else values
        return values.to(x_bchw.dtype).permute(0, 3, 1, 2)

    def _in_chunks(self, x_nc: torch.Tensor, out_nc: torch.Tensor) -> None:
        """Read and write main memory once: a chunk stays in the cache between the steps."""
        step = max(1, CHUNK_VALUES // self.channels)
        is_float32 = x_nc.dtype == torch.float32
        buffer_nc = None if is_float32 else torch.empty(step, self.channels, dtype=torch.float32)
        for start in range(0, len(x_nc), step):
            chunk_nc, result_nc = x_nc[start : start + step], out_nc[start : start + step]
            if is_float32:
                work_nc = result_nc
            else:
                chunk_nc = work_nc = buffer_nc[: len(chunk_nc)].copy_(chunk_nc)
            length_n1 = torch.linalg.vector_norm(chunk_nc, dim=1, keepdim=True)
            torch.mul(chunk_nc, length_n1.clamp_min_(TINY).reciprocal_(), out=work_nc).mul_(self.gamma)
            if self.silu:
                functional.silu(work_nc, inplace=True)
            if not is_float32:
                result_nc.copy_(work_nc)


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut. Overwrites its input where no compiler does better."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(in_channels)
        self.conv1 = FrameConv(in_channels, out_channels)
        self.norm2 = RmsNorm(out_channels)
        self.conv2 = FrameConv(out_channels, out_channels)
        self.conv_shortcut = FrameConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        shortcut = self.conv_shortcut(x_bchw)
        # x is free to be overwritten unless it is the shortcut itself
        hidden = self.norm1(x_bchw, in_place=shortcut is not x_bchw)
        hidden = self.norm2(self.conv1(hidden), in_place=True)
        return self.conv2.add_to(shortcut, hidden)


class Attention(nn.Module):
    """Attention of one head between the positions of a picture. Overwrites its input where no compiler does better."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RmsNorm(channels, silu=False, axes=2)
        self.to_qkv = FrameConv(channels, 3 * channels, 1, frames=0)
        self.proj = FrameConv(channels, channels, 1, frames=0)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same."""
        _, _, height, _ = x_bchw.shape
        qkv_bnc = self.to_qkv(self.norm(x_bchw)).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = qkv_bnc.unsqueeze(1).chunk(3, dim=-1)
        mixed_bnc = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        return self.proj.add_to(x_bchw, mixed_bnc.unflatten(1, (height, -1)).permute(0, 3, 1, 2))


class MidBlock(nn.Module):
    """What the deepest level of encoder and decoder share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x_bchw)))


class Unused(StoredDifferently, nn.Module):
    """A convolution over time: it changes nothing before the second frame, so its weights are checked and left out."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.shape = (out_channels, in_channels, 3, 1, 1)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the checkpoint."""
        return {"weight": self.shape, "bias": self.shape[:1]}

    def kept(self, name: str, stored: torch.Tensor) -> None:
        """Nothing."""


@functools.cache
def _adds_inside(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this processor has a convolution that adds to what is there already."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def _interleaved(parts_bhwc: list[torch.Tensor]) -> torch.Tensor:
    """Put four (B, H, W, C) tensors together as (B, C, 2H, 2W): upper left, upper right, lower left, lower right."""
    batch, height, width, channels = parts_bhwc[0].shape
    if torch.compiler.is_compiling():
        rows = [torch.stack(parts_bhwc[i : i + 2], dim=3) for i in (0, 2)]
        return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    joined = parts_bhwc[0].new_empty(batch, height, 2, width, 2, channels)
    for index, part in enumerate(parts_bhwc):
        joined[:, :, index // 2, :, index % 2] = part
    return joined.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def _rows(x_bchw: torch.Tensor) -> torch.Tensor:
    """The (N, C) view of a tensor in channels_last memory."""
    return x_bchw.permute(0, 2, 3, 1).view(-1, x_bchw.shape[1])
