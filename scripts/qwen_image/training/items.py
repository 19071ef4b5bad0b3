"""What is trained on: the items that stand in both manifests, each with its cache files, checked before the start.

The cache directories themselves are never listed: a file that no manifest names is not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_image.cache.fingerprint import FINGERPRINT_KEY
from qwen_image.cache.manifest import LATENT_COLUMNS, REJECT_COLUMNS, TEXT_COLUMNS, read_manifest, write_manifest
from qwen_image.cache.names import VAE_SCALE, split_text_file_name
from qwen_image.container import ContainerError, TensorInfo, read_header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.listing import limit
from qwen_image.problems import InputError, Problem

LATENT_PREFIX = "latents_1x"
TEXT_PREFIX = "varlen_vl_embed_"
HELD_OUT = "held out to validate with (validation_split)"
AGAIN = "run the caching stages again, they write what is missing or damaged: your snakemake command with --forcerun"
RERUN = f"{AGAIN} cache_latents cache_text_encoder_outputs"


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A cache file as its manifest row describes it."""

    path: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """One picture with its captions, as cached."""

    dataset: int
    key: str
    latents: CacheFile
    """Holds the latent, (16, 1, H/8, W/8)."""
    texts: tuple[CacheFile, ...]
    """One a caption, in their order; each holds an embedding, (tokens, hidden size)."""
    bucket: tuple[int, int]
    """(W, H) in pixels."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"datasets[{self.dataset}] {self.key}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An item of a manifest that is not trained on, and why."""

    dataset: int
    key: str
    reason: str

    def __str__(self) -> str:
        """What the log says of it."""
        return f"datasets[{self.dataset}] {self.key}: {self.reason}"


@dataclass(frozen=True)
class Joined:
    """The items of both manifests, and those of only one."""

    items: list[TrainingItem]
    left_out: list[LeftOut]


def join_manifests(latents: str, text: str, datasets: Sequence[DatasetSettings]) -> Joined:
    """Return the items that stand in both manifests, sorted by dataset and key. Opens no cache file.

    Raises InputError when a manifest cannot be read or does not fit the datasets, when one of an item's captions is
    missing, or when nothing is left.
    """
    by_index = {dataset.index: dataset for dataset in datasets}
    latent_rows = _latent_rows(latents, by_index)
    text_rows = _text_rows(text, by_index)
    items, left_out = [], []
    for dataset, key in sorted(latent_rows.keys() | text_rows.keys()):
        latent_row, captions = latent_rows.get((dataset, key)), text_rows.get((dataset, key))
        if latent_row is None or captions is None:
            # the tables' names alone: their folder is another on another machine
            missing = f"no latent in {Path(latents).name}"
            if latent_row is not None:
                missing = f"no text-encoder output in {Path(text).name}"
            left_out.append(LeftOut(dataset, key, missing))
            continue
        folder = by_index[dataset].cache_directory
        latent_file, *texts = (
            CacheFile(os.path.join(folder, row["cache_file"]), row["fingerprint"]) for row in (latent_row, *captions)
        )
        bucket = latent_row["bucket_width"], latent_row["bucket_height"]
        items.append(TrainingItem(dataset, key, latent_file, tuple(texts), bucket))
    if not items:
        found = f"has no item in common with {text}" if latent_rows and text_rows else "there is nothing to train on"
        raise InputError(
            [
                Problem(
                    file=latents, found=found, mend="run the caching stage again, and read its table of rejected items"
                )
            ]
        )
    return Joined(items, left_out)


def write_left_out(path: Path, joined: Joined, held_out: Sequence[TrainingItem] = ()) -> None:
    """Write the table of the manifests' items that are not trained on.

    All others are, `num_repeats` times an epoch; where the processes cannot share an epoch's batches evenly, a few once
    more. `held_out` are those that the training is validated with instead.
    """
    rows = [*joined.left_out, *(LeftOut(item.dataset, item.key, HELD_OUT) for item in held_out)]
    write_manifest(path, map(asdict, rows), REJECT_COLUMNS)


@dataclass(frozen=True)
class CacheShape:
    """What the transformer must fit: the cached latents' channels (16) and the embeddings' hidden size (3584)."""

    channels: int
    hidden_size: int


