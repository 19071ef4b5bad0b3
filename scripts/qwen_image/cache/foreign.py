"""Cache files that another program wrote under the names that ours have: never trusted silently, never deleted."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from qwen_image.cache.fingerprint import (
    ADOPTED,
    ARITHMETIC_KEY,
    DATA_KEY,
    carries_fingerprint,
    fingerprint_metadata,
    read_cache_header,
)
from qwen_image.cache.stage import Entry, Stage
from qwen_image.container import Header


def foreign_header(path: Path) -> Header | None:
    """Return the header of a whole safetensors file that another program wrote or changed, None where there is none."""
    header = read_cache_header(path)
    return None if header is None or carries_fingerprint(header) else header


def set_aside(path: Path) -> None:
    """Keep a foreign file that stands where ours must go as ``<name>.replaced``; leave anything else alone.

    The file gets a second name, and the first one goes over to ours when that is complete: at no moment is there
    nothing, and no other file is overwritten, whoever does the same at the same time.
    """
    if foreign_header(path) is None:
        return
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.replaced{f'-{number}' if number > 1 else ''}")
        try:
            os.link(path, aside)
        except FileExistsError:
            if os.path.samefile(path, aside):  # another run was here a moment ago
                return
        except OSError:  # a file system without second names
            if not os.path.lexists(aside):
                os.rename(path, aside)
                return
        else:
            return


def adopt(stage: Stage, entry: Entry, header: Header) -> str | None:
    """Make a foreign file with this header ours: the same tensors and metadata, with the fingerprint of the entry.

    The file must be what the stage would write: shape, bucket, caption, finite values. Returns None when it was
    adopted, otherwise why it was not; it is untouched then. Raises OSError.
    """
    if reason := stage.misfit(entry, header):
        return reason
    # whoever adopts has values to read; a stage without anything to do imports no torch
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from qwen_image.container import data_sha256, write_safetensors

    try:
        tensors = load_file(entry.path)
    except SafetensorError as error:
        return f"it cannot be read ({error})"
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        return "it holds NaN or Inf"
    own = {ARITHMETIC_KEY: ADOPTED, DATA_KEY: data_sha256(tensors)}
    metadata = {**header.metadata, **fingerprint_metadata(entry.parts), **own}
    write_safetensors(entry.path, tensors, metadata)
    return None
