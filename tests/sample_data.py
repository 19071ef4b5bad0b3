"""What sample pictures need beside a tiny training: a prompt file, its texts as cached, and the demo's VAE."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from training_data import HIDDEN_SIZE

from qwen_image.cache.fingerprint import fingerprint_metadata
from qwen_image.cache.manifest import TEXT_COLUMNS, write_manifest
from qwen_image.cache.prompts import prompts_folder, text_sha256
from qwen_image.container import write_safetensors
from qwen_image.sampling.prompts import load_prompts

PROMPTS = "a red square --w 32 --h 48 --s 2 --d 3\na blue round --w 48 --h 32 --s 2 --l 1\n"


def write_prompts(folder: Path, text: str = PROMPTS) -> dict[str, str]:
    """Write the files; returns the training arguments that name them."""
    file, manifest = folder / "prompts.txt", folder / "prompts.tsv"
    file.write_text(text, encoding="utf-8")
    texts = {text for prompt in load_prompts(file) for text in prompt.texts}
    write_manifest(manifest, [_cache(prompts_folder(manifest), text) for text in sorted(texts)], TEXT_COLUMNS)
    return {"sample_prompts": str(file), "prompts_manifest": str(manifest), "vae": str(tiny.path("vae"))}


def _cache(folder: Path, text: str) -> dict[str, object]:
    digest = text_sha256(text)
    random = torch.Generator().manual_seed(int(digest[:8], 16))
    embedding = torch.randn(6, HIDDEN_SIZE, generator=random).bfloat16()
    metadata = fingerprint_metadata({"caption": digest})
    write_safetensors(folder / f"{digest}_qi_te.safetensors", {"varlen_vl_embed_bfloat16": embedding}, metadata)
    return {
        "dataset": 0, "key": digest, "cache_file": f"{digest}_qi_te.safetensors", "tokens": 6, "dtype": "bfloat16",
        "caption_sha256": digest, "fingerprint": metadata["fingerprint"],
    }  # fmt: skip
