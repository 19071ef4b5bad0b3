"""One caching stage: find out what is missing, encode just that, write the manifest.

Both encoders run through `update_cache`; what differs between them is a `Stage` (see latents.py and
text_encoder_outputs.py). Nothing here imports torch: a stage that has nothing to encode never loads a model.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from qwen_image.cache.fingerprint import (
    ADOPTED,
    ARITHMETIC_KEY,
    DATA_KEY,
    DETERMINISTIC,
    FAST,
    fingerprint,
    read_matching_header,
)
from qwen_image.cache.foreign import adopt, foreign_header
from qwen_image.cache.manifest import REJECT_COLUMNS, write_digest, write_manifest
from qwen_image.cache.merge import remove_orphans
from qwen_image.cache.saver import THREADS, Saver
from qwen_image.cache.shards import split_listing
from qwen_image.cache.space import check_space, readable
from qwen_image.cache.stage import Entry, Stage
from qwen_image.container import Header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.images import file_reason
from qwen_image.dataset.items import Listing, Reject
from qwen_image.dataset.listing import limit
from qwen_image.files import tidy
from qwen_image.problems import InputError, Problem

Datasets = list[tuple[DatasetSettings, Listing]]


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a caching stage is to behave."""

    skip_existing: bool
    """Keep cache files whose fingerprint is right; False encodes everything."""
    keep_cache: bool
    """Keep cache files of items that left the dataset; False removes those that this project wrote."""
    deterministic: bool = False
    """Keep only files whose bytes depend on their item, the model and the settings alone."""
    adopt_existing: bool = False
    """Take over another program's files that fit their items."""
    on_bad_item: str
    """``error``: encode the good items, then fail; ``skip``: list the bad ones and succeed."""
    shard: int = 1
    num_shards: int = 1
    """Which part of the items is this run's, from 1 to `num_shards`; see shards.py."""
    subfolder: str = ""
    """Where the files go in the datasets' cache directories; empty for these themselves."""
    manifest: Path
    rejects: Path


@dataclass
class Report:
    """What a stage did."""

    title: str
    encoded: int = 0
    adopted: int = 0
    up_to_date: int = 0
    removed: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def __str__(self) -> str:
        """One readable line, for the terminal and the log."""
        text = f"{self.title}: {self.encoded} encoded, {self.up_to_date} up to date, {len(self.rejects)} rejected"
        more = {"adopted": self.adopted, "removed": self.removed}
        return text + "".join(f", {count} {word}" for word, count in more.items() if count)


def update_cache(stage: Stage, datasets: Iterable[tuple[DatasetSettings, Listing]], options: CacheOptions) -> Report:
    """Bring the cache files up to date with the datasets and write the manifest and the rejects table.

    Good items are encoded and saved before bad ones are reported. Raises InputError naming every bad item when
    `on_bad_item` is ``error``; nothing that was encoded is lost by that.
    """
    start = time.monotonic()
    report = Report(stage.title)
    datasets = [
        (settings, split_listing(listing, options.num_shards)[options.shard - 1])
        for settings, listing in in_subfolder(datasets, options.subfolder)
    ]
    entries = _plan(stage, datasets, report)
    # of a header only what the manifest says is held: there may be very many
    usable = ((entry, usable_header(stage, entry, options)) for entry in entries)
    known = {entry.path: _columns(stage, header) for entry, header in usable if header}
    if options.adopt_existing and options.skip_existing:
        _adopt(stage, [entry for entry in entries if entry.path not in known], known, report)
    stale = [entry for entry in entries if entry.path not in known]
    report.up_to_date = len(entries) - len(stale) - report.adopted
    if not stale:
        print(f"{stage.title}: {_amount(entries)}, nothing to encode", file=sys.stderr, flush=True)
    busy = _encode(stage, stale, report, _amount(entries)) if stale else ""
    # an item's captions may all fail for the same reason
    report.rejects = list(dict.fromkeys(report.rejects))
    if not options.keep_cache and options.num_shards == 1:  # of several shards none knows all items
        report.removed = remove_orphans(stage.suffix, datasets, {entry.path for entry in entries})

    rejected = {(reject.dataset, reject.key) for reject in report.rejects}
    kept = [entry for entry in entries if (entry.item.dataset, entry.item.key) not in rejected]
    rejects = ({"dataset": r.dataset, "key": r.key, "reason": r.reason} for r in report.rejects)
    write_manifest(options.rejects, rejects, REJECT_COLUMNS)
    _check_rejects(report, options, len(kept))
    rows = (_row(entry, options.subfolder, known.get(entry.path) or _written(stage, entry)) for entry in kept)
    write_digest(options.manifest, write_manifest(options.manifest, rows, stage.columns))
    print(f"{report} ({time.monotonic() - start:.1f} s{busy})", file=sys.stderr, flush=True)
    return report


def in_subfolder(datasets: Iterable[tuple[DatasetSettings, Listing]], subfolder: str) -> Datasets:
    """Return the datasets with this folder of their cache directories in place of those."""
    return [
        (replace(settings, cache_directory=os.path.join(settings.cache_directory, subfolder)), listing)
        if subfolder
        else (settings, listing)
        for settings, listing in datasets
    ]


