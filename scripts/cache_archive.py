"""Move a dataset's cache to another machine: pack it into one file, and unpack it there, verified.

    python scripts/cache_archive.py pack --dataset_config dataset.toml --archive cats.cache.tar
    python scripts/cache_archive.py unpack --archive cats.cache.tar --folder cats

The archive holds the manifests and cache files of both kinds and no image. Unpacked it is a new folder with a dataset
file, from which the trainer trains without the images (docs/reproducibility.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.cache.program import manifest_path
from qwen_image.cache.space import readable
from qwen_image.lock.archive import COLUMNS, Member, pack
from qwen_image.lock.unpack import unpack
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Pack or unpack."""
    args = _parser().parse_args(argv)
    if args.command == "pack":
        manifests = {
            kind: getattr(args, f"{kind}_manifest") or manifest_path(args.dataset_config, kind) for kind in COLUMNS
        }
        members = pack(args.dataset_config, manifests, args.prompts_manifest, args.archive)
        print(f"pack: {_amount(members)} in {args.archive}", file=sys.stderr)
        return 0
    members = unpack(args.archive, args.folder)
    print(f"unpack: {_amount(members)} in {args.folder}, every hash is right", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Move a dataset's cache to another machine.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack", help="write the archive", allow_abbrev=False)
    one.add_argument("--dataset_config", required=True, help="dataset file, .toml or .json")
    for kind in COLUMNS:
        one.add_argument(f"--{kind}_manifest", type=Path, help="its manifest (default: under results/manifests)")
    one.add_argument(
        "--prompts_manifest", type=Path, help="of prompts and the empty caption, where training needs them"
    )
    one.add_argument("--archive", type=Path, required=True, help="the file to write")
    other = commands.add_parser("unpack", help="make a folder from the archive", allow_abbrev=False)
    other.add_argument("--archive", type=Path, required=True, help="the file that was packed")
    other.add_argument("--folder", type=Path, required=True, help="a new folder, as the dataset file is to name it")
    return parser


def _amount(members: list[Member]) -> str:
    return f"{len(members)} files, {readable(sum(member.size for member in members))},"


if __name__ == "__main__":
    sys.exit(run(main))
