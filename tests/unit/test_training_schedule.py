"""Learning rates and lengths."""

import pytest
import torch
from transformers import get_scheduler

from qwen_image.training.schedule import learning_rate, resolve_warmup, steps_per_epoch, total_steps


@pytest.mark.parametrize(
    ("law", "warmup", "kwargs"),
    [
        ("constant", 0, {}),
        ("constant_with_warmup", 5, {}),
        ("linear", 5, {}),
        ("linear", 0, {}),
        ("cosine", 5, {}),
        ("cosine", 0, {}),
        ("cosine_with_restarts", 4, {"num_cycles": 3}),
        ("polynomial", 5, {"power": 2.0}),
    ],
)
def test_equals_transformers(law, warmup, kwargs):
    peak, total = 3e-4, 23
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_scheduler(law, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    for step in range(total + 1):
        ours = learning_rate(
            step, peak=peak, law=law, warmup=warmup, total=total, cycles=kwargs.get("num_cycles", 1),
            power=kwargs.get("power", 1.0),
        )  # fmt: skip
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-12), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("law", ["linear", "cosine", "cosine_with_restarts"])
def test_stays_down_after_the_end(law):
    rates = [learning_rate(step, peak=1.0, law=law, warmup=0, total=12) for step in range(12, 30)]
    assert rates == pytest.approx([0.0] * 18, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (100, 100), (0.1, 20), ("10%", 20), ("0%", 0), (1.0, 1), ("100%", 200), (0.999, 199)]
)
def test_warmup(value, steps):
    assert resolve_warmup(value, total_steps=200) == steps


@pytest.mark.parametrize("value", [1.5, "101%"])
def test_more_than_the_whole_training_is_refused(value):
    with pytest.raises(ValueError, match="more than the whole training"):
        resolve_warmup(value, total_steps=200)


def test_lengths():
    assert steps_per_epoch(7, processes=1, accumulation=1) == 7
    assert steps_per_epoch(7, processes=2, accumulation=3) == 2
    assert total_steps(1600, None, steps_in_epoch=7) == 1600
    assert total_steps(1600, 3, steps_in_epoch=7) == 21
