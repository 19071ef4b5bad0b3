"""A training that goes on with each kind of optimizer ends with the bytes of one that never stopped."""

import csv

import pytest
from training_data import write_tiny_training

from qwen_image.container import read_header
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.loop import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("optimizers"))


def run(tiny, folder, steps, **settings):
    """The trained LoRA's bytes."""
    # a rank whose matrices are large enough for 8 bits
    common = {"network_dim": 64, "network_alpha": 64, "max_data_loader_n_workers": 0, "save_every_n_steps": 2}
    required = {key: value for key, value in tiny.arguments.items() if key != "learning_rate"}
    flags = type(tiny)(tiny.folder, required).flags(
        **{**common, **settings, "output_dir": folder, "max_train_steps": steps}
    )
    train(parse_arguments(flags))
    return (folder / "lora.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"optimizer_type": "AdamW8bit", "learning_rate": "1e-3"}, "bitsandbytes.optim.adamw.AdamW8bit"),
        (
            {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor:1e-3"},
            "transformers.optimization.Adafactor(relative_step=True,scale_parameter=True)",
        ),
        ({"optimizer_type": "Prodigy", "learning_rate": 1}, "pytorch_optimizer.optimizer.prodigy.Prodigy"),
        (
            {"optimizer_type": "AdamWScheduleFree", "learning_rate": "1e-2", "optimizer_args": ["betas=(0.95,0.99)"]},
            "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW(betas=(0.95, 0.99))",
        ),
    ],
    ids=lambda value: value["optimizer_type"] if isinstance(value, dict) else "",
)
def test_going_on_equals_never_having_stopped(tiny, tmp_path, settings, label):
    straight = run(tiny, tmp_path / "straight", 5, **settings)
    half = run(tiny, tmp_path / "stopped", 3, **settings)
    assert run(tiny, tmp_path / "stopped", 5, **settings) == straight != half
    assert read_header(tmp_path / "straight" / "lora.safetensors").metadata["ss_optimizer"] == label
    with open(tmp_path / "straight" / "lora.loss.csv", newline="") as stream:
        rates = {float(row["learning_rate"]) for row in csv.DictReader(stream)}
    assert rates == {float(settings.get("learning_rate", 0.01))}
