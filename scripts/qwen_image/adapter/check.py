"""Is an adapter's file what its readers need? It is loaded back as they load it, and compared with what it should be.

The model is built from the checkpoint's headers without its weights, so that a 40 GB one takes a moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from peft.tuners.lora import LoraLayer

from qwen_image.adapter.compare import distance, magnitude_distance, size, tolerance
from qwen_image.adapter.delta import kind_of
from qwen_image.adapter.files import AdapterFile, network_size, open_adapter
from qwen_image.adapter.schemes import scheme_of
from qwen_image.adapter.tensors import ALPHA, LOHA_PARTS, LOKR_PARTS
from qwen_image.adapter.weights import Modules, read_modules
from qwen_image.models.checkpoint import open_checkpoint
from qwen_image.models.streaming import empty_model
from qwen_image.problems import InputError, Problem

REQUIRED = ("ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "sshs_model_hash")
"""Metadata by which the field's tools know the adapter; ``--no_metadata`` keeps these too."""
SIZE_TOLERANCE = 2**-8  # other tools round alpha to bf16
AGAIN = "train it again; if it is so again, report it with this message"
COMFYUI_PARTS = {
    "lora_up.weight": "lora_up.weight", "lora_B.weight": "lora_up.weight", "lora_down.weight": "lora_down.weight",
    "lora_A.weight": "lora_down.weight",
} | {part: part for part in (ALPHA, "dora_scale", *LOHA_PARTS, *LOKR_PARTS)}  # fmt: skip
SCALED_PARTS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Parts whose rank alpha is divided by."""
ADAPTER = "checked"
SHOWN = 3


def check_adapter_file(path: str | Path, dit: str | Path, other: str | Path | None = None) -> list[Problem]:
    """Return everything that is wrong with an adapter's file, and with the same adapter's file in another scheme.

    Each is read by the programs that can read its kind and scheme: ComfyUI by names, diffusers by its own loader.
    """
    try:
        linears = _linears(_empty_transformer(dit))
    except InputError as error:
        return error.problems
    problems, found = [], []
    for file in [path] if other is None else [path, other]:
        try:
            adapter = open_adapter(file)
        except InputError as error:
            problems += error.problems
            continue
        problems += _check_metadata(str(file), adapter)
        try:
            modules = read_modules(str(file), linears)
        except InputError as error:
            problems += error.problems
            continue
        problems += _check_values(str(file), adapter, modules)
        problems += _check_readers(str(file), adapter, modules, dit)
        found.append(modules)
    if len(found) == 2:
        problems += _differences(str(other), found[0], found[1], f"from {path}")
    return problems


def _check_metadata(file: str, adapter: AdapterFile) -> list[Problem]:
    metadata = adapter.metadata
    problems = []
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        found = f"lacks the metadata {', '.join(missing)}"
        problems.append(
            Problem(file=file, found=found, mend="use the file as the training wrote it, with its metadata")
        )
    if metadata.get("sshs_model_hash", adapter.data_sha256) != adapter.data_sha256:
        found = "is not the hash of the file's data: the file was damaged or changed"
        problems.append(Problem(file=file, key="sshs_model_hash", found=found, mend=AGAIN))
    return problems


def _check_values(file: str, adapter: AdapterFile, modules: Modules) -> Iterator[Problem]:
    """Check that the modules change something, by as much as the metadata says that they are scaled."""
    if not any(size(parts) > 0 for parts in modules.values()):
        mend = "train for more steps, or with a higher learning_rate"
        yield Problem(file=file, found="changes nothing: every module's change is 0", mend=mend)
    if scheme_of(adapter.tensors) == "kohya":
        named = [_split(name) for name in adapter.tensors]
        scaled = {stem for stem, part in named if part == ALPHA}
        bare = {stem for stem, part in named if part in SCALED_PARTS} - scaled
        if bare:
            yield Problem(file=file, key=ALPHA, found=f"is missing for {_some(bare)}", mend=AGAIN)
    # what most modules have: those taken over from a file of several ranks differ
    for key, own in zip(("ss_network_dim", "ss_network_alpha"), network_size(adapter.tensors) or (), strict=False):
        said = _number(adapter, key)
        if said is not None and not math.isclose(said, own, rel_tol=SIZE_TOLERANCE):
            found = f"says {said:g}, the tensors of most modules say {own:g}"
            yield Problem(file=file, key=key, found=found, mend=AGAIN)


def _check_readers(file: str, adapter: AdapterFile, modules: Modules, dit: str | Path) -> list[Problem]:
    """Load the file as each program that can read it does, and compare what that makes of it."""
    kinds = {kind_of(parts) for parts in modules.values()}
    scheme = scheme_of(adapter.tensors)
    problems = []
    if kinds == {"lora"} or scheme != "diffusers":
        loaded, unread = _load_in_comfyui(adapter.tensors, _empty_transformer(dit))
        if unread:
            problems.append(Problem(file=file, found=f"ComfyUI would not read {_some(unread)}", mend=AGAIN))
        problems += _differences(file, modules, loaded, "as ComfyUI reads it")
    # of kohya's DoRA diffusers would read half; for the other kinds it has no loader
    if kinds == {"lora"} or (kinds == {"dora"} and scheme == "diffusers"):
        try:
            loaded, unread = _load_in_diffusers(file, _empty_transformer(dit))
        except Exception as error:  # whatever its loader raises, the file cannot be used there
            found = f"diffusers cannot load it: {type(error).__name__}: {error}"
            return [*problems, Problem(file=file, found=found, mend=AGAIN)]
        if unread:
            problems.append(Problem(file=file, found=f"diffusers would not read {_some(unread)}", mend=AGAIN))
        problems += _differences(file, modules, loaded, "as diffusers reads it")
    return problems


def _load_in_comfyui(
    tensors: Mapping[str, torch.Tensor], transformer: QwenImageTransformer2DModel
) -> tuple[Modules, list[str]]:
    """Return what ComfyUI reads of these tensors, and the names that it passes over.

    It looks for each of the model's weights by the names that an adapter may call it, and scales by alpha / rank where
    there is an alpha. What it makes of a DoRA's magnitudes is not compared: it divides by the base's row lengths, not
    by those after the change, which no file can mend for it without being wrong elsewhere.
    """
    paths = {}
    for name in transformer.state_dict():
        path = name.removesuffix(".weight")
        if path != name:
            underscored = path.replace(".", "_")
            aliases = (f"lora_unet_{underscored}", f"diffusion_model.{path}", f"transformer.{path}", path)
            paths |= dict.fromkeys((*aliases, f"lycoris_{underscored}"), path)
    modules: Modules = {}
    unread = []
    for name, tensor in tensors.items():
        stem, part = _split(name)
        if part and stem in paths:
            modules.setdefault(paths[stem], {})[part] = tensor
        else:
            unread.append(name)
    whole = {path: parts for path, parts in modules.items() if kind_of(parts)}
    return whole, unread


def _load_in_diffusers(file: str, transformer: QwenImageTransformer2DModel) -> tuple[Modules, list[str]]:
    """Return what diffusers' pipeline makes of a file in peft's layers, and the names that ended in none of them."""
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(file, return_lora_metadata=True)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(
        state, transformer, adapter_name=ADAPTER, metadata=metadata, low_cpu_mem_usage=True
    )
    modules: Modules = {}
    expected = set()
    for path, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            expected |= {f"transformer.{path}.lora_A.weight", f"transformer.{path}.lora_B.weight"}
            parts = {"lora_down.weight": down, "lora_up.weight": up}
            if ADAPTER in layer.lora_magnitude_vector:
                parts["dora_scale"] = layer.lora_magnitude_vector[ADAPTER].weight
                expected.add(f"transformer.{path}.lora_magnitude_vector")
            # what was not in the file is on the meta device still
            if not any(tensor.is_meta for tensor in parts.values()):
                alpha = torch.tensor(layer.scaling[ADAPTER] * layer.r[ADAPTER], dtype=torch.float64)
                modules[path] = {part: tensor.detach() for part, tensor in parts.items()} | {ALPHA: alpha}
    return modules, sorted(expected ^ set(state))


def _differences(file: str, expected: Modules, found: Modules, where: str) -> list[Problem]:
    """Return what two readings of one adapter do not agree on, beyond rounding."""
    problems = []
    lost, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for paths, what in ((lost, "lacks"), (more, "has more modules,")):
        if paths:
            problems.append(Problem(file=file, found=f"{where} {what} {_some(paths)}", mend=AGAIN))
    far = {}
    for path in expected.keys() & found.keys():
        first, second = expected[path], found[path]
        gap = max(distance(first, second), magnitude_distance(first, second))
        # a NaN is no small distance
        if not gap <= tolerance(first, second):
            far[path] = gap
    if far:
        worst = max(sorted(far), key=far.get)
        text = f"{where} changes {len(far)} weights otherwise than it should, {worst} by {100 * far[worst]:.3g} %"
        problems.append(Problem(file=file, found=text, mend=AGAIN))
    return problems


def _empty_transformer(dit: str | Path) -> QwenImageTransformer2DModel:
    """Return the checkpoint's model with weights of its shapes that all are zeros and share one number's memory.

    On the meta device peft would put what it loads there too, and nothing could be compared.
    """
    config = open_checkpoint(dit, "dit").model_config()
    transformer = empty_model(lambda: QwenImageTransformer2DModel.from_config(config))
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return transformer


def _linears(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {path: module for path, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}


def _split(name: str) -> tuple[str, str]:
    """Return a tensor's name as what its module is called and its part by the field's name, empty where it has none."""
    part = next((part for part in COMFYUI_PARTS if name.endswith(f".{part}")), "")
    return name.removesuffix(f".{part}"), COMFYUI_PARTS.get(part, "")


def _number(adapter: AdapterFile, key: str) -> float | None:
    try:
        return float(adapter.metadata[key])
    except (KeyError, ValueError):
        return None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)  # readers give them in an order of chance
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
