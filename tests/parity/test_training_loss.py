"""The loss by hand, from the pieces of diffusers' own pipeline."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import QwenImagePipeline
from training_data import cached_batches, tiny_transformer, write_tiny_training

from qwen_image.dataset.config import load_dataset_config
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.batches import Batch, Draw
from qwen_image.training.items import join_manifests
from qwen_image.training.loop import batch_loss


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny_training(tmp_path_factory.mktemp("loss")).folder
    datasets = load_dataset_config(folder / "dataset.toml")
    return folder, join_manifests(str(folder / "latents.tsv"), str(folder / "text.tsv"), datasets).items


@pytest.fixture
def batches(tiny):
    return cached_batches(*tiny, seed=1)


def loss_of(transformer, batch, **settings):
    run = SimpleNamespace(settings=Settings(**with_defaults(settings)), transformer=transformer, model=transformer)
    return batch_loss(run, batch)


def errors_by_hand(transformer, latents, noise, t, text):
    """One item's errors, (16, 1, h, w) as z0 and noise; text is (L, D)."""
    channels, _, height, width = latents.shape
    z = (1 - t) * latents + t * noise
    velocity = transformer(
        hidden_states=QwenImagePipeline._pack_latents(z[None], 1, channels, height, width),
        timestep=t[None],
        encoder_hidden_states=text[None],
        img_shapes=[[(1, height // 2, width // 2)]],
    ).sample
    velocity = QwenImagePipeline._unpack_latents(velocity, height * 8, width * 8, 8)[0]
    return velocity - (noise - latents)


def all_errors(transformer, batch):
    """Item by item, without padding and mask, so padded captions are proved to change nothing."""
    lengths = [batch.text_bld.shape[1]] * len(batch.t_b) if batch.mask_bl is None else batch.mask_bl.sum(1).tolist()
    return [
        errors_by_hand(transformer, batch.latents_bc1hw[n], batch.noise_bc1hw[n], batch.t_b[n], text[:length].float())
        for n, (text, length) in enumerate(zip(batch.text_bld, lengths, strict=True))
    ]


@pytest.mark.parametrize("draws", [(Draw(0, 0),), (Draw(2, 0), Draw(4, 0)), (Draw(0, 0), Draw(1, 0), Draw(3, 0))])
def test_loss_of_one_batch(batches, draws):
    transformer = tiny_transformer()
    batch = batches[Batch(1, 0, draws)]
    ours = loss_of(transformer, batch)
    by_hand = torch.stack([error.square().mean() for error in all_errors(transformer, batch)])
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_loss_with_weights_and_huber(tiny):
    transformer = tiny_transformer()
    batch = cached_batches(*tiny, seed=1, weighting_scheme="sigma_sqrt")[Batch(1, 0, (Draw(0, 0), Draw(1, 0)))]
    errors = all_errors(transformer, batch)
    weights = batch.t_b**-2
    assert weights.max() > 1.5 * weights.min()
    squares = torch.stack([weight * error.square().mean() for weight, error in zip(weights, errors, strict=True)])
    assert loss_of(transformer, batch).item() == pytest.approx(squares.mean().item(), rel=1e-5)
    hubers = [2 * 0.3**2 * ((1 + (error / 0.3) ** 2).sqrt() - 1) for error in errors]
    by_hand = torch.stack([weight * huber.mean() for weight, huber in zip(weights, hubers, strict=True)]).mean()
    ours = loss_of(transformer, batch, loss_type="huber", huber_delta=0.3)
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(batches):
    batch = batches[Batch(1, 0, (Draw(0, 0), Draw(1, 0)))]
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny_transformer()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.requires_grad_(False)
        weight = transformer.transformer_blocks[0].attn.to_q.weight.requires_grad_(True)
        loss_of(transformer.train(), batch).backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, atol=1e-8)
    assert gradients[0].any()
