"""Filling a model from its checkpoint tensor by tensor, so that the peak is one copy of the weights plus one tensor.

The model is built on the meta device first. Tensors are read with ordinary reads, not mapped: a mapped tensor would
keep the user's file open and crash the process when that file is truncated or its disk goes away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

import accelerate
import torch
from torch import nn
from tqdm import tqdm

from qwen_image.container import TensorInfo
from qwen_image.models.checkpoint import Checkpoint
from qwen_image.models.float8 import Float8Linear
from qwen_image.problems import InputError

PROGRESS_BYTES = 1_000_000_000
"""Loads of less than this finish before a progress bar is of use."""


class StoredDifferently(ABC):
    """A module whose tensors stand in the checkpoint in another form, or under more names, than it keeps them in."""

    keeps_float32 = False
    """Whether they are fp32 whatever the model's dtype."""

    @abstractmethod
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of its tensors in the checkpoint, by the last part of its name."""

    @abstractmethod
    def kept(self, name: str, stored: torch.Tensor) -> torch.Tensor | None:
        """Return what the module keeps of a stored tensor, in the memory format it wants; None where it is nothing."""


def empty_model(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose parameters have shapes but no storage; its buffers are real, because they are computed."""
    with accelerate.init_empty_weights(include_buffers=False):
        return build()


def fill(model: nn.Module, checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Read every tensor of the checkpoint into the model, in ``dtype`` on ``device``, and return it in eval mode.

    Float8Linear modules take their weight in fp8 instead, StoredDifferently ones what they keep of it. Gradients are
    off. Raises InputError when tensors are missing, left over or of another shape; nothing has been read by then.
    """
    official = checkpoint.official_names()
    _check_names(model, checkpoint, official)
    total = sum(info.end - info.start for _, name, info in checkpoint.tensors() if official[name])
    # one buffer for every read: freeing and taking blocks of all sizes would leave holes in the heap
    buffer = torch.empty(max(info.end - info.start for _, _, info in checkpoint.tensors()), dtype=torch.uint8)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"load {checkpoint.role}", disable=total < PROGRESS_BYTES)
    with bar:
        for file, entries in groupby(checkpoint.tensors(), key=itemgetter(0)):
            with open(file, "rb", buffering=0) as stream:
                for _, name, info in entries:
                    if official[name]:
                        tensor = _read(stream, checkpoint.headers[file].data_start, info, buffer)
                        _place(model, official[name], tensor, torch.device(device), dtype)
                        bar.update(info.end - info.start)
    return model.to(device).eval().requires_grad_(False)


def _check_names(model: nn.Module, checkpoint: Checkpoint, official: dict[str, str | None]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            expected.pop(f"{name}.scale")
        if isinstance(module, StoredDifferently):
            expected |= {f"{name}.{leaf}": shape for leaf, shape in module.stored_shapes().items()}
    found = {official[name]: info.shape for _, name, info in checkpoint.tensors() if official[name]}
    kinds = {
        "lacks {}": sorted(expected.keys() - found.keys()),
        "has {}, unknown to this model": sorted(found.keys() - expected.keys()),
        "has {}, of another shape than its dimensions say": sorted(
            name for name in expected.keys() & found.keys() if expected[name] != found[name]
        ),
    }
    problems = [
        checkpoint.problem(
            f"this is {checkpoint.recognised.description}, but it {words.format(_some(names))}",
            "download it again, or use another copy of the model",
        )
        for words, names in kinds.items()
        if names
    ]
    if problems:
        raise InputError(problems)


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{len(names)} tensors such as {names[0]!r}"


def _read(stream: BinaryIO, data_start: int, info: TensorInfo, buffer: torch.Tensor) -> torch.Tensor:
    """Read one tensor as stored into the buffer; it is valid until the next read."""
    raw = buffer[: info.end - info.start]
    view = memoryview(raw.numpy())
    stream.seek(data_start + info.start)
    position = 0
    while position < len(view):
        count = stream.readinto(view[position:])  # may return less than asked for
        if not count:
            raise OSError(f"{stream.name} became shorter while it was read")
        position += count
    return raw.view(getattr(torch, info.torch_dtype)).reshape(info.shape)


def _place(model: nn.Module, name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Put a copy of a tensor into the parameter of that name."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, Float8Linear) and leaf == "weight":
        parent.quantize(tensor.to(device))
        return
    if isinstance(parent, StoredDifferently):
        tensor = parent.kept(leaf, tensor)
        dtype = torch.float32 if parent.keeps_float32 else dtype
    if tensor is not None:
        copy = tensor.to(device, dtype, copy=True)
        parent.register_parameter(leaf, nn.Parameter(copy, requires_grad=False))
