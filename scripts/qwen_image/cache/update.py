"""One caching stage: find out what is missing, encode just that, write the manifest.

Both encoders run through `update_cache`; what differs between them is a `Stage` (see latents.py and
text_encoder_outputs.py). Nothing here imports torch: a stage that has nothing to encode never loads a model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwen_image.cache.fingerprint import fingerprint, fingerprint_metadata, is_ours, read_matching_header
from qwen_image.cache.manifest import REJECT_COLUMNS, write_manifest
from qwen_image.container import Header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Item, Listing, Reject
from qwen_image.files import atomic_write, sha256_file
from qwen_image.problems import InputError, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a caching stage is to behave."""

    skip_existing: bool
    """Keep cache files whose fingerprint is right; False encodes everything."""
    keep_cache: bool
    """Keep cache files of items that left the dataset; False removes those that this project wrote."""
    on_bad_item: str
    """``error``: encode the good items, then fail; ``skip``: list the bad ones and succeed."""
    manifest: Path
    rejects: Path


@dataclass(frozen=True)
class Entry:
    """One item and the cache file it must have."""

    item: Item
    path: Path
    parts: Mapping[str, str]
    """What the file is made from; see fingerprint.py."""
    columns: Mapping[str, object]
    """The manifest columns that are known before encoding."""
    metadata: Mapping[str, str]
    """The field's metadata for the file, without the fingerprint."""
    payload: object = None
    """What the stage's encoder needs to know besides."""


@dataclass(frozen=True)
class Encoded:
    """One encoder output, ready to be written."""

    entry: Entry
    tensors: Mapping[str, torch.Tensor]


class Stage(Protocol):
    """What the two encoders have to say for themselves."""

    title: str
    suffix: str
    columns: Mapping[str, type]

    def plan(self, item: Item, settings: DatasetSettings) -> Entry:
        """Say what the item's cache file must be. Raises ValueError or OSError for an item that cannot be used."""

    def encode(self, entries: list[Entry]) -> Iterator[Encoded | Reject]:
        """Load the model and encode, in any order."""

    def describe(self, header: Header) -> dict[str, object]:
        """Return the manifest columns that are read off the finished file."""


@dataclass
class Report:
    """What a stage did."""

    title: str
    encoded: int = 0
    up_to_date: int = 0
    removed: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def __str__(self) -> str:
        """One readable line, for the terminal and the log."""
        text = f"{self.title}: {self.encoded} encoded, {self.up_to_date} up to date, {len(self.rejects)} rejected"
        return text + (f", {self.removed} removed" if self.removed else "")


def update_cache(stage: Stage, datasets: Iterable[tuple[DatasetSettings, Listing]], options: CacheOptions) -> Report:
    """Bring the cache files up to date with the datasets and write the manifest and the rejects table.

    Good items are encoded and saved before bad ones are reported. Raises InputError naming every bad item when
    `on_bad_item` is ``error``; nothing that was encoded is lost by that.
    """
    start = time.monotonic()
    report = Report(stage.title)
    datasets = list(datasets)
    entries = _plan(stage, datasets, report)
    headers = {entry.path: _current_header(entry, options) for entry in entries}
    stale = [entry for entry in entries if headers[entry.path] is None]
    report.up_to_date = len(entries) - len(stale)
    print(f"{stage.title}: {len(entries)} items, {len(stale)} to encode", file=sys.stderr, flush=True)

    for result in stage.encode(stale) if stale else ():
        if isinstance(result, Reject):
            report.rejects.append(result)
        else:
            _save(result)
            report.encoded += 1
    if not options.keep_cache:
        report.removed = _remove_orphans(stage, datasets, {entry.path for entry in entries})

    rejected = {(reject.dataset, reject.key) for reject in report.rejects}
    kept = [entry for entry in entries if (entry.item.dataset, entry.item.key) not in rejected]
    _check_rejects(report, options, len(kept))
    rows = (_row(stage, entry, headers[entry.path] or read_matching_header(entry.path, entry.parts)) for entry in kept)
    write_manifest(options.manifest, rows, stage.columns)
    # a few bytes that stand for the manifest's content, however large it is: what depends on it asks this file
    atomic_write(options.manifest.with_suffix(".sha256"), f"{sha256_file(options.manifest)}\n")
    rejects = ({"dataset": r.dataset, "key": r.key, "reason": r.reason} for r in report.rejects)
    write_manifest(options.rejects, rejects, REJECT_COLUMNS)
    print(f"{report} ({time.monotonic() - start:.1f} s)", file=sys.stderr, flush=True)
    return report


def _plan(stage: Stage, datasets: list[tuple[DatasetSettings, Listing]], report: Report) -> list[Entry]:
    entries = []
    for settings, listing in datasets:
        report.rejects.extend(listing.rejects)
        for item in listing.items:
            try:
                entries.append(stage.plan(item, settings))
            except (ValueError, OSError) as error:
                report.rejects.append(Reject(item.dataset, item.key, item.image_path, str(error)))
    return entries


def _current_header(entry: Entry, options: CacheOptions) -> Header | None:
    return read_matching_header(entry.path, entry.parts) if options.skip_existing else None


def _save(result: Encoded) -> None:
    from qwen_image.container import write_safetensors

    metadata = {**result.entry.metadata, **fingerprint_metadata(result.entry.parts)}
    write_safetensors(result.entry.path, result.tensors, metadata)


def _remove_orphans(stage: Stage, datasets: list[tuple[DatasetSettings, Listing]], wanted: set[Path]) -> int:
    """Remove this stage's files of items that are gone. A file that this project did not write is never touched."""
    removed = 0
    for folder in sorted({Path(settings.cache_directory) for settings, _ in datasets}):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.endswith(stage.suffix) and path not in wanted and is_ours(path):
                path.unlink()
                removed += 1
    return removed


def _check_rejects(report: Report, options: CacheOptions, good: int) -> None:
    if not report.rejects or (options.on_bad_item == "skip" and good):
        for reject in report.rejects:
            print(f"{report.title}: left out {reject.path}: {reject.reason}", file=sys.stderr)
        return
    mend = "mend or remove it, or set on_bad_item: skip to train without it"
    problems = [Problem(file=reject.path, found=reject.reason, mend=mend) for reject in report.rejects]
    print(f"{report}. The good items are cached, the next run encodes only what you mend.", file=sys.stderr)
    raise InputError(problems)


def _row(stage: Stage, entry: Entry, header: Header | None) -> dict[str, object]:
    if header is None:
        mend = "another program changed it while this stage ran; run the stage again"
        raise InputError([Problem(file=str(entry.path), found="the file just written is not whole", mend=mend)])
    return {
        "dataset": entry.item.dataset,
        "key": entry.item.key,
        "cache_file": entry.path.name,
        **entry.columns,
        **stage.describe(header),
        "fingerprint": fingerprint(entry.parts),
    }
