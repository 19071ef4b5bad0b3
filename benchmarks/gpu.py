"""The real sizes on one GPU: VAE, the 7B text encoder and the 20B transformer, with random weights.

    python benchmarks/gpu.py --folder /dev/shm            the checkpoints, 57 GB, are written into memory meanwhile
    python benchmarks/gpu.py --only vae

Encoders are timed in turns with the public classes on the same weights. Then the whole workflow caches eight
photographs at 1024x1024 and trains on them; a step is timed with and without what makes its bytes the same each time.
The rows go into benchmarks/results/gpu.json under the card's name; those that are not measured stay there as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "scripts")]

import numpy  # noqa: E402
import torch  # noqa: E402
from measure import Row, as_table, faster, medians  # noqa: E402
from run import write_rows  # noqa: E402

from qwen_image.models.image_vae import BASE_DIM  # noqa: E402

RESULTS = HERE / "results" / "gpu.json"
SIDES = {512: 8, 1024: 4}
"""Pictures in a batch, by their side."""
TEXT_DIMENSIONS = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
TOKENS = (25, 150)
IMAGES = 8
STEPS = 10
ROUNDS = 5


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description="Measure the real sizes on a GPU.")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="parts to measure")
    parser.add_argument("--results", type=lambda name: Path(name).absolute(), default=RESULTS, help="file to write")
    parser.add_argument("--folder", help="where the checkpoints lie meanwhile, memory if you can (default: as usual)")
    args = parser.parse_args(argv)
    card, rows = torch.cuda.get_device_name(), []
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.folder) as name:
        for part in args.only:
            for row in ROWS[part](Path(name)):
                rows.append(replace(row, name=f"{card}: {row.name}"))
                print(as_table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                # what is measured so far stays if a later part fails
                write_rows(args.results, rows, whole=False)
            _forget()
    print(f"{card}, torch {torch.__version__}\n{as_table(rows)}")
    return 0


# ---- the encoders


def vae_rows(folder: Path) -> Iterator[Row]:
    """Pictures a second, ours against diffusers' class."""
    from qwen_image.demo.checkpoints import demo_vae
    from qwen_image.models.vae import load_vae

    plain = demo_vae(BASE_DIM).to("cuda", torch.bfloat16).eval()
    ours = load_vae(_vae(folder), device="cuda")
    for side, batch in SIDES.items():
        pixels = numpy.random.default_rng(0).integers(0, 256, (batch, side, side, 3), numpy.uint8)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).unsqueeze(2).to("cuda", torch.bfloat16) / 127.5 - 1
        latents = ours.encode_pixels(pixels)
        calls = {
            "encoder": (lambda pixels=pixels: ours.encode_pixels(pixels).cpu(),
                        lambda x=x: plain.encode(x).latent_dist.mode().cpu()),
            "decoder": (lambda latents=latents: ours.decode_latents(latents).cpu(),
                        lambda latents=latents: plain.decode(latents).sample.float().cpu()),
        }  # fmt: skip
        for part, (mine, other) in calls.items():
            with torch.inference_mode():
                seconds = medians({"ours": mine, "other": other}, rounds=ROUNDS, warmup=2)
                peaks = [_peak(call) for call in (mine, other)]
            name = f"VAE {part}, bf16, {batch} of {side}x{side}"
            yield faster(name, ours=seconds["ours"], other=seconds["other"], count=batch, unit="images/s")
            yield Row(name=f"{name}: peak of GPU memory", ours=peaks[0], other=peaks[1], unit="GB",
                      ratio=peaks[1] / peaks[0])  # fmt: skip


def text_rows(folder: Path) -> Iterator[Row]:
    """Captions a second of the 7B model, ours in bf16 and in fp8 against the public pipeline in bf16."""
    from text_encoder import BATCH, captions, ours, pipeline

    path, encoders = _text_encoder(folder), {}
    for name, load in (
        ("pipeline", lambda: pipeline(path)), ("bf16", lambda: ours(path)), ("fp8", lambda: ours(path, fp8=True)),
    ):  # fmt: skip
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        encoders[name] = load()
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        yield Row(name=f"text encoder 7B, {name}: loaded in", ours=taken, unit="s")
        yield Row(name=f"text encoder 7B, {name}: weights", ours=_gigabytes(before), unit="GB")
    for tokens in TOKENS:
        texts = captions([tokens] * BATCH)
        calls = {name: partial(encode, texts) for name, encode in encoders.items()}
        seconds = medians(calls, rounds=ROUNDS, warmup=2)
        for name in ("bf16", "fp8"):
            title = f"text encoder 7B, {name}, {BATCH} captions of {tokens} tokens, times the pipeline in bf16"
            yield faster(title, ours=seconds[name], other=seconds["pipeline"], count=BATCH, unit="captions/s")


# ---- the workflow


def caching_rows(folder: Path) -> Iterator[Row]:
    """Both caches by the whole workflow, from photographs."""
    name = f"both caches of {IMAGES} images at 1024x1024, whole workflow"
    yield Row(name=name, ours=_run(_project(folder), "cache_only"), unit="s")


def training_rows(folder: Path) -> Iterator[Row]:
    """A LoRA of the 20B model by the whole workflow; with an empty cache, the caching is part of it."""
    project = _project(folder)
    yield Row(name=f"a LoRA of the 20B model in {STEPS} steps, checked, whole workflow", ours=_run(project), unit="s")
    yield Row(name="and again: nothing to be done", ours=_run(project), unit="s")


