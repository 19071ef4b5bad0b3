"""The VAE for single pictures against diffusers' own, with random weights of the published size, on two threads.

    python benchmarks/vae.py

Every rate is that of AutoencoderKLQwenImage.encode(x).latent_dist.mode() or .decode(z).sample with the same weights in
the same dtype, called in turn with ours. Compiling is timed in processes of their own, first with an empty cache folder
and then with what that left; so is the peak of memory, for one picture of 1024x1024.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "scripts"), str(HERE)]

import numpy  # noqa: E402
import torch  # noqa: E402
from measure import Row, as_table, faster, medians  # noqa: E402

from qwen_image.models.image_vae import ImageVae  # noqa: E402
from qwen_image.models.vae import load_vae  # noqa: E402

THREADS = 2
SEED = 0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = {512: (3, 1), 1024: (1, 0)}
"""Counted and uncounted turns by the picture's side; the large one, of a single turn, follows the small one, so all is
warm by then."""
TARGETS = {"eager bf16": ">= 4.5", "eager fp32": ">= 3", "compiled bf16": ">= 8", "compiled fp32": ">= 4"}

COMPILE = """
import json, sys, time, torch
from qwen_image.models.vae import load_vae
torch.set_num_threads({threads})
vae = load_vae({folder!r}, dtype=torch.{dtype})
start = time.perf_counter()
assert vae.compile({folder!r})
print(json.dumps(time.perf_counter() - start))
"""
PEAK = """
import json, resource, numpy, torch
torch.set_num_threads({threads})
pixels = numpy.random.default_rng(0).integers(0, 256, (1, 1024, 1024, 3), numpy.uint8)
if {ours}:
    from qwen_image.models.vae import load_vae
    load_vae({folder!r}, dtype=torch.{dtype}).encode_pixels(pixels)
else:
    from diffusers import AutoencoderKLQwenImage
    vae = AutoencoderKLQwenImage.from_pretrained({folder!r}, torch_dtype=torch.{dtype})
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2).to(vae.dtype)
    with torch.inference_mode():
        vae.encode(x).latent_dist.mode()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))
"""


def rows() -> list[Row]:
    """Ours against plain diffusers: pictures a second, peak of memory; and what compiling takes."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "compiled"))
        write_vae(folder)
        compiling = [row for name in DTYPES for row in _compile_rows(folder, name)]
        memory = [_memory_row(folder, name) for name in DTYPES]
        return [row for name in DTYPES for row in _speed_rows(folder, name)] + compiling + memory


def write_vae(folder: str) -> None:
    """Write a VAE of the published size as diffusers does, with weights that keep activations at their size."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(SEED)
    model = AutoencoderKLQwenImage()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            # of a kernel over several frames only one meets the picture
            inputs = parameter[0, :, -1] if parameter.ndim == 5 else parameter[0]
            torch.nn.init.normal_(parameter, std=inputs.numel() ** -0.5)
    model.save_pretrained(folder)


def _speed_rows(folder: str, dtype: str) -> list[Row]:
    from diffusers import AutoencoderKLQwenImage

    plain = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=DTYPES[dtype]).eval()
    ours = {name: load_vae(folder, dtype=DTYPES[dtype]) for name in ("eager", "compiled")}
    for part in ("encoder", "decoder"):
        assert ours["compiled"].compile(folder, part)
    found = []
    for side, (rounds, warmup) in ROUNDS.items():
        for part, calls in _calls(plain, ours, side).items():
            with torch.inference_mode():
                seconds = medians(calls, rounds=rounds, warmup=warmup)
            for name in ours:
                found.append(
                    faster(
                        f"VAE {part} {name}, {dtype}, {side}x{side}, times diffusers", ours=seconds[name],
                        other=seconds["plain"], count=1, unit="images/s", target=TARGETS[f"{name} {dtype}"],
                    )
                )  # fmt: skip
    return found


def _calls(plain: torch.nn.Module, ours: dict[str, ImageVae], side: int) -> dict[str, dict[str, Callable]]:
    """What encodes and what decodes one picture of that side, by whose it is."""
    pixels_bhwc = numpy.random.default_rng(SEED).integers(0, 256, (1, side, side, 3), numpy.uint8)
    x_bcfhw = torch.from_numpy(pixels_bhwc).permute(0, 3, 1, 2).float().div(127.5).sub(1).unsqueeze(2).to(plain.dtype)
    latents_bcfhw = ours["eager"].encode_pixels(pixels_bhwc)
    encode = {name: lambda vae=vae: vae.encode_pixels(pixels_bhwc) for name, vae in ours.items()}
    decode = {name: lambda vae=vae: vae.decode_latents(latents_bcfhw) for name, vae in ours.items()}
    return {
        "encoder": encode | {"plain": lambda: plain.encode(x_bcfhw).latent_dist.mode()},
        "decoder": decode | {"plain": lambda: plain.decode(latents_bcfhw).sample},
    }


def _compile_rows(folder: str, dtype: str) -> list[Row]:
    return [
        Row(name=f"VAE encoder, {dtype}: compile, {state}", ours=_in_new_process(COMPILE, folder, dtype), unit="s")
        for state in ("cold", "warm")
    ]


def _memory_row(folder: str, dtype: str) -> Row:
    ours, other = (_in_new_process(PEAK, folder, dtype, ours=ours) for ours in (True, False))
    name = f"VAE encoder, {dtype}, 1024x1024: peak of memory, diffusers over ours"
    return Row(name=name, ours=ours, other=other, unit="GB", ratio=other / ours)


def _in_new_process(code: str, folder: str, dtype: str, **values: object) -> float:
    text = code.format(folder=folder, dtype=str(DTYPES[dtype]).removeprefix("torch."), threads=THREADS, **values)
    done = subprocess.run(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, check=True, cwd=HERE.parent / "scripts"
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(as_table(rows()))
