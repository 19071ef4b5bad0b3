"""Learning rates and lengths."""

import math

import pytest

from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings
from qwen_image.training.checks import check_settings
from qwen_image.training.schedule import (
    Schedule,
    make_schedule,
    piecewise_rules,
    resolve_steps,
    steps_per_epoch,
    total_steps,
)
from qwen_image.training.schema import coerce_numbers, with_defaults


@pytest.mark.parametrize("law", ["linear", "cosine", "cosine_with_restarts"])
def test_stays_down_after_the_end(law):
    rates = [Schedule(peak=1.0, law=law, total=12).rate(step) for step in range(12, 30)]
    assert rates == pytest.approx([0.0] * 18, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0, 0), (100, 100), (0.1, 20), ("10%", 20), ("0%", 0), (1.0, 1), ("100%", 200), (0.999, 199), ("14.5%", 29)],
)
def test_warmup(value, steps):
    assert resolve_steps(value, total_steps=200) == steps


@pytest.mark.parametrize("value", [1.5, "101%"])
def test_more_than_the_whole_training_is_refused(value):
    with pytest.raises(ValueError, match="more than the whole training"):
        resolve_steps(value, total_steps=200)


def test_lengths():
    assert steps_per_epoch(7, processes=1, accumulation=1) == 7
    assert steps_per_epoch(7, processes=2, accumulation=3) == 2
    assert total_steps(1600, None, steps_in_epoch=7) == 1600
    assert total_steps(1600, 3, steps_in_epoch=7) == 21


def test_rex_falls_slowly_at_first_and_ends_at_the_lowest():
    schedule = Schedule(peak=2.0, law="rex", total=110, warmup_steps=10, lowest=0.25)
    assert [schedule.rate(step) for step in (0, 5, 10)] == pytest.approx([0.5, 1.25, 2])
    # half way z is 1/2: z / (0.1 + 0.9 z) = 1 / 1.1
    assert schedule.rate(60) == pytest.approx(2 * (0.25 + 0.75 / 1.1))
    assert schedule.rate(110) == pytest.approx(0.5)


@pytest.mark.parametrize("law", ["linear", "cosine", "rex", "warmup_stable_decay"])
def test_no_rate_is_below_the_lowest_once_it_has_risen(law):
    schedule = Schedule(peak=1.0, law=law, total=50, warmup_steps=5, decay_steps=20, lowest=0.1)
    rates = [schedule.rate(step) for step in range(5, 60)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)


def test_pieces():
    rules = piecewise_rules(["step_rules=1:10,0.1:20,0.01"])
    assert rules == ((10, 1.0), (20, 0.1), (math.inf, 0.01))
    schedule = Schedule(peak=2.0, law="piecewise_constant", total=30, rules=rules)
    assert [schedule.rate(step) for step in (0, 9, 10, 19, 20, 29)] == [2, 2, 0.2, 0.2, 0.02, 0.02]


@pytest.mark.parametrize("text", ["", "1:10", "1:20,0.1:10,0", "1:a,0", "1:10:20,0", "-1:10,0", "1:10,inf"])
def test_pieces_that_are_none(text):
    given = {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": [f"step_rules={text}"]}
    assert [problem.key for problem in check_settings(given, "x")] == ["lr_scheduler_args"]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"lr_scheduler": "cosine", "lr_scheduler_power": 2}, "lr_scheduler_power"),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, "lr_decay_steps"),
        ({"lr_scheduler": "constant", "lr_scheduler_min_lr_ratio": 0.1}, "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "cosine", "lr_scheduler_timescale": 5}, "lr_scheduler_timescale"),
        ({"lr_scheduler": "linear", "lr_scheduler_num_cycles": 2}, "lr_scheduler_num_cycles"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["a=1"]}, "lr_scheduler_args"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "warmup_stable_decay"}, "lr_decay_steps"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler_args"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "lr_warmup_steps"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 1.5}, "lr_warmup_steps"),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR", "lr_scheduler": "cosine"}, "lr_scheduler"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "lr_scheduler"),
        ({"lr_scheduler": "greedy"}, "lr_scheduler"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "learning_rate"),
    ],
)
def test_what_changes_nothing_or_is_missing_is_told(given, key):
    assert [problem.key for problem in check_settings(given, "x")] == [key]


