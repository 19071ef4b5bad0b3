"""The loss by hand, from the pieces of diffusers' own pipeline."""

import pytest
import torch
from diffusers import QwenImagePipeline
from training_data import tiny_transformer, write_tiny_training

from qwen_image.dataset.config import load_dataset_config
from qwen_image.training.batches import Batch, Draw
from qwen_image.training.items import join_manifests
from qwen_image.training.loading import CachedBatches, NoiseSettings
from qwen_image.training.loop import batch_loss


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = write_tiny_training(tmp_path_factory.mktemp("loss")).folder
    datasets = load_dataset_config(folder / "dataset.toml")
    items = join_manifests(str(folder / "latents.tsv"), str(folder / "text.tsv"), datasets).items
    noise = NoiseSettings(seed=1, law="qwen_shift", sigmoid_scale=1.0, shift=1.0, low=0, high=1000)
    return CachedBatches(items, noise)


def loss_by_hand(transformer, latents, noise, t, text):
    """One item: z0 and noise (16, 1, h, w), text (L, D)."""
    channels, _, height, width = latents.shape
    z = (1 - t) * latents + t * noise
    velocity = transformer(
        hidden_states=QwenImagePipeline._pack_latents(z[None], 1, channels, height, width),
        timestep=t[None],
        encoder_hidden_states=text[None],
        img_shapes=[[(1, height // 2, width // 2)]],
    ).sample
    velocity = QwenImagePipeline._unpack_latents(velocity, height * 8, width * 8, 8)[0]
    return (velocity - (noise - latents)).square().mean()


@pytest.mark.parametrize("draws", [(Draw(0, 0),), (Draw(2, 0), Draw(4, 0)), (Draw(0, 0), Draw(1, 0), Draw(3, 0))])
def test_loss_of_one_batch(batches, draws):
    transformer = tiny_transformer()
    batch = batches[Batch(1, 0, draws)]
    ours = batch_loss(transformer, batch, text_dtype=torch.float32)
    lengths = [batch.text_bld.shape[1]] * len(draws) if batch.mask_bl is None else batch.mask_bl.sum(1).tolist()
    by_hand = [
        # without padding and mask, so padded captions are proved to change nothing
        loss_by_hand(transformer, batch.latents_bc1hw[n], batch.noise_bc1hw[n], batch.t_b[n], text[:length].float())
        for n, (text, length) in enumerate(zip(batch.text_bld, lengths, strict=True))
    ]
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(batches):
    batch = batches[Batch(1, 0, (Draw(0, 0), Draw(1, 0)))]
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny_transformer()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.requires_grad_(False)
        weight = transformer.transformer_blocks[0].attn.to_q.weight.requires_grad_(True)
        batch_loss(transformer.train(), batch, text_dtype=torch.float32).backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, atol=1e-8)
    assert gradients[0].any()
