"""One training at a time writes an output: who has it, who waits, who takes over, and who must stop."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwen_image.files import remove_abandoned
from qwen_image.problems import InputError
from qwen_image.training import owner, ownership
from qwen_image.training.owner import Owner, is_running, this_process
from qwen_image.training.ownership import take

SCRIPTS = Path(__file__).parents[2] / "scripts"
QUICK = {
    "RENEW_SECONDS": 0.05, "TRUSTED_SECONDS": 0.05, "SILENT_SECONDS": 0.6, "SILENT_JOB_SECONDS": 0.3,
    "PATIENCE_SECONDS": 100.0, "LOOK_SECONDS": 0.02, "ASK_SECONDS": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in QUICK.items():
        monkeypatch.setattr(ownership, name, seconds)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lora.owner"


@pytest.fixture
def elsewhere(monkeypatch):
    """This process on another machine than those that it starts."""
    monkeypatch.setattr(owner, "_place", lambda: "another machine")


@pytest.fixture
def start():
    """Starts Python programs with a quick `ownership`; what is left of them is killed at the end."""
    started = []

    def run(code, *arguments):
        head = f"from qwen_image.training import ownership\nfor pair in {QUICK}.items(): setattr(ownership, *pair)\n"
        process = subprocess.Popen(
            [sys.executable, "-c", head + code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


HOLD = """
import sys, time
from pathlib import Path
held = ownership.take(Path(sys.argv[1]), lambda: None)
print("has it", flush=True)
time.sleep(float(sys.argv[2]))
held.release()
"""
WRITE = """
import sys, time
from pathlib import Path
held = ownership.take(Path(sys.argv[1]), lambda: None)
count = 0
while True:
    held.check()
    count += 1
    Path(sys.argv[2]).write_text(str(count))
    print(count, flush=True)
    time.sleep(0.005)
"""


def holder(start, path, seconds=60):
    process = start(HOLD, path, seconds)
    assert process.stdout.readline() == "has it\n", process.communicate()[1]
    return process


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.5)


def never():
    return None


# ---- taking, waiting, releasing --------------------------------------------------------------------------------------


def test_it_names_its_process_and_leaves_nothing_behind(path):
    held = take(path, never)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.check()
    held.release()
    assert list(path.parent.iterdir()) == []


def test_it_takes_next_to_no_time(path):
    start = time.perf_counter()
    held = take(path, never)
    for _ in range(100):
        held.check()
    held.release()
    assert time.perf_counter() - start < 1  # some milliseconds, on a machine that is not busy


def test_who_finds_a_live_owner_waits_and_then_says_who_it_is(path, start, caplog, impatient):
    process = holder(start, path)
    with pytest.raises(InputError) as caught:
        take(path, never)
    message = str(caught.value)
    assert f"process {process.pid} on " in message and f"ps -p {process.pid}" in message and f"rm {path}" in message
    assert [record.message for record in caplog.records if "waiting for it to end" in record.message]
    assert path.exists()


def test_an_owner_that_ends_meanwhile_is_followed(path, start):
    process = holder(start, path, 0.5)
    take(path, never).release()
    assert process.wait(timeout=60) == 0


def test_asked_to_stop_while_waiting_it_stops(path, start, caplog):
    caplog.set_level(logging.INFO, logger="qwen_image")
    holder(start, path)
    assert take(path, lambda: "SIGTERM was received") is None
    assert "SIGTERM was received; the same command goes on from there" in caplog.text


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot be made"):
        take(tmp_path / "no such folder" / ".lora.owner", never)


def assert_taken_and_released(path):
    """What the file says is followed at once: the output is this process's, and then nobody's."""
    before = path.read_text()
    mine = take(path, never)
    assert json.loads(path.read_text())["pid"] == os.getpid() and path.read_text() != before
    mine.release()
    assert list(path.parent.iterdir()) == []


# ---- taking over -----------------------------------------------------------------------------------------------------


def test_an_owner_that_was_killed_is_followed_at_once(path, start, caplog):
    process = holder(start, path)
    process.send_signal(signal.SIGKILL)
    # nobody has waited for it: it is a zombie
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    begin = time.monotonic()
    take(path, never).release()
    assert time.monotonic() - begin < QUICK["SILENT_JOB_SECONDS"] + 5
    assert f"process {process.pid} on" in caplog.text and "is gone" in caplog.text


def test_a_number_that_another_process_has_now_is_no_owner(path):
    there = this_process()
    path.write_text(json.dumps(vars(there) | {"started": there.started - 1}))
    assert_taken_and_released(path)


def test_on_another_machine_one_that_renews_nothing_is_gone(path, start, elsewhere):
    process = holder(start, path)
    process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    take(path, never).release()
    assert time.monotonic() - begin >= QUICK["SILENT_SECONDS"] - 0.1


def test_on_another_machine_one_that_renews_stays(path, start, elsewhere, monkeypatch):
    # an owner on a busy machine may come to nothing for a while
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 2.5)
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 3.0)
    holder(start, path)
    with pytest.raises(InputError, match="writes the same output"):
        take(path, never)


def test_time_in_which_nobody_looked_is_no_silence(path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(ownership, "_now", lambda: clock[0])
    watch, found = ownership._Watch(), ownership._Found(b"{}", 1)
    assert not watch.is_gone(found)
    clock[0] += 3600
    assert not watch.is_gone(found)


def test_one_that_was_killed_while_it_made_the_file_is_gone(path):
    path.touch()
    assert_taken_and_released(path)


def test_of_several_that_take_over_one_wins(path, start):
    """Many owners die one after the other, four processes at a time take over, and never two have it."""
    code = """
