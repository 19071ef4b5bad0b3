"""The demo's tiny checkpoints for tests, written once a session, and helpers to lay them out as other tools do."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

_FILES = {"dit": "dit.safetensors", "vae": "vae.safetensors", "text_encoder": "text_encoder/model.safetensors"}
_kept = []  # the temporary folder lives as long as the process


@functools.cache
def folder() -> Path:
    """Return a folder with ``dit.safetensors``, ``vae.safetensors`` and ``text_encoder/``. Do not write into it."""
    from qwen_image.demo.checkpoints import write_demo_checkpoints

    _kept.append(tempfile.TemporaryDirectory(prefix="tiny-checkpoints-"))
    path = Path(_kept[-1].name)
    write_demo_checkpoints(path)
    return path


def path(role: str) -> Path:
    """Return what a config would name for ``dit``, ``vae`` or ``text_encoder``."""
    return folder() / _FILES[role].removesuffix("/model.safetensors")


def stored(role: str) -> dict:
    """Return the tensors as stored: official names for ``dit`` and ``vae``, the hub's for ``text_encoder``."""
    from safetensors.torch import load_file

    return load_file(folder() / _FILES[role])


def official(role: str) -> dict:
    """Return the tensors by the name that they have in the model class, without head and vision tower."""
    if role != "text_encoder":
        return stored(role)
    return {name.removeprefix("model."): tensor for name, tensor in stored(role).items() if name.startswith("model.")}


def save(path: Path, tensors: dict) -> Path:
    """Write tensors to a safetensors file and return its path."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return path
