"""A training that is stopped in the real workflow: what is said, what is kept, and that the same command goes on."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest

STEPS = 40


def start(project):
    """Start the workflow as a terminal does, in a process group of its own; return once it has trained some steps."""
    log = (project.folder / "output").open("wb")
    process = subprocess.Popen(
        [str(part) for part in project.command()], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    table = project.folder / "results/models/demo.loss.csv.part"
    while process.poll() is None and not (table.exists() and len(table.read_text().splitlines()) > 3):
        time.sleep(0.02)
    assert process.poll() is None, (project.folder / "output").read_text()
    return process


def stage_of(process):
    """The stage runner of the training: what a scheduler signals."""
    (stage,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(word.endswith("run_stage.py") for word in child.cmdline()[:3]) and child.name().startswith("python")
    ]
    return stage


@pytest.fixture
def longer(project):
    """Something to train for a while, and the LoRA of a run before."""
    # it is about processes
    project.python = None
    project.configure(max_train_steps=STEPS, save_state_every_n_minutes=60)
    return project


@pytest.mark.parametrize("how", ["stage", "terminal"])
def test_the_same_command_goes_on_and_the_lora_is_that_of_an_undisturbed_run(longer, how, undisturbed):
    models = longer.folder / "results/models"
    before = (models / "demo.safetensors").read_bytes()
    process = start(longer)
    if how == "stage":
        stage_of(process).send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0
    text = (longer.folder / "output").read_text()
    # said as it happens, and once more by the explanation of the failed stage
    (done,) = set(map(int, re.findall(rf"stopped after step (\d+) of {STEPS}", text)))
    assert 3 <= done < STEPS
    if how == "stage":
        explanation = text[text.rindex("Stage train failed with return code 75") :]
        assert "saved its state; the same command goes on from there" in explanation
    assert (models / "demo.safetensors").read_bytes() == before, "the LoRA of the last good run is kept"

    result = longer.run()
    assert result.code == 0, result.text
    assert f"going on after step {done} of {STEPS}" in result.text
    assert (models / "demo.safetensors").read_bytes() == undisturbed
    assert longer.run().nothing_done


@pytest.fixture(scope="module")
def undisturbed(finished, tmp_path_factory):
    """The LoRA's bytes of a run of as many steps that nobody stopped."""
    project = finished[0].copy(tmp_path_factory.mktemp("undisturbed") / "project")
    project.configure(max_train_steps=STEPS, save_state_every_n_minutes=60)
    result = project.run()
    assert result.code == 0, result.text
    return (project.folder / "results/models/demo.safetensors").read_bytes()
