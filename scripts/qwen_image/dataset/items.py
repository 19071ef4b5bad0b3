"""Lists the items of a dataset, images with their captions, by looking at folders and JSONL files. Opens no image."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qwen_image.bounded import read_bytes
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.jsonl import list_jsonl
from qwen_image.dataset.listing import MAX_CAPTION_BYTES, Item, Listing, Reject, limit, name_fault, printable
from qwen_image.problems import InputError, Problem

__all__ = ["Item", "Listing", "Reject", "list_datasets", "list_items", "read_captions"]

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
JXL_PLUGINS = ("pillow_jxl", "jxlpy")
"""Modules that teach Pillow to read JPEG XL; with one of them installed, .jxl files are images as well."""


def list_datasets(settings_list: Sequence[DatasetSettings], dataset_config_path: str | Path) -> list[Listing]:
    """List all datasets of a dataset file, in its order.

    Raises one InputError with the problems of all of them; a dataset without a single item is a problem too.
    """
    listings, problems = [], []
    for settings in settings_list:
        try:
            listing = list_items(settings)
        except InputError as error:
            problems += error.problems
            continue
        if not listing.items:
            problems.append(_empty_problem(settings, listing, str(dataset_config_path)))
        listings.append(listing)
    if problems:
        raise InputError(problems)
    return listings


def list_items(settings: DatasetSettings) -> Listing:
    """The items of one dataset. Sub-folders are not searched.

    Raises InputError for a folder or file that cannot be read, and for images that would share a cache file.
    """
    if settings.image_jsonl_file is None:
        return _list_directory(settings)
    return list_jsonl(settings)


def read_captions(item: Item, settings: DatasetSettings) -> list[str]:
    """The item's captions, at least one: its file's text without surrounding white space, or the JSONL file's verbatim.

    With `multiple_captions`, each line of the file that is not blank is one, and so is each text of a JSONL file's
    list, all without surrounding white space and each once; where nothing is left, it is the empty caption. A JSONL
    file's plain text stays one caption: it can give a list. Raises ValueError with a reason for people when the file
    cannot be read or is not UTF-8.
    """
    if isinstance(item.caption, str):
        return [item.caption]
    if item.caption is not None:
        return _different(item.caption)
    assert item.caption_path is not None, item
    text = _read_text(item.caption_path)
    # not str.splitlines, which also takes characters within a caption for line ends
    return _different(re.split(r"[\r\n]", text)) if settings.multiple_captions else [text]


def _different(texts: Iterable[str]) -> list[str]:
    """The texts that are not blank, stripped, each once; of none, the empty one."""
    stripped = (text.strip() for text in texts)
    return list(dict.fromkeys(text for text in stripped if text)) or [""]


def _read_text(path: str) -> str:
    """The text of a caption file without surrounding white space."""
    try:
        content = read_bytes(path, MAX_CAPTION_BYTES)
    except OSError as error:
        raise ValueError(f"the caption file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"the caption file {path} cannot be read: {error}") from error
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        encoding = " (it looks like UTF-16)" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        reason = f"the caption file {path} is not UTF-8 text{encoding}; save it as UTF-8"
        raise ValueError(reason) from error
    if "\0" in text:
        raise ValueError(f"the caption file {path} holds NUL characters; save it as UTF-8 text")
    return text


def _list_directory(settings: DatasetSettings) -> Listing:
    directory, extension = settings.image_directory, settings.caption_extension
    assert directory is not None and extension is not None, settings
    images, captions, others = _scan(settings, directory, extension)
    prefix = os.path.join(directory, "")
    items, rejects, clashes, first = [], [], [], {}
    for name, kind_fault in sorted(images):
        stem, suffix = os.path.splitext(name)
        caption = stem + extension
        reason = kind_fault or name_fault(stem)
        if reason is None and suffix.lower() == ".jxl" and not _reads_jxl():
            reason = f"JPEG XL needs a plugin for Pillow, and neither of {', '.join(JXL_PLUGINS)} is installed"
        if reason is None and caption not in captions:
            what = "is not a file that can be read" if caption in others else "is missing"
            reason = f"its caption file {caption} {what}"
        if reason is not None:
            rejects.append(Reject(settings.index, printable(name), printable(prefix + name), reason))
        elif (other := first.setdefault(stem, name)) is not name:
            found = f"`{other}` and `{name}` have the same name but for the extension, so also the same cache files"
            clashes.append(Problem(file=directory, key=name, found=found, mend="rename or remove one of them"))
        else:
            items.append(Item(settings.index, name, prefix + name, prefix + caption, None))
    if clashes:
        raise InputError(limit(clashes))
    rejects.sort(key=lambda reject: reject.key)
    return Listing(items, rejects, len(captions))


def _scan(
    settings: DatasetSettings, directory: str, extension: str
) -> tuple[list[tuple[str, str | None]], set[str], set[str]]:
    """One pass over the folder: images, each with what is wrong with it; caption files; what is only named like one.

    Follows the file types that the listing itself carries: no call to the file system for each plain file.
    """
    images, captions, others = [], set(), set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                # Not os.path.splitext: it takes four times as long and differs for hidden names alone.
                suffix = name[name.rfind(".") :].lower() if "." in name else ""
                if suffix in IMAGE_EXTENSIONS or suffix == ".jxl":
                    images.append((name, _kind_fault(entry)))
                elif name.endswith(extension):
                    (others if _kind_fault(entry) else captions).add(name)
    except OSError as error:
        key = f"datasets[{settings.index}].image_directory"
        mend = f"give a folder that exists and may be read; relative paths start at {Path.cwd()}"
        found = f"cannot be listed: {error.strerror or error}"
        raise InputError([Problem(file=directory, key=key, found=found, mend=mend)]) from error
    return images, captions, others


def _kind_fault(entry: os.DirEntry) -> str | None:
    """Why the entry is no file, or None when it is one or a link to one."""
    try:
        if entry.is_file():
            return None
        if entry.is_dir():
            return "it is a folder, not an image; folders in image_directory are not searched"
        leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)
        return "it is a link to a file that does not exist" if leads_nowhere else "it is not a regular file"
    except OSError as error:
        return f"it cannot be looked at: {error.strerror or error}"


def _reads_jxl() -> bool:
    return any(importlib.util.find_spec(module) is not None for module in JXL_PLUGINS)


def _empty_problem(settings: DatasetSettings, listing: Listing, file: str) -> Problem:
    """The problem of a dataset without items: what was looked for, what was there, and the likely mend."""
    images, captions = len(listing.rejects), listing.captions_found
    example = f"; for example {listing.rejects[0].key}: {listing.rejects[0].reason}" if images else ""
    if settings.image_jsonl_file is not None:
        key, source = "image_jsonl_file", settings.image_jsonl_file
        found = f"0 usable images: `{source}` has {captions} rows{example}"
        mend = f"correct them; relative paths start at {Path.cwd()}" if captions else "add one JSON object a line"
    else:
        key, source, extension = "image_directory", settings.image_directory, settings.caption_extension
        known = ", ".join(sorted(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS))
        found = f"0 usable images: {images} images and {captions} caption files (*{extension}) in `{source}`{example}"
        mend = f"put images ({known}) directly into that folder, each with its caption in a file ending in {extension}"
        if images and not captions:
            caption = Path(listing.rejects[0].key).stem + extension
            mend = f"add the captions, such as {caption}, or correct caption_extension"
    return Problem(file=file, key=f"datasets[{settings.index}].{key}", found=found, mend=mend)