import os, sys, time
from pathlib import Path
path, inside = Path(sys.argv[1]), Path(sys.argv[2])
ownership.PATIENCE_SECONDS, ownership.LOOK_SECONDS = 60, 0.001
for turn in range(15):
    child = os.fork()
    if child == 0:
        held = ownership.take(path, lambda: None)
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            time.sleep(0.003)
            held.check()
            inside.unlink()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)  # as if killed: the file stays
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""
    processes = [start(code, path, path.with_name("inside")) for _ in range(4)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, output + errors
    assert not list(path.parent.glob(".tmp-*"))


def test_a_file_that_is_another_ones_by_now_is_put_back(path):
    stale = ownership._Found(b"an earlier owner's", 1)
    path.write_text("a newer owner's")
    renames = []
    original = ownership._look

    def look_before_it_changes(where):
        renames.append(where)
        return stale if len(renames) == 1 else original(where)

    ownership._look = look_before_it_changes
    try:
        ownership._break(path, stale)
    finally:
        ownership._look = original
    assert path.read_text() == "a newer owner's"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_killed_while_it_takes_over_it_leaves_what_the_next_clears_away(path, monkeypatch):
    path.write_text("an owner that is gone")
    stale = ownership._look(path)

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        ownership._break(path, stale)
    assert len(list(path.parent.iterdir())) == 1
    remove_abandoned(path.parent)
    assert not list(path.parent.iterdir())


# ---- losing it -------------------------------------------------------------------------------------------------------


def test_a_paused_owner_that_lost_it_stops_before_it_writes(path, start, elsewhere, tmp_path):
    numbers = tmp_path / "numbers"
    process = start(WRITE, path, numbers)
    while process.stdout.readline() != "5\n":
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGSTOP)
    held = take(path, never)
    before = numbers.read_text()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and f"now process {os.getpid()} on" in errors
    assert numbers.read_text() == before
    held.check()
    held.release()
    assert not path.exists()


def test_an_owner_whose_file_was_removed_stops_and_leaves_the_next_ones(path):
    held = take(path, never)
    path.unlink()
    time.sleep(2 * QUICK["TRUSTED_SECONDS"])
    with pytest.raises(InputError, match="its file is gone"):
        held.check()
    path.write_text("another's")
    held.release()
    assert path.read_text() == "another's"


def test_a_file_that_was_taken_by_mistake_and_comes_back_ends_nothing(path):
    held = take(path, never)
    aside = path.with_name("aside")
    path.rename(aside)
    threading.Timer(0.2, aside.rename, [path]).start()
    time.sleep(2 * QUICK["TRUSTED_SECONDS"])
    held.check()
    held.release()
    assert not path.exists()


# ---- what SLURM says -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(monkeypatch, tmp_path):
    """An owner in a job on another machine, and what squeue answers about it."""
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answers(script, **changes):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "squeue").chmod(0o755)
        there = vars(this_process()) | {"place": "another machine", "job": "12", "cluster": "big"}
        return Owner(**there | changes)

    return answers


GONE = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$2" = --jobs=12 ] && echo RUNNING', True), ("echo COMPLETING", True), ("echo PENDING", False),
        ("true", False), (GONE, False), (DOWN, None),
    ],
)  # fmt: skip
def test_a_job_is_asked_for(job, script, expected):
    assert is_running(job(script)) is expected


def test_what_slurm_says_counts_for_jobs_of_ones_own_on_this_cluster(job, monkeypatch):
    assert is_running(job(GONE, user=os.getuid() + 1)) is None
    assert is_running(job("echo RUNNING", user=os.getuid() + 1)) is True
    assert is_running(job("echo RUNNING", cluster="small")) is None
    # run again under its number, it may run twice for a moment
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert is_running(job("echo RUNNING")) is None
    monkeypatch.setenv("PATH", "")
    assert is_running(job("echo RUNNING", job="13")) is None


def test_a_job_that_slurm_has_keeps_its_output_though_it_renews_nothing(job, path, impatient):
    path.write_text(job("echo SUSPENDED").text())
    with pytest.raises(InputError, match=r"SLURM job 12 \(process (?s:.*) `squeue --job 12`"):
        take(path, never)


def test_a_job_that_is_over_is_followed_once_nothing_more_comes_from_it(job, path):
    path.write_text(job(GONE).text())
    begin = time.monotonic()
    take(path, never).release()
    assert time.monotonic() - begin >= QUICK["SILENT_JOB_SECONDS"] - 0.1
