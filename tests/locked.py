"""A project that looks trained: real pictures, captions and checkpoints, real files around invented numbers."""

from __future__ import annotations

import json
from pathlib import Path

import lock_dataset
import tiny
import torch
import verify_lock
import yaml
from PIL import Image
from write_train_config import main as write_train_config

from qwen_image.cache.latents import LatentStage, is_hash_and_size
from qwen_image.cache.merge import merge_shards
from qwen_image.cache.names import latent_tensor_name, text_tensor_name
from qwen_image.cache.shards import shard_manifest
from qwen_image.cache.stage import Encoded
from qwen_image.cache.text_encoder_outputs import TextEncoderStage
from qwen_image.cache.update import CacheOptions, update_cache
from qwen_image.container import write_safetensors
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import list_datasets
from qwen_image.files import FileMemo, atomic_write, sha256_file
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.models.identity import model_identity
from qwen_image.models.tokenizer import tokenizer_files
from qwen_image.training.metadata import with_hashes
from qwen_image.training.provenance import told_settings

NAMES = ("cat", "dog", "fox")
CONFIG = {
    "dataset_config": "pets.toml", "dit": "models/dit.safetensors", "vae": "models/vae.safetensors",
    "text_encoder": "models/text_encoder", "output_dir": "results/models", "output_name": "pets",
    "learning_rate": 1e-4, "max_train_steps": 2,
}  # fmt: skip


def write_project(folder: Path) -> None:
    """Write everything into the folder, which is the working directory."""
    for number, name in enumerate(NAMES):
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(folder / f"images/{name}.png")
        (folder / f"images/{name}.txt").write_text(f"a {name}")
    (folder / "models").symlink_to(tiny.folder())
    (folder / "pets.toml").write_text(
        '[general]\nresolution = 64\ncaption_extension = ".txt"\n'
        '[[datasets]]\nimage_directory = "images"\ncache_directory = "cache"\n'
    )
    write_config(folder)
    cache()
    train()


def write_config(folder: Path, **changes) -> None:
    """Write the configuration; None removes a key."""
    (folder / "my.yaml").write_text(
        yaml.safe_dump({key: value for key, value in {**CONFIG, **changes}.items() if value is not None})
    )


def cache(on_bad_item: str = "error") -> None:
    """Bring both caches and their manifests up to date, with numbers that nobody computed."""
    settings = load_dataset_config("pets.toml")
    listings = list_datasets(settings, "pets.toml")
    for kind, stage in stages().items():
        whole = Path(f"results/manifests/pets/{kind}.tsv")
        shard = shard_manifest(whole, 1, 1)
        options = CacheOptions(
            skip_existing=True, keep_cache=True, on_bad_item=on_bad_item, manifest=shard,
            rejects=shard.with_suffix(".rejects.tsv"),
        )  # fmt: skip
        update_cache(stage, zip(settings, listings, strict=True), options)
        merge_shards(whole, 1)


def stages() -> dict:
    """Return the two stages, with encoders that compute nothing."""
    models = Path("models")
    memo = FileMemo("memo.json", is_hash_and_size)
    encoder_files = [
        *checkpoint_files(models / "text_encoder", "text_encoder"),
        *tokenizer_files("models/text_encoder"),
    ]
    common = {"device": "cpu", "batch_size": 1, "deterministic": True}
    return {
        "latents": _Latents(
            vae="models/vae.safetensors", num_workers=1, memo=memo,
            model_identity=model_identity(checkpoint_files(models / "vae.safetensors", "vae"), "."), **common,
        ),
        "text_encoder_outputs": _Texts(
            text_encoder="models/text_encoder", tokenizer=None, fp8=True,
            model_identity=model_identity(encoder_files, "."), **common,
        ),
    }  # fmt: skip


class _Latents(LatentStage):
    def encode(self, entries):
        for entry in entries:
            name = latent_tensor_name(entry.payload.bucket, "bfloat16")
            yield Encoded(entry, {name: torch.full((16, 1, 8, 8), _number(entry.parts), dtype=torch.bfloat16)}, True)


class _Texts(TextEncoderStage):
    def encode(self, entries):
        for entry in entries:
            embedding = torch.full((3, 256), _number(entry.parts), dtype=torch.bfloat16)
            yield Encoded(entry, {text_tensor_name("bfloat16"): embedding}, True)


def _number(parts) -> float:
    return sum(json.dumps(dict(parts), sort_keys=True).encode()) % 251


def train(*, first: float = 0.0, threads: int = 2, **settings) -> None:
    """Write the trainer's TOML and a LoRA of numbers from `first` on that says what it was made from."""
    code = write_train_config([
        "--config", "my.yaml", "--latents_manifest", "results/manifests/pets/latents.tsv",
        "--text_encoder_outputs_manifest", "results/manifests/pets/text_encoder_outputs.tsv",
        "--toml", "results/train/pets/config.toml", "--resolved", "results/train/pets/resolved.yaml",
    ])  # fmt: skip
    assert code == 0
    identities = {kind: stage._model_identity for kind, stage in stages().items()}
    of_result = {key: value for key, value in CONFIG.items() if key in told_settings()}
    told = {
        "settings": of_result | {key: Path(CONFIG[key]).name for key in ("dit", "vae", "text_encoder")} | settings,
        "num_processes": 1,
        "datasets": [{
            "image_directory": "images", "cache_directory": "cache", "caption_extension": ".txt",
            "resolution": [64, 64],
        }],
        "software": {"torch": "1.0"},
        "inputs": {
            "latents_manifest": sha256_file("results/manifests/pets/latents.tsv"),
            "text_encoder_outputs_manifest": sha256_file("results/manifests/pets/text_encoder_outputs.tsv"),
            "dit": model_identity(checkpoint_files(CONFIG["dit"], "dit"), "."),
            "latents": {"model": identities["latents"]},
            "text_encoder_outputs": {"model": identities["text_encoder_outputs"], "weights": "float8_e4m3fn"},
        },
    }  # fmt: skip
    tensors = {"lora_unet_x.lora_up.weight": torch.arange(first, first + 12).reshape(3, 4)}
    metadata = {f"qwen_image.{key}": json.dumps(value) for key, value in told.items()}
    write_safetensors("results/models/pets.safetensors", tensors, with_hashes(tensors, metadata))
    atomic_write("results/logs/train/pets.log", f"train: computed on cpu, {threads} threads\n")


def lock() -> int:
    """Lock the working directory."""
    return lock_dataset.main(["--config", "my.yaml"])


def verify(capsys, *more: str) -> tuple[int, str]:
    """Verify the working directory; return the exit code and what was said."""
    capsys.readouterr()
    code = verify_lock.main(["--config", "my.yaml", *more])
    return code, capsys.readouterr().err


def flip_last_bit(path: str) -> None:
    """Damage a file in its last byte."""
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)
