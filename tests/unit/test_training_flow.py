"""The loss in closed form, packing against diffusers, random numbers that belong to their item."""

import pytest
import torch
from diffusers import QwenImagePipeline

from qwen_image.training.flow import flow_loss, noisy_latents, pack, unpack
from qwen_image.training.loading import pad_text, worker_count
from qwen_image.training.randomness import derived_seed


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
    weight = torch.tensor([0.5, 2.0])
    assert flow_loss(noise - z0.float(), z0, noise, weight) == 0
    assert flow_loss(noise - z0.float() + 2, z0, noise, torch.ones(2)) == pytest.approx(4, rel=1e-6)
    error = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    assert flow_loss(noise - z0.float() + error, z0, noise, weight) == pytest.approx((0.5 + 2 * 9) / 2, rel=1e-6)


def test_without_weights_the_loss_is_the_mean_squared_error_to_the_bit():
    random = torch.Generator().manual_seed(0)
    z0, noise, velocity = (torch.randn(3, 16, 1, 10, 14, generator=random) for _ in range(3))
    losses, gradients = [], []
    for loss in (
        lambda v: flow_loss(v, z0, noise, torch.ones(3)),
        lambda v: torch.nn.functional.mse_loss(v, noise - z0),
    ):
        v = velocity.clone().requires_grad_()
        losses.append(loss(v))
        losses[-1].backward()
        gradients.append(v.grad)
    assert losses[0].item() == losses[1].item()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("delta", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("error", [0.0, 1e-4, 0.05, 1.0, 200.0])
def test_huber(error, delta):
    z0, noise = torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 16, 1, 4, 4)
    velocity = torch.full_like(z0, error).requires_grad_()
    loss = flow_loss(velocity, z0, noise, torch.ones(1), loss_type="huber", huber_delta=delta)
    loss.backward()
    # in closed form; float64 keeps the digits that cancel
    root = torch.tensor(1 + (error / delta) ** 2, dtype=torch.float64).sqrt().item()
    assert loss.item() == pytest.approx(2 * delta**2 * (root - 1), rel=1e-5, abs=1e-12)
    assert velocity.grad.sum().item() == pytest.approx(2 * error / root, rel=1e-5)
    # between the squares of small errors and the proportions of large ones
    assert loss.item() <= min(error**2, 2 * delta * error) * (1 + 1e-5)


def test_huber_with_a_large_delta_is_mse():
    random = torch.Generator().manual_seed(0)
    z0, noise, velocity = (torch.randn(2, 16, 1, 4, 4, generator=random) for _ in range(3))
    weight = torch.tensor([0.5, 2.0])
    huber = flow_loss(velocity, z0, noise, weight, loss_type="huber", huber_delta=1e4)
    assert huber == pytest.approx(flow_loss(velocity, z0, noise, weight).item(), rel=1e-5)


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
