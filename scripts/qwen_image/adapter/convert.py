"""Converting an adapter's file from one naming scheme to another, its metadata kept true."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qwen_image.adapter.files import PEFT_KEY, network_size, open_adapter, read_adapter, save_adapter
from qwen_image.adapter.schemes import ALIASES, CONVERSIONS, SchemeError
from qwen_image.problems import InputError, Problem
from qwen_image.training.saving import RUN_KEY

NOT_KEPT = (PEFT_KEY, RUN_KEY)
"""Its alpha is in the tensors now; and the file is no longer the one that a training finished with."""


def convert_file(source: str | Path, target_file: str | Path, target: str) -> int:
    """Write an adapter's file by the names of a target, and return how many tensors it has.

    Metadata is kept; rank, alpha and hashes are those of the new file. Raises InputError when the source cannot be read
    or the target has no names for what it holds.
    """
    scheme = ALIASES.get(target, target)
    tensors = read_adapter(source)
    if not tensors:
        raise InputError([Problem(file=str(source), found="holds no tensors", mend="give an adapter of Qwen-Image")])
    try:
        converted = CONVERSIONS[scheme](tensors)
    except SchemeError as error:
        mend = f"give an adapter of Qwen-Image that {target} has names for"
        raise InputError([Problem(file=str(source), found=reason, mend=mend) for reason in error.reasons]) from error
    save_adapter(target_file, converted, _metadata(open_adapter(source).metadata, converted))
    return len(converted)


def _metadata(metadata: Mapping[str, str], converted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    kept = {key: value for key, value in metadata.items() if key not in NOT_KEPT}
    if size := network_size(converted):
        rank, alpha = size
        kept |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return kept
