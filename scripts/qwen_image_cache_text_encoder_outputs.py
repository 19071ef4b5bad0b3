"""Cache the text-encoder outputs of a dataset's captions: one file an image, and a manifest of them.

    python scripts/qwen_image_cache_text_encoder_outputs.py --dataset_config dataset.toml \
        --text_encoder qwen_2.5_vl_7b.safetensors --fp8_vl --skip_existing --keep_cache
"""

from __future__ import annotations

import os
import sys

from qwen_image.cache.program import bring_up_to_date, cache_options, cache_parser, usable_workers
from qwen_image.cache.text_encoder_outputs import TextEncoderStage
from qwen_image.models.checkpoint import check_checkpoint, checkpoint_files
from qwen_image.models.identity import model_identity
from qwen_image.models.tokenizer import check_tokenizer, tokenizer_files
from qwen_image.problems import InputError, run


def main(argv: list[str] | None = None) -> int:
    """Bring the text cache up to date. Returns 0 only when every item is cached or knowingly left out."""
    parser = cache_parser("Cache the text-encoder outputs of a dataset's captions.", batch_size=16)
    parser.add_argument("--text_encoder", required=True, help="Qwen2.5-VL: a .safetensors file, an index or a folder")
    parser.add_argument("--tokenizer", help="tokenizer folder, when the text encoder's has none")
    parser.add_argument("--fp8_vl", action="store_true", help="store the linear weights in fp8, compute in bf16")
    args = parser.parse_args(argv)
    if problems := [
        *check_checkpoint(args.text_encoder, "text_encoder"),
        *check_tokenizer(args.text_encoder, args.tokenizer),
    ]:
        raise InputError(problems)
    # the tokenizer's own thread pool, read when it is first imported
    os.environ["RAYON_NUM_THREADS"] = str(usable_workers(args.num_workers))
    options = cache_options(args, "text_encoder_outputs")
    files = [
        *checkpoint_files(args.text_encoder, "text_encoder"),
        *tokenizer_files(args.text_encoder, args.tokenizer),
    ]
    stage = TextEncoderStage(
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        model_identity=model_identity(files, options.manifest.parent),
        fp8=args.fp8_vl,
        device=args.device,
        batch_size=args.batch_size,
        deterministic=args.deterministic,
    )
    bring_up_to_date(stage, args.dataset_config, options)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
