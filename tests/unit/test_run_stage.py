"""The stage runner: output shown and kept, failures explained, exit codes passed on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_stage

from qwen_image.training.interruption import GOES_ON, STATE_IS_SAVED

PROGRAM = Path(__file__).parents[2] / "scripts" / "run_stage.py"


@pytest.fixture(autouse=True)
def no_job(monkeypatch, tmp_path):
    """No job of SLURM's, and a home without leases."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(tmp_path, *command, options=(), **more):
    return subprocess.run(
        [sys.executable, PROGRAM, "--stage", "cook", "--log", tmp_path / "logs/cook.log", *options, "--", *command],
        capture_output=True, text=True, timeout=60, **more,
    )  # fmt: skip


def python(code):
    return [sys.executable, "-c", code]


def test_output_is_shown_and_kept(tmp_path):
    result = run(tmp_path, *python("import sys; print('out'); print('err', file=sys.stderr)"))
    assert result.returncode == 0
    assert (tmp_path / "logs/cook.log").read_text().splitlines() == ["out", "err"]
    assert "out" in result.stderr
    assert not (tmp_path / "logs/cook.failed").exists()


def test_a_progress_bar_moves_on_the_terminal_and_leaves_its_last_state_in_the_log(tmp_path):
    code = (
        "import sys, time\n"
        "for i in range(3):\n    sys.stderr.write(f'\\r{i} of 2'); sys.stderr.flush(); time.sleep(.05)\n"
        "print('\\ndone')"
    )
    result = run(tmp_path, *python(code))
    assert "0 of 2" in result.stderr
    log = (tmp_path / "logs/cook.log").read_bytes()
    assert log == b"2 of 2\ndone\n"


@pytest.mark.parametrize("at", [0, 1, 12, 38])
def test_a_token_of_the_environment_reaches_neither_terminal_nor_log(tmp_path, monkeypatch, at):
    """However a library prints it: in a traceback, in two parts, as the state of a progress bar, or last of all."""
    monkeypatch.setenv("WANDB_API_KEY", token := "planted0wandb0key0" + "f" * 21)
    code = (
        "import os, sys, time\n"
        "token = os.environ['WANDB_API_KEY']\n"
        "for before in ('a ', '\\r', 'k=' + token[:5]):\n"
        f"    for part in (before + token[:{at}], token[{at}:] + ' b\\n'):\n"
        "        sys.stderr.write(part); sys.stderr.flush(); time.sleep(.05)\n"
        f"sys.stderr.write('hf_' + 'A' * {at}); sys.stderr.flush(); time.sleep(.05)\n"
        f"sys.stderr.write('B' * 20 + '\\n')\n"
        "raise ValueError('401 for Bearer ' + token)\n"
    )
    result = run(tmp_path, *python(code))
    assert result.returncode == 1
    for text in (result.stderr, (tmp_path / "logs/cook.log").read_text(), (tmp_path / "logs/cook.failed").read_text()):
        assert "a (a token) b\n" in text and "k=plant(a token) b\n" in text
        assert text.count("(a token)\n") == 2 and "Bearer (a token)\n" in text
        assert token not in text and token[:30] not in text and token[10:] not in text
        assert "BBBB" not in text


def test_what_begins_like_a_token_is_shown_before_the_line_ends(tmp_path):
    """Whoever waits for an answer must see the question."""
    code = "import sys; sys.stdout.write('which wandb? '); sys.stdout.flush(); sys.stdin.read(); print('h')"
    with subprocess.Popen(
        [sys.executable, PROGRAM, "--stage", "cook", "--log", tmp_path / "cook.log", "--", *python(code)],
        stderr=subprocess.PIPE, stdin=subprocess.PIPE,
    ) as stage:  # fmt: skip
        assert os.read(stage.stderr.fileno(), 100) == b"which wandb? "
        stage.stdin.close()
        assert stage.stderr.read() == b"h\n"


@pytest.mark.parametrize("code", [1, 2, 77])
def test_a_failure_keeps_its_code_and_is_explained(tmp_path, code):
    result = run(tmp_path, *python(f"print('line before'); raise SystemExit({code})"))
    assert result.returncode == code
    explanation = (tmp_path / "logs/cook.failed").read_text()
    assert f"Stage cook failed with return code {code}" in explanation
    assert "line before" in explanation
    assert "cook.log" in explanation
    assert "Hint: mend the cause and run the same command again" in explanation


