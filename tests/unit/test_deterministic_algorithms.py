"""What makes a GPU give the same bits each time is on where it is asked for, and nowhere else."""

import os

import pytest
import torch
from training_data import write_tiny_training

from qwen_image.device import deterministic_algorithms
from qwen_image.training import loop
from qwen_image.training.arguments import parse_arguments


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("device", "within"), [("cuda", True), ("cpu", False)])
def test_they_are_on_within_the_block_on_a_gpu_and_afterwards_as_before(device, within, before):
    torch.use_deterministic_algorithms(before)
    with pytest.raises(KeyError), deterministic_algorithms(device):
        assert torch.are_deterministic_algorithms_enabled() == (within or before)
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_training_computes_loss_and_gradients_with_them_and_has_cublas_keep_to_one_workspace(tmp_path, monkeypatch):
    told, enabled = [], []

    def on_a_gpu(device):
        told.append((device, os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        return deterministic_algorithms("cuda")

    def loss(run, batch):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        value = plain(run, batch)
        value.register_hook(lambda _: enabled.append(torch.are_deterministic_algorithms_enabled()))
        return value

    plain = loop.batch_loss
    monkeypatch.setattr(loop, "deterministic_algorithms", on_a_gpu)
    monkeypatch.setattr(loop, "batch_loss", loss)
    assert loop.train(parse_arguments(write_tiny_training(tmp_path).flags(max_train_steps=2)))
    assert told == [("cpu", ":4096:8")] * 2
    assert enabled == [True] * 4
