"""What looks after a training: signals and deadlines, slow steps, and the moving average of its weights."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from qwen_image.training.ema import Average
from qwen_image.training.interruption import Interruption, job_deadline
from qwen_image.training.watchdog import StepWatch, memory_facts

# ---- signals and deadlines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    interruption = Interruption()
    with interruption.listening():
        assert interruption.reason() is None
        os.kill(os.getpid(), number)
        assert interruption.reason() == f"{signal.Signals(number).name} was received"
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_it_at_once():
    with Interruption().listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_deadline_counts_back_from_the_jobs_end(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "10000")
    assert job_deadline(5) == 10000 - 300
    monkeypatch.setenv("SLURM_JOB_END_TIME", "unknown")
    assert job_deadline(5) is None
    assert job_deadline(None) is None
    now = SimpleNamespace(value=9699)
    interruption = Interruption(9700, clock=lambda: now.value)
    assert interruption.reason() is None
    now.value = 9700
    assert "end of the job" in interruption.reason()


@pytest.mark.parametrize(("seconds_left", "margin"), [(100, 20), (3600, 300), (-5, 0)])
def test_without_a_setting_a_short_job_spends_a_fifth_on_stopping(monkeypatch, seconds_left, margin):
    end = int(time.time()) + seconds_left
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert job_deadline(None) == pytest.approx(end - margin, abs=1)


# ---- slow steps ------------------------------------------------------------------------------------------------------


def warnings(seconds, shapes=None):
    watch = StepWatch(lambda: "memory is full")
    return [watch.note(*pair) for pair in zip(seconds, shapes or ["one"] * len(seconds), strict=True)]


def test_the_third_slow_step_in_a_row_is_told_once_with_the_usual_time_and_the_memory():
    found = warnings([1.0] * 6 + [3.0] * 6)
    assert [index for index, text in enumerate(found) if text] == [8]
    assert "(1.0 s)" in found[8] and "memory is full" in found[8]


def test_after_a_usual_step_a_new_series_is_told_again():
    found = warnings([1.0] * 6 + [3.0] * 3 + [1.0] + [3.0] * 3)
    assert [index for index, text in enumerate(found) if text] == [8, 12]


@pytest.mark.parametrize(
    ("seconds", "shapes"),
    [
        ([9.0, 5.0, 1.0, 1.0, 1.0, 1.0], None),  # the first steps compile and warm up
        ([1.0] * 6 + [3.0, 3.0, 1.0, 3.0, 3.0], None),
        ([1.0] * 6 + [3.0] * 9, ["small"] * 6 + ["large"] * 9),
        ([1.0] * 6 + [2.0] * 9, None),
    ],
)
def test_what_is_no_spill_is_not_told(seconds, shapes):
    assert not any(warnings(seconds, shapes))


def test_the_facts_say_how_full_memory_is():
    assert "main memory is" in memory_facts(torch.device("cpu")) and "swapped" in memory_facts(torch.device("cpu"))


# ---- the average -----------------------------------------------------------------------------------------------------


def test_the_average_follows_and_stands_in_only_for_a_while():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average([parameter], 0.5)
    expected = 0.0
    for update in range(1, 20):
        parameter.data += 1
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    assert average.values[0].tolist() == pytest.approx([expected] * 3)
    with average.in_place():
        assert torch.equal(parameter.data, average.values[0])
    assert parameter.tolist() == [19.0] * 3
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert parameter.tolist() == [19.0] * 3


def test_the_average_goes_on_to_the_bit():
    def drive(average, parameter, steps):
        for step in steps:
            parameter.data = torch.randn(5, generator=torch.Generator().manual_seed(step))
            average.update()

    straight = torch.nn.Parameter(torch.zeros(5))
    whole = Average([straight], 0.9)
    drive(whole, straight, range(8))
    first, second = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.ones(5))
    before, after = Average([first], 0.9), Average([second], 0.9)
    drive(before, first, range(4))
    after.load_state_dict(before.state_dict())
    drive(after, second, range(4, 8))
    assert torch.equal(after.values[0], whole.values[0])
