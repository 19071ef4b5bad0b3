"""A packed cache on another machine: every byte verified before anything stands in its place, all of it or nothing.

What arrives is a new folder: the manifests, the cache files, and a dataset file that names them. Nothing that is there
already is written over, and no member can lead out of the folder.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from qwen_image.bounded import open_file, parse_json, read_text, text_fault
from qwen_image.cache.manifest import digest_text
from qwen_image.cache.prompts import read_prompts
from qwen_image.cache.space import check_space
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.files import atomic_write, is_sha256, sync_folder, temporary_folder
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
from qwen_image.lock.datasets import settings_fault
from qwen_image.problems import InputError, Problem

MAX_TABLE_BYTES = 2**28
"""A million members with long names."""
MAX_NAME_BYTES = 2**16
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
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(parent) as aside:
            with _opened(archive) as stream:
                members = _extract(stream, aside)
            _complete(aside, folder)
            # every file's content before the name of the folder
            os.sync()
            _put_in_place(aside, folder)
    except ArchiveError as error:
        mend = "copy it again from where it was packed"
        found = f"is no whole archive of a cache ({error}); nothing was unpacked"
        raise InputError([Problem(file=str(archive), found=found, mend=mend)]) from error
    except OSError as error:
        found = f"cannot be unpacked to {folder}: {error.strerror or error}; nothing was unpacked"
        raise InputError([Problem(file=str(archive), found=found, mend="mend that, and unpack again")]) from error
    return members


def _check_free(folder: Path) -> None:
    """The folder must be new, or empty."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        mend = "name a new folder: nothing is ever written over"
        raise InputError([Problem(file=str(folder), found="is there already, and not empty", mend=mend)])


def _opened(archive: Path) -> BinaryIO:
    try:
        return open_file(archive)
    except ValueError as error:
        raise ArchiveError(str(error)) from error


class _Entry(tarfile.TarInfo):
    """A header that `pack` writes: of a file, or of a long name before one. No other kind is looked into."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        is_name = self.type == tarfile.GNUTYPE_LONGNAME and 0 < self.size <= MAX_NAME_BYTES
        if not is_name and self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ArchiveError("it holds what is no file: a link, a device, a folder, or something sparse")
        return super()._proc_member(archive)


def _extract(stream: BinaryIO, folder: Path) -> list[Member]:
    """Write the members to the folder, each checked against the table."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", tarinfo=_Entry) as tar:
            entries = iter(tar)
            members = _read_table(tar, next(entries, None))
            check_space([(folder / one.name, one.size) for one in members], waiting=0)
            for member in members:
                entry = next(entries, None)
                if entry is None or (entry.name, entry.size) != (member.name, member.size):
                    raise ArchiveError(f"{member.name!r} is not where the table says")
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_member(tar.extractfile(entry), path, member)
            if next(entries, None) is not None:
                raise ArchiveError("it holds more than its table says")
    except (ArchiveError, InputError):
        raise
    except (tarfile.TarError, EOFError) as error:
        raise ArchiveError(str(error)) from error
    except (RecursionError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        # what Python's reader makes of headers that no archive has
        raise ArchiveError(f"a header in it cannot be read ({type(error).__name__})") from error
    return members


def _read_table(tar: tarfile.TarFile, entry: tarfile.TarInfo | None) -> list[Member]:
    if entry is None or entry.name != TABLE or not 0 <= entry.size <= MAX_TABLE_BYTES:
        raise ArchiveError("it does not begin with a table")
    try:
        text = tar.extractfile(entry).read().decode()
        if not text.startswith(HEAD):
            raise ValueError("another first line")
        rows = [line.split("\t") for line in text.removeprefix(HEAD).removesuffix("\n").split("\n")]
        members = [Member(json.loads(name), int(size), sha256) for name, size, sha256 in rows]
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"its table cannot be read: {error}") from error
    for member in members:
        is_name = isinstance(member.name, str) and _is_name(member.name)
        if not (is_name and member.size >= 0 and is_sha256(member.sha256)):
            raise ArchiveError(f"{member.name!r} is no member of a cache's archive")
    if len({member.name for member in members}) != len(members):
        raise ArchiveError("a member stands twice in its table")
    return members


def _is_name(name: str) -> bool:
    """Whether it is a name that `pack` gives; none leads elsewhere."""
    parts = name.split("/")
    if text_fault(name) or any(part in ("", ".", "..") for part in parts):
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
    try:
        _write_dataset_file(aside / name, list(_placed(datasets, folder)))
        here = [replace(one, cache_directory=str(aside / cache_place(one))) for one in datasets]
        manifests = {kind: aside / MANIFESTS / f"{kind}.tsv" for kind in COLUMNS}
        for kind, path in manifests.items():
            digest = path.with_suffix(".sha256")
            there = path.is_file() and digest.is_file()
            if not there or digest.read_bytes() != digest_text(path.read_bytes()).encode():
                raise ArchiveError(f"its manifest of {kind} is not there, or not the one that its digest names")
        check_complete(manifests, here)
        if (prompts := aside / MANIFESTS / f"{PROMPTS}.tsv").is_file():
            read_prompts(prompts)
    except InputError as error:
        first = error.problems[0]
        where = ": ".join(filter(None, (os.path.relpath(first.file, aside), first.key)))
        raise ArchiveError(f"{where}: {first.found}") from error


def _write_dataset_file(path: Path, datasets: list[DatasetSettings]) -> None:
    atomic_write(path, dataset_file_text(path.name, [asdict(one) for one in datasets]))
    read = load_dataset_config(path)
    if [replace(one, cache_directory="") for one in read] != [replace(one, cache_directory="") for one in datasets]:
        raise ArchiveError("its datasets' settings cannot be written to a dataset file")


def _read_datasets(path: Path) -> tuple[str, list[DatasetSettings]]:
    """The dataset file's name and the settings, with the last names of their paths."""
    try:
        content = parse_json(read_text(path, MAX_SETTINGS_BYTES))
        if fault := text_fault(json.dumps(content, ensure_ascii=False)):
            raise ValueError(f"a text of it {fault}")
        name, tables = content["file"], content["datasets"]
        if not re.fullmatch(r"[^/\0]{1,250}\.(toml|json)", name, re.IGNORECASE) or name == DATASETS:
            raise ValueError(f"{name!r} is no dataset file's name")
        for index, table in enumerate(tables):
            settings = {key: value for key, value in table.items() if key != "index" and value is not None}
            if (fault := settings_fault(settings)) is not None:
                raise ValueError(f"datasets[{index}].{fault[0]}: {fault[1]}")
        datasets = [DatasetSettings(**{key: _tuple(value) for key, value in table.items()}) for table in tables]
        if [one.index for one in datasets] != list(range(len(datasets))) or not all(map(_has_plain_names, datasets)):
            raise ValueError("a path leads elsewhere")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchiveError(f"its datasets' settings cannot be read: {error}") from error
    return name, datasets


def _has_plain_names(settings: DatasetSettings) -> bool:
    if settings.cache_directory is None:
        return False
    names = [settings.image_directory, settings.image_jsonl_file, settings.control_directory, settings.cache_directory]
    return all(
        "/" not in name and not text_fault(name) and name not in (".", "..") for name in names if name is not None
    )


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
