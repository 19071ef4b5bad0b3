"""The schemes by which tools name an adapter's tensors, and going from one to another.

    kohya            lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight, alpha beside it (read by most tools)
    diffusers        transformer.transformer_blocks.0.attn.to_q.lora_A.weight, no alpha: lora_B @ lora_A is the change
    diffusion_model  diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight, alpha beside it

The change to each weight stays what it was. Between kohya and diffusion_model nothing but names is changed. Folding
alpha in is exact where alpha / rank is a power of two; elsewhere lora_A is rounded once to its own dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from qwen_image.adapter.delta import LORA_PARTS, kind_of
from qwen_image.adapter.options import KINDS
from qwen_image.adapter.tensors import ALPHA, PREFIX, by_module, module_name, rank_of

DIFFUSERS_PREFIX = "transformer."
DIFFUSION_MODEL_PREFIX = "diffusion_model."
BLOCK_MODULES = (
    "img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)  # fmt: skip
OTHER_MODULES = (
    "img_in", "txt_in", "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)  # fmt: skip
KINDS_IN_DIFFUSERS = ("lora", "dora")
SHOWN = 3
_UNDERSCORED = {path.replace(".", "_"): path for path in (*BLOCK_MODULES, *OTHER_MODULES)}
_DOTTED_PREFIXES = (DIFFUSION_MODEL_PREFIX, DIFFUSERS_PREFIX, "base_model.model.")
_UNDERSCORED_PREFIXES = (PREFIX, "lycoris_")
_LORA_A = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
_PARTS = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight", "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
} | {
    part: part for part in (
        *LORA_PARTS, ALPHA, "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a",
        "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    )
}  # fmt: skip


class SchemeError(ValueError):
    """A naming scheme cannot hold these tensors; each of the reasons is a text of its own."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def to_kohya(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by the field's names, with an alpha (the rank, where there was none) for every module.

    Names that no scheme has, and a second tensor of one meaning, keep their names, so that a reader can tell.
    """
    named: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        known = _kohya_name(key)
        # peft's magnitudes are a vector; a column says that they belong to the outputs
        column = known is not None and known.endswith(".dora_scale") and tensor.ndim == 1
        named[known if known and known not in named else key] = tensor[:, None] if column else tensor
    for name, parts in by_module(named).items():
        if ALPHA not in parts and _is_whole(parts) and (rank := rank_of(parts)):
            named[f"{name}.{ALPHA}"] = held(torch.tensor(float(rank)), next(iter(parts.values())).dtype)
    return named


def to_diffusers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA or DoRA as diffusers and peft name them, the same that diffusers makes of kohya's.

    Raises SchemeError for other kinds and for modules that Qwen-Image does not have.
    """
    named = {}
    for path, parts in _modules(tensors, DIFFUSERS_PREFIX, KINDS_IN_DIFFUSERS).items():
        down, up = folded(parts)
        named |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        if "dora_scale" in parts:
            named[f"{path}.lora_magnitude_vector"] = parts["dora_scale"].reshape(-1)
    return named


