"""Cache files that another program wrote under the names that ours have: never trusted silently, never deleted."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from qwen_image.cache.fingerprint import ADOPTED, ARITHMETIC_KEY, FINGERPRINT_KEY, fingerprint_metadata
from qwen_image.cache.fingerprint import read_cache_header as read_whole
from qwen_image.cache.stage import Entry, Stage


def is_foreign(path: Path) -> bool:
    """Whether there is a whole safetensors file that carries no fingerprint of ours."""
    header = read_whole(path)
    return header is not None and FINGERPRINT_KEY not in header.metadata


def set_aside(path: Path) -> None:
    """Rename a foreign file that stands where ours must go to ``<name>.replaced``; leave anything else alone."""
    if not is_foreign(path):
        return
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    aside = (path.with_name(f"{path.name}.replaced{number}") for number in names)
    os.rename(path, next(name for name in aside if not os.path.lexists(name)))


def adopt(stage: Stage, entry: Entry) -> str | None:
    """Make a foreign file ours: the same tensors and metadata, with the fingerprint that this entry needs.

    The file must be what the stage would write: shape, bucket, caption, finite values. Returns None when it was
    adopted, otherwise why it was not; it is untouched then.
    """
    if not is_foreign(entry.path):
        return "there is none"
    header = read_whole(entry.path)
    if reason := stage.misfit(entry, header):
        return reason
    # whoever adopts has values to read; a stage without anything to do imports no torch
    import torch
    from safetensors.torch import load_file

    from qwen_image.container import write_safetensors

    tensors = load_file(entry.path)
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        return "it holds NaN or Inf"
    metadata = {**header.metadata, **fingerprint_metadata(entry.parts), ARITHMETIC_KEY: ADOPTED}
    write_safetensors(entry.path, tensors, metadata)
    return None
