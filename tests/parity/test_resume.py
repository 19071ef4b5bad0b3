"""A training that is killed, stopped or extended ends with the bytes of one that never was."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_data import write_tiny_training

from qwen_image.container import read_header
from qwen_image.training.state import list_states

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "scripts" / "qwen_image_train_network.py"
EVERY_STEP = 1e-9
"""save_state_every_n_minutes of a training that saves its state after each step."""
FULL = {
    "max_train_steps": 8, "network_dim": 2, "network_dropout": 0.2, "lr_scheduler": "cosine", "save_every_n_steps": 3,
    "save_every_n_epochs": 1, "save_last_n_epochs": 1, "save_state": True, "ema_decay": 0.9,
    "gradient_accumulation_steps": 2, "validation_split": 0.3, "validate_every_n_steps": 3,
    "save_state_every_n_minutes": EVERY_STEP, "max_data_loader_n_workers": 0,
}  # fmt: skip
"""Everything that a state must hold, and files of every kind."""


class Server:
    """Trainings that can be killed, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "fork_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def train(self, flags, log, *, kill_at=None, kill_after=None, number=signal.SIGKILL) -> tuple[int, int]:
        """Train; kill it at a call or after seconds. Returns the exit code and the number of calls."""
        command = {"flags": [str(flag) for flag in flags], "log": str(log), "kill_at": kill_at}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(pid, number)
        code, calls = map(int, self._process.stdout.readline().split())
        return code, calls

    def close(self) -> None:
        """End the server."""
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    items = [(name, (64, 64) if index % 3 else (96, 48), 4 + index % 4) for index, name in enumerate("abcdefghij")]
    return write_tiny_training(tmp_path_factory.mktemp("resume"), items=items, batch_size=1)


