"""GPUs: which there are, and that no two stages have the same one. CUDA_VISIBLE_DEVICES stands for devices here."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwen_image import leases
from qwen_image.devices import candidates
from qwen_image.leases import lease_devices, private_folder
from qwen_image.problems import InputError

PROGRAM = Path(__file__).parents[2] / "scripts" / "run_stage.py"


@pytest.fixture(autouse=True)
def own_place(monkeypatch, tmp_path):
    """A home without leases, and no devices but those that a test names."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SLURM_JOB_ID", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    list_cards(monkeypatch, tmp_path, "")
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)


def list_cards(monkeypatch, tmp_path, listing):
    """Let nvidia-smi print this, or fail where it is empty."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{f'cat <<END{chr(10)}{listing}{chr(10)}END' if listing else 'exit 9'}\n")
    program.chmod(0o755)
    if str(program.parent) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def cards(monkeypatch, tmp_path):
    list_cards(monkeypatch, tmp_path, "0, GPU-aa11, 8192\n1, GPU-bb22, 24576\n2, GPU-bc33, 24576")


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def words(devices):
    return [device.word for device in devices]


# ---- which devices there are -----------------------------------------------------------------------------------------


def test_without_nvidia_smi_and_without_a_setting_there_are_none():
    assert candidates("all") == candidates("0") == candidates("cuda:1") == []


def test_the_largest_comes_first_as_cuda_counts_them_unless_it_is_told_otherwise(cards, monkeypatch):
    assert words(candidates("all")) == ["GPU-bb22", "GPU-bc33", "GPU-aa11"]
    assert [device.name for device in candidates("all")] == ["1", "2", "0"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert words(candidates("all")) == ["GPU-aa11", "GPU-bb22", "GPU-bc33"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("2,0", ["2", "0"]), ("GPU-bb22", ["GPU-bb22"]), ("MIG-1, 1", ["MIG-1", "1"]), ("1,1", ["1"]),
        ("0,-1,2", ["0"]), ("", []), ("-1", []), ("NoDevFiles", []),
    ],
)  # fmt: skip
def test_the_environment_limits_what_is_visible(cards, monkeypatch, setting, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert words(candidates("all")) == expected


def test_a_device_is_the_same_whatever_it_is_called(cards, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    (expected,) = {device.identity for device in candidates("all") if device.name == "1"}
    for name in ("1", "GPU-bb22", "GPU-bb"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        assert [device.identity for device in candidates("all")] == [expected]
    # two cards begin so
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    assert candidates("all")[0].identity != expected


def test_gpu_ids_choose_among_the_visible_ones(cards, monkeypatch):
    assert words(candidates("1,0")) == ["1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert words(candidates("2")) == ["2"]
    assert words(candidates("cuda:1")) == ["2"]
    assert words(candidates("cuda")) == words(candidates("auto")) == ["0", "2"]
    assert candidates("cuda:2") == candidates("cpu") == []
    for unknown in ("1", "0,7", "GPU-xyz", "first", ""):
        with pytest.raises(InputError, match="no such GPU; visible are 0,2"):
            candidates(unknown)


# ---- leases ----------------------------------------------------------------------------------------------------------


def test_the_program_sees_its_devices_and_no_others(two):
    with lease_devices(1, "all", "one", print) as first, lease_devices(1, "all", "other", print) as second:
        assert first.environment == {"CUDA_VISIBLE_DEVICES": "0"}
        assert second.environment == {"CUDA_VISIBLE_DEVICES": "1"}
    with lease_devices(2, "1,0", "both", print) as both:
        assert both.environment == {"CUDA_VISIBLE_DEVICES": "1,0"}


def test_a_device_named_by_its_place_is_lent_and_keeps_its_place(two):
    with lease_devices(1, "cuda:1", "one", print) as lease:
        assert (words(lease.devices), lease.environment) == (["1"], {})
        with lease_devices(1, "all", "other", print) as other:
            assert words(other.devices) == ["0"]


def test_no_device_is_wanted_or_known(two, monkeypatch):
    with lease_devices(0, "all", "one", print) as lease:
        assert (lease.devices, lease.environment, lease.descriptor) == ((), {}, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with lease_devices(2, "0,1", "one", print) as lease:
        assert (lease.devices, lease.environment, lease.descriptor) == ((), {}, None)
    assert not (Path(os.environ["XDG_CACHE_HOME"])).exists()


def test_more_than_there_are_is_an_error_and_no_endless_wait(two):
    with pytest.raises(InputError, match="3 are wanted, and there are 2: 0,1"), lease_devices(3, "all", "one", print):
        pass


def test_a_slurm_job_takes_what_it_was_given(two, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for gpus, gpu_ids in ((2, "all"), (2, "5,6")):
        with lease_devices(gpus, gpu_ids, "one", print) as lease:
            assert (words(lease.devices), lease.environment, lease.descriptor) == (["0", "1"], {}, None)
    # stages that share a job share its devices as those of a machine
    with lease_devices(1, "all", "one", print) as first, lease_devices(1, "all", "other", print) as second:
        assert words(first.devices) + words(second.devices) == ["0", "1"]
        # another job's 0 is another device
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        with lease_devices(1, "all", "one", print) as third:
            assert words(third.devices) == ["0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with lease_devices(1, "all", "one", print) as lease:
        assert lease.devices == ()


def test_many_that_want_one_or_two_of_two_all_get_them_and_never_the_same(two):
    users, most, served = {"0": 0, "1": 0}, [], []

    def use(count):
        for _ in range(4):
            with lease_devices(count, "all", f"{count}", lambda _: None) as lease:
                for word in words(lease.devices):
                    users[word] += 1
                most.append(max(users.values()))
                time.sleep(0.005)
                for word in words(lease.devices):
                    users[word] -= 1
                served.append(len(lease.devices))

    threads = [threading.Thread(target=use, args=(count,), daemon=True) for count in (2, 2, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(served) == [1] * 8 + [2] * 8
    assert max(most) == 1


def test_who_waits_says_so_once_and_for_whom(two):
    told = []
    with lease_devices(1, "1", "train in /home/me (process 7)", print) as first:
        release = threading.Timer(0.3, os.close, [os.dup(first.descriptor)])
        release.start()

    def wait():
        with lease_devices(2, "all", "one", told.append) as lease:
            told.append(words(lease.devices))

    wait()
    release.join()
    assert told == [
        "waiting for 2 of the GPUs 0,1, in use by train in /home/me (process 7)",
        ["0", "1"],
    ]


# ---- the lock --------------------------------------------------------------------------------------------------------


def start_stage(tmp_path, code):
    """Run Python code as a stage with both devices, and return once it has said something: the stage and the answer."""
    command = [sys.executable, PROGRAM, "--stage", "cook", "--log", tmp_path / "cook.log", "--gpus", "2", "--"]
    stage = subprocess.Popen([*command, sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert stage.stderr.readline().endswith(", devices 0,1\n")
    return stage, stage.stderr.readline()


def test_a_stage_that_was_killed_lends_to_nobody_what_its_program_still_uses(two, tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
        "import os; print(os.getpid(), worker.pid, flush=True)\ntime.sleep(120)"
    )
    stage, answer = start_stage(tmp_path, code)
    left = list(map(int, answer.split()))
    try:
        stage.kill()
        stage.wait()
        # the program, which has started the worker without any word about the lease
        os.kill(left.pop(0), signal.SIGKILL)
        told = []

        def say(text):
            told.append(text)
            os.kill(left.pop(), signal.SIGKILL)

        with lease_devices(1, "all", "other", say) as lease:
            assert words(lease.devices) == ["0"]
        assert "in use by cook in " in told[0]
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def test_a_lease_ends_with_its_stage(two, tmp_path):
    stage, answer = start_stage(tmp_path, "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    assert (answer, stage.wait(timeout=60)) == ("0,1\n", 0)
    assert (tmp_path / "cook.log").read_text().endswith(", devices 0,1\n0,1\n")
    with lease_devices(2, "all", "other", pytest.fail):
        pass


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    folder = private_folder()
    assert folder.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700


def test_where_the_home_cannot_be_used_another_folder_is(two, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".snakemake").mkdir()
    assert private_folder().is_relative_to(tmp_path / ".snakemake")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert private_folder().is_relative_to(tmp_path / "run")


def test_without_any_folder_no_gpu_is_taken_that_may_be_in_use(two, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="any of 0,1 may be in use"), lease_devices(1, "all", "one", pytest.fail):
        pass
    told = []
    for count, gpu_ids, expected in ((2, "all", "0,1"), (1, "1", "1")):
        with lease_devices(count, gpu_ids, "one", told.append) as lease:
            assert (lease.environment, lease.descriptor) == ({"CUDA_VISIBLE_DEVICES": expected}, None)
    assert len(told) == 2 and "GPUs are not reserved" in told[0]


def test_locks_as_nfs_has_them(two, monkeypatch):
    """Linux' NFS: a shared lock only of what is open for reading, an exclusive one only of what is for writing."""
    flock = fcntl.flock

    def nfs_flock(stream, operation):
        descriptor = stream if isinstance(stream, int) else stream.fileno()
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        needless = os.O_WRONLY if operation & fcntl.LOCK_SH else os.O_RDONLY
        if mode == needless:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", nfs_flock)
    with lease_devices(1, "all", "one", pytest.fail) as one, lease_devices(1, "all", "other", pytest.fail) as other:
        assert {*words(one.devices), *words(other.devices)} == {"0", "1"}


def test_fewer_gpus_than_processes_are_told_also_in_a_job(two, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    message = "GPUs of job 17: 3 are wanted, and there are 2: 0,1"
    with pytest.raises(InputError, match=message), lease_devices(3, "all", "one", pytest.fail):
        pass
