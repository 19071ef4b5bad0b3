"""Which files a training removes: older ones, each only once the newer one is complete."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_image.training import saving
from qwen_image.training.batches import Step
from qwen_image.training.ownership import NoOwnership
from qwen_image.training.run import Progress
from qwen_image.training.schema import with_defaults
from qwen_image.training.state import list_states, write_state


@pytest.fixture
def run(tmp_path):
    """As much of a training as saving looks at; its adapter is one number."""
    layer = torch.nn.Linear(1, 1)
    settings = SimpleNamespace(
        **with_defaults({
            "output_dir": str(tmp_path), "output_name": "lora", "save_every_n_steps": 10, "save_last_n_steps": 10,
            "save_state": True, "save_state_every_n_minutes": 0,
        })
    )  # fmt: skip
    return SimpleNamespace(
        settings=settings, accelerator=SimpleNamespace(is_main_process=True), output_dir=Path(tmp_path), metadata={},
        made_from={}, transformer=layer, optimizer=torch.optim.SGD(layer.parameters(), lr=1), average=None,
        progress=Progress(step=30, epoch=1), plan=SimpleNamespace(epochs=9), kept_weights=contextlib.nullcontext,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_files(monkeypatch):
    monkeypatch.setattr(saving, "adapter_tensors", lambda *_, **__: {})
    monkeypatch.setattr(saving, "files_of", lambda path, tensors, _: [(path, tensors)])
    monkeypatch.setattr(saving, "save_adapter", lambda path, *_: path.write_text("a LoRA"))


@pytest.fixture
def saver(run):
    uploader = SimpleNamespace(file=lambda _: None, folder=lambda _: None)
    for step in (10, 20):
        (run.output_dir / f"lora-step{step:08d}.safetensors").write_text("a LoRA")
        write_state(
            run.output_dir / f"lora-step{step:08d}-state",
            saving.Facts(
                step=step, epoch=1, skipped_steps=0, recent_losses=[], best_validation=None, made_from={}, kept=True
            ),
            adapter={}, optimizer={}, average=None, check=lambda: None,
        )  # fmt: skip
    return saving.Saver(run, uploader, NoOwnership())


def steps(folder):
    return sorted(int(path.stem.removeprefix("lora-step")) for path in folder.glob("lora-step*.safetensors"))


@pytest.mark.parametrize("failing", ["save_adapter", "write_state"])
def test_when_the_newer_one_cannot_be_written_the_older_ones_stay(run, saver, monkeypatch, failing):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(saving, failing, fail)
    with pytest.raises(OSError, match="no space"):
        saver.save_if_due(Step(30, 1, (), ends_epoch=False))
    assert {10, 20} <= set(steps(run.output_dir))
    assert [saved.facts.step for saved in list_states(run.output_dir, "lora")] == [10, 20]


def test_once_the_newer_one_is_complete_the_outdated_go(run, saver):
    saver.save_if_due(Step(30, 1, (), ends_epoch=False))
    assert steps(run.output_dir) == [20, 30]
    assert [saved.facts.step for saved in list_states(run.output_dir, "lora")] == [20, 30]


def test_other_processes_write_nothing(run, saver):
    run.accelerator.is_main_process = False
    other = saving.Saver(run, None, NoOwnership())
    other.save_if_due(Step(30, 1, (), ends_epoch=False))
    other.finish()
    assert steps(run.output_dir) == [10, 20]


def test_a_state_that_was_asked_for_serves_as_the_passing_one_of_its_step(run, saver):
    run.settings.save_state_every_n_minutes = 1e-9
    saver.save_if_due(Step(30, 1, (), ends_epoch=False))
    saver.save_passing_state()
    (newest,) = [saved for saved in list_states(run.output_dir, "lora") if saved.facts.step == 30]
    assert newest.facts.kept


@pytest.mark.parametrize(
    ("step", "every", "keep", "old"), [(50, 10, 30, 10), (40, 10, 30, None), (45, 10, None, None), (55, 10, 30, 20)]
)
def test_the_step_that_goes_is_the_fields(step, every, keep, old):
    assert saving.outdated_step(step, every=every, keep=keep) == old