def files(folder) -> dict[str, bytes]:
    """Content of everything that a training leaves, but for its states."""
    assert not list(folder.rglob(".tmp-*")), "nothing temporary is left"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def launched(flags) -> subprocess.Popen:
    """A training of two processes, as the workflow starts it."""
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    return subprocess.Popen(
        [*launcher, str(PROGRAM), *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_rows(process, folder):
    """Wait until three steps are in the loss table."""
    table = folder / "lora.loss.csv.part"
    while process.poll() is None and not (table.exists() and len(table.read_text().splitlines()) > 3):
        time.sleep(0.01)


def steps_of(folder) -> list[int]:
    return [saved.facts.step for saved in list_states(folder, "lora")]


@pytest.fixture(scope="module")
def straight(server, tiny, tmp_path_factory):
    """The files of a training that was never stopped, its seconds and its number of operations on the disk."""
    # the first one of all takes longer than those that are to be killed
    assert server.train(tiny.flags(output_dir=tmp_path_factory.mktemp("first"), **FULL), os.devnull)[0] == 0
    folder = tmp_path_factory.mktemp("straight")
    start = time.monotonic()
    code, calls = server.train(tiny.flags(output_dir=folder, **FULL), folder.with_suffix(".log"))
    assert code == 0, folder.with_suffix(".log").read_text()
    found = files(folder)
    assert {"lora.safetensors", "lora-best.safetensors", "lora-step00000006.safetensors", "lora.loss.csv"} <= set(found)
    assert steps_of(folder)[-1] == 8
    return found, time.monotonic() - start, calls


def test_saving_states_changes_nothing(server, tiny, straight, tmp_path):
    flags = tiny.flags(output_dir=tmp_path / "m", **FULL | {"save_state_every_n_minutes": 0, "resume": "none"})
    assert server.train(flags, tmp_path / "log")[0] == 0
    assert files(tmp_path / "m") == straight[0]


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_it_ends_with_the_same_bytes(server, tiny, straight, tmp_path, seed):
    """Six kills each: three by the clock, three in the middle of an operation on the disk."""
    expected, seconds, calls = straight
    drawn = random.Random(seed)
    flags = tiny.flags(output_dir=tmp_path / "m", **FULL)
    killed = 0
    for turn in range(60):
        if killed < 3:
            code, _ = server.train(flags, tmp_path / "log", kill_after=drawn.uniform(0.1, seconds))
        elif killed < 6:
            # a training that goes on has fewer operations left
            code, _ = server.train(flags, tmp_path / "log", kill_at=drawn.randint(1, max(2, calls // (turn + 2))))
        else:
            break
        if code == 0:
            # it was done before it could be killed; the next one starts from nothing
            assert files(tmp_path / "m") == expected
            (tmp_path / "m").rename(tmp_path / f"done{turn}")
        else:
            assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
            killed += 1
    assert killed == 6
    assert server.train(flags, tmp_path / "log")[0] == 0, (tmp_path / "log").read_text()
    assert files(tmp_path / "m") == expected


def test_a_scheduler_that_signals_every_process_gets_a_state(tiny, tmp_path):
    """As scancel does it: the data-loader workers and every process of several are told as well."""
    flags = tiny.flags(output_dir=tmp_path, **FULL | {"max_data_loader_n_workers": 1, "max_train_steps": 500})
    process = launched(flags)
    wait_for_rows(process, tmp_path)
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    (step,) = map(int, re.findall(r"stopped after step (\d+) of 500: SIGTERM was received", errors))
    assert "the same command goes on from there" in errors
    assert steps_of(tmp_path)[-1] == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_it_saves_its_state_and_goes_on(server, tiny, straight, tmp_path, number):
    expected, seconds, _ = straight
    flags = tiny.flags(output_dir=tmp_path / "m", **FULL | {"save_state_every_n_minutes": 60})
    code, _ = server.train(flags, tmp_path / "log", kill_after=0.6 * seconds, number=number)
    text = (tmp_path / "log").read_text()
    if code == 0:
        pytest.skip("it was done before the signal came")
    assert code == 75, text
    assert f"{signal.Signals(number).name} was received" in text and "the same command goes on from there" in text
    (step,) = map(int, re.findall(r"stopped after step (\d+) of 8", text))
    assert step in steps_of(tmp_path / "m")
    assert not (tmp_path / "m" / "lora.safetensors").exists()
    assert server.train(flags, tmp_path / "log")[0] == 0
    assert f"going on after step {step} of 8" in (tmp_path / "log").read_text()
    assert files(tmp_path / "m") == expected


def test_a_deadline_that_is_near_stops_after_one_step(server, tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, *map(str, tiny.flags(output_dir=tmp_path, stop_before=5, **FULL))], text=True,
        capture_output=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SLURM_JOB_END_TIME": str(int(time.time()) + 60)},
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "stopped after step 1 of 8: the end of the job is near" in done.stderr
    assert steps_of(tmp_path) == [1]


def test_a_finished_training_does_nothing(server, tiny, straight, tmp_path):
    flags = tiny.flags(output_dir=tmp_path / "m", **FULL)
    assert server.train(flags, tmp_path / "log")[0] == 0
    # the checkpoint's hash may be remembered only now: a file of a moment ago might change within the clock's tick
    assert server.train(flags, tmp_path / "log")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()}
    (tmp_path / "log").unlink()
    assert server.train(flags, tmp_path / "log")[0] == 0
    assert "is finished; nothing to do" in (tmp_path / "log").read_text()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()} == before


def test_more_steps_extend_a_finished_training(server, tiny, tmp_path):
    constant = FULL | {"lr_scheduler": "constant", "save_every_n_epochs": None, "save_last_n_epochs": None}
    constant = {key: value for key, value in constant.items() if value is not None}
    short, long = constant | {"max_train_steps": 5}, constant
    assert server.train(tiny.flags(output_dir=tmp_path / "m", **short), tmp_path / "log")[0] == 0
    assert server.train(tiny.flags(output_dir=tmp_path / "m", **long), tmp_path / "log")[0] == 0
    assert "going on after step 5 of 8" in (tmp_path / "log").read_text()
    assert server.train(tiny.flags(output_dir=tmp_path / "whole", **long), tmp_path / "log")[0] == 0
    extended, whole = files(tmp_path / "m"), files(tmp_path / "whole")
    # files in between tell how long their training was to be, and the shorter one measured at its own end too
    for name in ("lora.safetensors", "lora-step00000006.safetensors", "lora.loss.csv"):
        assert extended[name] == whole[name]


def test_another_setting_starts_anew_and_says_which(server, tiny, tmp_path):
    flags = tiny.flags(output_dir=tmp_path / "m", **FULL | {"max_train_steps": 2})
    assert server.train(flags, tmp_path / "log")[0] == 0
    changed = tiny.flags(
        **FULL | {"output_dir": tmp_path / "m", "learning_rate": 0.002, "max_data_loader_n_workers": 1}
    )
    assert server.train(changed, tmp_path / "log")[0] == 0
    text = (tmp_path / "log").read_text()
    assert "starting anew" in text and "learning_rate was 0.001 and is 0.002" in text
    assert "max_data_loader_n_workers" not in text and "going on after" not in text
    assert (
        server.train(tiny.flags(**FULL | {"output_dir": tmp_path / "n", "learning_rate": 0.002}), tmp_path / "l")[0]
        == 0
    )
    assert (tmp_path / "m" / "lora.safetensors").read_bytes() == (tmp_path / "n" / "lora.safetensors").read_bytes()


def test_a_state_can_be_named_and_one_of_another_training_is_refused(server, tiny, straight, tmp_path):
    flags = FULL | {"output_dir": tmp_path / "m"}
    assert server.train(tiny.flags(**flags), tmp_path / "log")[0] == 0
    state = tmp_path / "m" / "lora-step00000003-state"
    assert server.train(tiny.flags(**flags | {"output_dir": tmp_path / "n", "resume": state}), tmp_path / "log")[0] == 0
    assert "going on after step 3 of 8" in (tmp_path / "log").read_text()
    assert (tmp_path / "n" / "lora.safetensors").read_bytes() == straight[0]["lora.safetensors"]
    (tmp_path / "log").unlink()
    other = flags | {"output_dir": tmp_path / "o", "resume": state, "network_dim": 3}
    assert server.train(tiny.flags(**other), tmp_path / "log")[0] == 2
    assert "network_dim was 2 and is 3" in (tmp_path / "log").read_text()
    other = flags | {"output_dir": tmp_path / "o", "resume": tmp_path}
    assert server.train(tiny.flags(**other), tmp_path / "log")[0] == 2
    assert "holds no state" in (tmp_path / "log").read_text()


def test_a_paused_training_whose_output_another_has_finished_writes_nothing_more(server, tiny, tmp_path):
    flags = tiny.flags(output_dir=tmp_path / "m", **FULL | {"max_train_steps": 60})
    paused = subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for_rows(paused, tmp_path / "m")
        paused.send_signal(signal.SIGSTOP)
        # its owner is alive, so somebody must say that it counts no more
        (tmp_path / "m" / ".lora.owner").unlink()
        assert server.train(flags, tmp_path / "log")[0] == 0, (tmp_path / "log").read_text()
        finished = files(tmp_path / "m"), steps_of(tmp_path / "m")
        paused.send_signal(signal.SIGCONT)
        _, errors = paused.communicate(timeout=120)
    finally:
        paused.kill()
    assert paused.returncode == 2 and "does not own its output any more" in errors, errors
    assert (files(tmp_path / "m"), steps_of(tmp_path / "m")) == finished


def test_states_go_with_their_checkpoints(server, tiny, tmp_path):
    keep = FULL | {"save_every_n_steps": 2, "save_last_n_steps": 2, "save_every_n_epochs": None, "max_train_steps": 7}
    keep = {key: value for key, value in keep.items() if value is not None} | {"save_last_n_steps_state": 4}
    keep.pop("save_last_n_epochs")
    assert server.train(tiny.flags(output_dir=tmp_path / "m", **keep), tmp_path / "log")[0] == 0, (
        tmp_path / "log"
    ).read_text()
    assert sorted(path.name for path in (tmp_path / "m").glob("lora-step*.safetensors")) == [
        "lora-step00000004.safetensors", "lora-step00000006.safetensors",
    ]  # fmt: skip
    assert steps_of(tmp_path / "m") == [2, 4, 6, 7]
    header = read_header(tmp_path / "m" / "lora.safetensors")
    assert header.metadata["ss_steps"] == "7"


def test_two_processes_that_are_killed_end_with_the_same_bytes(tiny, tmp_path):
    settings = {key: value for key, value in FULL.items() if not key.startswith("valid")} | {"max_train_steps": 10}

    def start(folder):
        return launched(tiny.flags(output_dir=folder, **settings))

    def kill_after_three_steps(folder):
        process = start(folder)
        wait_for_rows(process, folder)
        # the launcher first: it would end the others in its own way
        top = psutil.Process(process.pid)
        for one in [top, *top.children(recursive=True)]:
            one.kill()
        process.communicate(timeout=120)

    whole = start(tmp_path / "whole")
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    kill_after_three_steps(tmp_path / "m")
    assert 1 <= steps_of(tmp_path / "m")[-1] < 10
    last = start(tmp_path / "m")
    _, errors = last.communicate(timeout=240)
    assert last.returncode == 0 and "going on after step" in errors, errors
    assert files(tmp_path / "m") == files(tmp_path / "whole")