def test_the_hint_knows_common_causes(tmp_path):
    run(tmp_path, *python("raise SystemExit('torch.OutOfMemoryError: CUDA out of memory. Tried')"))
    assert "lower the batch size" in (tmp_path / "logs/cook.failed").read_text()


def test_a_missing_program_is_named(tmp_path):
    result = run(tmp_path, "accelerate-that-is-not-there", "launch")
    assert result.returncode == 127
    explanation = (tmp_path / "logs/cook.failed").read_text()
    assert "accelerate-that-is-not-there: No such file or directory" in explanation
    assert "make clean setup" in explanation


def test_a_killed_program_is_told_apart(tmp_path):
    result = run(tmp_path, *python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert result.returncode == 128 + signal.SIGKILL
    assert "memory ran out" in (tmp_path / "logs/cook.failed").read_text()


def test_success_removes_the_explanation_of_an_earlier_failure(tmp_path):
    run(tmp_path, *python("raise SystemExit(3)"))
    assert run(tmp_path, *python("pass")).returncode == 0
    assert not (tmp_path / "logs/cook.failed").exists()


def test_a_signal_that_comes_while_the_program_starts_reaches_it(tmp_path, monkeypatch):
    popen, ready = subprocess.Popen, tmp_path / "ready"

    def start_slowly(*command, **options):
        child = popen(*command, **options)
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    code = (
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(ready)!r}).touch()\ntime.sleep(30)"
    )
    monkeypatch.setattr(subprocess, "Popen", start_slowly)
    assert run_stage.main(["--stage", "cook", "--log", str(tmp_path / "cook.log"), "--", *python(code)]) == 5


def test_a_stop_signal_reaches_the_program(tmp_path):
    code = (
        "import signal, sys, time\n"
        "def stop(*_):\n    print('saved'); sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready')\ntime.sleep(30)"
    )
    command = [sys.executable, PROGRAM, "--stage", "cook", "--log", tmp_path / "cook.log", "--", *python(code)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 5
    finally:
        process.kill()
    assert (tmp_path / "cook.log").read_text() == "ready\nsaved\n"


def test_arguments_arrive_as_they_are(tmp_path):
    strange = ["a b", "it's", '"', "$(id)", ";", "{x}", "--", "漢字", "\n"]
    run(tmp_path, *python("import sys; print(sys.argv[1:])"), *strange)
    assert (tmp_path / "logs/cook.log").read_text().strip() == str(strange)


def test_the_log_says_first_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    show = python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    run(tmp_path, *show, options=["--gpus", "1"])
    assert (tmp_path / "logs/cook.log").read_text() == f"on {socket.gethostname()}, devices 0\n0\n"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    result = run(tmp_path, *show, options=["--gpus", "2"])
    assert (tmp_path / "logs/cook.log").read_text() == "job 17 on n1, devices 0,1\n0,1\n"
    assert result.stderr == "job 17 on n1, devices 0,1\n0,1\n"
    run(tmp_path, *show)
    assert (tmp_path / "logs/cook.log").read_text() == "job 17 on n1\n0,1\n"


def test_gpus_that_are_not_there_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    result = run(tmp_path, *python("print('ran')"), options=["--gpus", "1", "--gpu_ids", "7"])
    assert result.returncode == 2
    assert "7: no such GPU; visible are 0,1" in (tmp_path / "logs/cook.failed").read_text()
    assert "ran" not in result.stderr


@pytest.mark.parametrize(
    ("code", "says", "goes_back"),
    [
        (75, f"train: {STATE_IS_SAVED}", True),
        # what a launcher makes of it
        (1, f"train: {STATE_IS_SAVED}", True),
        # it came no further
        (2, GOES_ON, False),
        (1, "no such file", False),
        (0, f"train: {STATE_IS_SAVED}", False),
    ],
)
def test_the_job_of_a_training_that_saved_its_state_goes_back_into_the_queue(
    tmp_path, monkeypatch, code, says, goes_back
):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$*" >> "$0.asked"\necho "JobState=RUNNING Comment=rule_train Power="\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    result = run(tmp_path, *python(f"print({says!r}); raise SystemExit({code})"))
    asked = (tmp_path / "scontrol.asked").read_text() if (tmp_path / "scontrol.asked").exists() else ""
    assert ("requeue 17" in asked) is goes_back
    # nothing has failed then
    assert (tmp_path / "logs/cook.failed").exists() is (code != 0 and not goes_back)
    assert result.returncode == (75 if code and GOES_ON in says else code)
