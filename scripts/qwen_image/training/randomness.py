"""Random numbers that depend on what they are for and not on what was drawn before.

Each draw has its own generator, seeded from the training's seed and the names of what it is for. So an item gets the
same noise whatever batch, process or order it comes in, and a training that goes on later draws the same again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that follows from the parts; other parts give an unrelated one."""
    # lengths in front keep ("ab", "c") and ("a", "bc") apart
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded from the parts."""
    import torch

    return torch.Generator().manual_seed(derived_seed(*parts))
