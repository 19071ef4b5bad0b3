"""Trainings on a GPU: the same bytes each time, also where one stopped and went on; the losses of a CPU."""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from adapters import KIND_SETTINGS
from safetensors.torch import load_file
from training_data import write_tiny_training

from qwen_image.training.interruption import WENT_ON
from qwen_image.training.watchdog import memory_facts

PROGRAM = Path(__file__).parents[2] / "scripts" / "qwen_image_train_network.py"
# attention over a thousand tokens is shared out over many of the GPU's processors, and captions differ in length
ITEMS = [(name, (512, 512) if index % 3 else (768, 384), 20 + 9 * index) for index, name in enumerate("abcdef")]
SETTINGS = {"max_train_steps": 6, "network_dim": 4, "learning_rate": "1e-2", "save_precision": "fp32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("gpu"), items=ITEMS)


def train(tiny, folder, *, precision="bf16", devices=None, **more):
    """Train as the workflow does; returns what was said."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        "--dynamo_backend", "no", "--mixed_precision", precision, str(PROGRAM),
        *tiny.flags(**{**SETTINGS, "output_dir": folder, **more}),
    ]  # fmt: skip
    environment = os.environ | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def at_once(*calls):
    """Run several trainings at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def losses(folder):
    rows = csv.DictReader((folder / "lora.loss.csv").read_text().splitlines())
    return torch.tensor([float(row["loss"]) for row in rows])


@pytest.mark.parametrize(
    "settings",
    [
        {"network_dropout": 0.3, "ema_decay": 0.9, "gradient_accumulation_steps": 2, "validation_split": 0.2},
        *({"network_dim": 3, **KIND_SETTINGS[kind]} for kind in ("dora", "loha", "lokr")),
        {"optimizer_type": "Adafactor"},
    ],
    ids=["lora", "dora", "loha", "lokr", "Adafactor"],
)
def test_the_same_bytes_come_out_each_time(tiny, tmp_path, settings):
    said, _ = at_once(*(lambda name=name: train(tiny, tmp_path / name, **settings) for name in "ab"))
    assert f"train: computed on cuda, {torch.cuda.get_device_name()}" in said
    assert losses(tmp_path / "a").isfinite().all()
    assert (tmp_path / "a/lora.safetensors").read_bytes() == (tmp_path / "b/lora.safetensors").read_bytes()
    assert (tmp_path / "a/lora.loss.csv").read_bytes() == (tmp_path / "b/lora.loss.csv").read_bytes()


def test_one_that_goes_on_and_one_that_computes_twice_end_with_the_bytes_of_one_that_did_neither(tiny, tmp_path):
    def in_two_parts():
        train(tiny, tmp_path / "parts", max_train_steps=3)
        return train(tiny, tmp_path / "parts")

    _, said, _ = at_once(
        lambda: train(tiny, tmp_path / "straight"),
        in_two_parts,
        lambda: train(tiny, tmp_path / "checkpointing", gradient_checkpointing=True),
    )
    assert f"{WENT_ON} 3 of 6" in said
    straight = (tmp_path / "straight/lora.safetensors").read_bytes()
    assert (tmp_path / "parts/lora.safetensors").read_bytes() == straight
    names = {name: load_file(tmp_path / name / "lora.safetensors") for name in ("straight", "checkpointing")}
    assert names["straight"].keys() == names["checkpointing"].keys()
    assert all(torch.equal(value, names["checkpointing"][key]) for key, value in names["straight"].items())


def test_the_losses_are_those_of_a_cpu(tiny, tmp_path):
    at_once(
        lambda: train(tiny, tmp_path / "gpu", precision="no"),
        lambda: train(tiny, tmp_path / "cpu", precision="no", devices=""),
        lambda: train(tiny, tmp_path / "bf16"),
    )
    torch.testing.assert_close(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses(tmp_path / "bf16"), losses(tmp_path / "cpu"), atol=2e-2, rtol=2e-2)


def test_the_watch_tells_how_full_the_gpu_is():
    kept = torch.zeros(1 << 28, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    used, _, rest = memory_facts(kept.device).partition(" of ")
    assert float(used) > 1 and rest.startswith(f"{total:.1f} GB of the GPU are in use, 0 allocations were retried")
