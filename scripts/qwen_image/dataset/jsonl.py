"""Lists the items of a JSONL dataset: a file with one JSON object a line, `image_path` and `caption` in each."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image.bounded import parse_json, read_bytes
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.keys import describe, path_fault
from qwen_image.dataset.listing import (
    MAX_CAPTION_BYTES,
    Item,
    Listing,
    Reject,
    limit,
    name_fault,
    printable,
    stem_of,
)
from qwen_image.problems import InputError, Problem

MAX_JSONL_BYTES = 2**28
"""A quarter of a million items with a thousand characters each."""
MOST_KEYS = 100
"""Keys of a line among which the one that was meant is looked for."""


def list_jsonl(settings: DatasetSettings) -> Listing:
    """The items of `settings.image_jsonl_file`, sorted by key.

    Rejects are: lines that are broken, lines that repeat an earlier one, images that lines give different captions, and
    images that do not exist. Blank lines are skipped, and keys that mean nothing here (control images of edit models,
    people's own notes) are ignored. Raises InputError for a file that cannot be read, and for different images that
    would share a cache file.
    """
    file = settings.image_jsonl_file
    assert file is not None, settings
    faults: list[tuple[int, _LineFault]] = []
    rows: dict[str, list[_Row]] = {}  # by the stem that cache files are named by
    for number, text in enumerate(_read(settings, file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = _Row(number, *_content(text, settings.multiple_captions))
        except _LineFault as fault:
            faults.append((number, fault))
        else:
            rows.setdefault(stem_of(row.path), []).append(row)
    items, rejects = _items(settings, file, rows)
    # a reject by the name of an item would take that item along
    taken = {item.key for item in items}
    for number, fault in faults:
        if fault.path is None or fault.path in taken:
            rejects.append(_line_reject(settings, file, number, str(fault)))
        else:
            rejects.append(_image_reject(settings, fault.path, f"line {number} of {file}: {fault}"))
    items.sort(key=lambda item: item.key)
    rejects.sort(key=lambda reject: reject.key)
    return Listing(items, rejects, sum(map(len, rows.values())) + len(faults))


@dataclass(frozen=True, slots=True)
class _Row:
    """A sound line."""

    number: int
    path: str
    caption: str | tuple[str, ...]


class _LineFault(Exception):
    """What is wrong with one line and how to mend it, with the path of its image where that much can be read."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason)
        self.path = path


def _read(settings: DatasetSettings, file: str) -> str:
    key = f"datasets[{settings.index}].image_jsonl_file"
    try:
        content = read_bytes(file, MAX_JSONL_BYTES)
    except OSError as error:
        found = f"cannot be read: {error.strerror or error}"
        mend = f"give a file that exists and may be read; relative paths start at {Path.cwd()}"
        raise InputError([Problem(file=file, key=key, found=found, mend=mend)]) from error
    except ValueError as error:
        mend = "give a JSONL file; split one this large into datasets"
        raise InputError([Problem(file=file, key=key, found=str(error), mend=mend)]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = Problem(file=file, key=f"line {line}", found="is not UTF-8 text", mend="save the file as UTF-8")
        raise InputError([problem]) from error
    if text.lstrip().startswith("["):
        mend = "write one JSON object a line, without brackets around them and commas between them"
        raise InputError([Problem(file=file, key="line 1", found="starts a JSON list, which JSONL is not", mend=mend)])
    return text


def _content(text: str, several: bool) -> tuple[str, str | tuple[str, ...]]:
    """The image path and the caption of one line, or its captions where it may give several."""
    try:
        row = parse_json(text)
    except ValueError as error:
        # The parser counts lines inside this one line, so only its column is of use.
        reason = re.sub(r": line \d+ column (\d+) \(char \d+\)", r" at column \1", str(error))
        raise _LineFault(f"it is not valid JSON: {reason}; write one complete JSON object on the line") from error
    if not isinstance(row, dict):
        raise _LineFault(f'{describe(row)} is no JSON object; write {{"image_path": "...", "caption": "..."}}')
    if {"image_path", "image_path_0"} <= row.keys():
        raise _LineFault("it has both image_path and image_path_0; keep one of the two")
    path = _text(row, "image_path_0" if "image_path_0" in row else "image_path")
    if fault := path_fault(path):
        raise _LineFault(f"image_path {fault}; write the path of the image")
    if more := [key for key in row if key.startswith("image_path_") and key[11:].isdecimal() and key != "image_path_0"]:
        raise _LineFault(f"`{more[0]}` is for the layered model, which is not supported; keep image_path alone", path)
    return path, _caption(row, path, several)


def _caption(row: dict[str, Any], path: str, several: bool) -> str | tuple[str, ...]:
    value = row.get("caption")
    if not isinstance(value, list):
        return _sound_caption(_text(row, "caption", path), path)
    if not several:
        mend = "write one text in double quotes, or set multiple_captions = true for this dataset"
        raise _LineFault(f"`caption` is {describe(value)}; {mend}", path)
    if not value or not all(isinstance(text, str) for text in value):
        raise _LineFault(f"`caption` is {describe(value)}; write a list of texts, each in double quotes", path)
    return tuple(_sound_caption(_encodable(text, "caption", path), path) for text in value)


def _sound_caption(caption: str, path: str) -> str:
    if "\0" in caption:
        raise _LineFault("`caption` holds a NUL character; write the caption without it", path)
    if len(caption.encode()) > MAX_CAPTION_BYTES:
        raise _LineFault(f"`caption` is longer than {MAX_CAPTION_BYTES} bytes; shorten it", path)
    return caption


def _text(row: dict[str, Any], key: str, path: str | None = None) -> str:
    if key not in row:
        close = difflib.get_close_matches(key, itertools.islice(row, MOST_KEYS), n=1)
        mend = f"did you mean it by `{close[0]}`?" if close else f"add `{key}`"
        raise _LineFault(f"`{key}` is missing; {mend}", path)
    value = row[key]
    if not isinstance(value, str):
        raise _LineFault(f"`{key}` is {describe(value)}; write text in double quotes", path)
    return _encodable(value, key, path)


def _encodable(text: str, key: str, path: str | None) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"`{key}` holds half of a surrogate pair; write the character itself, in UTF-8"
        raise _LineFault(reason, path) from error
    return text


def _items(settings: DatasetSettings, file: str, rows: dict[str, list[_Row]]) -> tuple[list[Item], list[Reject]]:
    """One item for each image that is there and has one caption; the other images and the lines too many as rejects."""
    items, rejects, clashes = [], [], []
    for stem, same_stem in rows.items():
        usable: list[_Row] = []
        for first, *others in _by_image(same_stem):
            if any(row.caption != first.caption for row in others):
                reason = f"lines {_numbers([first, *others])} of {file} give it different captions; keep one line"
                rejects.append(_image_reject(settings, first.path, reason))
                continue
            for row in others:
                reason = f"`{row.path}` stands in line {first.number} already, with the same caption; remove one line"
                rejects.append(_line_reject(settings, file, row.number, reason))
            if reason := name_fault(stem) or _missing(first.path):
                rejects.append(_image_reject(settings, first.path, reason))
            else:
                usable.append(first)
        clashes += [_clash(file, row, usable[0]) for row in usable[1:]]
        items += [Item(settings.index, row.path, row.path, None, row.caption) for row in usable]
    if clashes:
        raise InputError(limit(clashes))
    return items, rejects


def _by_image(rows: list[_Row]) -> list[list[_Row]]:
    """The rows of each image together, however its path is spelt."""
    if len(rows) == 1:
        return [rows]
    images: dict[str, list[_Row]] = {}
    for row in rows:
        images.setdefault(os.path.abspath(row.path), []).append(row)
    return list(images.values())


def _numbers(rows: list[_Row]) -> str:
    *others, last = [str(row.number) for row in rows]
    return f"{', '.join(others)} and {last}"


def _clash(file: str, row: _Row, other: _Row) -> Problem:
    found = (
        f"`{row.path}` and `{other.path}` (line {other.number}) have the same name but for folder and extension, "
        "so also the same cache files"
    )
    mend = "rename one, or put it into a dataset of its own"
    return Problem(file=file, key=f"line {row.number}", found=found, mend=mend)


def _image_reject(settings: DatasetSettings, path: str, reason: str) -> Reject:
    return Reject(settings.index, printable(path), printable(path), reason)


def _line_reject(settings: DatasetSettings, file: str, number: int, reason: str) -> Reject:
    return Reject(settings.index, f"line {number}", f"{printable(file)}: line {number}", reason)


def _missing(path: str) -> str | None:
    """Why there is no file at `path`, or None when there is one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return f"it cannot be looked at: {error.strerror or error}"
    if stat.S_ISREG(mode):
        return None
    return "it is a folder, not an image" if stat.S_ISDIR(mode) else "it is not a regular file"
