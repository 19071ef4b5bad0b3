"""Make the embedded demo: captioned pictures, a dataset file and three tiny checkpoints of the real model classes.

    python scripts/make_demo.py --folder resources/demo

Only what is absent is made, so nothing that was changed there is lost; what is made is the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import toml

from qwen_image.demo.checkpoints import write_demo_checkpoints
from qwen_image.demo.pictures import PICTURES, write_pictures
from qwen_image.files import atomic_write
from qwen_image.problems import run

RESOLUTION = 256
BATCH_SIZE = 2


def main(argv: list[str] | None = None) -> int:
    """Write what is absent."""
    parser = argparse.ArgumentParser(description="Make the embedded demo.")
    parser.add_argument("--folder", type=Path, default=Path("resources/demo"))
    parser.add_argument("--cache_directory", default="results/cache/demo")
    args = parser.parse_args(argv)
    pictures = args.folder / "images"
    written = write_pictures(pictures)
    _write_checkpoints(args.folder)
    dataset = args.folder / "dataset.toml"
    if not dataset.exists():
        atomic_write(dataset, _dataset_toml(pictures, args.cache_directory))
    print(f"demo: {written} of {len(PICTURES)} pictures written, checkpoints in {args.folder}", file=sys.stderr)
    return 0


def _write_checkpoints(folder: Path) -> None:
    """Make the checkpoints elsewhere, where nothing is in the way if this ends early, and take over what is absent."""
    with tempfile.TemporaryDirectory() as aside:
        write_demo_checkpoints(aside)
        for made in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
            wanted = folder / made.relative_to(aside)
            if not wanted.exists():
                atomic_write(wanted, made.read_bytes())


def _dataset_toml(pictures: Path, cache_directory: str) -> str:
    general = {
        "resolution": [RESOLUTION, RESOLUTION],
        "caption_extension": ".txt",
        "enable_bucket": True,
        "batch_size": BATCH_SIZE,
    }
    dataset = {"image_directory": pictures.as_posix(), "cache_directory": cache_directory}
    return toml.dumps({"general": general, "datasets": [dataset]})


if __name__ == "__main__":
    sys.exit(run(main))
