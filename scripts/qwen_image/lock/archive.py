"""A dataset's cache in one file: a plain tar with a table of its members first; the same cache gives the same bytes.

It holds both manifests with their digests and tables of rejects, the cache files that they list, the prompts' where
asked for, and the datasets' settings. No image, no time, no user's name and no path of this machine is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import BinaryIO

from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, digest_text, read_manifest
from qwen_image.cache.prompts import prompts_folder, read_prompts
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.files import atomic_write
from qwen_image.lock.hashing import DAMAGED, made_sha256
from qwen_image.lock.layout import DATASET_PATHS
from qwen_image.problems import InputError, Problem
from qwen_image.training.items import AGAIN, RERUN, check_cache_files, join_manifests

TABLE, DATASETS = "table.tsv", "datasets.json"
MANIFESTS, CACHE, PROMPTS = "manifests", "cache", "prompts"
COLUMNS = {"latents": LATENT_COLUMNS, "text_encoder_outputs": TEXT_COLUMNS}
HEAD = "member\tbytes\tsha256\n"


@dataclass(frozen=True)
class Member:
    """A file of an archive, as its table says."""

    name: str
    """Relative, of plain parts."""
    size: int
    """In bytes."""
    sha256: str


def pack(dataset_config: str, manifests: Mapping[str, Path], prompts: Path | None, archive: Path) -> list[Member]:
    """Write the archive atomically; return what is in it, without the table.

    `manifests` are those of both kinds. Raises InputError when one cannot be read, or a cache file is missing, damaged
    or not the one that its row describes.
    """
    settings = load_dataset_config(dataset_config)
    check_complete(manifests, settings)
    contents = _contents(dataset_config, settings, manifests)
    contents |= _prompts(prompts) if prompts is not None else {}
    try:
        members = _members(contents)
        atomic_write(archive, lambda stream: _write(stream, members, contents))
    except OSError as error:
        found = f"cannot be packed: {error.filename or 'the archive'}: {error.strerror or error}"
        raise InputError([Problem(file=str(archive), found=found, mend="mend that, and pack again")]) from error
    return members


def check_complete(manifests: Mapping[str, Path], settings: list[DatasetSettings]) -> None:
    """Raise InputError unless the manifests fit the datasets, and their items' cache files are there and whole."""
    joined = join_manifests(str(manifests["latents"]), str(manifests["text_encoder_outputs"]), settings)
    check_cache_files(joined.items)


def cache_place(settings: DatasetSettings) -> str:
    """Return where a dataset's cache directory lies in an archive; its own name counts, because LoRAs name it."""
    return f"{CACHE}/{settings.index}/{PurePath(settings.cache_directory).name or CACHE}"


def table_text(members: Iterable[Member]) -> str:
    """Return the archive's table."""
    return HEAD + "".join(f"{json.dumps(one.name)}\t{one.size}\t{one.sha256}\n" for one in members)


def _contents(
    dataset_config: str, settings: list[DatasetSettings], manifests: Mapping[str, Path]
) -> dict[str, Path | bytes]:
    """What goes in, by the members' names."""
    contents: dict[str, Path | bytes] = {DATASETS: _datasets(dataset_config, settings)}
    places = {one.index: (cache_place(one), Path(one.cache_directory)) for one in settings}
    for kind, path in manifests.items():
        contents[f"{MANIFESTS}/{kind}.tsv"] = path
        contents[f"{MANIFESTS}/{kind}.sha256"] = digest_text(path.read_bytes()).encode()
        rejects = path.with_suffix(".rejects.tsv")
        contents |= {f"{MANIFESTS}/{kind}.rejects.tsv": rejects} if rejects.is_file() else {}
        for row in read_manifest(path, COLUMNS[kind]).to_dict("records"):
            place, folder = places[row["dataset"]]
            contents[f"{place}/{row['cache_file']}"] = folder / row["cache_file"]
    return contents


def _datasets(dataset_config: str, settings: list[DatasetSettings]) -> bytes:
    """The datasets' settings, with the last names of their paths, and the dataset file's own."""
    cut = [
        asdict(replace(one, **{key: _last_name(getattr(one, key)) for key in DATASET_PATHS})) for one in settings
    ]  # fmt: skip
    content = {"file": PurePath(dataset_config).name, "datasets": cut}
    return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def _last_name(path: str | None) -> str | None:
    return PurePath(path).name if path is not None else None


def _prompts(manifest: Path) -> dict[str, Path | bytes]:
    read_prompts(manifest)
    rows = read_manifest(manifest, TEXT_COLUMNS).to_dict("records")
    files = {row["cache_file"] for row in rows}
    return {
        f"{MANIFESTS}/{PROMPTS}.tsv": manifest,
        **{f"{MANIFESTS}/{PROMPTS}/{file}": prompts_folder(manifest) / file for file in files},
    }


def _order(name: str) -> tuple[bool, str]:
    """What describes the rest comes first."""
    return name.startswith(f"{CACHE}/"), name


def _members(contents: Mapping[str, Path | bytes]) -> list[Member]:
    members, problems = [], []
    for name in sorted(contents, key=_order):
        content = contents[name]
        if isinstance(content, bytes):
            members.append(Member(name, len(content), hashlib.sha256(content).hexdigest()))
            continue
        sha256, is_sound = made_sha256(content)
        members.append(Member(name, os.path.getsize(content), sha256))
        if not is_sound:
            mend = f"delete it, and {RERUN if name.startswith(CACHE) else f'{AGAIN} cache_prompts'}"
            problems.append(Problem(file=str(content), found=DAMAGED, mend=mend))
    if problems:
        raise InputError(problems)
    return members


def _write(stream: BinaryIO, members: list[Member], contents: Mapping[str, Path | bytes]) -> None:
    table = table_text(members).encode()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        tar.addfile(_info(TABLE, len(table)), io.BytesIO(table))
        for member in members:
            content = contents[member.name]
            with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as source:
                reader = HashingReader(source)
                tar.addfile(_info(member.name, member.size), reader)
            if reader.sha256 != member.sha256:
                raise _changed(content)


def _changed(content: Path | bytes) -> InputError:
    mend = "let what writes it come to its end, and pack again"
    return InputError([Problem(file=str(content), found="changed while it was packed", mend=mend)])


def _info(name: str, size: int) -> tarfile.TarInfo:
    """A member's header: no time, no owner."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


class HashingReader:
    """Reads a file, and knows the hash of what was read."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        part = self._source.read(size)
        self._digest.update(part)
        return part

    @property
    def sha256(self) -> str:
        """Of all that was read."""
        return self._digest.hexdigest()
