"""Texts that belong to no picture, cached like captions: prompts of sample pictures, and the empty caption of dropout.

The manifest is one of text-encoder outputs whose key is the text's SHA-256; the cache files lie in the folder beside it
that is named like it. Imports no torch: where every text is cached no model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qwen_image.cache.fingerprint import FINGERPRINT_KEY, read_cache_header
from qwen_image.cache.manifest import TEXT_COLUMNS, read_manifest
from qwen_image.cache.stage import Stage
from qwen_image.cache.update import CacheOptions, Report, update_cache
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Item, Listing
from qwen_image.dataset.keys import KEYS
from qwen_image.dataset.listing import limit
from qwen_image.problems import InputError, Problem
from qwen_image.training.items import CacheFile


def text_sha256(text: str) -> str:
    """Return the hex SHA-256 of a text, by which its cache file is found."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def update_prompts(stage: Stage, texts: Iterable[str], options: CacheOptions) -> Report:
    """Bring the cache files of these texts up to date and write the manifest. Raises InputError."""
    items = [Item(0, digest, digest, None, text) for digest, text in sorted((text_sha256(t), t) for t in set(texts))]
    return update_cache(stage, [(_settings(options.manifest), Listing(items, []))], options)


def read_prompts(manifest: str | Path) -> dict[str, CacheFile]:
    """Return the cache files that the manifest lists, by the SHA-256 of their text.

    Raises InputError when the manifest cannot be read, or a file is not whole or not the one that it lists.
    """
    rows = read_manifest(manifest, TEXT_COLUMNS).to_dict("records")
    folder = prompts_folder(manifest)
    files = {row["key"]: CacheFile(str(folder / row["cache_file"]), row["fingerprint"]) for row in rows}
    headers = {file: read_cache_header(Path(file.path)) for file in files.values()}
    found, mend = f"is not there, not whole, or not the file that {manifest} lists", "run the caching of prompts again"
    problems = [
        Problem(file=file.path, found=found, mend=mend)
        for file, header in headers.items()
        if header is None or header.metadata.get(FINGERPRINT_KEY) != file.fingerprint
    ]
    if problems:
        raise InputError(limit(problems))
    return files


def prompts_folder(manifest: str | Path) -> Path:
    """Return the folder of the manifest's cache files."""
    return Path(manifest).with_suffix("")


def _settings(manifest: Path) -> DatasetSettings:
    """A dataset that has nothing but a place for its cache files."""
    defaults = {name: key.default for name, key in KEYS.items() if not key.ignored}
    return DatasetSettings(**defaults | {"index": 0, "cache_directory": str(prompts_folder(manifest))})
