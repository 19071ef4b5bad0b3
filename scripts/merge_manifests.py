"""Merge the manifests of a caching stage's shards into the dataset's, and remove cache files of items that are gone.

    python scripts/merge_manifests.py --dataset_config dataset.toml --manifest results/manifests/dataset/latents.tsv \
        --num_shards 4 --keep_cache

The shards' tables lie in the folder shards beside the manifest, where `snakemake` has them written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.cache.merge import KINDS, cache_paths, merge_shards, remove_orphans
from qwen_image.cache.program import subfolder_name
from qwen_image.cache.update import in_subfolder
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import list_datasets
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Merge, clean up where that is asked for, and return the exit code."""
    parser = argparse.ArgumentParser(description="Merge the manifests of a caching stage's shards.")
    parser.add_argument("--dataset_config", required=True, help="dataset file, .toml or .json")
    parser.add_argument("--manifest", type=_manifest, required=True, help="latents.tsv or text_encoder_outputs.tsv")
    parser.add_argument(
        "--cache_subfolder", type=subfolder_name, default="", help="as the caching program was given it"
    )
    parser.add_argument("--num_shards", type=int, required=True, help="how many shards there are")
    parser.add_argument("--keep_cache", action="store_true", help="keep files of items that left the dataset")
    args = parser.parse_args(argv)
    merge_shards(args.manifest, args.num_shards)
    print(f"{args.manifest}: merged from {args.num_shards}", file=sys.stderr)
    if not args.keep_cache and args.num_shards > 1:  # a stage that is not divided has cleaned up by itself
        settings = load_dataset_config(args.dataset_config)
        datasets = list(zip(settings, list_datasets(settings, args.dataset_config), strict=True))
        suffix, _ = KINDS[args.manifest.stem]
        wanted = cache_paths(args.manifest, datasets)
        removed = remove_orphans(suffix, in_subfolder(datasets, args.cache_subfolder), wanted)
        print(f"{removed} cache files of items that are gone removed", file=sys.stderr)
    return 0


def _manifest(text: str) -> Path:
    path = Path(text)
    if path.stem not in KINDS:
        raise argparse.ArgumentTypeError(f"{path.name} is neither of {', '.join(f'{kind}.tsv' for kind in KINDS)}")
    return path


if __name__ == "__main__":
    sys.exit(run(main))
