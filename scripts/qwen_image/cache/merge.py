"""What only the whole dataset can tell: the manifest of all shards, and which cache files no item has any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen_image.cache.fingerprint import is_ours
from qwen_image.cache.manifest import (
    LATENT_COLUMNS,
    REJECT_COLUMNS,
    TEXT_COLUMNS,
    manifest_content,
    read_manifest,
    write_digest,
    write_manifest,
)
from qwen_image.cache.names import LATENT_SUFFIX, TEXT_SUFFIX, split_text_file_name
from qwen_image.cache.shards import shard_manifest
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Listing
from qwen_image.dataset.listing import limit, stem_of
from qwen_image.files import atomic_write
from qwen_image.problems import InputError, Problem

REJECTS = ".rejects.tsv"
KINDS: Mapping[str, tuple[str, Mapping[str, type]]] = {
    "latents": (LATENT_SUFFIX, LATENT_COLUMNS),
    "text_encoder_outputs": (TEXT_SUFFIX, TEXT_COLUMNS),
}
"""Suffix of the cache files and columns of the manifest, by the manifest's stem."""


def merge_shards(manifest: Path, count: int) -> None:
    """Write the manifest, its digest and its rejects table from those of `count` shards.

    The order of its rows does not depend on `count`. Tables of another count are removed: they describe the cache as it
    once was, and would pass for up to date if that count came back. Raises InputError when a table cannot be read, or
    when no item is left.
    """
    parts = [shard_manifest(manifest, shard, count) for shard in range(1, count + 1)]
    if count == 1:
        # the only shard's tables are the whole's; pandas is not imported for them
        content, rejected = _content(parts[0]), _content(parts[0].with_suffix(REJECTS))
        atomic_write(manifest, content)
        atomic_write(manifest.with_suffix(REJECTS), rejected)
    else:
        _, columns = KINDS[manifest.stem]
        rejects = _rows([part.with_suffix(REJECTS) for part in parts], REJECT_COLUMNS)
        rows = _rows(parts, columns)
        if not rows:
            raise InputError(_nothing_left(manifest, rejects))
        content = write_manifest(manifest, rows, columns)
        write_manifest(manifest.with_suffix(REJECTS), rejects, REJECT_COLUMNS)
    # what depends on the manifest asks this file
    write_digest(manifest, content)
    for table in parts[0].parent.glob(f"{manifest.stem}.*-of-*"):
        if f"-of-{count}." not in table.name:
            table.unlink()


def cache_paths(manifest: Path, datasets: Iterable[tuple[DatasetSettings, Listing]]) -> set[Path]:
    """Return the paths of the cache files that a manifest lists."""
    _, columns = KINDS[manifest.stem]
    folders = {settings.index: Path(settings.cache_directory) for settings, _ in datasets}
    return {folders[row["dataset"]] / row["cache_file"] for row in _rows([manifest], columns)}


def remove_orphans(suffix: str, datasets: Iterable[tuple[DatasetSettings, Listing]], wanted: set[Path]) -> int:
    """Remove the files with this suffix that are neither wanted nor those of an item that is left out; return how many.

    The suffix of texts stands for those of further captions too. An item that is bad today may be mended tomorrow, so
    its files stay. A file that this project did not write is never touched.
    """
    members: dict[Path, set[str]] = {}
    for settings, listing in datasets:
        stems = members.setdefault(Path(settings.cache_directory), set())
        stems.update(item.stem for item in listing.items)
        stems.update(stem_of(reject.path) for reject in listing.rejects)
    left_out = {folder: stems - _stems(wanted, folder, suffix) for folder, stems in members.items()}
    orphans = [
        path
        for folder in sorted(members)
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path not in wanted and (stem := _stem(path, suffix)) is not None and stem not in left_out[folder]
    ]
    ours = [path for path in orphans if is_ours(path)]
    for path in ours:
        path.unlink()
    return len(ours)


def _rows(tables: Iterable[Path], columns: Mapping[str, type]) -> list[dict]:
    return [row for table in tables for row in read_manifest(table, columns).to_dict("records")]


def _content(table: Path) -> bytes:
    try:
        return manifest_content(table)
    except OSError as error:
        mend = "run the caching stage again, it writes this file"
        found = f"cannot be read ({error.strerror})"
        raise InputError([Problem(file=str(table), found=found, mend=mend)]) from error


def _nothing_left(manifest: Path, rejects: list[dict]) -> list[Problem]:
    mend = "mend or remove it; the dataset needs at least one usable item"
    names = [(f"datasets[{reject['dataset']}] {reject['key']}", reject["reason"]) for reject in rejects]
    problems = [Problem(file=str(manifest), key=name, found=reason, mend=mend) for name, reason in names]
    return limit(problems) or [Problem(file=str(manifest), found="there is no item", mend="give a dataset with items")]


def _stems(paths: Iterable[Path], folder: Path, suffix: str) -> set[str | None]:
    return {_stem(path, suffix) for path in paths if path.parent == folder}


def _stem(path: Path, suffix: str) -> str | None:
    """The stem of the image that a cache file is named after; None for a file that is none of this suffix."""
    if suffix == TEXT_SUFFIX:
        parts = split_text_file_name(path.name)
        return parts and parts[0]
    # the image's size stands behind the stem
    return path.name.removesuffix(suffix).rpartition("_")[0] if path.name.endswith(suffix) else None