def to_diffusion_model(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by dotted names behind ``diffusion_model.``, alpha as it was.

    Raises SchemeError for tensors of no adapter and for modules that Qwen-Image does not have.
    """
    return {
        f"{path}.{_LORA_A.get(part, part)}": tensor
        for path, parts in _modules(tensors, DIFFUSION_MODEL_PREFIX, tuple(KINDS)).items()
        for part, tensor in parts.items()
    }


def to_known_kohya(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `to_kohya`'s tensors. Raises SchemeError for tensors of no adapter and for other models' modules."""
    _modules(tensors, "", tuple(KINDS))
    return to_kohya(tensors)


CONVERSIONS: dict[str, Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "kohya": to_known_kohya,
    "diffusers": to_diffusers,
    "diffusion_model": to_diffusion_model,
}
ALIASES = {"default": "kohya", "other": "diffusion_model"}
"""The field's names of the targets."""


def scheme_of(names: Iterable[str]) -> str | None:
    """Return the scheme that all names are of, None where they are of several or of none that can be written."""
    prefixes = {"kohya": PREFIX, "diffusers": DIFFUSERS_PREFIX, "diffusion_model": DIFFUSION_MODEL_PREFIX}
    names = list(names)
    return next((scheme for scheme, prefix in prefixes.items() if all(name.startswith(prefix) for name in names)), None)


def dotted_path(name: str) -> str | None:
    """Return the dotted path of the module that the field calls so, None where Qwen-Image has no such module."""
    underscored = name.removeprefix(PREFIX)
    if block := re.fullmatch(r"transformer_blocks_(\d+)_(.+)", underscored):
        path = _UNDERSCORED.get(block[2])
        return f"transformer_blocks.{block[1]}.{path}" if path in BLOCK_MODULES else None
    path = _UNDERSCORED.get(underscored)
    return path if path in OTHER_MODULES else None


def folded(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the down and up matrix of a module with alpha / rank in them: up @ down is the whole change.

    Up takes a power of two, which is exact, and down the rest, divided as diffusers divides it.
    """
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    scale_down, scale_up = float(parts[ALPHA]) / down.shape[0], 1.0
    while scale_down * 2 < scale_up:
        scale_down, scale_up = scale_down * 2, scale_up / 2
    return _scaled(down, scale_down), _scaled(up, scale_up)


def held(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a value in this dtype where that can hold it exactly, otherwise as it is."""
    rounded = value.to(dtype)
    return rounded if torch.equal(rounded.to(value.dtype), value) else value


def _modules(
    tensors: Mapping[str, torch.Tensor], prefix: str, kinds: tuple[str, ...]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return each module's tensors, by its dotted path behind a prefix. Raises SchemeError."""
    modules = by_module(to_kohya(tensors))
    paths = {name: dotted_path(name) if name.startswith(PREFIX) else None for name in modules}
    unknown = [name for name, path in paths.items() if path is None]
    broken = [name for name, parts in modules.items() if name not in unknown and not _is_whole(parts)]
    others = [name for name, parts in modules.items() if _is_whole(parts) and kind_of(parts) not in kinds]
    reasons = [
        f"{what}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for names, what in (
            (unknown, "Qwen-Image has no such modules"),
            (broken, "no whole LoRA, DoRA, LoHa or LoKr"),
            (others, f"this scheme holds {' and '.join(KINDS[kind] for kind in kinds)} only"),
        )
        if names
    ]
    if reasons:
        raise SchemeError(reasons)
    return {f"{prefix}{paths[name]}": parts for name, parts in modules.items()}


def _is_whole(parts: Mapping[str, torch.Tensor]) -> bool:
    """Whether a module's tensors are an adapter of one of our kinds, as far as names and dimensions tell."""
    matrices = all(tensor.ndim == 2 and tensor.numel() for part, tensor in parts.items() if part != ALPHA)
    return kind_of(parts) is not None and matrices and (ALPHA not in parts or parts[ALPHA].numel() == 1)


def _kohya_name(key: str) -> str | None:
    """Return the field's name of a tensor in any scheme, None where it is of none."""
    part = next((part for part in _PARTS if key.endswith(f".{part}")), None)
    if part is None:
        return None
    path = key.removesuffix(f".{part}")
    for prefix in _UNDERSCORED_PREFIXES:
        if path.startswith(prefix) and "." not in path:
            return f"{PREFIX}{path.removeprefix(prefix)}.{_PARTS[part]}"
    prefix = next((prefix for prefix in _DOTTED_PREFIXES if path.startswith(prefix)), "")
    return f"{module_name(path.removeprefix(prefix))}.{_PARTS[part]}"


def _scaled(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return (tensor.float() * scale).to(tensor.dtype)
