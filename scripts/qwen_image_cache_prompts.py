"""Cache the text-encoder outputs of texts that belong to no picture: sample prompts, and the empty caption of dropout.

    python scripts/qwen_image_cache_prompts.py --sample_prompts prompts.txt --empty_caption \
        --text_encoder qwen_2.5_vl_7b.safetensors --skip_existing --manifest prompts.tsv

The cache files lie in the folder beside the manifest that is named like it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen_image.cache.program import add_encoding_options, add_text_encoder_options, text_encoder_stage
from qwen_image.cache.prompts import update_prompts
from qwen_image.cache.update import CacheOptions
from qwen_image.problems import InputError, Problem, run
from qwen_image.sampling.prompts import load_prompts


def main(argv: list[str] | None = None) -> int:
    """Bring the cache of these texts up to date."""
    parser = argparse.ArgumentParser(description="Cache texts that belong to no picture.", allow_abbrev=False)
    parser.add_argument("--sample_prompts", help="prompt file, .txt, .toml or .json")
    parser.add_argument("--empty_caption", action="store_true", help="the empty caption too, for caption dropout")
    parser.add_argument("--manifest", type=Path, required=True, help="where the table of the cache files goes")
    add_text_encoder_options(parser)
    add_encoding_options(parser, batch_size=16)
    args = parser.parse_args(argv)
    if not args.sample_prompts and not args.empty_caption:
        found, mend = "no text is asked for", "give --sample_prompts, --empty_caption or both"
        raise InputError([Problem(file="command line", found=found, mend=mend)])
    prompts = load_prompts(args.sample_prompts) if args.sample_prompts else []
    texts = [text for prompt in prompts for text in prompt.texts] + ([""] if args.empty_caption else [])
    options = CacheOptions(
        skip_existing=args.skip_existing,
        keep_cache=args.keep_cache,
        deterministic=args.deterministic,
        on_bad_item="error",
        manifest=args.manifest,
        rejects=args.manifest.with_suffix(".rejects.tsv"),
    )
    update_prompts(text_encoder_stage(args, args.manifest.parent), texts, options)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
