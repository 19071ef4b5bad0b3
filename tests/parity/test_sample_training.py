"""Whole trainings with and without sample pictures: the same LoRA to the bit, the pictures beside it."""

import re

import pytest
from sample_data import write_prompts
from training_data import write_tiny_training

from qwen_image.sampling.pictures import Painter
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.loop import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def prompts(tiny):
    return write_prompts(tiny.folder)


def trained(tiny, name, **more):
    """Train four steps, the third of which ends an epoch; returns the LoRA's file."""
    settings = {"output_dir": tiny.folder / name, "max_train_steps": 4, "network_dropout": 0.1, "ema_decay": 0.9}
    return train(parse_arguments(tiny.flags(**settings | more)))


def sampled(tiny, name):
    return sorted(re.sub(r"_\d+\.png$", "", path.name) for path in (tiny.folder / name / "sample").iterdir())


@pytest.fixture(scope="module")
def plain(tiny, prompts):
    """The LoRA's bytes without sample pictures. The VAE, whose name is in the metadata, is the same."""
    return trained(tiny, "plain", vae=prompts["vae"]).read_bytes()


def test_pictures_change_nothing_about_the_training(tiny, prompts, plain):
    more = {"sample_every_n_steps": 2, "sample_every_n_epochs": 1, "sample_at_first": True}
    lora = trained(tiny, "sampled", **prompts, **more)
    assert lora.read_bytes() == plain
    marks = ("000000", "000002", "000004", "e000001")
    assert sampled(tiny, "sampled") == [f"lora_{mark}_{index:02d}" for mark in marks for index in (0, 1)]


def test_pictures_that_fail_do_not_end_the_training(tiny, prompts, plain, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(Painter, "paint", fail)
    caplog.set_level("INFO", logger="qwen_image")
    lora = trained(tiny, "failed", **prompts, sample_every_n_steps=2)
    assert lora.read_bytes() == plain
    messages = [record.getMessage() for record in caplog.records]
    (wrote,) = [number for number, message in enumerate(messages) if message.startswith("train: wrote")]
    again = [message for message in messages[wrote:] if "no room on the device" in message]
    assert ["step 2" in again[0], "step 4" in again[1], len(again)] == [True, True, 2], messages
    assert not (tiny.folder / "failed" / "sample").exists()


def test_pictures_show_the_kept_weights(tiny, prompts):
    """The last pictures are those of the saved LoRA, which here is the moving average."""
    averaged = trained(tiny, "averaged", **prompts, sample_every_n_steps=4, save_precision="fp32")
    again = trained(
        tiny, "again", **prompts, sample_at_first=True, network_weights=averaged, dim_from_weights=True,
        max_train_steps=1, ema_decay=0.9,
    )  # fmt: skip
    for index in (0, 1):
        (last,) = (averaged.parent / "sample").glob(f"lora_000004_{index:02d}_*.png")
        (first,) = (again.parent / "sample").glob(f"lora_000000_{index:02d}_*.png")
        assert first.read_bytes() == last.read_bytes()
