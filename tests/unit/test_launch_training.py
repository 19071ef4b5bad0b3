"""How a training's processes are started: as words of a command line. That they train is shown on a cluster."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import launch_training
import pytest

from qwen_image.config import check_config
from qwen_image.problems import InputError

PROGRAM = Path(launch_training.__file__)
TRAINER = ["scripts/qwen_image_train_network.py", "--config_file", "train.toml"]
TWO = ["--quiet", "--num_processes", "4", "--num_machines", "2", "--main_process_port", "0"]
LISTED = "echo JobId=12 ReqNodeList=none NodeList=a[1-3] BatchHost=a1"
NODES = '[ "$3" = "a[1-3]" ] && echo a1 && echo a2 && echo a3'
NODE = "echo NodeName=a1 NodeAddr=localhost NodeHostName=a1"


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "SRUN", "SBATCH")):
            monkeypatch.delenv(name)


@pytest.fixture
def became(monkeypatch):
    """What the process became."""
    commands = []
    monkeypatch.setattr(os, "execvp", lambda _, command: commands.append(command))
    return commands


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A job of three nodes, as `scontrol` and `srun` of its own show it; what srun was called with is written down."""

    def answers(hostnames=NODES, node=NODE, srun="echo 15999", listed=LISTED):
        scripts = {
            "scontrol": f'case "$2$3" in hostnames*) {hostnames};; node*) {node};; showjob) {listed};; esac',
            "srun": f'printf "%s\\n" "$@" > {tmp_path}/srun.$#; env > {tmp_path}/env; {srun}',
        }
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "a1")
        return tmp_path

    return answers


def steps(folder):
    """The calls of srun, by the number of their words."""
    return [
        path.read_text().splitlines() for path in sorted(folder.glob("srun.*"), key=lambda path: int(path.suffix[1:]))
    ]


def test_on_one_machine_it_becomes_the_launcher(became):
    launch = ["--quiet", "--num_processes", "2", "--multi_gpu", "--gpu_ids", "0,1"]
    launch_training.main([*launch, "--", *TRAINER])
    (command,) = became
    assert command == [*launch_training.LAUNCHER, *launch, *TRAINER]


def test_a_file_of_the_users_is_no_module_of_the_launchers(tmp_path):
    for name in ("accelerate", "code", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    result = subprocess.run(
        [sys.executable, PROGRAM, "--num_processes", "1", "--", "-h"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "of the user" not in result.stderr and "Accelerate launch" in result.stdout, result.stderr


def test_a_launcher_that_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.setattr(launch_training, "LAUNCHER", ["no-such-launcher"])
    assert launch_training.main(["--", *TRAINER]) == 127
    assert "no-such-launcher: No such file or directory" in capsys.readouterr().err


def test_options_of_the_program_are_not_its_own(became):
    launch_training.main(["--", *TRAINER, "--num_machines", "2"])
    assert became[0][-2:] == ["--num_machines", "2"]


def test_without_slurm_it_says_how_to_start_it_by_hand():
    with pytest.raises(InputError, match=r"this is no SLURM job(?s:.*)--machine_rank"):
        launch_training.main([*TWO, "--", *TRAINER])


def test_started_by_hand_on_each_machine_it_is_what_accelerate_does(became):
    launch = [*TWO, "--machine_rank", "1", "--main_process_ip", "a1"]
    launch_training.main([*launch, "--", *TRAINER])
    assert became == [[*launch_training.LAUNCHER, *launch, *TRAINER]]


@pytest.mark.parametrize("rank", [[], ["--machine_rank", "0"]])
def test_processes_that_cannot_be_shared_evenly_are_refused(rank):
    with pytest.raises(InputError, match="3 processes cannot be shared evenly by 2 machines"):
        launch_training.main(["--num_processes", "3", "--num_machines", "2", *rank, "--", *TRAINER])


def test_the_configuration_refuses_them_too():
    paths = dict.fromkeys(("dataset_config", "dit", "vae", "text_encoder", "output_dir", "output_name"), "x")
    found = check_config(paths | {"num_processes": 3, "num_machines": 2}, "my.yaml")
    assert [problem.key for problem in found] == ["num_processes"] and "shared evenly" in found[0].found
    assert check_config(paths | {"num_processes": 4, "num_machines": 2}, "my.yaml") == []


def test_in_a_job_one_launcher_starts_on_each_node(job, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    folder = job()
    assert launch_training.main([*TWO, "--", *TRAINER]) == 0
    port, training = steps(folder)
    assert "--nodelist=a1" in port and port[-1] == "--free_port"
    assert {"--nodelist=a1,a2", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8"} <= set(training)
    assert {"--overlap", "--input=none", "--kill-on-bad-exit=1", "--wait=0"} <= set(training)
    meeting = ["--main_process_ip", "localhost", "--main_process_port", "15999"]
    assert training[-len([*TWO, *meeting, *TRAINER]) :] == [*TWO, *meeting, *TRAINER]
    assert "2 nodes (a1, a2), which meet at localhost:15999" in capfd.readouterr().err


def test_a_port_that_was_chosen_is_taken(job):
    folder = job()
    launch_training.main([*TWO[:-1], "29999", "--main_process_ip", "10.0.0.1", "--", *TRAINER])
    (training,) = steps(folder)
    assert "10.0.0.1" in training and training[-len(TRAINER) - 1] == "29999"


def test_a_new_step_is_not_shaped_by_the_one_around_it(job, monkeypatch):
    shaping = {"SLURM_NNODES", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_CPU_BIND", "SRUN_CPUS_PER_TASK"}
    for name in (*shaping, "SLURM_JOB_END_TIME", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    folder = job()
    launch_training.main([*TWO, "--", *TRAINER])
    passed_on = {line.partition("=")[0] for line in (folder / "env").read_text().splitlines()}
    assert {"SLURM_JOB_END_TIME", "SLURM_JOB_ID", "HF_HUB_OFFLINE", "PET_SIGNALS_TO_HANDLE"} <= passed_on
    assert not shaping & passed_on


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"hostnames": "echo a1"}, "the SLURM job has 1 (a1)"),
        ({"node": "echo NodeAddr=no.such.host.invalid"}, "node a1 cannot be found as no.such.host.invalid"),
        ({"hostnames": "echo cannot contact >&2; exit 1"}, "scontrol show hostnames a[1-3] failed: cannot contact"),
    ],
)
def test_what_is_wrong_with_a_job_is_told(job, answers, message):
    job(**answers)
    with pytest.raises(InputError) as caught:
        launch_training.main([*TWO, "--", *TRAINER])
    assert message in str(caught.value)


def test_a_node_that_fails_fails_all(job):
    job(srun='[ "$#" -lt 12 ] && echo 15999 || exit 3')
    assert launch_training.main([*TWO, "--", *TRAINER]) == 3


def test_asked_to_stop_it_asks_the_nodes_and_waits(job, tmp_path):
    """srun would kill what it started on SIGTERM; SIGUSR1 it passes on."""
    script = """[ "$#" -lt 12 ] && echo 15999 && exit
        trap 'echo asked; exit 9' USR1
        trap 'echo killed; exit 1' TERM
        echo ready; while :; do sleep 0.05; done"""
    job(srun=script)
    process = subprocess.Popen(
        [sys.executable, PROGRAM, *TWO, "--", *TRAINER], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (output, process.returncode) == ("asked\n", 9)


def test_a_free_port_is_one_that_nobody_listens_on(capsys):
    assert launch_training.main(["--free_port"]) == 0
    port = int(capsys.readouterr().out)
    with socket.socket() as probe:
        probe.bind(("", port))
