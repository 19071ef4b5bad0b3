"""Remove the cache files that manifests list, once training no longer needs them (keep_cache: false).

    python scripts/clear_cache.py --dataset_config dataset.toml --manifests latents.tsv --table cleared.tsv

Only files that carry this project's fingerprint, the very one in the manifest, are removed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.cache.fingerprint import FINGERPRINT_KEY, read_cache_header
from qwen_image.cache.manifest import read_manifest, write_manifest
from qwen_image.dataset.config import load_dataset_config
from qwen_image.problems import run

COLUMNS = {"dataset": int, "key": str, "cache_file": str, "fingerprint": str}


def main(argv: list[str] | None = None) -> int:
    """Remove the files and write the table of what was removed."""
    parser = argparse.ArgumentParser(description="Remove the cache files that manifests list.")
    parser.add_argument("--dataset_config", required=True)
    parser.add_argument("--manifests", nargs="+", required=True, type=Path)
    parser.add_argument("--table", required=True, type=Path, help="table of the removed files")
    args = parser.parse_args(argv)
    folders = {settings.index: Path(settings.cache_directory) for settings in load_dataset_config(args.dataset_config)}
    removed = []
    for manifest in args.manifests:
        for row in read_manifest(manifest, COLUMNS).to_dict("records"):
            path = folders[row["dataset"]] / row["cache_file"]
            header = read_cache_header(path)
            if header and header.metadata.get(FINGERPRINT_KEY) == row["fingerprint"]:
                path.unlink()
                removed.append(row)
    write_manifest(args.table, removed, COLUMNS)
    print(f"clear_cache: {len(removed)} cache files removed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
