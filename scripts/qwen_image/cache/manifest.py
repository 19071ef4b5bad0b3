"""Manifests: the tables that say which cache file belongs to which item. They are the rules' outputs.

One row an item, sorted, tab-separated, paths relative to the dataset's own folders, no timestamps: the same inputs give
the same bytes on every machine. Of an item with several captions the texts' manifest has a row a caption, in their
order; the number stands in the cache file's name (see names.py).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.bounded import read_bytes
from qwen_image.files import atomic_write
from qwen_image.problems import InputError, Problem

if TYPE_CHECKING:
    import pandas

LATENT_COLUMNS = {
    "dataset": int, "key": str, "cache_file": str, "width": int, "height": int, "bucket_width": int,
    "bucket_height": int, "dtype": str, "source_sha256": str, "fingerprint": str, "arithmetic": str,
}  # fmt: skip
TEXT_COLUMNS = {
    "dataset": int, "key": str, "cache_file": str, "tokens": int, "dtype": str, "caption_sha256": str,
    "fingerprint": str, "arithmetic": str,
}  # fmt: skip
MAX_MANIFEST_BYTES = 2**29
"""Of a million items."""
MAX_COLUMN_BYTES = 4096
"""Of the line with the columns' names."""
REJECT_COLUMNS = {"dataset": int, "key": str, "reason": str}


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, object]], columns: Mapping[str, type]) -> bytes:
    """Write rows sorted by dataset and key, atomically; rows of one item keep their order. Returns what was written."""
    text = io.StringIO()
    # not pandas: it takes longer to import than a stage that finds nothing to do has to work
    table = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (row["dataset"], row["key"])))
    # file names may hold bytes that are no UTF-8; they come back as they were
    content = text.getvalue().encode("utf-8", errors="surrogateescape")
    atomic_write(path, content)
    return content


def digest_text(content: bytes) -> str:
    """Return what stands in the digest of a manifest with this content."""
    return f"{hashlib.sha256(content).hexdigest()}\n"


def write_digest(manifest: Path, content: bytes) -> None:
    """Write a manifest's hash beside it: by these few bytes a change of the manifest is known, however large it is.

    `content` is what was written, which may be on the disk no more.
    """
    atomic_write(manifest.with_suffix(".sha256"), digest_text(content))


def manifest_content(manifest: Path) -> bytes:
    """Return a manifest's bytes. One without a digest is taken as it is.

    Raises OSError, or InputError when they are not those that its digest was written for, or one of both is no file.
    """
    digest = manifest.with_suffix(".sha256")
    try:
        content = read_bytes(manifest, MAX_MANIFEST_BYTES)
        expected = read_bytes(digest) if digest.exists() else digest_text(content).encode()
    except ValueError as error:
        mend = "delete it and its .sha256, and run the caching stage again, which writes both"
        raise InputError([Problem(file=str(manifest), found=f"cannot be read ({error})", mend=mend)]) from error
    if expected != digest_text(content).encode():
        mend = "delete it and run the same command, which writes it again; an unpacked cache is unpacked again"
        raise InputError([Problem(file=str(manifest), found="was changed after it was written", mend=mend)])
    return content


def read_manifest(path: str | Path, columns: Mapping[str, type], *, checked: bool = True) -> pandas.DataFrame:
    """Read a manifest. Raises InputError when the file is missing, is not one, or was changed after it was written.

    With `checked` False a changed one is read, by who tells of the change in another way.
    """
    import pandas

    try:
        content = manifest_content(Path(path)) if checked else read_bytes(path, MAX_MANIFEST_BYTES)
        # pandas takes hours over a million columns
        if len(content[: MAX_COLUMN_BYTES + 1].partition(b"\n")[0]) > MAX_COLUMN_BYTES:
            raise ValueError("its first line is no list of columns")
        table = pandas.read_csv(
            io.BytesIO(content), sep="\t", dtype=dict(columns), usecols=list(columns), keep_default_na=False,
            lineterminator="\n", encoding="utf-8", encoding_errors="surrogateescape",
        )[list(columns)]  # fmt: skip
        # nothing outside the cache folder is read or removed by a manifest
        bad = [name for name in table.get("cache_file", ()) if _leads_elsewhere(name)]
        if bad:
            raise ValueError(f"cache_file {bad[0]!r} is no file of the cache directory")
    except InputError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        mend = "run the caching stage again, it writes this file"
        raise InputError([Problem(file=str(path), found=f"not a readable manifest ({error})", mend=mend)]) from error
    return table


def _leads_elsewhere(name: str) -> bool:
    """Whether it is neither a file's name nor that of a file in a subfolder; see runs/caches.py."""
    parts = name.split("/")
    return len(parts) > 2 or "\0" in name or any(part in ("", ".", "..") for part in parts)
