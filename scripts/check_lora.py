"""Check a trained LoRA by loading it as its readers do; all problems in one message.

    python scripts/check_lora.py --lora models/my_lora.safetensors --dit dit.safetensors --digest lora.sha256

ComfyUI and diffusers are the readers. Exit code 0 when the file is what it should be, 2 with the list of problems. The
digest is written last, and only then.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from qwen_image.files import atomic_write, sha256_file
from qwen_image.models.checkpoint import check_checkpoint
from qwen_image.problems import InputError, Problem, run


def main(argv: list[str] | None = None) -> int:
    """Check, write the digest if asked to, and return the exit code."""
    parser = argparse.ArgumentParser(description="Check a trained LoRA by loading it as its readers do.")
    parser.add_argument("--lora", type=Path, required=True, help="the LoRA (or DoRA, LoHa, LoKr), in any naming scheme")
    parser.add_argument("--diffusers", type=Path, help="the same one in another scheme, which has to be equal to it")
    parser.add_argument(
        "--dit", type=Path, required=True, help="checkpoint that it was trained for; only headers are read"
    )
    parser.add_argument("--digest", type=Path, help="file for the LoRA's hash, as sha256sum writes it")
    args = parser.parse_args(argv)
    files = [file for file in (args.lora, args.diffusers) if file is not None]
    problems = [
        Problem(file=str(file), found="does not exist", mend="give the file that the training wrote")
        for file in files
        if not file.exists()
    ]
    problems += check_checkpoint(args.dit, "dit")
    if not problems:
        # torch is imported only once the arguments are known to be good
        from qwen_image.adapter.check import check_adapter_file

        logging.getLogger("diffusers").setLevel(logging.ERROR)
        problems = check_adapter_file(args.lora, args.dit, args.diffusers)
    if problems:
        raise InputError(problems)
    if args.digest:
        atomic_write(args.digest, f"{sha256_file(args.lora)}  -\n")
    print(f"check_lora: {' and '.join(map(str, files))}: loaded back, no problems found", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
