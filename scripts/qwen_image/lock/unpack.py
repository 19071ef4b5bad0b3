"""A packed cache on another machine: every byte verified before anything stands in its place, all of it or nothing.

What arrives is a new folder: the manifests, the cache files, and a dataset file that names them. Nothing that is there
already is written over, and no member can lead out of the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from qwen_image.bounded import parse_json
from qwen_image.cache.manifest import digest_text
from qwen_image.cache.prompts import read_prompts
from qwen_image.cache.space import check_space
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.files import atomic_write, is_sha256, sync_folder
from qwen_image.lock.archive import (
    CACHE,
    COLUMNS,
    DATASETS,
    HEAD,
    MANIFESTS,
    PROMPTS,
    TABLE,
    HashingReader,
    Member,
    cache_place,
    check_complete,
)
from qwen_image.lock.dataset_file import dataset_file_text
from qwen_image.problems import InputError, Problem

MAX_TABLE_BYTES = 2**28
"""A million members with long names."""
MAX_SETTINGS_BYTES = 2**22
CHUNK = 2**20
IMAGES = "images"
"""Where in the folder the images would be; training needs none."""


class ArchiveError(ValueError):
    """The archive is not one that `pack` wrote, or is damaged; the message says in what way."""


def unpack(archive: Path, folder: Path) -> list[Member]:
    """Make the folder from the archive; return what was in it, without the table.

    Raises InputError for an archive that is damaged or is none, for a folder that holds anything, and for a disk that
    is too small. The folder is then as it was.
    """
    _check_free(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = folder.absolute().parent / f".tmp-{secrets.token_hex(8)}"
    aside.mkdir()
    try:
        with open(archive, "rb") as stream:
            members = _extract(stream, aside)
        _complete(aside, folder)
        # every file's content before the name of the folder
        os.sync()
        _put_in_place(aside, folder)
    except (ArchiveError, tarfile.TarError, EOFError) as error:
        mend = "copy it again from where it was packed"
        found = f"is no whole archive of a cache ({error}); nothing was unpacked"
        raise InputError([Problem(file=str(archive), found=found, mend=mend)]) from error
    except OSError as error:
        found = f"cannot be unpacked to {folder}: {error.strerror or error}; nothing was unpacked"
        raise InputError([Problem(file=str(archive), found=found, mend="mend that, and unpack again")]) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(aside)
    return members


def _check_free(folder: Path) -> None:
    """The folder must be new, or empty."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        mend = "name a new folder: nothing is ever written over"
        raise InputError([Problem(file=str(folder), found="is there already, and not empty", mend=mend)])


def _extract(stream: BinaryIO, folder: Path) -> list[Member]:
    """Write the members to the folder, each checked against the table."""
    with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8") as tar:
        entries = iter(tar)
        members = _read_table(tar, next(entries, None))
        check_space([(folder / one.name, one.size) for one in members], waiting=0)
        for member in members:
            entry = next(entries, None)
            if entry is None or not _is_plain(entry) or (entry.name, entry.size) != (member.name, member.size):
                raise ArchiveError(f"{member.name!r} is not where the table says")
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_member(tar.extractfile(entry), path, member)
        if next(entries, None) is not None:
            raise ArchiveError("it holds more than its table says")
    return members


def _read_table(tar: tarfile.TarFile, entry: tarfile.TarInfo | None) -> list[Member]:
    if entry is None or entry.name != TABLE or not _is_plain(entry) or entry.size > MAX_TABLE_BYTES:
        raise ArchiveError("it does not begin with a table")
    try:
        text = tar.extractfile(entry).read().decode()
        if not text.startswith(HEAD):
            raise ValueError("another first line")
        rows = [line.split("\t") for line in text.removeprefix(HEAD).splitlines()]
        members = [Member(json.loads(name), int(size), sha256) for name, size, sha256 in rows]
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"its table cannot be read: {error}") from error
    for member in members:
        if not (
            isinstance(member.name, str) and _is_name(member.name) and member.size >= 0 and is_sha256(member.sha256)
        ):
            raise ArchiveError(f"{member.name!r} is no member of a cache's archive")
    if len({member.name for member in members}) != len(members):
        raise ArchiveError("a member stands twice in its table")
    return members


