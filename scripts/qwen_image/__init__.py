"""Qwen-Image LoRA training as a library: datasets, caches, models and the trainer behind the programs in scripts/."""
