"""Remove the cache files that manifests list, once training no longer needs them (keep_cache: false).

    python scripts/clear_cache.py --dataset_config dataset.toml --manifests latents.tsv --table cleared.tsv

Both options may be given once for each dataset file, in pairs.
Only files that carry this project's fingerprint, the very one in the manifest, are removed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.cache.fingerprint import FINGERPRINT_KEY, read_cache_header
from qwen_image.cache.manifest import read_manifest, write_manifest
from qwen_image.dataset.config import load_dataset_config
from qwen_image.problems import InputError, Problem, run

COLUMNS = {"dataset": int, "key": str, "cache_file": str, "fingerprint": str}


def main(argv: list[str] | None = None) -> int:
    """Remove the files and write the table of what was removed."""
    parser = argparse.ArgumentParser(description="Remove the cache files that manifests list.")
    parser.add_argument("--dataset_config", action="append", required=True)
    parser.add_argument("--manifests", action="append", nargs="+", required=True, type=Path)
    parser.add_argument("--table", required=True, type=Path, help="table of the removed files")
    args = parser.parse_args(argv)
    if len(args.dataset_config) != len(args.manifests):
        parser.error("give --manifests as often as --dataset_config")
    removed = [
        row
        for dataset_config, manifests in zip(args.dataset_config, args.manifests, strict=True)
        for row in clear(dataset_config, manifests)
    ]
    write_manifest(args.table, removed, COLUMNS)
    print(f"clear_cache: {len(removed)} cache files removed", file=sys.stderr)
    return 0


def clear(dataset_config: str, manifests: list[Path]) -> list[dict]:
    """Remove the files of a dataset's manifests; return the rows of those that were removed."""
    folders = {settings.index: Path(settings.cache_directory) for settings in load_dataset_config(dataset_config)}
    removed = []
    for manifest in manifests:
        for row in read_manifest(manifest, COLUMNS).to_dict("records"):
            if row["dataset"] not in folders:
                found = f"belongs to datasets[{row['dataset']}], which the dataset file does not have"
                mend = "run the caching stages again, they write this table"
                raise InputError([Problem(file=str(manifest), key=row["key"], found=found, mend=mend)])
            path = folders[row["dataset"]] / row["cache_file"]
            header = read_cache_header(path)
            if header and header.metadata.get(FINGERPRINT_KEY) == row["fingerprint"]:
                path.unlink()
                removed.append(row)
    return removed


if __name__ == "__main__":
    sys.exit(run(main))
