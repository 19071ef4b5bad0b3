"""Train a Qwen-Image LoRA on cached latents and text-encoder outputs.

    accelerate launch --mixed_precision bf16 scripts/qwen_image_train_network.py --config_file train.toml

Every TOML key is also a flag (--help lists them); the command line overrides the file. Exits with 0 once the LoRA is
written, and with 75 when it was asked to stop: its state is saved then, and the same command goes on from there. Of
several processes the first one's code tells.
"""

from __future__ import annotations

import logging
import os
import sys

from qwen_image.problems import run
from qwen_image.training.arguments import parse_arguments


def main(argv: list[str] | None = None) -> int:
    """Check the arguments, train, and return the exit code."""
    settings = parse_arguments(argv)
    # one voice: of several processes only the first reports
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("qwen_image").setLevel(logging.INFO if first else logging.ERROR)

    # torch is imported only once the arguments are known to be good
    if settings.show_timesteps is not None:
        from qwen_image.training.noise_picture import show_timesteps

        if first:
            show_timesteps(settings)
        return 0

    from qwen_image.training.interruption import GOES_ON_LATER
    from qwen_image.training.loop import train

    # launchers end all processes as soon as one fails: the first one alone says that there is more to do
    return GOES_ON_LATER if train(settings) is None and first else 0


if __name__ == "__main__":
    sys.exit(run(main))
