"""The LoRA as a file: tensor names and metadata that ComfyUI, diffusers and the field's tools read as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qwen_image.adapter.tensors import named_tensors
from qwen_image.container import write_safetensors
from qwen_image.training.metadata import with_hashes

PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_lora(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all. Equal tensors and metadata give equal bytes."""
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_safetensors(path, on_cpu, with_hashes(on_cpu, metadata))


def lora_tensors(transformer: torch.nn.Module, *, precision: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors, named as the field names them."""
    return {name: tensor.to(PRECISIONS[precision]) for name, tensor in named_tensors(transformer).items()}
