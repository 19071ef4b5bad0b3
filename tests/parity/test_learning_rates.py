"""Learning rates against transformers' schedulers of the same names, step by step."""

import warnings

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from transformers import get_scheduler
from transformers.optimization import Adafactor

from qwen_image.training.arguments import Settings
from qwen_image.training.checks import check_settings
from qwen_image.training.schedule import make_schedule
from qwen_image.training.schema import with_defaults

TOTAL = 57
CASES = [
    ({"lr_scheduler": "constant"}, {}),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}, {}),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 7}, {}),
    ({"lr_scheduler": "cosine", "lr_warmup_steps": 0}, {}),
    ({"lr_scheduler": "cosine", "lr_warmup_steps": "20%"}, {}),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 4}, {"num_cycles": 3}),
    ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0, "lr_warmup_steps": 4}, {"power": 2.0}),
    ({"lr_scheduler": "inverse_sqrt"}, {}),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 9}, {}),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 9, "lr_scheduler_timescale": 30}, {"timescale": 30}),
    (
        {"lr_scheduler": "cosine_with_min_lr", "lr_warmup_steps": 5, "lr_scheduler_min_lr_ratio": 0.2},
        {"min_lr_rate": 0.2},
    ),
    (
        {"lr_scheduler": "cosine_warmup_with_min_lr", "lr_warmup_steps": 5, "lr_scheduler_min_lr_ratio": 0.2},
        {"min_lr_rate": 0.2},
    ),
    # the field counts half waves, transformers whole ones
    (
        {
            "lr_scheduler": "cosine_with_min_lr", "lr_warmup_steps": 5, "lr_scheduler_min_lr_ratio": 0.2,
            "lr_scheduler_num_cycles": 3,
        },
        {"min_lr_rate": 0.2, "num_cycles": 1.5},
    ),
    (
        {
            "lr_scheduler": "cosine_warmup_with_min_lr", "lr_warmup_steps": 5, "lr_scheduler_min_lr_ratio": 0.2,
            "lr_scheduler_num_cycles": 3,
        },
        {"min_lr_rate": 0.2, "num_cycles": 1.5},
    ),
    (
        {
            "lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 20,
            "lr_scheduler_num_cycles": 3,
        },
        {"num_decay_steps": 20, "num_cycles": 1.5},
    ),
    (
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 20},
        {"num_decay_steps": 20},
    ),
    (
        {
            "lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 0.4,
            "lr_scheduler_min_lr_ratio": 0.1,
        },
        {"num_decay_steps": 22, "min_lr_ratio": 0.1},
    ),
]  # fmt: skip


def schedule(**given):
    given = {"learning_rate": 0.3} | given
    assert not check_settings(given, "x")
    return make_schedule(Settings(**with_defaults(given)), TOTAL)


@pytest.mark.parametrize(("given", "theirs"), CASES)
def test_every_step_has_transformers_rate(given, theirs):
    ours = schedule(**given)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = get_scheduler(
            given["lr_scheduler"], optimizer, num_warmup_steps=ours.warmup_steps, num_training_steps=TOTAL,
            scheduler_specific_kwargs=theirs,
        )  # fmt: skip
        for step in range(TOTAL):
            assert ours.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15), step
            scheduler.step()


def test_a_class_of_ones_own_is_a_function_of_the_step():
    given = {"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR", "lr_scheduler_args": ["step_size=10", "gamma=0.5"]}
    ours = schedule(**given)
    assert [ours.rate(step) for step in (0, 9, 10, 25, 56)] == pytest.approx([0.3, 0.3, 0.15, 0.075, 0.3 / 32])


def test_rex_is_the_fields():
    ours = schedule(lr_scheduler="rex", lr_scheduler_min_lr_ratio=0.1)
    for step in range(TOTAL):
        left = (TOTAL - step) / TOTAL
        assert ours.rate(step) == pytest.approx(0.3 * (0.1 + 0.9 * left / (0.1 + 0.9 * left)), rel=1e-12)


def test_adafactor_takes_the_rate_that_is_shown():
    ours = make_schedule(Settings(**with_defaults({"lr_scheduler": "adafactor", "optimizer_type": "Adafactor"})), TOTAL)
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Adafactor([parameter], scale_parameter=False, relative_step=True)
    for step in range(TOTAL):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        taken = optimizer._get_lr(optimizer.param_groups[0], optimizer.state[parameter])
        assert ours.rate(step) == pytest.approx(taken, rel=1e-12)


def test_piecewise_constant_is_diffusers():
    rules = "1:10,0.1:20,0.01"
    ours = schedule(lr_scheduler="piecewise_constant", lr_scheduler_args=[f"step_rules={rules}"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.3)
    theirs = get_piecewise_constant_schedule(optimizer, rules)
    for step in range(TOTAL):
        assert ours.rate(step) == pytest.approx(0.3 * theirs.lr_lambdas[0](step), rel=1e-12)
