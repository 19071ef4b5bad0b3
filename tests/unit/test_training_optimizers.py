"""Optimizers: found by name, told what they take, driven the same, and restored to the bit."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_image.problems import InputError
from qwen_image.training.checks import check_settings
from qwen_image.training.key_values import KeyValueError
from qwen_image.training.optimizer_options import OPTIMIZERS, named_optimizer, optimizer_arguments
from qwen_image.training.optimizers import (
    check_optimizer,
    evaluation_weights,
    make_optimizer,
    optimizer_label,
    set_learning_rate,
)
from qwen_image.training.own_classes import load_class, parameter_names
from qwen_image.training.tree import read_tree, write_tree

NAMES = tuple(OPTIMIZERS)
CPU = torch.device("cpu")
# what the libraries take and optimizer_args may not set: the rate, how it is computed, and what would train backwards
NOT_OURS = {
    "params", "lr", "defaults", "maximize", "foreach", "fused", "capturable", "differentiable", "optim_bits", "args",
    "is_paged", "min_8bit_size",
}  # fmt: skip


def settings(name, arguments=None, rate=0.01, law="constant"):
    return SimpleNamespace(optimizer_type=name, optimizer_args=arguments, learning_rate=rate, lr_scheduler=law)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's own."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    return write


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


@pytest.mark.parametrize(("name", "law"), [*((name, "constant") for name in NAMES), ("adafactor", "adafactor")])
def test_it_trains_and_goes_on_from_a_state_to_the_bit(tmp_path, name, law):
    straight, groups = fresh()
    whole = make_optimizer(settings(name, law=law), groups)
    start = [parameter.detach().clone() for parameter in straight]
    drive(whole, straight, range(6))
    assert all(not torch.equal(a, b) and b.isfinite().all() for a, b in zip(start, straight, strict=True))

    first, groups = fresh()
    before = make_optimizer(settings(name, law=law), groups)
    drive(before, first, range(3))
    write_tree(tmp_path / "state", before.state_dict())
    second, groups = fresh()
    after = make_optimizer(settings(name, law=law), groups)
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
    # ScheduleFreeRAdam changes no weight in its first steps
    drive(undisturbed, straight, range(8))
    for step in range(8):
        drive(watched, looked, [step])
        with evaluation_weights(watched):
            inside = [parameter.detach().clone() for parameter in looked]
    assert all(torch.equal(a, b) for a, b in zip(looked, straight, strict=True))
    averaged = any(not torch.equal(a, b) for a, b in zip(looked, inside, strict=True))
    assert averaged == OPTIMIZERS[name].averages


@pytest.mark.parametrize("name", NAMES)
def test_the_table_agrees_with_the_library(name):
    optimizer = OPTIMIZERS[name]
    taken = set(parameter_names(load_class(optimizer.path, torch.optim.Optimizer, "optimizer_type")))
    # what the class has, but only for another one's sake
    unused = {"adamw8bit": {"amsgrad"}, "adam": {"decoupled_weight_decay"}}
    refused = NOT_OURS | unused.get(name, set())
    assert set(optimizer.arguments) == taken - refused
    assert set(optimizer.defaults or {}) | set(optimizer.own_rate or {}) <= taken


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
        ("transformers.optimization.Adafactor", "transformers.Adafactor"),
        ("pytorch_optimizer.optimizer.prodigy.Prodigy", "pytorch_optimizer.Prodigy"),
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


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=True"]}, "optimizer_args"),
        ({"optimizer_type": "Adafactor", "optimizer_args": ["warmup_init=True"]}, "optimizer_args"),
        (
            {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor", "optimizer_args": ["relative_step=False"]},
            "optimizer_args",
        ),
        ({"optimizer_type": "AdamW", "lr_scheduler": "adafactor"}, "lr_scheduler"),
        ({"optimizer_type": "torch.optim.RMSprop", "lr_scheduler": "adafactor"}, "lr_scheduler"),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "adafactor:fast"}, "lr_scheduler"),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "adafactor", "learning_rate": 1e-4}, "learning_rate"),
        (
            {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor", "network_args": ["loraplus_lr_ratio=4"]},
            "network_args",
        ),
        ({"optimizer_type": "Prodigy"}, "learning_rate"),
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1, "network_args": ["loraplus_lr_ratio=4"]},
            "network_args",
        ),
        ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"}, "lr_scheduler"),
    ],
)
def test_what_does_not_go_together_is_told(given, key):
    assert [problem.key for problem in check_settings(given, "x.toml")] == [key]


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor:1e-3", "optimizer_args": ["warmup_init=True"]},
        {"optimizer_type": "Adafactor", "learning_rate": 1e-3, "network_args": ["loraplus_lr_ratio=4"]},
        {"optimizer_type": "Prodigy", "learning_rate": 1, "lr_scheduler": "cosine"},
        {"optimizer_type": "SGDScheduleFree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
    ],
)
def test_what_goes_together_is_not_complained_about(given):
    assert not check_settings(given, "x.toml")


@pytest.mark.parametrize("name", NAMES)
def test_the_rehearsal_passes_and_draws_nothing(name):
    drawn = torch.random.get_rng_state()
    check_optimizer(settings(name), CPU)
    assert torch.equal(torch.random.get_rng_state(), drawn)


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
        ("torch.optim.LBFGS", None, "parameter groups"),
        # **kwargs would take any name
        ("pytorch_optimizer.Yogi", ["weigth_decay=1"], "did you mean weight_decay?"),
        ("pytorch_optimizer.Yogi", ["kwargs=1"], "takes"),
    ],
)
def test_a_class_that_cannot_be_used_is_told(name, arguments, words):
    with pytest.raises(InputError, match="problem") as error:
        check_optimizer(settings(name, arguments), CPU)
    assert words in str(error.value)


def test_a_module_that_fails_is_told(own):
    own("own_failing", "raise RuntimeError('no such device')")
    with pytest.raises(InputError, match="no such device"):
        check_optimizer(settings("own_failing.Class"), CPU)


@pytest.mark.parametrize(
    ("memory", "words"), [("self.steps", "as if it had never stopped"), ("self.param_groups[0]['counts']", "set")]
)
def test_one_that_does_not_come_back_from_its_state_is_told(own, memory, words):
    own(
        "own_forgetful_" + words.split()[0],
        f"""
        import torch

        class Forgetful(torch.optim.SGD):
            def __init__(self, params, lr):
                super().__init__(params, lr)
                {memory} = set()

            def step(self, closure=None):
                {memory}.add(len({memory}))
                for group in self.param_groups:
                    group["lr"] /= len({memory})
                super().step()
        """,
    )
    with pytest.raises(InputError, match=words):
        check_optimizer(settings("own_forgetful_" + words.split()[0] + ".Forgetful"), CPU)


def test_other_libraries_do_not_find_bitsandbytes():
    code = "import qwen_image, importlib.util; assert importlib.util.find_spec('bitsandbytes') is None"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2] / "scripts", check=True)


def test_what_is_hidden_from_other_libraries_is_found(own, monkeypatch):
    own("own_hidden", "class Class: pass")
    monkeypatch.setitem(sys.modules, "own_hidden", None)
    assert load_class("own_hidden.Class", object, "optimizer_type").__name__ == "Class"


def test_names_that_a_class_hands_on_are_its_own_too(own):
    own(
        "own_child",
        """
        import torch

        class Child(torch.optim.RMSprop):
            def __init__(self, params, lr, **kwargs):
                super().__init__(params, lr, **kwargs)
        """,
    )
    assert make_optimizer(settings("own_child.Child", ["alpha=0.5"]), fresh()[1]).defaults["alpha"] == 0.5


def test_all_problems_of_the_arguments_come_at_once():
    with pytest.raises(KeyValueError) as error:
        optimizer_arguments(OPTIMIZERS["adamw"], ["beta=1", "eps=0", "x"], "constant")
    assert len(error.value.problems) == 3
