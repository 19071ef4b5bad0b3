"""Cache the text-encoder outputs of a dataset's captions: one file an image, and a manifest of them.

    python scripts/qwen_image_cache_text_encoder_outputs.py --dataset_config dataset.toml \
        --text_encoder qwen_2.5_vl_7b.safetensors --fp8_vl --skip_existing --keep_cache
"""

from __future__ import annotations

import sys

from qwen_image.cache.program import (
    add_text_encoder_options,
    bring_up_to_date,
    cache_options,
    cache_parser,
    text_encoder_stage,
)
from qwen_image.problems import run


def main(argv: list[str] | None = None) -> int:
    """Bring the text cache up to date. Returns 0 only when every item is cached or knowingly left out."""
    parser = cache_parser("Cache the text-encoder outputs of a dataset's captions.", batch_size=16)
    add_text_encoder_options(parser)
    args = parser.parse_args(argv)
    options = cache_options(args, "text_encoder_outputs")
    stage = text_encoder_stage(args, options.manifest.parent)
    bring_up_to_date(stage, args.dataset_config, options)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
