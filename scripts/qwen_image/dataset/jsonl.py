"""Lists the items of a JSONL dataset: a file with one JSON object a line, `image_path` and `caption` in each."""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.keys import describe, path_fault
from qwen_image.dataset.listing import Item, Listing, Reject, limit, name_fault, printable, stem_of
from qwen_image.problems import InputError, Problem


def list_jsonl(settings: DatasetSettings) -> Listing:
    """The items of `settings.image_jsonl_file`, sorted by key. An image that does not exist is a reject.

    Raises InputError with all that is wrong with the file's lines. Blank lines are skipped, and keys that mean nothing
    here (control images of edit models, people's own notes) are ignored.
    """
    file = settings.image_jsonl_file
    assert file is not None, settings
    problems: list[Problem] = []
    items, rejects, lines, stems = [], [], {}, {}
    for number, text in enumerate(_read(settings, file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            path, caption = _row(text)
            stem = stem_of(path)
            _claim(path, stem, number, lines, stems)
        except _RowFault as fault:
            problems.append(Problem(file=file, key=f"line {number}", found=fault.found, mend=fault.mend))
            continue
        if reason := name_fault(stem) or _missing(path):
            rejects.append(Reject(settings.index, printable(path), printable(path), reason))
        else:
            items.append(Item(settings.index, path, path, None, caption))
    if problems:
        raise InputError(limit(problems))
    items.sort(key=lambda item: item.key)
    rejects.sort(key=lambda reject: reject.key)
    return Listing(items, rejects, len(lines))


class _RowFault(Exception):
    """What is wrong with one line, in the words of a `Problem`."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found, self.mend = found, mend


def _read(settings: DatasetSettings, file: str) -> str:
    key = f"datasets[{settings.index}].image_jsonl_file"
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        found = f"cannot be read: {error.strerror or error}"
        mend = f"give a file that exists and may be read; relative paths start at {Path.cwd()}"
        raise InputError([Problem(file=file, key=key, found=found, mend=mend)]) from error
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


def _row(text: str) -> tuple[str, str]:
    """The image path and the caption of one line."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        # The parser counts lines inside this one line, so only its column is of use.
        reason = re.sub(r": line \d+ column (\d+) \(char \d+\)", r" at column \1", str(error))
        raise _RowFault(f"is not valid JSON: {reason}", "write one complete JSON object on the line") from error
    if not isinstance(row, dict):
        raise _RowFault(f"{describe(row)} is no JSON object", 'write {"image_path": "...", "caption": "..."}')
    if more := [key for key in row if key.startswith("image_path_") and key[11:].isdecimal() and key != "image_path_0"]:
        raise _RowFault(f"`{more[0]}` is for the layered model, which is not supported", "keep image_path alone")
    if {"image_path", "image_path_0"} <= row.keys():
        raise _RowFault("has both image_path and image_path_0", "keep one of the two")
    path = _text(row, "image_path_0" if "image_path_0" in row else "image_path")
    if fault := path_fault(path):
        raise _RowFault(f"image_path {fault}", "write the path of the image")
    caption = _text(row, "caption")
    if "\0" in caption:
        raise _RowFault("`caption` holds a NUL character", "write the caption without it")
    return path, caption


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        close = difflib.get_close_matches(key, row, n=1)
        raise _RowFault(f"`{key}` is missing", f"did you mean it by `{close[0]}`?" if close else f"add `{key}`")
    value = row[key]
    if not isinstance(value, str):
        raise _RowFault(f"`{key}` is {describe(value)}", "write text in double quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RowFault(f"`{key}` holds half of a surrogate pair", "write the character itself, in UTF-8") from error
    return value


def _claim(path: str, stem: str, number: int, lines: dict[str, int], stems: dict[str, str]) -> None:
    """Note the line's image in `lines` (path -> line) and `stems` (stem -> path), unless an earlier line has it."""
    if path in lines:
        raise _RowFault(f"`{path}` stands in line {lines[path]} already", "remove one of the two lines")
    lines[path] = number
    other = stems.setdefault(stem, path)
    if other != path:
        found = f"`{path}` and `{other}` (line {lines[other]}) have the same name but for folder and extension"
        raise _RowFault(f"{found}, so also the same cache files", "rename one, or put it into a dataset of its own")


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