def made(total, **given):
    given = {"learning_rate": 0.5} | given
    assert not check_settings(given, "x")
    return make_schedule(Settings(**with_defaults(coerce_numbers(given))), total)


def test_phases_longer_than_the_training_are_told(caplog):
    with pytest.raises(InputError, match="50 steps of warm-up and 51 of decay, but the training has 100"):
        made(100, lr_scheduler="warmup_stable_decay", lr_warmup_steps=50, lr_decay_steps="51%")
    made(100, lr_scheduler="linear", lr_warmup_steps=100)
    assert not caplog.text
    made(100, lr_scheduler="linear", lr_warmup_steps=101)
    assert "never reaches its peak: 101 steps of warm-up, 100 in all" in caplog.text


def test_a_longer_training_has_the_same_shape_over_more_steps():
    short, long = (made(total, lr_scheduler="cosine", lr_warmup_steps="10%") for total in (100, 200))
    assert [long.rate(2 * step) for step in range(100)] == pytest.approx([short.rate(step) for step in range(100)])


def test_rex_ends_at_a_hundredth_unless_told():
    assert made(50, lr_scheduler="rex").rate(50) == pytest.approx(0.5 / 100)
    assert made(50, lr_scheduler="rex", lr_scheduler_min_lr_ratio=0).rate(50) == 0


def test_half_waves():
    schedule = made(100, lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2, lr_scheduler_num_cycles=3)
    assert [schedule.rate(step) for step in (0, 50, 100)] == pytest.approx([0.5, 0.3, 0.1])
    assert schedule.rate(33) < 0.101 and schedule.rate(67) > 0.499


def test_adafactor_shows_the_rate_that_the_optimizer_takes():
    given = {"lr_scheduler": "adafactor:1e-3", "optimizer_type": "Adafactor"}
    plain = made(10, **given, learning_rate=None)
    slow = made(10, **given, learning_rate=None, optimizer_args=["warmup_init=True"])
    assert [plain.rate(step) for step in (0, 9_999, 39_999)] == pytest.approx([0.01, 0.01, 0.005])
    assert [slow.rate(step) for step in (0, 99)] == pytest.approx([1e-6, 1e-4])


# ---- classes of the user's own ---------------------------------------------------------------------------------------


def test_a_name_without_a_path_is_torchs():
    schedule = made(10, lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=4", "gamma=0.5"])
    assert [schedule.rate(step) for step in (0, 3, 4, 9)] == [0.5, 0.5, 0.25, 0.125]


def test_a_function_may_make_the_schedule():
    path = "transformers.optimization.get_linear_schedule_with_warmup"
    schedule = made(10, lr_scheduler_type=path, lr_scheduler_args=["num_warmup_steps=2", "num_training_steps=10"])
    assert [schedule.rate(step) for step in (0, 1, 2, 6)] == pytest.approx([0, 0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("StepLr", [], "StepLr"),
        ("math.pi", [], "is a float"),
        ("collections.OrderedDict", [], "is a class of another kind"),
        ("os.path.join", ["paths=a"], "is a function"),
        ("StepLR", ["stepsize=4"], "did you mean step_size?"),
        ("StepLR", [], "step_size"),
        ("StepLR", ["step_size=0"], "zero"),
        ("ReduceLROnPlateau", [], "metrics"),
        ("StepLR", ["step_size=1", "gamma=-1"], "below 0"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_told(kind, arguments, words):
    with pytest.raises(InputError) as error:
        made(10, lr_scheduler_type=kind, lr_scheduler_args=arguments or None)
    assert words in str(error.value)
