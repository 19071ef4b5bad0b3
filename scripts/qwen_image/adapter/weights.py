"""Adapters that a training starts from: read from files in any naming, checked against the model, merged into it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qwen_image.adapter.delta import change, kind_of, merged
from qwen_image.adapter.files import read_adapter
from qwen_image.adapter.options import KINDS
from qwen_image.adapter.schemes import to_kohya
from qwen_image.adapter.tensors import ALPHA, alpha_of, by_module, module_name, rank_of
from qwen_image.container import ContainerError, read_header
from qwen_image.problems import InputError, Problem

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)
Modules = dict[str, dict[str, torch.Tensor]]
"""An adapter file's tensors: dotted path of a module, and its tensors by part name."""
ALPHA_TOLERANCE = 0.005
SHOWN = 3  # a file for another model has hundreds of modules that do not fit


def check_weight_files(settings: Settings) -> None:
    """Check that the files a training starts from are there and whole, which needs no model.

    Raises InputError with the problems of all of them.
    """
    problems = []
    files = {"network_weights": [settings.network_weights], "base_weights": settings.base_weights or []}
    for key, file in ((key, file) for key, named in files.items() for file in named if file):
        try:
            read_header(file)
        except (OSError, ContainerError) as error:
            found = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            problems.append(Problem(file=file, key=key, found=found, mend="give an adapter as .safetensors"))
    if problems:
        raise InputError(problems)