def check_cache_files(items: Sequence[TrainingItem], empty_caption: CacheFile | None = None) -> CacheShape:
    """Read every file's header: it must be whole, the one its manifest row describes, and shaped like the others.

    Raises InputError with all bad files.
    """
    problems = []
    channels = hidden_size = None

    def sizes(
        name: str, file: CacheFile, prefix: str, expected: tuple[int | None, ...], mend: str = RERUN
    ) -> tuple[int | None, ...]:
        shape = _read_shape(file, prefix, expected)
        if isinstance(shape, str):
            problems.append(Problem(file=file.path, key=name, found=shape, mend=mend))
            return expected
        return shape

    # the first good file of each kind sets what the others must be
    for item in items:
        width, height = item.bucket
        channels, *_ = sizes(
            item.name, item.latents, LATENT_PREFIX, (channels, 1, height // VAE_SCALE, width // VAE_SCALE)
        )
        for text in item.texts:
            _, hidden_size = sizes(item.name, text, TEXT_PREFIX, (None, hidden_size))
    if empty_caption is not None:
        sizes("the empty caption", empty_caption, TEXT_PREFIX, (None, hidden_size), f"{AGAIN} cache_prompts")
    if problems:
        raise InputError(limit(problems))
    return CacheShape(channels, hidden_size)


def find_tensor(tensors: Mapping[str, TensorInfo] | Sequence[str], prefix: str) -> str | None:
    """Return the one tensor's name with this prefix, or None where there is none or more than one."""
    names = [name for name in tensors if name.startswith(prefix)]
    return names[0] if len(names) == 1 else None


def _read_shape(file: CacheFile, prefix: str, expected: tuple[int | None, ...]) -> tuple[int, ...] | str:
    """Return the shape of the file's tensor, or what is wrong with the file."""
    try:
        header = read_header(file.path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ContainerError as error:
        return str(error)
    if header.metadata.get(FINGERPRINT_KEY) != file.fingerprint:
        return "is not the file that the manifest describes (its fingerprint differs)"
    name = find_tensor(header.tensors, prefix)
    if name is None:
        return f"does not hold one tensor {prefix}*"
    shape = header.tensors[name].shape
    fits = len(shape) == len(expected) and all(want in (None, size) for size, want in zip(shape, expected, strict=True))
    if fits and 0 not in shape:
        return shape
    wanted = " x ".join("any" if size is None else str(size) for size in expected)
    return f"{name} has the shape {' x '.join(map(str, shape))}, expected is {wanted}"


def _latent_rows(path: str, datasets: Mapping[int, DatasetSettings]) -> dict[tuple[int, str], dict]:
    by_item = _rows_by_item(path, LATENT_COLUMNS, datasets)
    twice = [key for (_, key), rows in by_item.items() if len(rows) > 1]
    if twice:
        raise InputError(limit([Problem(file=path, key=key, found="stands twice", mend=RERUN) for key in twice]))
    return {item: row for item, (row,) in by_item.items()}


def _text_rows(path: str, datasets: Mapping[int, DatasetSettings]) -> dict[tuple[int, str], list[dict]]:
    """Return the rows of each item's captions, the first caption first; none may be missing."""
    by_item = _rows_by_item(path, TEXT_COLUMNS, datasets)
    problems = []
    for (dataset, key), rows in by_item.items():
        rows.sort(key=_caption_number)
        numbers = [_caption_number(row) for row in rows]
        missing = sorted(set(range(1, numbers[-1])) - set(numbers))
        found = ""
        if len(set(numbers)) < len(numbers):
            found = "stands twice"
        elif missing:
            found = f"of its {numbers[-1]} captions these are missing: {', '.join(map(str, missing))}"
        elif len(rows) > 1 and not datasets[dataset].multiple_captions:
            found = f"has {len(rows)} captions here, and multiple_captions is not set for datasets[{dataset}]"
        if found:
            problems.append(Problem(file=path, key=key, found=found, mend=RERUN))
    if problems:
        raise InputError(limit(problems))
    return by_item


def _caption_number(row: Mapping) -> int:
    parts = split_text_file_name(row["cache_file"])
    return parts[1] if parts else 1


def _rows_by_item(
    path: str, columns: Mapping[str, type], datasets: Mapping[int, DatasetSettings]
) -> dict[tuple[int, str], list[dict]]:
    rows: dict[tuple[int, str], list[dict]] = {}
    problems = []
    for row in read_manifest(path, columns).to_dict("records"):
        if row["dataset"] not in datasets:
            found = f"belongs to datasets[{row['dataset']}], which the dataset file does not have"
            problems.append(Problem(file=path, key=row["key"], found=found, mend=RERUN))
        rows.setdefault((row["dataset"], row["key"]), []).append(row)
    if problems:
        raise InputError(problems)
    return rows
