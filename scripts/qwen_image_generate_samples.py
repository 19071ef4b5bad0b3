"""Make sample pictures of LoRAs: every checkpoint with every prompt, and all of them on one contact sheet.

    python scripts/qwen_image_generate_samples.py --checkpoints_of models/my_lora.safetensors --dit dit.safetensors \
        --vae vae.safetensors --sample_prompts prompts.txt --prompts_manifest prompts.tsv --output_dir samples

The prompts must have been cached by qwen_image_cache_prompts.py: no text encoder is loaded here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_image.models.checkpoint import check_checkpoint
from qwen_image.problems import InputError, run
from qwen_image.sampling.checkpoints import adapter_on, check_loras, run_checkpoints
from qwen_image.sampling.prompts import SamplePrompt, load_prompts

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.sampling.pictures import Painter


def main(argv: list[str] | None = None) -> int:
    """Make the pictures, the table of them and the sheet."""
    args = _parser().parse_args(argv)
    prompts = load_prompts(args.sample_prompts, seed=args.seed)
    loras = [Path(file) for file in args.lora] if args.lora else run_checkpoints(args.checkpoints_of)
    check_loras(loras, args.base_weights)
    if problems := check_checkpoint(args.dit, "dit"):
        raise InputError(problems)

    # torch is imported only once the files are known to be there
    import torch

    from qwen_image.adapter.weights import merge_base_weights
    from qwen_image.device import pick_device
    from qwen_image.models.transformer import load_transformer
    from qwen_image.sampling.pictures import Painter
    from qwen_image.training.arguments import Settings, with_defaults

    device = torch.device(pick_device(args.device))
    painter = Painter(prompts, manifest=args.prompts_manifest, dit=args.dit, vae=args.vae, device=device)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    transformer = load_transformer(args.dit, device=device, dtype=dtype)
    multipliers = args.base_weights_multiplier or None
    merged = {"base_weights": args.base_weights or None, "base_weights_multiplier": multipliers}
    merge_base_weights(transformer, Settings(**with_defaults(merged)))

    files = _make_pictures(painter, transformer, loras, Path(args.output_dir))
    _write_sheet(args.sheet or Path(args.output_dir, "sheet.png"), loras, prompts, files)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make sample pictures of LoRAs.", allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--lora", nargs="+", metavar="FILE", help="LoRAs, each a row of the sheet")
    which.add_argument("--checkpoints_of", metavar="FILE", help="a training's LoRA: with all checkpoints beside it")
    parser.add_argument("--dit", required=True, help="the transformer that they were trained on")
    parser.add_argument("--vae", required=True, help="the VAE")
    parser.add_argument("--sample_prompts", required=True, help="prompt file: .txt, .toml or .json")
    parser.add_argument("--prompts_manifest", required=True, help="table that qwen_image_cache_prompts.py wrote of it")
    parser.add_argument("--output_dir", required=True, help="folder for the pictures")
    parser.add_argument("--sheet", type=Path, help="contact sheet, a PNG (default: sheet.png among the pictures)")
    parser.add_argument("--seed", type=int, default=42, help="the training's, for prompts without one (default: 42)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the GPU if there is one")
    parser.add_argument("--mixed_precision", choices=["bf16", "no"], default="bf16", help="as in training")
    parser.add_argument("--base_weights", nargs="*", default=[], help="adapters merged in before, as in training")
    parser.add_argument("--base_weights_multiplier", nargs="*", type=float, help="their strengths")
    return parser


def _make_pictures(
    painter: Painter, transformer: QwenImageTransformer2DModel, loras: Sequence[Path], folder: Path
) -> list[list[Path]]:
    """Return the files that were written, a list for each LoRA."""
    from qwen_image.sampling.pictures import save_picture

    files = []
    total = len(loras) * len(painter.prompts)
    with tqdm(total=total, unit="picture", desc="samples", ncols=100) as bar:
        for lora in loras:
            row = []
            with adapter_on(transformer, lora):
                for index, prompt in enumerate(painter.prompts):
                    path = folder / f"{lora.stem}_{index:02d}_{prompt.seed}.png"
                    save_picture(path, painter.paint(transformer, prompt))
                    row.append(path)
                    bar.update()
            files.append(row)
    return files


def _write_sheet(
    path: Path, loras: Sequence[Path], prompts: Sequence[SamplePrompt], files: Sequence[Sequence[Path]]
) -> None:
    from qwen_image.sampling.pictures import save_picture
    from qwen_image.sampling.sheet import contact_sheet

    columns = [f"{index:02d}: {prompt.prompt}" for index, prompt in enumerate(prompts)]
    save_picture(path, contact_sheet([lora.stem for lora in loras], columns, files))
    print(f"samples: {sum(map(len, files))} pictures of {len(loras)} LoRAs, sheet {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