def merge_base_weights(transformer: torch.nn.Module, settings: Settings) -> None:
    """Merge the adapters of ``base_weights`` into the transformer, in their order.

    Sums are taken in float32 and rounded once to the weight's own dtype. Raises InputError, before anything is
    changed, for files that cannot be read or do not fit.
    """
    files = settings.base_weights or []
    multipliers = settings.base_weights_multiplier or [1.0] * len(files)
    linears = {path: module for path, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    adapters = read_all(files, linears)
    for path, linear in linears.items():
        touching = [(adapter[path], by) for adapter, by in zip(adapters, multipliers, strict=True) if path in adapter]
        if not touching:
            continue
        weight = linear.weight.detach()
        for parts, multiplier in touching:
            on_device = {part: tensor.to(weight.device) for part, tensor in parts.items()}
            weight = merged(weight, on_device, multiplier)
        linear.weight.data = weight.to(linear.weight.dtype)
    for file, adapter, multiplier in zip(files, adapters, multipliers, strict=True):
        log.info("train: merged %s into the base model, %d modules, times %g", file, len(adapter), multiplier)


def read_start(file: str, linears: Mapping[str, torch.nn.Linear]) -> Modules:
    """Read ``network_weights`` for these modules: an adapter that training can go on with, all of one kind.

    Raises InputError otherwise.
    """
    modules = read_modules(file, linears)
    kinds = sorted({kind_of(parts) for parts in modules.values()})
    problems = []
    if len(kinds) > 1:
        found = f"holds several kinds at once: {', '.join(KINDS[kind] for kind in kinds)}"
        problems.append(Problem(file=file, found=found, mend="give an adapter of one kind"))
    if any((alpha := alpha_of(parts)) is not None and alpha <= 0 for parts in modules.values()):
        mend = "give a file whose alpha is above 0"
        problems.append(Problem(file=file, key=ALPHA, found="is 0 or less, so nothing could be learnt", mend=mend))
    if any(parts["dora_scale"].shape[1] != 1 for parts in modules.values() if "dora_scale" in parts):
        found = "is a DoRA whose magnitudes belong to the inputs; peft trains those of the outputs"
        problems.append(Problem(file=file, found=found, mend="merge it with base_weights, and train another on top"))
    if problems:
        raise InputError(problems)
    return modules


def check_start(file: str | None, start: Modules, fresh: Modules, *, kind: str, rank: int, alpha: float) -> None:
    """Check that the modules of ``network_weights`` are what the settings make, `fresh`.

    Raises InputError with what is different.
    """
    problems = []
    for key, found, mend in _differences(start, fresh, kind=kind, rank=rank, alpha=alpha):
        mend = f"{mend}, or set dim_from_weights to train what the file holds"
        problems.append(Problem(file=str(file), key=key, found=found, mend=mend))
    if problems:
        raise InputError(problems)


def _differences(
    start: Modules, fresh: Modules, *, kind: str, rank: int, alpha: float
) -> Iterator[tuple[str, str, str]]:
    """Yield the setting that is different, how, and how to mend it."""
    kinds = {kind_of(parts) for parts in start.values()} - {kind}
    for other in kinds:
        yield "network_module", f"is a {KINDS[other]}, the settings say {KINDS[kind]}", "choose the kind of the file"
    if kinds:
        return
    more = [path for path in start if path not in fresh]
    if more:
        found = f"has modules that the settings leave out: {_some(more)}"
        yield "network_args", found, "take them in with include_patterns"
    common = {path: parts for path, parts in start.items() if path in fresh}
    ranks = sorted({own for parts in common.values() if (own := rank_of(parts)) not in (rank, None)})
    if ranks:
        found = f"has modules of rank {_some(ranks)}, the settings say {rank}"
        yield "network_dim", found, f"set network_dim to {ranks[0]}"
    others = [path for path, parts in common.items() if _shapes(parts) != _shapes(fresh[path])]
    if others and not ranks:
        found = f"has factors of other sizes than the settings make: {_some(others)}"
        yield "network_args", found, "give the factor that the file was made with"
    # a file may hold alpha in bf16; a module without a rank is not scaled by it
    alphas = {alpha_of(parts) or own for parts in common.values() if (own := rank_of(parts)) is not None}
    alphas = sorted(own for own in alphas if not math.isclose(own, alpha, rel_tol=ALPHA_TOLERANCE))
    if alphas:
        found = f"has an alpha of {_some(f'{own:g}' for own in alphas)}, the settings say {alpha:g}"
        yield "network_alpha", found, f"set network_alpha to {alphas[0]:g}"


def _shapes(parts: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {part: tuple(tensor.shape) for part, tensor in parts.items() if part != ALPHA}


def read_all(files: Sequence[str], linears: Mapping[str, torch.nn.Linear]) -> list[Modules]:
    """Read adapter files for these modules. Raises InputError with the problems of all of them."""
    adapters, problems = [], []
    for file in files:
        try:
            adapters.append(read_modules(file, linears))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return adapters


def read_modules(file: str, linears: Mapping[str, torch.nn.Linear]) -> Modules:
    """Read an adapter file, in any naming, as tensors of these modules, by their dotted paths in the model's order.

    Raises InputError when it cannot be read, names other modules, or its tensors do not fit.
    """
    modules = by_module(to_kohya(read_adapter(file)))
    names = {path: module_name(path) for path in linears}
    unknown = sorted(modules.keys() - names.values())
    # in the model's order: the safetensors reader gives tensors in any
    known = {path: modules[name] for path, name in names.items() if name in modules}
    sound = {path: parts for path, parts in known.items() if kind_of(parts)}
    strange = [path for path in known if path not in sound]
    misfits = [path for path, parts in sound.items() if not _fits(parts, linears[path])]
    broken = [path for path, parts in sound.items() if not all(tensor.isfinite().all() for tensor in parts.values())]
    problems = [
        Problem(file=file, found=f"{found}: {_some(wrong)}", mend=mend)
        for wrong, found, mend in (
            (unknown, "is for modules that this model does not have", "give an adapter of Qwen-Image"),
            (strange, "is no LoRA, DoRA, LoHa or LoKr of these modules", "give an adapter of one of these kinds"),
            (misfits, "has shapes that do not fit these modules", "give an adapter that was made for this dit"),
            (broken, "holds values that are no numbers for these modules", "take an earlier file of that training"),
        )
        if wrong
    ]
    if not modules:
        problems.append(Problem(file=file, found="holds no tensors", mend="give an adapter of Qwen-Image"))
    if problems:
        raise InputError(problems)
    return known


def _fits(parts: Mapping[str, torch.Tensor], linear: torch.nn.Linear) -> bool:
    """Whether a module's tensors make a change of its weight's shape."""
    if ALPHA in parts and parts[ALPHA].numel() != 1:
        return False
    matrices = {part: tensor for part, tensor in parts.items() if part not in (ALPHA, "dora_scale")}
    if any(tensor.ndim != 2 for tensor in matrices.values()):
        return False
    size_out, size_in = linear.weight.shape
    if "dora_scale" in parts and tuple(parts["dora_scale"].shape) not in ((size_out, 1), (1, size_in)):
        return False
    try:
        # without data: only the shapes are worked out
        shape = change({part: tensor.to("meta") for part, tensor in matrices.items()}).shape
    except RuntimeError:
        return False
    # of two sizes, the smaller would be stretched to the larger
    stretched = any(
        f"hada_w2_{side}" in matrices and matrices[f"hada_w1_{side}"].shape != matrices[f"hada_w2_{side}"].shape
        for side in "ab"
    )
    return shape == linear.weight.shape and not stretched


def _some(names: Iterable[object]) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
