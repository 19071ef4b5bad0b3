"""A tiny transformer and a cache of random numbers for the trainer's tests: the real classes and file formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import toml
import torch
from diffusers import QwenImageTransformer2DModel

from qwen_image.cache.fingerprint import fingerprint_metadata
from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest, write_manifest
from qwen_image.container import write_safetensors
from qwen_image.dataset.config import load_dataset_config
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.captions import CaptionChoice
from qwen_image.training.items import TrainingItem
from qwen_image.training.loading import CachedBatches
from qwen_image.training.noise_levels import NoiseLevels

HIDDEN_SIZE = 64
# name, bucket (W, H) in pixels, text tokens
ITEMS = (("a", (64, 64), 5), ("b", (64, 64), 9), ("c", (96, 48), 7), ("d", (64, 64), 5), ("e", (96, 48), 6))


@dataclass(frozen=True)
class TinyTraining:
    """Paths of everything a training needs."""

    folder: Path
    arguments: dict[str, str]
    """The required arguments; three steps."""

    def flags(self, **more: object) -> list[str]:
        """Return a command line; True is a flag by itself, a list its several values."""
        words: list[str] = []
        for key, value in {**self.arguments, **more}.items():
            words.append(f"--{key}")
            if isinstance(value, list):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))
        return words


def tiny_transformer(*, layers: int = 2, heads: int = 1, hidden_size: int = HIDDEN_SIZE) -> QwenImageTransformer2DModel:
    """Return a random transformer, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return QwenImageTransformer2DModel(
            num_layers=layers, attention_head_dim=128, num_attention_heads=heads, joint_attention_dim=hidden_size
        ).eval()


def write_tiny_training(folder: Path, *, items=ITEMS, batch_size: int = 2, num_repeats: int = 1) -> TinyTraining:
    """Write a checkpoint, a dataset file, cache files and both manifests."""
    tiny_transformer().save_pretrained(folder / "dit")
    latent_rows, text_rows = [], []
    for number, (name, bucket, tokens) in enumerate(items):
        latent_rows.append(_write_latents(folder / "cache", name, bucket, number))
        text_rows.append(_write_text(folder / "cache", name, tokens, number))
    write_manifest(folder / "latents.tsv", latent_rows, LATENT_COLUMNS)
    write_manifest(folder / "text.tsv", text_rows, TEXT_COLUMNS)
    dataset = {
        "image_directory": str(folder / "pictures"), "cache_directory": str(folder / "cache"),
        "caption_extension": ".txt", "enable_bucket": True, "resolution": [64, 64], "batch_size": batch_size,
        "num_repeats": num_repeats,
    }  # fmt: skip
    (folder / "dataset.toml").write_text(toml.dumps({"datasets": [dataset]}), encoding="utf-8")
    arguments = {
        "dataset_config": folder / "dataset.toml",
        "latents_manifest": folder / "latents.tsv",
        "text_encoder_outputs_manifest": folder / "text.tsv",
        "dit": folder / "dit",
        "output_dir": folder / "models",
        "output_name": "lora",
        "max_train_steps": 3,
        "learning_rate": "1e-3",
    }
    return TinyTraining(folder, {key: str(value) for key, value in arguments.items()})


def add_captions(folder: Path, name: str, count: int) -> None:
    """Give one item of a training that `write_tiny_training` wrote `count` captions; set multiple_captions."""
    rows = read_manifest(folder / "text.tsv", TEXT_COLUMNS).to_dict("records")
    (first,) = [row for row in rows if row["key"] == f"{name}.png"]
    for number in range(2, count + 1):
        file, metadata = f"{name}_qi_te{number}.safetensors", {"fingerprint": f"{name}{number}"}
        tensor = torch.full((number, HIDDEN_SIZE), float(number), dtype=torch.bfloat16)
        write_safetensors(folder / "cache" / file, {"varlen_vl_embed_bfloat16": tensor}, metadata)
        # the reader puts them in order, whatever the table's
        rows.insert(0, first | {"cache_file": file, "tokens": number, **metadata})
    write_manifest(folder / "text.tsv", rows, TEXT_COLUMNS)
    table = (folder / "dataset.toml").read_text(encoding="utf-8")
    (folder / "dataset.toml").write_text(f"{table}multiple_captions = true\n", encoding="utf-8")


def write_empty_caption(folder: Path) -> Path:
    """Write the empty caption's cache file and a manifest of prompts, which is returned."""
    from qwen_image.cache.prompts import prompts_folder, text_sha256

    manifest, empty = folder / "prompts.tsv", text_sha256("")
    row = _write_text(prompts_folder(manifest), empty, 5, 0)
    write_manifest(manifest, [row | {"key": empty}], TEXT_COLUMNS)
    return manifest


def cached_batches(folder: Path, items: list[TrainingItem], **settings: object) -> CachedBatches:
    """Return what reads the batches of a training that `write_tiny_training` wrote, with these settings."""
    checked = Settings(**with_defaults(settings))
    datasets = {dataset.index: dataset for dataset in load_dataset_config(folder / "dataset.toml")}
    levels = NoiseLevels(checked, items, datasets)
    return CachedBatches(items, levels, CaptionChoice(checked, None), seed=checked.seed)


def _write_latents(cache: Path, name: str, bucket: tuple[int, int], seed: int) -> dict[str, object]:
    width, height = bucket
    latents = torch.randn(16, 1, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    metadata = fingerprint_metadata({"picture": name, "bucket": f"{width}x{height}"})
    file = f"{name}_{width:04d}x{height:04d}_qi.safetensors"
    tensor_name = f"latents_1x{height // 8}x{width // 8}_bfloat16"
    write_safetensors(cache / file, {tensor_name: latents.bfloat16()}, metadata)
    return {
        "dataset": 0, "key": f"{name}.png", "cache_file": file, "width": width, "height": height, "bucket_width": width,
        "bucket_height": height, "dtype": "bfloat16", "source_sha256": "0", "fingerprint": metadata["fingerprint"],
    }  # fmt: skip


def _write_text(cache: Path, name: str, tokens: int, seed: int) -> dict[str, object]:
    text = torch.randn(tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1000 + seed))
    metadata = fingerprint_metadata({"caption": name})
    file = f"{name}_qi_te.safetensors"
    write_safetensors(cache / file, {"varlen_vl_embed_bfloat16": text.bfloat16()}, metadata)
    return {
        "dataset": 0, "key": f"{name}.png", "cache_file": file, "tokens": tokens, "dtype": "bfloat16",
        "caption_sha256": "0", "fingerprint": metadata["fingerprint"],
    }  # fmt: skip
