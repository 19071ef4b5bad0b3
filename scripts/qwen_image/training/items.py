"""What is trained on: the items that stand in both manifests, each with its two cache files, checked before the start.

The cache directories themselves are never listed: a file that no manifest names is not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image.cache.fingerprint import FINGERPRINT_KEY
from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest
from qwen_image.cache.names import VAE_SCALE
from qwen_image.container import ContainerError, TensorInfo, read_header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.listing import limit
from qwen_image.problems import InputError, Problem

LATENT_PREFIX = "latents_1x"
TEXT_PREFIX = "varlen_vl_embed_"
RERUN = (
    "run the caching stages again, they write what is missing or damaged: your snakemake command with "
    "--forcerun cache_latents cache_text_encoder_outputs"
)


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A cache file as its manifest row describes it."""

    path: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """One picture with its caption, as cached."""

    dataset: int
    key: str
    latents: CacheFile
    """Holds the latent, (16, 1, H/8, W/8)."""
    text: CacheFile
    """Holds the embedding, (tokens, hidden size)."""
    bucket: tuple[int, int]
    """(W, H) in pixels."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"datasets[{self.dataset}] {self.key}"


@dataclass(frozen=True)
class Joined:
    """The items of both manifests, and those of only one with the reason."""

    items: list[TrainingItem]
    left_out: list[str]


def join_manifests(latents: str, text: str, datasets: Sequence[DatasetSettings]) -> Joined:
    """Return the items that stand in both manifests, sorted by dataset and key. Opens no cache file.

    Raises InputError when a manifest cannot be read or does not fit the datasets, or when nothing is left.
    """
    folders = {dataset.index: dataset.cache_directory for dataset in datasets}
    latent_rows = _rows_by_item(latents, LATENT_COLUMNS, folders)
    text_rows = _rows_by_item(text, TEXT_COLUMNS, folders)
    items, left_out = [], []
    for dataset, key in sorted(latent_rows.keys() | text_rows.keys()):
        latent_row, text_row = latent_rows.get((dataset, key)), text_rows.get((dataset, key))
        if latent_row is None or text_row is None:
            missing = f"no latent in {latents}" if latent_row is None else f"no text-encoder output in {text}"
            left_out.append(f"datasets[{dataset}] {key}: {missing}")
            continue
        folder = folders[dataset]
        items.append(
            TrainingItem(
                dataset,
                key,
                CacheFile(os.path.join(folder, latent_row["cache_file"]), latent_row["fingerprint"]),
                CacheFile(os.path.join(folder, text_row["cache_file"]), text_row["fingerprint"]),
                (latent_row["bucket_width"], latent_row["bucket_height"]),
            )
        )
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


@dataclass(frozen=True)
class CacheShape:
    """What the transformer must fit: the cached latents' channels (16) and the embeddings' hidden size (3584)."""

    channels: int
    hidden_size: int


def check_cache_files(items: Sequence[TrainingItem]) -> CacheShape:
    """Read every file's header: it must be whole, the one its manifest row describes, and shaped like the others.

    Raises InputError with all bad files.
    """
    problems = []
    channels = hidden_size = None
    for item in items:
        width, height = item.bucket
        latent = _read_shape(item.latents, LATENT_PREFIX, (channels, 1, height // VAE_SCALE, width // VAE_SCALE))
        text = _read_shape(item.text, TEXT_PREFIX, (None, hidden_size))
        for file, shape in ((item.latents, latent), (item.text, text)):
            if isinstance(shape, str):
                problems.append(Problem(file=file.path, key=item.name, found=shape, mend=RERUN))
        # the first good file of each kind sets what the others must be
        channels = channels or (None if isinstance(latent, str) else latent[0])
        hidden_size = hidden_size or (None if isinstance(text, str) else text[1])
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


def _rows_by_item(path: str, columns: Mapping[str, type], folders: Mapping[int, str]) -> dict[tuple[int, str], dict]:
    rows: dict[tuple[int, str], dict] = {}
    problems = []
    for row in read_manifest(path, columns).to_dict("records"):
        item = (row["dataset"], row["key"])
        if item in rows:
            problems.append(Problem(file=path, key=row["key"], found="stands twice", mend=RERUN))
        if row["dataset"] not in folders:
            found = f"belongs to datasets[{row['dataset']}], which the dataset file does not have"
            problems.append(Problem(file=path, key=row["key"], found=found, mend=RERUN))
        if Path(row["cache_file"]).name != row["cache_file"]:
            found = f"cache_file {row['cache_file']!r} is no plain file name"
            problems.append(Problem(file=path, key=row["key"], found=found, mend=RERUN))
        rows[item] = row
    if problems:
        raise InputError(problems)
    return rows
