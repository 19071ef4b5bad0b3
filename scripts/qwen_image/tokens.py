"""Access tokens of the hub and wandb come from the environment; a setting that holds one is refused and never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
PATTERN = re.compile(r"hf_[A-Za-z0-9]{20,}|wandb_v\d_[A-Za-z0-9_]{20,}")
SHORTEST = 8
"""Characters of a variable's value that count as a token: a shorter one may stand in any text by chance."""
FOUND = "holds an access token"
MEND = (
    "remove it and set HF_TOKEN (hub) or WANDB_API_KEY (wandb) in the environment; make a new token where this one may "
    "have been seen by others"
)


def holds_token(value: object) -> bool:
    """Whether a setting's value, or anything in it, holds an access token."""
    if isinstance(value, Mapping):
        return any(map(holds_token, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(holds_token, value))
    return isinstance(value, str) and hide_tokens(value) != value


def hide_tokens(text: str) -> str:
    """Return the text with every token in it replaced."""
    for name in VARIABLES:
        if len(token := os.environ.get(name, "")) >= SHORTEST:
            text = text.replace(token, "(a token)")
    return PATTERN.sub("(a token)", text)
