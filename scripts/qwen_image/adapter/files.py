"""The adapter as a file: tensor names and metadata that ComfyUI, diffusers and the field's tools read as they are."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load

from qwen_image.adapter.schemes import CONVERSIONS, DIFFUSERS_PREFIX, held, scheme_of, to_kohya
from qwen_image.adapter.tensors import ALPHA, alpha_of, by_module, named_tensors, rank_of
from qwen_image.bounded import parse_json
from qwen_image.container import ContainerError, read_header, write_safetensors
from qwen_image.models.recognise import recognise_foreign
from qwen_image.problems import InputError, Problem
from qwen_image.training.file_names import DIFFUSERS
from qwen_image.training.metadata import with_hashes

PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PEFT_KEY = "lora_adapter_metadata"
"""Metadata in which diffusers keeps peft's config: an alpha there holds for tensors that have none beside them."""
DOWN = ".lora_A.weight"
GIVE = "give an adapter of Qwen-Image as .safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds."""

    tensors: dict[str, torch.Tensor]
    """By the names in the file, whichever scheme they are of."""
    metadata: dict[str, str]
    data_sha256: str
    """Hash of the data section, which ``sshs_model_hash`` must be."""


def adapter_tensors(transformer: torch.nn.Module, *, precision: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by the field's names, the matrices in this precision.

    An alpha that the precision cannot hold stays float32, since every weight is multiplied by it. So do a DoRA's
    magnitudes: rounding them would change the base model's weights, which the adapter should leave alone.
    """
    dtype = PRECISIONS[precision]
    return {name: _in_precision(name, tensor, dtype) for name, tensor in named_tensors(transformer).items()}


def files_of(
    path: Path, tensors: Mapping[str, torch.Tensor], save_format: str
) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Return the files, with their tensors, that ``save_format`` makes of the field's tensors; `path` is the last.

    Raises SchemeError where diffusers has no names for this kind of adapter.
    """
    if save_format != "both":
        return [(path, CONVERSIONS[save_format](tensors))]
    beside = path.with_name(f"{path.stem}{DIFFUSERS}{path.suffix}")
    return [(beside, CONVERSIONS["diffusers"](tensors)), (path, CONVERSIONS["kohya"](tensors))]


def save_adapter(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all. Equal tensors and metadata give equal bytes.

    Where alpha is folded into the tensors, the metadata's alpha is the rank, which is how such a file is scaled.
    """
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    if scheme_of(on_cpu) == "diffusers" and "ss_network_dim" in metadata:
        metadata = {**metadata, "ss_network_alpha": metadata["ss_network_dim"]}
    write_safetensors(path, on_cpu, with_hashes(on_cpu, metadata))


def read_adapter(path: str | Path) -> dict[str, torch.Tensor]:
    """Return an adapter file's tensors by the names in it, with the alphas that diffusers keeps in the metadata.

    Raises InputError for what is no whole safetensors file. Nothing is ever unpickled.
    """
    file = open_adapter(path)
    return {**file.tensors, **_alphas_of_metadata(path, file)}


def open_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter's file. Raises InputError for what is no whole safetensors file."""
    try:
        header = read_header(path)
        content = Path(path).read_bytes()
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise InputError([Problem(file=str(path), found=found, mend=GIVE)]) from error
    except ContainerError as error:
        foreign = recognise_foreign(path)
        found = f"{foreign}, not safetensors" if foreign else str(error)
        raise InputError([Problem(file=str(path), found=found, mend=GIVE)]) from error
    digest = hashlib.sha256(memoryview(content)[header.data_start :]).hexdigest()
    return AdapterFile(load(content), header.metadata, digest)


def network_size(tensors: Mapping[str, torch.Tensor]) -> tuple[int, float] | None:
    """Return the rank and alpha of most modules; None where no module has a rank, as in a LoKr of whole matrices."""
    modules = by_module(to_kohya(tensors)).values()
    sizes = Counter((rank, alpha_of(parts) or rank) for parts in modules if (rank := rank_of(parts)))
    return sizes.most_common(1)[0][0] if sizes else None


def _in_precision(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if name.endswith(".dora_scale"):
        return tensor
    return held(tensor, dtype) if name.endswith(f".{ALPHA}") else tensor.to(dtype)


def _alphas_of_metadata(path: str | Path, file: AdapterFile) -> dict[str, torch.Tensor]:
    """Return the alphas that peft's config in the metadata adds to a file that has none beside its tensors."""
    from peft.utils.other import get_pattern_key

    downs = {name.removesuffix(DOWN): tensor for name, tensor in file.tensors.items() if name.endswith(DOWN)}
    if PEFT_KEY not in file.metadata or not downs or any(name.endswith(f".{ALPHA}") for name in file.tensors):
        return {}
    try:
        given = parse_json(file.metadata[PEFT_KEY])
        own = {key.removeprefix(DIFFUSERS_PREFIX): given[key] for key in given if key.startswith(DIFFUSERS_PREFIX)}
        alpha, patterns = float(own["lora_alpha"]), dict(own.get("alpha_pattern") or {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"holds no config of peft that has an alpha ({type(error).__name__}: {error})"
        raise InputError([Problem(file=str(path), key=PEFT_KEY, found=found, mend=GIVE)]) from error
    alphas = {}
    for module, down in downs.items():
        key = get_pattern_key(patterns.keys(), module.removeprefix(DIFFUSERS_PREFIX))
        # rank-stabilised: alpha is divided by the root of the rank
        factor = math.sqrt(down.shape[0]) if own.get("use_rslora") else 1
        alphas[f"{module}.{ALPHA}"] = torch.tensor(float(patterns.get(key, alpha)) * factor)
    return alphas
