"""Which shard caches which item, and what a shard's tables are called: one answer for the workflow and the programs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_image.dataset.items import Listing


def shard_of(key: str, count: int) -> int:
    """Return the shard, 1 to `count`, of the item with this key. It depends on nothing else, so it never changes."""
    # keys may hold bytes that are no UTF-8, as half character pairs
    digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % count + 1


def split_listing(listing: Listing, count: int) -> list[Listing]:
    """Return the parts of a listing, shard 1 first: each item and each reject stands in the one of its key."""
    if count == 1:
        return [listing]
    parts = [Listing([], []) for _ in range(count)]
    for item in listing.items:
        parts[shard_of(item.key, count) - 1].items.append(item)
    for reject in listing.rejects:
        parts[shard_of(reject.key, count) - 1].rejects.append(reject)
    return parts


def shard_manifest(manifest: str | Path, shard: int | str, count: int) -> Path:
    """Return where a shard's own manifest lies, given the whole one's path; its rejects table is named like it."""
    manifest = Path(manifest)
    return manifest.parent / "shards" / f"{manifest.stem}.{shard}-of-{count}{manifest.suffix}"
