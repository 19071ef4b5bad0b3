"""The caching programs as people start them: whole processes on photographs, with models of random weights.

How much of a long run the encoder is busy, what a run costs in time and memory, and what one costs that finds nothing
to do. The VAE is of the real size, the text encoder has 400M parameters. With a checkout of musubi-tuner the same
images go through its public program too, in turns; its text encoder program is left out, because it knows the 7B model
alone and takes the tokenizer from the hub.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Row, faster

ROOT = Path(__file__).parents[1]
IMAGES = 48
IMAGES_BESIDE = 12
"""Fewer beside the other program, which takes many seconds an image."""
RESOLUTION = 512
ROUNDS = 3
BUSY = re.compile(r"encoder busy (\d+)%")
UNITS = {"latents": "images", "text_encoder_outputs": "captions"}
CAPTION = "a photograph of something that stands before something else in the light of a late afternoon, "
TEXT_DIMENSIONS = {
    "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 2,
}  # fmt: skip
"""Twelve layers with the real model's proportions: 400M parameters."""


@dataclass(frozen=True)
class Run:
    """One process from start to end."""

    seconds: float
    peak: float
    """Largest resident size in MB, of the process or any of its children."""
    text: str


def rows(musubi: Path | None = None, musubi_python: str = sys.executable) -> list[Row]:
    """Return the rows; `musubi` is a checkout of musubi-tuner and `musubi_python` the Python it is installed for."""
    with tempfile.TemporaryDirectory(prefix="caching-") as name:
        folder = Path(name)
        _write_photographs(folder / "images")
        _write_models(folder)
        found = [row for kind in UNITS for row in _alone(folder, kind)]
        return found + (_beside(folder, musubi.resolve(), musubi_python) if musubi else [])


def _alone(folder: Path, kind: str) -> list[Row]:
    """One of our programs: full runs, and runs with nothing to do."""
    command, unit = _ours(folder, kind), UNITS[kind]
    full = [_run(command, folder, fresh=True) for _ in range(ROUNDS)]
    idle = [_run(command, folder) for _ in range(ROUNDS)]
    assert all("nothing to encode" in run.text for run in idle), idle[0].text
    busy = statistics.median(int(BUSY.search(run.text)[1]) / 100 for run in full)
    return [
        Row(name=f"{kind}, whole program: share of the time that the encoder is busy", ours=busy, unit="",
            target=">= 0.9"),
        Row(name=f"{kind}, whole program of {IMAGES} {unit}", ours=IMAGES / _median(full), unit=f"{unit}/s"),
        Row(name=f"{kind}, whole program: peak memory", ours=max(run.peak for run in full), unit="MB"),
        Row(name=f"{kind}, whole program that finds nothing to do", ours=_median(idle), unit="s"),
    ]  # fmt: skip


def _beside(folder: Path, musubi: Path, python: str) -> list[Row]:
    """Both latent programs in turns: full runs, then runs with nothing to do."""
    for image in sorted((folder / "images").iterdir())[2 * IMAGES_BESIDE :]:
        image.unlink()
    ours = _ours(folder, "latents")
    theirs = [
        python, str(musubi / "qwen_image_cache_latents.py"), "--dataset_config", "musubi.toml", "--vae",
        "vae.safetensors", "--device", "cpu", "--skip_existing", "--keep_cache",
    ]  # fmt: skip
    found = []
    for name, fresh in ((f"{IMAGES_BESIDE} images at {RESOLUTION}²", True), ("nothing to do", False)):
        runs = [(_run(ours, folder, fresh=fresh), _run(theirs, folder, fresh=fresh)) for _ in range(ROUNDS)]
        mine, other = ([run[side] for run in runs] for side in (0, 1))
        title = f"latents, whole program against musubi-tuner's: {name}"
        found.append(faster(title, ours=_median(mine), other=_median(other), count=IMAGES_BESIDE, unit="images/s"))
    return found


def _median(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def _run(command: list[str], folder: Path, *, fresh: bool = False) -> Run:
    if fresh:
        for cache in ("cache", "theirs"):
            shutil.rmtree(folder / cache, ignore_errors=True)
    start = time.perf_counter()
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return Run(seconds, usage.ru_maxrss / 1000, text)


def _ours(folder: Path, kind: str) -> list[str]:
    model = ["--vae", "vae.safetensors"] if kind == "latents" else ["--text_encoder", "text_encoder"]
    program = str(ROOT / f"scripts/qwen_image_cache_{kind}.py")
    options = ["--dataset_config", "ours.toml", "--device", "cpu", "--skip_existing", "--keep_cache"]
    return [sys.executable, program, *model, *options]


def _write_photographs(folder: Path) -> None:
    """Write photographs of 12 megapixels, as a camera leaves them, and a dataset file for each side."""
    import skimage
    from PIL import Image, ImageOps

    folder.mkdir()
    sources = [Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "coffee.png", "chelsea.png")]
    for index in range(IMAGES):
        size = (4000, 3000) if index % 3 else (3000, 4000)
        image = ImageOps.fit(Image.open(sources[index % 3]).convert("RGB"), size, centering=(index / IMAGES, 0.5))
        image.save(folder / f"{index:03}.jpg", quality=90)
        words = CAPTION * (1 + index % 4)
        (folder / f"{index:03}.txt").write_text(f"{index}: {words[: 60 + 5 * index]}")
    for name, cache in (("ours", "cache"), ("musubi", "theirs")):
        (folder.parent / f"{name}.toml").write_text(
            f'[general]\nresolution = {RESOLUTION}\nenable_bucket = true\ncaption_extension = ".txt"\n'
            f'[[datasets]]\nimage_directory = "images"\ncache_directory = "{cache}"\n'
        )


def _write_models(folder: Path) -> None:
    from qwen_image.demo.checkpoints import demo_text_encoder, demo_vae, write_text_encoder, write_vae

    write_vae(folder / "vae.safetensors", demo_vae(base_dim=96))
    write_text_encoder(folder / "text_encoder", demo_text_encoder(**TEXT_DIMENSIONS))


if __name__ == "__main__":
    from run import main

    sys.exit(main(["--only", "caching", *sys.argv[1:]]))
