"""One training on two nodes: the bytes of the same processes on one machine, also when a node's process dies under way;
asked to stop, both nodes stop and the state is saved."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from cluster.driving import ROOT, Project, Scene, passed

from qwen_image.config import launch_arguments, resolve_config
from qwen_image.training.state import list_states

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

LAUNCH = [sys.executable, ROOT / "scripts" / "launch_training.py"]
STAGE = [sys.executable, ROOT / "scripts" / "run_stage.py", "--stage", "train", "--log", "stopped.log", "--"]
TRAINER = ["--", ROOT / "scripts" / "qwen_image_train_network.py", "--config_file", "results/train/demo/config.toml"]
FEW = 8


def on_two_nodes(scene: Scene):
    """Through the profile; the process on the second node is killed, and Snakemake's second try goes on."""
    project = scene.copy().forget_training()
    project.configure(num_processes=2, num_machines=2, max_train_steps=FEW, save_every_n_steps=2)
    run = project.start()
    run.until(lambda: project.steps() >= 3)
    os.kill(process_on_node(project, 1), signal.SIGKILL)
    assert run.wait() == 0, run.report()
    assert len(project.jobs("train")) == 2
    log = project.log("train/demo.log")
    assert "2 nodes (n1, n2), which meet at" in log and "cpu x 2" in log and "going on after step" in log, run.report()
    alone = subprocess.run(
        words(LAUNCH, options(project, num_machines=1), TRAINER, "--output_dir", "alone"), cwd=project.folder,
        env=project.cluster.env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    lora = Path("demo.safetensors")
    assert (project.folder / "results/models" / lora).read_bytes() == (project.folder / "alone" / lora).read_bytes()
    stop_it(project)


def stop_it(project: Project) -> None:
    """A stage that is asked to stop, as by its site, has every node save and end, and tells that it can go on."""
    endless = ["--output_dir", "stopped", "--max_train_steps", "100000"]
    command = words(STAGE, LAUNCH, options(project), TRAINER, endless)
    script = f"srun --ntasks=1 --nodes=1 {shlex.join(command)}; echo $? > code"
    (project.folder / "job.sh").write_text(f"#!/bin/sh\n{script}\n")
    job = subprocess.Popen(
        ["sbatch", "--wait", "--nodes=2", "--ntasks=2", "--cpus-per-task=1", "job.sh"],
        cwd=project.folder, env=project.cluster.env, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    table = project.folder / "stopped/demo.loss.csv.part"
    log = project.folder / "stopped.log"
    while not (table.exists() and len(table.read_text().splitlines()) > 2):
        assert job.poll() is None, log.read_text()
        time.sleep(0.1)
    (stage,) = [one.pid for one in processes(project) if "run_stage.py" in " ".join(one.cmdline()[:2])]
    os.kill(stage, signal.SIGTERM)
    job.wait(timeout=300)
    assert (project.folder / "code").read_text().strip() == "75", log.read_text()
    (state,) = list_states(project.folder / "stopped", "demo")[-1:]
    assert f"stopped after step {state.facts.step} of 100000" in log.read_text()
    assert not list((project.folder / "stopped").glob(".*")), "nobody owns the output any more"


def options(project: Project, **changes) -> list[str]:
    """The launcher's options, as the workflow gives them."""
    config = yaml.safe_load((project.folder / "my.yaml").read_text())
    return [*launch_arguments(resolve_config(config | changes)), "--main_process_port", "0"]


def words(*parts) -> list[str]:
    """Words and lists of words as one command line."""
    return [str(word) for part in parts for word in (part if isinstance(part, list) else [part])]


def process_on_node(project: Project, number: int) -> int:
    """The training process on a node of the project's training, counted from 0."""
    trainings = [one for one in processes(project) if "RANK" in one.environ()]
    # not those that it starts to read data
    trainings = [one for one in trainings if "RANK" not in one.parent().environ()]
    (found,) = [one.pid for one in trainings if one.environ()["SLURM_NODEID"] == str(number)]
    return found


def processes(project: Project) -> list[psutil.Process]:
    """The processes of the cluster that work in the project's folder."""
    found = []
    for pid in project.cluster.members():
        # others end meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            one = psutil.Process(pid)
            found += [one] if Path(one.cwd()) == project.folder and one.cmdline() else []
    return found


@pytest.mark.parametrize("scenario", [on_two_nodes])
def test_two_nodes(played, scenario):
    passed(played[scenario.__name__])
