"""The VAE for single pictures against diffusers' AutoencoderKLQwenImage: the same values for any size and dtype."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import skimage
import tiny
import torch
from diffusers import AutoencoderKLQwenImage
from library_vae import decoded, library_vae, normalised_mode

from qwen_image.dataset.images import fit_to_bucket, load_image
from qwen_image.models.image_vae import COMPILE_WORTH_PIXELS, worth_compiling
from qwen_image.models.vae import DEFAULTS, load_vae
from qwen_image.problems import InputError

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
BUCKETS = [(16, 16), (64, 1024), (1024, 64), (512, 512), (240, 272), (128, 512), (16, 48)]
OTHER = {
    "base_dim": 24,
    "z_dim": 4,
    "dim_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "temperal_downsample": [True, False],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [0.7, 1.1, 0.9, 1.3],
}
"""Dimensions and statistics unlike the published ones."""
SMALL = {"base_dim": 16, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
"""As few layers as there can be, because they are compiled."""


def photograph(bucket, name="astronaut.png"):
    """A photograph as uint8 pixels (1, H, W, 3); `bucket` is (W, H)."""
    return fit_to_bucket(load_image(PHOTOGRAPHS / name), bucket)[None]


@pytest.fixture(scope="module")
def library():
    return library_vae()


@pytest.fixture(scope="module")
def ours():
    return load_vae(tiny.path("vae"), dtype=torch.float32)


def written(folder, config, *, seed=0, scale=1.0):
    """A random VAE in a folder as diffusers writes it; returns diffusers' model."""
    torch.manual_seed(seed)
    model = AutoencoderKLQwenImage(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("weight"):
                parameter.mul_(scale)
    model.save_pretrained(folder)
    return model


# --- values


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_float32_latents_equal_those_of_diffusers(library, ours, bucket):
    for name in NAMES if bucket[0] * bucket[1] < 100_000 else NAMES[:1]:
        pixels = photograph(bucket, name)
        found, expected = ours.encode_pixels(pixels), normalised_mode(library, pixels)
        assert found.shape == (1, 16, 1, bucket[1] // 8, bucket[0] // 8) and found.dtype == torch.float32
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bucket", [bucket for bucket in BUCKETS if bucket != (512, 512)], ids=str)
def test_float32_pictures_equal_those_of_diffusers(library, ours, bucket):
    latents = torch.randn(1, 16, 1, bucket[1] // 8, bucket[0] // 8, generator=torch.Generator().manual_seed(1))
    found, expected = ours.decode_latents(latents), decoded(library, latents)
    assert found.shape == (1, 3, bucket[1], bucket[0]) and found.dtype == torch.float32
    assert found.abs().max() <= 1 and expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_any_dimensions_are_supported(tmp_path):
    library, ours = written(tmp_path, OTHER, scale=2), load_vae(tmp_path)
    pixels = photograph((100, 76), "coffee.png")  # a position of its latents is 4 pixels wide
    latents = normalised_mode(library, pixels)
    assert latents.std() > 0.1 and latents.shape == (1, 4, 1, 19, 25)
    torch.testing.assert_close(ours.encode_pixels(pixels), latents, atol=1e-5, rtol=0)
    picture = decoded(library, latents)
    assert picture.std() > 0.1
    torch.testing.assert_close(ours.decode_latents(latents), picture, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [16, 40])
def test_bfloat16_is_no_further_from_float32_than_that_of_diffusers(library, tmp_path, width):
    exact = library if width == 16 else written(tmp_path, {"base_dim": width}, scale=2)
    # weights that bf16 holds, so that only the arithmetic differs
    exact.bfloat16().save_pretrained(tmp_path)
    rounded = AutoencoderKLQwenImage.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    exact.float()
    ours = load_vae(tmp_path)
    assert ours.dtype == torch.bfloat16
    latent_errors, picture_errors = [], []
    for name in NAMES[:2]:
        pixels = photograph((160, 112), name)
        latents = normalised_mode(exact, pixels)
        picture = decoded(exact, latents)
        latent_errors.append([x - latents for x in (ours.encode_pixels(pixels), normalised_mode(rounded, pixels))])
        picture_errors.append([x - picture for x in (ours.decode_latents(latents), decoded(rounded, latents))])
    for errors in (latent_errors, picture_errors):
        mine, theirs = (torch.cat(side).abs() for side in zip(*errors, strict=True))
        assert 0 < mine.mean() <= theirs.mean() and mine.max() <= theirs.max()


def test_float16_works_on_processors_without_it(library):
    vae = load_vae(tiny.path("vae"), dtype=torch.float16)
    pixels = photograph((48, 32))
    latents = normalised_mode(library, pixels)
    torch.testing.assert_close(vae.encode_pixels(pixels).float(), latents, atol=0.03, rtol=0)
    torch.testing.assert_close(vae.decode_latents(latents), decoded(library, latents), atol=0.03, rtol=0)


def test_a_batch_gives_what_its_pictures_give(ours):
    pixels = numpy.concatenate([photograph((96, 80), name) for name in NAMES])
    latents = ours.encode_pixels(pixels)
    singles = torch.cat([ours.encode_pixels(picture[None]) for picture in pixels])
    torch.testing.assert_close(latents, singles, atol=1e-5, rtol=0)
    pictures = torch.cat([ours.decode_latents(latent[None]) for latent in latents])
    torch.testing.assert_close(ours.decode_latents(latents), pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_depend_on_the_picture_alone(dtype):
    first = load_vae(tiny.path("vae"), dtype=dtype)
    latents = first.encode_pixels(photograph((112, 80)))
    picture = first.decode_latents(latents)
    second = load_vae(tiny.path("vae"), dtype=dtype)
    for bucket in ((64, 256), (16, 16), (320, 304)):
        second.decode_latents(second.encode_pixels(photograph(bucket, "chelsea.png")))
    for _ in range(3):
        assert torch.equal(second.encode_pixels(photograph((112, 80))), latents)
        assert torch.equal(second.decode_latents(latents), picture)


def test_inputs_are_left_as_they_were(ours):
    pixels = photograph((32, 48))
    latents = torch.randn(1, 16, 1, 4, 6)
    before = pixels.copy(), latents.clone()
    ours.encode_pixels(pixels)
    ours.decode_latents(latents)
    assert (pixels == before[0]).all() and torch.equal(latents, before[1])


def test_sides_must_fit_the_latents(ours):
    with pytest.raises(ValueError, match="20x16 pixels: both sides must be multiples of 8"):
        ours.encode_pixels(numpy.zeros((1, 16, 20, 3), numpy.uint8))


# --- loading


def test_the_defaults_are_those_of_diffusers():
    parameters = inspect.signature(AutoencoderKLQwenImage.__init__).parameters.values()
    assert {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"} == DEFAULTS


def problems_of(tensors, folder):
    with pytest.raises(InputError) as error:
        load_vae(tiny.save(folder / "vae.safetensors", tensors))
    return [problem.found for problem in error.value.problems]


def test_no_tensor_is_passed_over_even_where_it_is_not_used(tmp_path):
    tensors = tiny.stored("vae")
    unused = "decoder.up_blocks.0.upsamplers.0.time_conv.weight"
    tensors["encoder.surplus.weight"] = tensors.pop(unused)
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"][:16].clone()  # what is kept of it
    lacks, surplus, shape = problems_of(tensors, tmp_path)
    assert f"lacks {unused!r}" in lacks
    assert "has 'encoder.surplus.weight', unknown" in surplus
    assert "has 'quant_conv.bias', of another shape" in shape


def test_a_vae_of_four_channels_is_refused(tmp_path):
    written(tmp_path, SMALL | {"input_channels": 4})
    with pytest.raises(InputError, match="takes pictures of 4 channels; pictures here have 3"):
        load_vae(tmp_path)


def test_attention_between_the_levels_is_refused(tmp_path):
    written(tmp_path, SMALL | {"attn_scales": [1.0]})  # diffusers builds it, but cannot run it
    with pytest.raises(InputError, match="has attention between its levels"):
        load_vae(tmp_path)


def test_statistics_of_another_length_are_refused(tmp_path):
    written(tmp_path, SMALL | {"latents_std": [1.0] * 4})
    with pytest.raises(InputError, match="gives 4 values of latents_std, and the model needs 16"):
        load_vae(tmp_path)


def in_new_process(code, **environment):
    scripts = Path(__file__).parents[2] / "scripts"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=scripts, check=True,
        env={name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"} | environment,
    )  # fmt: skip


def test_loading_does_not_import_diffusers():
    done = in_new_process(
        f"import sys; from qwen_image.models.vae import load_vae; load_vae({str(tiny.path('vae'))!r});"
        "print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    assert done.stdout.split() == ["torch"]


# --- compiling


def test_compiled_once_for_all_sizes_it_gives_what_it_gives_uncompiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    written(tmp_path, SMALL, scale=2)
    compiled, eager = load_vae(tmp_path), load_vae(tmp_path)
    assert compiled.compile(tmp_path / "not used")
    assert any((tmp_path / "kept").rglob("*.so")) and not (tmp_path / "not used").exists()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bucket in ((160, 160), (128, 208)):
            pixels = photograph(bucket)
            torch.testing.assert_close(compiled.encode_pixels(pixels), eager.encode_pixels(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_decoder_computes_the_same(tmp_path, monkeypatch, dtype):
    # the graph that would be compiled, run as it is: compiling it takes half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    written(tmp_path, SMALL, scale=2)
    compiled, eager = load_vae(tmp_path, dtype=dtype), load_vae(tmp_path, dtype=dtype)
    assert compiled.compile(tmp_path, "decoder")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for side in (48, 64):
            latents = torch.randn(1, 16, 1, side, 52)
            pictures = [vae.decode_latents(latents) for vae in (compiled, eager)]
            torch.testing.assert_close(*pictures, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    written(tmp_path, SMALL)
    code = (
        "import numpy; from qwen_image.models.vae import load_vae;"
        f"vae = load_vae({str(tmp_path)!r});"
        f"assert not vae.compile({str(tmp_path / 'kept')!r});"
        "assert vae.encode_pixels(numpy.zeros((1, 16, 32, 3), numpy.uint8)).isfinite().all()"
    )
    done = in_new_process(code, CXX="/nonexistent")
    (line,) = done.stderr.splitlines()
    assert line.startswith("the VAE's encoder runs uncompiled: ") and "/nonexistent" in line


def test_compiling_is_worth_it_for_many_pixels_on_a_cpu_with_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert worth_compiling(COMPILE_WORTH_PIXELS, 96, "cpu") and not worth_compiling(COMPILE_WORTH_PIXELS - 1, 96, "cpu")
    assert not worth_compiling(5 * COMPILE_WORTH_PIXELS, 16, "cpu")
    assert not worth_compiling(10 * COMPILE_WORTH_PIXELS, 96, "cuda:0")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not worth_compiling(10 * COMPILE_WORTH_PIXELS, 96, "cpu")