def _is_plain(entry: tarfile.TarInfo) -> bool:
    """Whether it is a file by itself: no link, no device, no folder, nothing sparse."""
    return entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and entry.sparse is None


def _is_name(name: str) -> bool:
    """Whether it is a name that `pack` gives; none leads elsewhere."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        return False
    if name == DATASETS:
        return True
    kinds = "|".join(COLUMNS)
    if re.fullmatch(rf"{MANIFESTS}/(({kinds})(\.tsv|\.sha256|\.rejects\.tsv)|{PROMPTS}\.tsv)", name):
        return True
    if parts[:2] == [MANIFESTS, PROMPTS]:
        return len(parts) == 3
    return parts[0] == CACHE and parts[1].isdecimal() and 4 <= len(parts) <= 5


def _write_member(source: BinaryIO, path: Path, member: Member) -> None:
    reader = HashingReader(source)
    with open(path, "xb") as target:
        while part := reader.read(CHUNK):
            target.write(part)
    if reader.sha256 != member.sha256:
        raise ArchiveError(f"{member.name!r} is damaged")


def _complete(aside: Path, folder: Path) -> None:
    """Write the dataset file, and see that everything fits together as a training will ask."""
    name, datasets = _read_datasets(aside / DATASETS)
    final = list(_placed(datasets, folder))
    atomic_write(aside / name, dataset_file_text(name, [asdict(one) for one in final]))
    if [replace(one, cache_directory="") for one in load_dataset_config(aside / name)] != [
        replace(one, cache_directory="") for one in final
    ]:
        raise ArchiveError("its datasets' settings cannot be written to a dataset file")
    here = [replace(one, cache_directory=str(aside / cache_place(one))) for one in datasets]
    manifests = {kind: aside / MANIFESTS / f"{kind}.tsv" for kind in COLUMNS}
    for kind, path in manifests.items():
        digest = path.with_suffix(".sha256")
        if not path.is_file() or not digest.is_file() or digest.read_bytes() != digest_text(path.read_bytes()).encode():
            raise ArchiveError(f"its manifest of {kind} is not there, or not the one that its digest names")
    check_complete(manifests, here)
    if (prompts := aside / MANIFESTS / f"{PROMPTS}.tsv").is_file():
        read_prompts(prompts)


def _read_datasets(path: Path) -> tuple[str, list[DatasetSettings]]:
    """The dataset file's name and the settings, with the last names of their paths."""
    try:
        content = parse_json(path.read_bytes()[:MAX_SETTINGS_BYTES].decode())
        name, tables = content["file"], content["datasets"]
        if not re.fullmatch(r"[^/\0]{1,250}\.(toml|json)", name, re.IGNORECASE) or name == DATASETS:
            raise ValueError(f"{name!r} is no dataset file's name")
        datasets = [DatasetSettings(**{key: _tuple(value) for key, value in table.items()}) for table in tables]
        if [one.index for one in datasets] != list(range(len(datasets))) or not all(map(_has_plain_names, datasets)):
            raise ValueError("a path leads elsewhere")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchiveError(f"its datasets' settings cannot be read: {error}") from error
    return name, datasets


def _has_plain_names(settings: DatasetSettings) -> bool:
    names = [settings.image_directory, settings.image_jsonl_file, settings.control_directory, settings.cache_directory]
    return all(re.fullmatch(r"[^/\0]*", name) and name not in (".", "..") for name in names if name is not None)


def _placed(datasets: list[DatasetSettings], folder: Path) -> Iterator[DatasetSettings]:
    for one in datasets:
        paths: dict[str, Any] = {"cache_directory": os.path.join(folder, cache_place(one))}
        for key in ("image_directory", "image_jsonl_file", "control_directory"):
            if (name := getattr(one, key)) is not None:
                paths[key] = os.path.join(folder, IMAGES, str(one.index), name)
        yield replace(one, **paths)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _put_in_place(aside: Path, folder: Path) -> None:
    """Give the folder its name; a rename replaces an empty one, and nothing else."""
    os.rename(aside, folder)
    sync_folder(folder.absolute().parent)
