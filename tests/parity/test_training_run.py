"""Whole trainings through `accelerate launch`: files, reproducible bytes, and the LoRA in diffusers' pipeline."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toml
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file
from training_data import HIDDEN_SIZE, ITEMS, tiny_transformer, write_tiny_training

from qwen_image.container import read_header
from qwen_image.problems import InputError
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.loop import train
from qwen_image.training.state import list_states

PROGRAM = Path(__file__).parents[2] / "scripts" / "qwen_image_train_network.py"
LAUNCH = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]


def launch(flags, *, launcher=("-m", "accelerate.commands.launch", *LAUNCH), cwd=None, **environment):
    command = [sys.executable, *launcher, str(PROGRAM), *flags]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def files(folder):
    """Content of all files of a training, those of its states too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("a place with 'quotes', 空白 and $x"))


@pytest.fixture(scope="module")
def trained(tiny):
    """Two epochs with all kinds of files in between."""
    done = launch(
        tiny.flags(
            max_train_epochs=2, network_dim=4, network_alpha=2, lr_scheduler="cosine", lr_warmup_steps="20%",
            save_every_n_epochs=1, save_every_n_steps=2, save_last_n_steps=2, network_dropout=0.1, log_config=True,
            logging_dir=tiny.folder / "logs", vae="/somewhere/vae.safetensors", learning_rate="1e-2",
        )
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_files_and_messages(tiny, trained):
    models = tiny.folder / "models"
    # of the steps' files 2, 4 and 6 the first is more than two steps old at the end
    assert {path.name for path in models.iterdir()} == {
        "lora.safetensors", "lora-000001.safetensors", "lora-step00000004.safetensors", "lora-step00000006.safetensors",
        "lora.loss.csv", "lora.left_out.tsv", "lora-state",
    }  # fmt: skip
    assert "train: 5 items in 3 batches an epoch, 6 steps (2 epochs)" in trained.stderr
    assert "train: LoRA of rank 4 on 24 layers, 36,864 trainable parameters" in trained.stderr
    assert f"train: wrote {models / 'lora.safetensors'} after 6 steps (2 epochs), average loss " in trained.stderr
    assert list((tiny.folder / "logs" / "lora" / "network_train").glob("events.*"))


def test_loss_table(tiny, trained):
    text = (tiny.folder / "models" / "lora.loss.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert text.splitlines()[0] == "step,epoch,loss,loss_average,learning_rate,grad_norm,skipped_steps"
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 1, 2, 2, 2]
    losses = [float(row["loss"]) for row in rows]
    assert all(map(math.isfinite, losses))
    # the mean of the last epoch's worth
    assert float(rows[-1]["loss_average"]) == pytest.approx(sum(losses[-3:]) / 3)
    # one step of warm-up from zero, then half a cosine
    rates = [1e-2 * (step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 5))) for step in range(6)]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(rates)


def test_metadata(tiny, trained):
    header = read_header(tiny.folder / "models" / "lora.safetensors")
    assert header.metadata["ss_steps"] == "6"
    assert header.metadata["ss_epoch"] == "2"
    assert header.metadata["ss_network_alpha"] == "2"
    assert header.metadata["ss_vae_name"] == "vae.safetensors"
    assert str(tiny.folder) not in str(header.metadata)
    assert read_header(tiny.folder / "models" / "lora-000001.safetensors").metadata["ss_epoch"] == "1"
    assert read_header(tiny.folder / "models" / "lora-step00000004.safetensors").metadata["ss_epoch"] == "2"
    assert {info.dtype for info in header.tensors.values()} == {"BF16"}


