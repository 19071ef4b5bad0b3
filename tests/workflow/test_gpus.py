"""Stages at once on a machine with two GPUs: each has one of its own. CUDA_VISIBLE_DEVICES stands for the GPUs here."""

import os
import textwrap

import pytest

# In every Python process of the run that finds this beside its path; of them the stages' programs write down when they
# had which device.
WITNESS = """
    import atexit, os, sys, time

    if any(word.endswith(("qwen_image_cache_latents.py", "qwen_image_train_network.py")) for word in sys.argv[:1]):
        def write(event):
            with open(os.environ["WITNESSED"], "a") as table:
                table.write(f"{time.monotonic()} {event} {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
        write("begins")
        atexit.register(write, "ends")
"""


@pytest.fixture
def witnessed(monkeypatch, tmp_path):
    """Return the table that tells when which program had which of the two devices."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(WITNESS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("WITNESSED", str(tmp_path / "table"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path / "table"


def test_each_process_of_a_training_has_a_gpu(project, witnessed):
    """Also where Snakemake knows of a single one, as profiles/default says, which is how many stages start at once."""
    project.configure(num_processes=2, max_train_steps=3)
    result = project.run()
    assert result.code == 0, result.text
    table = [line.split() for line in witnessed.read_text().splitlines()]
    assert [devices for _, event, devices in table if event == "begins"] == ["0,1", "0,1"]


def test_no_two_stages_have_the_same_gpu_at_once(project, witnessed):
    # another number of shards starts them all, and finds everything cached
    project.configure(caching_shards=4, caching_latent_device=None, max_train_steps=3)
    # more at a time than there are devices
    result = project.run("--resources", "local_gpu=4", "--set-threads", "cache_latents=1", cores=4)
    assert result.code == 0, result.text

    lines = [line.split() for line in witnessed.read_text().splitlines()]
    table = sorted(lines, key=lambda line: float(line[0]))
    assert len(table) == 2 * 5
    using = set()
    for _, event, device in table:
        assert device in ("0", "1")
        assert (device in using) == (event == "ends"), table
        using ^= {device}
    assert {device for _, _, device in table} == {"0", "1"}
    logs = (project.folder / "results/logs/cache_latents").rglob("*-of-4.log")
    texts = [log.read_text() for log in logs if log.stat().st_mtime >= project.started]
    assert len(texts) == 4
    assert all(f"on {os.uname().nodename}, devices " in text for text in texts)
    assert any("waiting for 1 of the GPUs 0,1, in use by cache_latents in " in text for text in texts)
