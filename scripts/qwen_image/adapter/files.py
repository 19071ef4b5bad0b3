"""The LoRA as a file: tensor names and metadata that ComfyUI, diffusers and the field's tools read as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qwen_image.adapter.network import ADAPTER, lora_layers
from qwen_image.container import write_safetensors
from qwen_image.training.metadata import with_hashes

PREFIX = "lora_unet_"
PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_lora(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all. Equal tensors and metadata give equal bytes."""
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_safetensors(path, on_cpu, with_hashes(on_cpu, metadata))


def lora_tensors(transformer: torch.nn.Module, *, precision: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors, three a module, named as the field names them.

    ``lora_down.weight`` (rank, in), ``lora_up.weight`` (out, rank) and the scalar ``alpha``; the change to a weight is
    alpha / rank * up @ down.
    """
    dtype = PRECISIONS[precision]
    tensors = {}
    for path, layer in lora_layers(transformer):
        name = PREFIX + path.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = layer.lora_A[ADAPTER].weight.detach().to(dtype)
        tensors[f"{name}.lora_up.weight"] = layer.lora_B[ADAPTER].weight.detach().to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(layer.lora_alpha[ADAPTER], dtype=dtype)
    return tensors