def test_diffusers_loads_it_and_draws_differently(tiny, trained):
    transformer = tiny_transformer()
    inputs = {
        "hidden_states": torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.randn(1, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    with torch.no_grad():
        before = transformer(**inputs).sample
        pipe = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
        pipe.load_lora_weights(str(tiny.folder / "models" / "lora.safetensors"), adapter_name="lora")
        after = transformer(**inputs).sample
    assert not torch.allclose(before, after, atol=1e-6)

    ours = load_file(tiny.folder / "models" / "lora.safetensors")
    modules = {name.removesuffix(".alpha") for name in ours if name.endswith(".alpha")}
    loaded = {
        "lora_unet_" + path.replace(".", "_"): module
        for path, module in transformer.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(loaded) == modules, "all keys are matched"
    changed = 0
    for name, module in loaded.items():
        up, down = ours[f"{name}.lora_up.weight"].float(), ours[f"{name}.lora_down.weight"].float()
        delta = ours[f"{name}.alpha"].float() / down.shape[0] * up @ down
        assert torch.allclose(module.get_delta_weight("lora"), delta, atol=1e-6), name
        changed += bool(delta.any())
    assert changed >= 18, "all but what only feeds the last block's text were trained"


def test_two_runs_give_the_same_bytes(tiny, trained, tmp_path):
    """Another working directory, launcher and number of workers, arguments from a file: the same bytes."""
    before = files(tiny.folder / "models")
    config = tmp_path / "train.toml"
    config.write_text(toml.dumps({"paths": tiny.arguments, "rest": {"seed": 42}}))
    done = launch(
        [
            "--config_file", str(config), "--output_dir", str(tmp_path / "models"), "--max_train_epochs", "2",
            "--network_dim", "4", "--network_alpha", "2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20%",
            "--save_every_n_epochs", "1", "--save_every_n_steps", "2", "--save_last_n_steps", "2",
            "--network_dropout", "0.1", "--vae", "/elsewhere/vae.safetensors", "--learning_rate", "0.01",
            "--max_data_loader_n_workers", "0",
        ],
        cwd=tmp_path, launcher=(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "models") == before


def test_two_processes(tiny, tmp_path):
    # as the workflow launches them; the launcher itself has no notion of several processes on CPUs
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    flags = tiny.flags(
        output_dir=tmp_path, max_train_epochs=1, gradient_checkpointing=True, max_data_loader_n_workers=0
    )
    done = launch(flags, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "cpu x 2" in done.stderr
    assert done.stderr.count("train: wrote ") == 1, "only the first process speaks"
    # 3 batches on 2 processes: the first batch comes again, so that both do two
    assert len((tmp_path / "lora.loss.csv").read_text().splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "lora.safetensors", "lora.loss.csv", "lora.left_out.tsv", "lora-state",
    }  # fmt: skip


def spoil(folder):
    """Make one item's latents no numbers, in a file that is else as it was."""
    path = folder / "cache" / "c_0096x0048_qi.safetensors"
    metadata = read_header(path).metadata
    tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)


def test_a_loss_that_is_no_number_too_often_names_the_item(tmp_path):
    spoilt = write_tiny_training(tmp_path, batch_size=1)
    spoil(tmp_path)
    flags = spoilt.flags(
        max_train_epochs=3, mixed_precision="bf16", max_data_loader_n_workers=0, max_skipped_steps=1,
        save_state_every_n_minutes="1e-9",
    )  # fmt: skip
    with pytest.raises(InputError, match="was no number at step") as caught:
        train(parse_arguments(flags))
    assert [problem.key for problem in caught.value.problems] == ["datasets[0] c.png"]
    # the table shows how far it came; no LoRA is left that looks finished
    (state,) = list_states(tmp_path / "models", "lora")
    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "lora.loss.csv", "lora.left_out.tsv", state.folder.name,
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "models" / "lora.loss.csv").read_text().splitlines()))
    (skipped,) = [int(row["step"]) for row in rows if row["loss"] == "nan"]
    assert 1 <= skipped <= 5 < state.facts.step == len(rows), "the last good state is of the step before"
    assert state.facts.skipped_steps == 1
    assert all(math.isfinite(float(row["loss_average"])) for row in rows[skipped:])


def test_a_step_that_is_skipped_changes_nothing_and_is_told(tmp_path, caplog):
    spoilt = write_tiny_training(tmp_path, batch_size=1, items=ITEMS[:3])
    spoil(tmp_path)
    caplog.set_level("INFO", logger="qwen_image")
    flags = spoilt.flags(max_train_epochs=1, max_data_loader_n_workers=0, ema_decay=0.9)
    train(parse_arguments(flags))
    (told,) = [record.message for record in caplog.records if "is skipped" in record.message]
    assert "datasets[0] c.png" in told and "a.png" not in told and "1 of 3 such steps" in told
    tensors = load_file(tmp_path / "models" / "lora.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_layers": 60}, "the checkpoint has 2, the settings say 60"),
        ({"network_args": ["exclude_patterns=['.*']"]}, "exclude every module"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint(tiny, tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        train(parse_arguments(tiny.flags(output_dir=tmp_path, **arguments)))


def test_a_launcher_with_fp16_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="fp16 is not supported"):
        train(parse_arguments(tiny.flags()))


def test_bad_arguments_stop_before_anything_is_loaded(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, *tiny.flags(output_dir=tmp_path / "new", fp8_base=True, sed=1)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "2 problems were found" in done.stderr
    assert "did you mean seed?" in done.stderr
    assert not (tmp_path / "new").exists()
