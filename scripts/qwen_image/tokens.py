"""Access tokens of the hub and wandb come from the environment; a setting that holds one is refused and never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
PATTERN = re.compile(r"hf_[A-Za-z0-9]{20,}|wandb_v\d_[A-Za-z0-9_]{20,}")
BEGUN = re.compile(rb"(hf_|wandb_v)\w*$")
"""The end of a text within which a token may have begun; the beginnings of these words are looked for as well."""
BEGINNINGS = (b"hf_", b"wandb_v")
LONGEST = 2**16
"""Bytes of a token; what goes on for longer is none."""
SHORTEST = 8
"""Characters of a variable's value that count as a token: a shorter one may stand in any text by chance."""
HIDDEN = "(a token)"
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
    for token in _own_tokens():
        text = text.replace(token, HIDDEN)
    return PATTERN.sub(HIDDEN, text)


class TokenFilter:
    """Replaces every token in a stream of bytes. The end of a part is kept back while it may be half of a token."""

    def __init__(self) -> None:
        self._tokens = [os.fsencode(token) for token in _own_tokens()]
        self._kept = b""

    def pass_on(self, part: bytes) -> bytes:
        """Return what may be shown once this part has come, which may be nothing yet."""
        data = self._hide_own(self._kept + part)
        at = self._begun(data)
        self._kept = data[at:]
        return _hide_others(data[:at])

    def rest(self) -> bytes:
        """Return what was kept back, once no more parts come."""
        data, self._kept = self._kept, b""
        return _hide_others(data)

    def _hide_own(self, data: bytes) -> bytes:
        for token in self._tokens:
            data = data.replace(token, HIDDEN.encode())
        return data

    def _begun(self, data: bytes) -> int:
        """Where a token may have begun that is not complete."""
        tail = data[-LONGEST:]
        starts = [len(data) - len(tail) + begun.start()] if (begun := BEGUN.search(tail)) else []
        for word in (*BEGINNINGS, *self._tokens):
            lengths = (length for length in range(len(word) - 1, 0, -1) if data.endswith(word[:length]))
            starts += [len(data) - length for length in lengths][:1]
        return min(starts, default=len(data))


def _own_tokens() -> list[str]:
    tokens = {os.environ.get(name, "") for name in VARIABLES}
    # one may begin like another
    return sorted((token for token in tokens if len(token) >= SHORTEST), key=len, reverse=True)


def _hide_others(data: bytes) -> bytes:
    return re.sub(PATTERN.pattern.encode(), HIDDEN.encode(), data)
