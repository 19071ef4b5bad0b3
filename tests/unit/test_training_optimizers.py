"""Optimizers: found by name, told what they take, driven the same, and restored to the bit."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from qwen_image.problems import InputError
from qwen_image.training.checks import check_settings
from qwen_image.training.key_values import KeyValueError
from qwen_image.training.optimizer_options import OPTIMIZERS, named_optimizer, optimizer_arguments
from qwen_image.training.optimizers import evaluation_weights, make_optimizer, optimizer_label, set_learning_rate
from qwen_image.training.own_classes import load_class
from qwen_image.training.tree import read_tree, write_tree

NAMES = tuple(OPTIMIZERS)
RELATIVE = ("adafactor", ["relative_step=True", "scale_parameter=True"])


def settings(name, arguments=None, rate=0.01):
    return SimpleNamespace(optimizer_type=name, optimizer_args=arguments, learning_rate=rate)


def fresh():
    """Two groups, as LoRA+ makes them; large enough for 8 bits."""
    random = torch.Generator().manual_seed(0)
    down, up = (torch.nn.Parameter(torch.randn(80, 64, generator=random)) for _ in range(2))
    return [down, up], [{"params": [down], "lr_ratio": 1.0}, {"params": [up], "lr_ratio": 4.0}]


def drive(optimizer, parameters, steps):
    """Some steps down a bowl, with noise that follows from the step."""
    for step in steps:
        set_learning_rate(optimizer, 0.01 / (1 + step))
        for index, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + index))
            parameter.grad = parameter.detach() + noise
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("name", "arguments"), [*((name, None) for name in NAMES), RELATIVE])
def test_it_trains_and_goes_on_from_a_state_to_the_bit(tmp_path, name, arguments):
    straight, groups = fresh()
    whole = make_optimizer(settings(name, arguments), groups)
    start = [parameter.detach().clone() for parameter in straight]
    drive(whole, straight, range(6))
    assert all(not torch.equal(a, b) and b.isfinite().all() for a, b in zip(start, straight, strict=True))

    first, groups = fresh()
    before = make_optimizer(settings(name, arguments), groups)
    drive(before, first, range(3))
    write_tree(tmp_path / "state", before.state_dict())
    second, groups = fresh()
    after = make_optimizer(settings(name, arguments), groups)
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
    after.load_state_dict(read_tree(tmp_path / "state"))
    drive(after, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(second, straight, strict=True))
    assert [group["lr_ratio"] for group in after.param_groups] == [1.0, 4.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_look_at_the_averaged_weights_changes_nothing(name):
    looked, groups = fresh()
    watched = make_optimizer(settings(name), groups)
    straight, groups = fresh()
    undisturbed = make_optimizer(settings(name), groups)
    drive(undisturbed, straight, range(4))
    for step in range(4):
        drive(watched, looked, [step])
        with evaluation_weights(watched):
            inside = [parameter.detach().clone() for parameter in looked]
    assert all(torch.equal(a, b) for a, b in zip(looked, straight, strict=True))
    averaged = any(not torch.equal(a, b) for a, b in zip(looked, inside, strict=True))
    assert averaged == OPTIMIZERS[name].averages


@pytest.mark.parametrize("name", NAMES)
def test_the_table_agrees_with_the_library(name):
    optimizer = OPTIMIZERS[name]
    taken = inspect.signature(load_class(optimizer.path, torch.optim.Optimizer, "optimizer_type")).parameters
    assert set(optimizer.arguments) | set(optimizer.defaults or {}) <= set(taken)


def test_adamw_is_torchs_own():
    ours, groups = fresh()
    drive(make_optimizer(settings("AdamW", ["weight_decay=0.1"]), groups[:1]), ours[:1], range(3))
    theirs, _ = fresh()
    optimizer = torch.optim.AdamW(theirs[:1], lr=0.01, weight_decay=0.1)
    optimizer.param_groups[0]["lr_ratio"] = 1.0
    drive(optimizer, theirs[:1], range(3))
    assert torch.equal(ours[0], theirs[0])


def test_the_rate_is_each_groups_share():
    _, groups = fresh()
    optimizer = make_optimizer(settings("sgd"), groups)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ADAMW", "torch.optim.AdamW"),
        ("torch.optim.adamw.AdamW", "torch.optim.AdamW"),
        ("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"),
        ("ScheduleFreeAdamW", "pytorch_optimizer.ScheduleFreeAdamW"),
    ],
)
def test_names_in_any_spelling(name, path):
    assert named_optimizer(name).path == path


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("AdanW", None, "did you mean"),
        ("PagedAdamW8bit", None, "use AdamW8bit"),
        ("prodigy", ["dcoef=2"], "did you mean d_coef?"),
        ("adamw", ["betas=(0.9,1)"], "two numbers below 1"),
        ("came", ["betas=(0.9,0.99)"], "three numbers"),
        ("lion", ["lr=1"], "set by learning_rate"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(name, arguments, words):
    given = {"optimizer_type": name} | ({"optimizer_args": arguments} if arguments else {})
    (problem,) = check_settings(given, "x.toml")
    assert words in f"{problem.found} {problem.mend}"


def test_an_average_of_averages_is_refused():
    (problem,) = check_settings({"optimizer_type": "AdamWScheduleFree", "ema_decay": 0.9}, "x.toml")
    assert problem.key == "ema_decay"


def test_a_schedule_for_an_optimizer_that_sets_its_own_rate_is_refused():
    given = {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=True"], "lr_scheduler": "cosine"}
    assert [problem.key for problem in check_settings(given, "x.toml")] == ["lr_scheduler"]


# ---- classes of the user's own ---------------------------------------------------------------------------------------


def test_any_torch_optimizer_can_be_named_by_its_path():
    parameters, groups = fresh()
    own = settings("torch.optim.RMSprop", ["alpha=0.9", "centered=True"])
    assert not check_settings({"optimizer_type": own.optimizer_type, "optimizer_args": own.optimizer_args}, "x")
    optimizer = make_optimizer(own, groups)
    assert type(optimizer) is torch.optim.RMSprop and optimizer.defaults["alpha"] == 0.9
    drive(optimizer, parameters, range(2))
    assert optimizer_label(own) == "torch.optim.rmsprop.RMSprop(alpha=0.9,centered=True)"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("torch.optim.RMSprob", None, "RMSprob"),
        ("nowhere.Class", None, "nowhere"),
        ("torch.nn.Linear", None, "subclass of torch.optim"),
        ("torch.optim.RMSprop", ["alhpa=0.9"], "did you mean alpha?"),
        ("torch.optim.RMSprop", ["lr=0.9"], "takes"),
        ("torch.optim.RMSprop", ["alpha=-1"], "alpha"),
    ],
)
def test_a_class_that_cannot_be_used_is_told(name, arguments, words):
    with pytest.raises(InputError, match="problem") as error:
        make_optimizer(settings(name, arguments), fresh()[1])
    assert words in str(error.value)


def test_all_problems_of_the_arguments_come_at_once():
    with pytest.raises(KeyValueError) as error:
        optimizer_arguments(OPTIMIZERS["adamw"], ["beta=1", "eps=0", "x"])
    assert len(error.value.problems) == 3
