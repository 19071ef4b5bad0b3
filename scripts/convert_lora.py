"""Write a LoRA with another tool's tensor names; what it does to each weight stays the same.

    python scripts/convert_lora.py --input my_lora.safetensors --output my_lora_peft.safetensors --target diffusers

kohya (also called default) are the names that ComfyUI and most tools read, diffusers those of diffusers and peft, with
alpha folded in, diffusion_model (also called other) dotted names with alpha. The input may have any of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qwen_image.problems import InputError, Problem, run

TARGETS = ("kohya", "default", "diffusers", "diffusion_model", "other")


def main(argv: list[str] | None = None) -> int:
    """Read, rename, write, and return the exit code."""
    parser = argparse.ArgumentParser(description="Write a LoRA with another tool's tensor names.")
    parser.add_argument(
        "--input", type=Path, required=True, help="LoRA, DoRA, LoHa or LoKr of Qwen-Image, .safetensors"
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write; an existing one is replaced")
    parser.add_argument("--target", choices=TARGETS, required=True, help="whose names to write")
    args = parser.parse_args(argv)
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        found, mend = "is the input itself", "choose another --output; the input stays as it is"
        raise InputError([Problem(file=str(args.output), found=found, mend=mend)])

    # torch is imported only once the arguments are known to be good
    from qwen_image.adapter.convert import convert_file

    count = convert_file(args.input, args.output, args.target)
    print(f"convert_lora: {args.output}: {count} tensors by the names of {args.target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
