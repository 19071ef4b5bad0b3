"""The stage runner: output shown and kept, failures explained, exit codes passed on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "run_stage.py"


def run(tmp_path, *command, **more):
    return subprocess.run(
        [sys.executable, PROGRAM, "--stage", "cook", "--log", tmp_path / "logs/cook.log", "--", *command],
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