def _plan(stage: Stage, datasets: Datasets, report: Report) -> list[Entry]:
    entries = []
    for settings, listing in datasets:
        report.rejects.extend(listing.rejects)
        # silent where it takes a moment; a first look at very many images reads them all
        for item in tqdm(listing.items, desc=f"{stage.title}: look", unit="item", delay=3, ncols=100, leave=False):
            try:
                entries += stage.plan(item, settings)
            except (ValueError, OSError) as error:
                reason = file_reason(error) if isinstance(error, OSError) else str(error)
                report.rejects.append(Reject(item.dataset, item.key, item.image_path, reason))
    return entries


def usable_header(stage: Stage, entry: Entry, options: CacheOptions) -> Header | None:
    """Return the header of the entry's cache file where that may stay as it is, else None."""
    header = read_matching_header(entry.path, entry.parts) if options.skip_existing else None
    if header is None or stage.misfit(entry, header):
        return None
    wanted = (DETERMINISTIC,) if options.deterministic else (DETERMINISTIC, FAST, ADOPTED)
    return header if header.metadata.get(ARITHMETIC_KEY) in wanted and DATA_KEY in header.metadata else None


def _adopt(stage: Stage, stale: list[Entry], known: dict[Path, dict[str, object]], report: Report) -> None:
    """Take over what fits; say of what does not why it is encoded."""
    for entry in stale:
        header = foreign_header(entry.path)
        if header is None:
            continue
        try:
            reason = adopt(stage, entry, header)
        except OSError as error:
            mend = "mend that and run the same command again"
            found = f"cannot be adopted: {error.strerror or error}"
            raise InputError([Problem(file=str(entry.path), found=found, mend=mend)]) from error
        if reason:
            print(f"{stage.title}: not adopted {entry.path}: {reason}", file=sys.stderr)
        else:
            known[entry.path] = _written(stage, entry)
            report.adopted += 1


def _encode(stage: Stage, stale: list[Entry], report: Report, amount: str) -> str:
    """Encode and save; return how busy the encoder was once it was loaded, in words."""
    # before the free space is counted
    for folder in {entry.path.parent for entry in stale}:
        tidy(folder.absolute())
    sizes = stage.output_bytes(stale)
    files = [(entry.path, size) for entry, size in zip(stale, sizes, strict=True)]
    needed = check_space(files, waiting=min(len(files), THREADS))
    text = f"{stage.title}: {amount}, {len(stale)} to encode, about {readable(needed)} to write"
    print(text, file=sys.stderr, flush=True)
    begun = None
    with Saver() as saver:
        for result in stage.encode(stale):
            begun = begun or time.monotonic() - stage.watch.seconds
            _count(report, [result] if isinstance(result, Reject) else saver.save(result))
        _count(report, saver.rest())
    share = stage.watch.seconds / max(time.monotonic() - begun, 1e-9)
    return f", encoder busy {share:.0%} of the time"


def _amount(entries: list[Entry]) -> str:
    items = len({(entry.item.dataset, entry.item.key) for entry in entries})
    return f"{items} items" if items == len(entries) else f"{items} items with {len(entries)} captions"


def _count(report: Report, results: Iterable[Entry | Reject]) -> None:
    for result in results:
        if isinstance(result, Reject):
            report.rejects.append(result)
        else:
            report.encoded += 1


def _check_rejects(report: Report, options: CacheOptions, good: int) -> None:
    """Name every bad item; raise where the run is to fail for them."""
    # a shard may well have bad items only; whether the dataset has good ones is seen when the shards are merged
    if not report.rejects or (options.on_bad_item == "skip" and (good or options.num_shards > 1)):
        for reject in report.rejects:
            print(f"{report.title}: left out {reject.path}: {reject.reason}", file=sys.stderr)
        return
    mend = "mend or remove it, or set on_bad_item: skip to train without it"
    problems = [Problem(file=reject.path, found=reject.reason, mend=mend) for reject in report.rejects]
    print(f"{report}. The good items are cached, the next run encodes only what you mend.", file=sys.stderr)
    raise InputError(limit(problems))


def _written(stage: Stage, entry: Entry) -> dict[str, object]:
    header = read_matching_header(entry.path, entry.parts)
    if header is None:
        mend = "another program changed it while this stage ran; run the stage again"
        raise InputError([Problem(file=str(entry.path), found="the file just written is not whole", mend=mend)])
    return _columns(stage, header)


def _columns(stage: Stage, header: Header) -> dict[str, object]:
    """Return what a manifest row takes from the file."""
    return {**stage.describe(header), "arithmetic": header.metadata[ARITHMETIC_KEY]}


def _row(entry: Entry, subfolder: str, columns: dict[str, object]) -> dict[str, object]:
    return {
        "dataset": entry.item.dataset,
        "key": entry.item.key,
        "cache_file": f"{subfolder}/{entry.path.name}" if subfolder else entry.path.name,
        **entry.columns,
        **columns,
        "fingerprint": fingerprint(entry.parts),
    }
