"""Runs as a training leaves them behind, written by hand for the tests of comparing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

SETTINGS = {
    "dataset_config": "data/dataset.toml", "vae": "vae.safetensors", "text_encoder": "text_encoder",
    "caching_teo_text_encoder": "text_encoder", "output_dir": "results/models", "seed": 42, "learning_rate": 1e-4,
    "network_dim": 4, "network_args": None, "validation_split": 0,
}  # fmt: skip


def write_run(
    project: Path,
    name: str,
    *,
    losses: Sequence[float] = (0.5, 0.4),
    validation: Sequence[float] = (),
    finished: bool = True,
    trained_with: dict | None = None,
    **settings: object,
) -> Path:
    """Write a run's settings, tables and LoRA into a project and return its folder.

    Validation losses are a step apart as well. `trained_with` is what the LoRA says of itself.
    """
    folder = project / "results/train" / name
    settings = {**SETTINGS, "output_name": name, "validation_split": 0.1 if validation else 0, **settings}
    _write(folder / "resolved.yaml", yaml.safe_dump(settings, allow_unicode=True))
    models = project / str(settings["output_dir"])
    ending = "" if finished else ".part"
    rows = [f"{step},1,9,{loss},1e-4,0.1,0" for step, loss in enumerate(losses, 1)]
    head = "step,epoch,loss,loss_average,learning_rate,grad_norm,skipped_steps"
    _write(models / f"{settings['output_name']}.loss.csv{ending}", "\n".join([head, *rows, ""]))
    if validation:
        rows = [f"{step},{loss}" for step, loss in enumerate(validation, 1)]
        _write(models / f"{settings['output_name']}.validation.csv{ending}", "\n".join(["step,loss", *rows, ""]))
        _write(models / f"{settings['output_name']}-best.safetensors", "")
    if finished:
        lora = _lora({} if trained_with is None else trained_with)
        (models / f"{settings['output_name']}.safetensors").write_bytes(lora)
        _write(folder / "lora.sha256", f"{hashlib.sha256(lora).hexdigest()}  -\n")
    return folder


def write_time(project: Path, name: str, seconds: float, log: str = "") -> None:
    """Write what Snakemake measured of a training, and its log."""
    _write(project / f"results/benchmarks/train/{name}.tsv", f"s\th:m:s\tmax_rss\n{seconds}\t0:00:00\t1.0\n")
    _write(project / f"results/logs/train/{name}.log", log)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _lora(settings: dict) -> bytes:
    """A file without tensors."""
    header = json.dumps({"__metadata__": {"qwen_image.settings": json.dumps(settings)}}).encode()
    return len(header).to_bytes(8, "little") + header
