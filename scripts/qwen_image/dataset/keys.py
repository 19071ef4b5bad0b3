"""The keys of a dataset file: where each may stand, its type and its default. `config` reads files by this table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIN_SIDE = 16
"""Smallest side of a resolution in pixels: 8 of the VAE times 2 of the transformer's patches."""
MAX_SIDE = 8192
"""Largest side of a resolution in pixels. Far above what the model can do; it catches areas and digits too many."""
MAX_WEIGHT = 1000
"""Largest weight of a dataset. It catches digits too many; what counts is how the weights of datasets compare."""

Check = Callable[[Any], Any]
"""Takes the value as written and returns it in its final form, or raises ValueError saying what is expected."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a dataset file."""

    check: Check
    default: Any = None
    in_general: bool = False
    """Whether it may stand in `general` as well as in `datasets`."""
    ignored: bool = False
    """Accepted because people's files have it, without a meaning for this model."""


def describe(value: object) -> str:
    """The value as one would write it in the file, shortened to fit into a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def path_fault(path: str) -> str | None:
    """Why no file can have this name, or None when one can."""
    if not path:
        return "is empty"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return "holds characters that no file name can have"
    return "holds a NUL character" if b"\0" in encoded else None


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("write true or false, without quotes")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int | None = None) -> Check:
    bound = "" if low is None else f" of at least {low}"

    def check(value: object) -> int:
        if not _is_integer(value) or (low is not None and value < low):
            raise ValueError(f"write a whole number{bound}")
        return value

    return check


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_WEIGHT:
        raise ValueError(f"write a number above 0 and at most {MAX_WEIGHT}, such as 0.5")
    return float(value)


def _integers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(map(_is_integer, value)):
        raise ValueError("write a list of whole numbers, such as [0, 13]")
    return value


def _size(value: object) -> tuple[int, int]:
    sides = [value, value] if _is_integer(value) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(map(_is_integer, sides)):
        raise ValueError("write one whole number, such as 1024, or [width, height], such as [960, 544]")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"write sides in pixels, each from {MIN_SIDE} to {MAX_SIDE}")
    return sides[0], sides[1]


def _path(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("write a path in quotes")
    if fault := path_fault(value):
        raise ValueError(f"write a usable path: this one {fault}")
    return value


def _caption_extension(value: object) -> str:
    expected = 'write the ending of the caption files with its dot, such as ".txt"'
    if not isinstance(value, str) or "." not in value or "/" in value or os.sep in value or path_fault(value):
        raise ValueError(expected)
    return value


def _background(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"white|black|#[0-9a-fA-F]{6}", value):
        raise ValueError('write "white", "black" or a colour such as "#7f7f7f"')
    # One spelling for one colour: it becomes part of what a cached latent is recognised by.
    return value.lower()


KEYS: dict[str, Key] = {
    "resolution": Key(check=_size, default=(960, 544), in_general=True),
    "enable_bucket": Key(check=_boolean, default=False, in_general=True),
    "bucket_no_upscale": Key(check=_boolean, default=False, in_general=True),
    "caption_extension": Key(check=_caption_extension, in_general=True),
    "multiple_captions": Key(check=_boolean, default=False, in_general=True),
    "batch_size": Key(check=_integer(1), default=1, in_general=True),
    "num_repeats": Key(check=_integer(1), default=1, in_general=True),
    "loss_weight": Key(check=_weight, default=1.0, in_general=True),
    "alpha_background": Key(check=_background, default="white", in_general=True),
    "image_directory": Key(check=_path),
    "image_jsonl_file": Key(check=_path),
    "cache_directory": Key(check=_path),
    "control_directory": Key(check=_path),
    "multiple_target": Key(check=_boolean, default=False),
    "no_resize_control": Key(check=_boolean, default=False),
    "control_resolution": Key(check=_size),
    "fp_latent_window_size": Key(check=_integer(), default=9, ignored=True),
    "fp_1f_clean_indices": Key(check=_integers, ignored=True),
    "fp_1f_target_index": Key(check=_integer(), ignored=True),
    "fp_1f_no_post": Key(check=_boolean, default=False, ignored=True),
}

RENAMED: dict[str, str] = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
"""Old key names that people's files still have."""

VIDEO_KEYS = frozenset(
    {
        "video_directory",
        "video_jsonl_file",
        "target_frames",
        "frame_extraction",
        "frame_stride",
        "frame_sample",
        "max_frames",
        "source_fps",
    }
)
