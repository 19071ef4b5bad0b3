"""Cache the latents of a dataset: one file an image, and a manifest of them.

    python scripts/qwen_image_cache_latents.py --dataset_config dataset.toml --vae vae.safetensors \
        --skip_existing --keep_cache
"""

from __future__ import annotations

import sys

from qwen_image.cache.latents import LatentStage, is_hash_and_size
from qwen_image.cache.program import (
    bring_up_to_date,
    cache_options,
    cache_parser,
    open_memo,
    usable_workers,
)
from qwen_image.models.checkpoint import check_checkpoint, checkpoint_files
from qwen_image.models.identity import model_identity
from qwen_image.problems import InputError, run


def main(argv: list[str] | None = None) -> int:
    """Bring the latent cache up to date. Returns 0 only when every item is cached or knowingly left out."""
    parser = cache_parser("Cache the latents of a dataset.", batch_size=4)
    parser.add_argument("--vae", required=True, help="Qwen-Image VAE: a .safetensors file or a diffusers folder")
    args = parser.parse_args(argv)
    if problems := check_checkpoint(args.vae, "vae"):
        raise InputError(problems)
    options = cache_options(args, "latents")
    memo = open_memo(options, "latents", is_hash_and_size)
    stage = LatentStage(
        vae=args.vae,
        model_identity=model_identity(checkpoint_files(args.vae, "vae"), options.manifest.parent),
        device=args.device,
        batch_size=args.batch_size,
        num_workers=usable_workers(args.num_workers),
        deterministic=args.deterministic,
        memo=memo,
    )
    try:
        bring_up_to_date(stage, args.dataset_config, options)
    finally:
        # what was hashed is remembered even when the stage fails or is told to stop
        memo.save(keep_others=args.num_shards > 1)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