def step_rows(folder: Path) -> Iterator[Row]:
    """One training step of the 20B model, with and without what makes its bytes the same each time."""
    from qwen_image.device import deterministic_algorithms
    from qwen_image.training.arguments import parse_arguments
    from qwen_image.training.loop import batch_loss, load_batches
    from qwen_image.training.preparation import make_accelerator, make_plan, origin_of, prepare, read_data

    project = _project(folder)
    _run(project, "results/train/large/config.toml")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    with contextlib.chdir(project):
        settings = parse_arguments(["--config_file", "results/train/large/config.toml"])
        accelerator = make_accelerator(settings)
        data = read_data(settings)
        plan = make_plan(settings, data.items, data.datasets, processes=1)
        origin = origin_of(settings, accelerator)  # hashes the checkpoints
        start = time.perf_counter()
        run = prepare(settings, accelerator, data, plan, origin, None)
        torch.cuda.synchronize()
        yield Row(name="transformer 20B, bf16: loaded, with an adapter of rank 16, in",
                  ours=time.perf_counter() - start, unit="s")  # fmt: skip
        yield Row(name="transformer 20B, bf16: weights, with the adapter", ours=_gigabytes(), unit="GB")
        loaded = next(load_batches(run)).to(accelerator.device)

    def step(ordered: bool) -> None:
        with deterministic_algorithms("cuda") if ordered else contextlib.nullcontext():
            accelerator.backward(batch_loss(run, loaded))
        accelerator.clip_grad_norm_(run.parameters, 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    seconds = medians({"ours": lambda: step(True), "other": lambda: step(False)}, rounds=ROUNDS, warmup=2)
    name = "training step, 20B, rank 16, 1024x1024, gradient checkpointing"
    yield faster(f"{name}: the same bytes each time, times whatever bytes", ours=seconds["ours"],
                 other=seconds["other"], count=1, unit="steps/s")  # fmt: skip
    yield Row(name=f"{name}: peak of GPU memory", ours=_peak(lambda: step(True), whole=True), unit="GB")


def _project(folder: Path) -> Path:
    """Write the checkpoints, photographs and a configuration, unless they are there."""
    project = folder / "project"
    if project.exists():
        return project
    start = time.perf_counter()
    models = {"dit": _transformer(folder), "vae": _vae(folder), "text_encoder": _text_encoder(folder)}
    print(f"wrote the checkpoints in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    _write_photographs(project / "images")
    (project / "dataset.toml").write_text(
        '[general]\nresolution = 1024\ncaption_extension = ".txt"\n'
        '[[datasets]]\nimage_directory = "images"\ncache_directory = "results/cache"\n'
    )
    config = {
        **{key: str(path) for key, path in models.items()}, "dataset_config": "dataset.toml", "network_dim": 16,
        "output_dir": "results/models", "output_name": "large", "gradient_checkpointing": True,
        "mixed_precision": "bf16", "learning_rate": 1e-4, "max_train_steps": STEPS,
    }  # fmt: skip
    (project / "my.yaml").write_text(json.dumps(config))
    return project


def _run(project: Path, *target: str) -> float:
    start = time.perf_counter()
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "all",
        "--configfile", "my.yaml", "--", *target,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout.decode(errors="replace")[-8000:], file=sys.stderr)
        done.check_returncode()
    return time.perf_counter() - start


def _write_photographs(folder: Path) -> None:
    import skimage
    from PIL import Image, ImageOps

    folder.mkdir(parents=True)
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")
    for number in range(IMAGES):
        ImageOps.fit(photograph.rotate(7 * number), (1024, 1024)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(" ".join(["an astronaut in an orange suit"] * (1 + number % 4)))


# ---- checkpoints


def _vae(folder: Path) -> Path:
    from qwen_image.demo.checkpoints import demo_vae, write_vae

    path = folder / "vae.safetensors"
    if not path.exists():
        write_vae(path, demo_vae(BASE_DIM))
    return path


def _text_encoder(folder: Path) -> Path:
    """Write Qwen2.5-VL's 7B language model and head, with the demo's small vision tower."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from qwen_image.demo.checkpoints import demo_text_encoder, write_text_encoder

    path = folder / "text_encoder"
    if not path.exists():
        config = demo_text_encoder(num_hidden_layers=TEXT_DIMENSIONS["num_hidden_layers"]).config
        config.text_config.update(TEXT_DIMENSIONS)
        model = _random(lambda: Qwen2_5_VLForConditionalGeneration(config))
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        write_text_encoder(path, model)
        del model
        _forget()
    return path


def _transformer(folder: Path) -> Path:
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.container import write_safetensors

    path = folder / "dit.safetensors"
    model = _random(QwenImageTransformer2DModel)
    write_safetensors(path, model.state_dict(), {"format": "pt"})
    del model
    _forget()
    return path


def _random(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a model on the GPU in bf16, with weights that keep activations at their size."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = build()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


# ---- memory


def _forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _gigabytes(before: int = 0) -> float:
    return (torch.cuda.memory_allocated() - before) / 1e9


def _peak(call: Callable[[], object], *, whole: bool = False) -> float:
    """GB that a call takes at most, beyond what is there before or, `whole`, with it."""
    torch.cuda.synchronize()
    before = 0 if whole else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


ROWS = {
    "vae": vae_rows, "text_encoder": text_rows, "caching": caching_rows, "step": step_rows, "training": training_rows,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
