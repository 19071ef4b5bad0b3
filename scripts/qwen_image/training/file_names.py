"""Names of the LoRAs that a training saves, and whose a name may be. Imports no torch."""

from __future__ import annotations

import re

DIFFUSERS = ".diffusers"
"""Stands behind the name of the file that save_format both writes in diffusers' names."""
BEST = "-best"
MARK = rf"-(?P<epoch>\d{{6,}})|-step(?P<step>\d{{8,}})|(?P<best>{BEST})"
"""What stands behind the output_name of a LoRA that is not the finished one, as a regular expression."""


def lora_name(output_name: str, *, step: int | None = None, epoch: int | None = None) -> str:
    """Name of the file saved after a step or an epoch, both counted from 1."""
    middle = f"step{step:08d}" if step is not None else f"{epoch:06d}"
    return f"{output_name}-{middle}.safetensors"


def best_name(output_name: str) -> str:
    """Name of the file with the lowest validation loss so far."""
    return f"{output_name}{BEST}.safetensors"


def names_before(output_name: str) -> list[str]:
    """Return the other names under which a training may save `{output_name}.safetensors`, the longest first.

    Of ``cat-best.diffusers`` they are ``cat-best`` and ``cat``, of most names there are none.
    """
    plain = output_name.removesuffix(DIFFUSERS)
    names = [plain, re.sub(f"({MARK})$", "", plain)]
    return [name for name in dict.fromkeys(names) if name and name != output_name]
