"""Qwen-Image LoRA training as a library: datasets, caches, models and the trainer behind the programs in scripts/."""

import sys

__version__ = "0.1.0"
"""The one place where the project's version stands; every LoRA carries it."""

# diffusers and peft import it wherever it is installed, a second at each start, though only AdamW8bit needs it;
# own_classes.py imports it for that
sys.modules.setdefault("bitsandbytes", None)
