"""Tensor names: from the many ways people's files spell them to the names that the model classes use."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_image.models.recognise import Recognised

_NOT_WEIGHTS = ("__index_timestep_zero__",)
"""Marks that repackaged transformers carry; the model's settings are read from them, not its weights."""


def official_names(stored: Iterable[str], recognised: Recognised) -> dict[str, str | None]:
    """Map each stored name to the one in the model class's state dict, or to None when it is knowingly left out.

    Left out are the language-model head and the vision tower of the text encoder. A name that nobody knows maps to
    itself, so that loading can report it. The Wan layout needs diffusers (and with it torch); the others do not.
    """
    stored = list(stored)
    inner = {name: name.removeprefix(recognised.prefix) for name in stored}
    if recognised.layout == "wan":
        renamed = _wan_to_diffusers(inner.values())
        return {name: renamed[inner[name]] for name in stored}
    if recognised.role == "text_encoder":
        return {name: None if _is_beside_text_model(name, recognised.prefix) else inner[name] for name in stored}
    return {name: None if inner[name] in _NOT_WEIGHTS else inner[name] for name in stored}


def _is_beside_text_model(name: str, prefix: str) -> bool:
    parts = name.split(".")
    if "visual" in parts or "lm_head" in parts:
        return True
    # old files store the rotary frequencies, which the model computes
    return name.startswith(prefix) and parts[-1] == "inv_freq"


def _wan_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Let diffusers' converter rename the names themselves, passed as both key and value."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return {old: new for new, old in convert_wan_vae_to_diffusers({name: name for name in names}).items()}
