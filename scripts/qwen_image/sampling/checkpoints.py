"""The LoRAs that pictures are made with: which a training saved, and putting one on the model and taking it off."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.container import ContainerError, read_header
from qwen_image.problems import InputError, Problem
from qwen_image.training.file_names import MARK

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


def run_checkpoints(lora: str | Path) -> list[Path]:
    """Return what the training of this LoRA saved, in the order in which it was: by epoch, by step, best, finished.

    Raises InputError when there is nothing.
    """
    lora = Path(lora)
    names = re.compile(rf"{re.escape(lora.stem)}({MARK})?\.safetensors")
    matches = [match for path in lora.parent.glob("*.safetensors") if (match := names.fullmatch(path.name))]
    if not matches:
        mend = "train first, or give its path"
        raise InputError([Problem(file=str(lora), found="there is no such LoRA, finished or not", mend=mend)])
    return [lora.with_name(match.string) for match in sorted(matches, key=_place)]


def check_loras(loras: Sequence[str | Path], base_weights: Sequence[str | Path] = ()) -> None:
    """Check that all files are there and whole, and that pictures can be named after the LoRAs. Raises InputError."""
    problems = []
    for file in (*loras, *base_weights):
        try:
            read_header(file)
        except (OSError, ContainerError) as error:
            found = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            problems.append(Problem(file=str(file), found=found, mend="give an adapter as .safetensors"))
    for stem, count in Counter(Path(file).stem for file in loras).items():
        if count > 1:
            mend = "rename one, or make the pictures of each in a folder of their own"
            problems.append(Problem(file=stem, found=f"{count} LoRAs have this name", mend=mend))
    if problems:
        raise InputError(problems)


@contextlib.contextmanager
def adapter_on(transformer: QwenImageTransformer2DModel, file: str | Path) -> Iterator[None]:
    """Have an adapter file of any kind and naming on the transformer, as it is while it is trained: not merged.

    Raises InputError when it does not fit.
    """
    from qwen_image.adapter.network import add_adapter
    from qwen_image.adapter.tensors import adapted_layers
    from qwen_image.training.arguments import Settings, with_defaults

    add_adapter(transformer, Settings(**with_defaults({"network_weights": str(file), "dim_from_weights": True})))
    try:
        yield
    finally:
        for path, layer in list(adapted_layers(transformer)):
            parent, _, name = path.rpartition(".")
            setattr(transformer.get_submodule(parent), name, layer.get_base_layer())
        # what diffusers and peft note on the model, so that the next adapter is the first one again
        transformer._hf_peft_config_loaded = False
        del transformer.peft_config


def _place(match: re.Match[str]) -> tuple[int, int]:
    for rank, group in enumerate(("epoch", "step")):
        if match[group]:
            return rank, int(match[group])
    return (2, 0) if match["best"] else (3, 0)
