"""Noise levels against their closed forms, packing against diffusers, random numbers that belong to their item."""

import math
import statistics

import pytest
import torch
from diffusers import QwenImagePipeline

from qwen_image.training.flow import LAWS, flow_loss, noise_level, noisy_latents, pack, qwen_shift, unpack
from qwen_image.training.loading import pad_text, worker_count
from qwen_image.training.randomness import derived_seed, generator


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("draw", [-3.0, -0.5, 0.0, 0.7, 4.0])
@pytest.mark.parametrize("tokens", [256, 1024, 6889])
def test_closed_forms(draw, tokens):
    t = sigmoid(1.3 * draw)
    assert noise_level("sigmoid", draw, tokens=tokens, sigmoid_scale=1.3) == pytest.approx(t)
    k = 2.2
    assert noise_level("shift", draw, tokens=tokens, sigmoid_scale=1.3, shift=k) == pytest.approx(
        k * t / (1 + (k - 1) * t)
    )
    k = math.exp(0.5 + (tokens - 256) * 0.4 / 7936)
    ours = noise_level("qwen_shift", draw, tokens=tokens, sigmoid_scale=1.3, shift=9)
    assert ours == pytest.approx(k * t / (1 + (k - 1) * t))


@pytest.mark.parametrize(("side", "k"), [(512, 1.714), (768, 1.828), (1024, 2.001), (1328, 2.303)])
def test_shift_of_the_model_s_own_scheduler(side, k):
    tokens = (side // 16) ** 2
    assert qwen_shift(tokens) == pytest.approx(k, abs=6e-4)
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    assert qwen_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens, 256, 8192, 0.5, 0.9)))


@pytest.mark.parametrize("law", LAWS)
def test_extreme_draws_and_the_range(law):
    draws = [0.0, 0.25, 0.999] if law == "uniform" else [-800.0, -1.0, 0.0, 1.0, 800.0]
    whole = [noise_level(law, draw, tokens=1024, shift=2.0) for draw in draws]
    assert all(0 <= t <= 1 for t in whole)
    assert whole == sorted(whole)
    part = [noise_level(law, draw, tokens=1024, shift=2.0, low=200, high=700) for draw in draws]
    assert part == pytest.approx([0.2 + 0.5 * t for t in whole])


def test_median_of_qwen_shift():
    # the median of a shifted law is k/(1+k)
    draws = torch.randn(4001, generator=generator("test"), dtype=torch.float64).tolist()
    k = qwen_shift(1024)
    median = statistics.median(noise_level("qwen_shift", draw, tokens=1024) for draw in draws)
    assert median == pytest.approx(k / (1 + k), abs=0.02)


def test_packing_is_diffusers_and_unpacks():
    z = torch.randn(2, 16, 1, 6, 10)
    assert torch.equal(pack(z), QwenImagePipeline._pack_latents(z, 2, 16, 6, 10))
    assert torch.equal(unpack(pack(z), 6, 10), z)
    assert torch.equal(unpack(pack(z), 6, 10), QwenImagePipeline._unpack_latents(pack(z), 48, 80, 8))


def test_noise_and_loss():
    z0, noise = torch.randn(2, 16, 1, 4, 4).bfloat16(), torch.randn(2, 16, 1, 4, 4)
    t = torch.tensor([0.0, 1.0])
    z = noisy_latents(z0, noise, t)
    assert z.dtype == torch.float32
    assert torch.equal(z[0], z0[0].float())
    assert torch.equal(z[1], noise[1])
    assert flow_loss(noise - z0.float(), z0, noise) == 0
    assert flow_loss(noise - z0.float() + 2, z0, noise) == pytest.approx(4, rel=1e-6)


def test_padding():
    text, mask = pad_text([torch.ones(2, 3), torch.ones(4, 3)])
    assert text.shape == (2, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert text[0, 2:].abs().sum() == 0
    assert pad_text([torch.ones(2, 3), torch.ones(2, 3)])[1] is None


def test_seeds_depend_on_every_part():
    seeds = {
        derived_seed(*parts) for parts in [(1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2), ("1a", 2), (1, "a2")]
    }
    assert len(seeds) == 6
    assert derived_seed(1, "a", 2) == derived_seed(1, "a", 2) < 2**63
    assert derived_seed("\udc80 🐯")


def test_never_more_workers_than_cpus():
    assert worker_count(0, 1) == 0
    assert worker_count(1, 1) == 1
    assert worker_count(10_000, 10_000) == 1
