"""The workflow's SLURM profile on a real, throwaway cluster of two nodes; no test here mocks a SLURM command."""

import hashlib
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster.slurm import NODES, Cluster

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

PROJECT = Path(__file__).resolve().parents[2]

# The throwaway cluster has no accounting, and its jobs take seconds: by the eighth, most have ended. When none has, the
# plugin waits ten seconds longer each time.
PROFILE = [
    *("--profile", PROJECT / "profiles" / "slurm"),
    *("--slurm-status-command", "squeue", "--slurm-no-account", "--slurm-init-seconds-before-status-checks", "8"),
]


@pytest.mark.parametrize("node", NODES)
def test_node_runs_a_job(cluster: Cluster, node: str):
    job = cluster.run("srun", "-w", node, "printenv", "SLURMD_NODENAME")
    assert job.stdout.strip() == node, job.stderr + cluster.logs()


def test_gpus_are_assigned(cluster: Cluster):
    job = cluster.run("srun", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert job.stdout.strip() == "0,1", job.stderr + cluster.logs()


def test_workflow_through_the_profile(cluster: Cluster, tmp_path: Path):
    # The folder's name must reach the jobs as it is.
    folder = tmp_path / 'my "$HOME"; {folder}'
    # Snakemake adds profiles/default beside a Snakefile to any other profile: the pair is what users get.
    shutil.copytree(PROJECT / "profiles" / "default", folder / "profiles" / "default")
    snakefile = """
        rule all:
            input: "n1.txt", "n2.txt"

        rule land:
            output: "{node}.txt"
            resources: gpu=2, local_gpu=2, slurm_extra=lambda wildcards: f"--nodelist={wildcards.node}"
            shell: 'echo "$SLURM_JOB_ID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" > {output:q}'

        rule fail:
            output: "never.txt"
            shell: "exit 3"
    """
    (folder / "Snakefile").write_text(textwrap.dedent(snakefile))

    first = snakemake(cluster, folder, *PROFILE, "--retries", "0", "all", "never.txt")
    assert first.returncode == 1, report(cluster, first)
    assert first.stderr.count("status is: 'FAILED'") == 1, report(cluster, first)
    assert not (folder / "never.txt").exists()
    # The other jobs did not suffer, and each was a SLURM job of its own, on its node, with the GPUs it asked for.
    landed = [(folder / f"{node}.txt").read_text().split() for node in NODES]
    job_ids, nodes, gpus = zip(*landed, strict=True)
    assert len(set(job_ids)) == 2
    assert (nodes, gpus) == (NODES, ("0,1", "0,1"))

    second = snakemake(cluster, folder, *PROFILE)
    assert second.returncode == 0, report(cluster, second)
    assert "Nothing to be done" in second.stderr, report(cluster, second)


def test_demo_through_the_profile(cluster: Cluster, tmp_path: Path):
    """The demo as SLURM jobs on both nodes: every cached file and the LoRA, byte by byte, as on one machine."""
    # The same number of threads a job on both sides: a sum's last bits depend on how it is divided.
    runs = {"local": ["--cores", "2"], "slurm": [*PROFILE, "--max-threads", "2"]}
    # A quarter of the demo's epochs, for the time it takes.
    common = ["--snakefile", PROJECT / "Snakefile", "--config", "max_train_epochs=1"]
    folders = {name: tmp_path / name for name in runs}
    for folder in folders.values():
        folder.mkdir()
    # Side by side: most of a SLURM run's time goes by between two looks at its jobs.
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda name: snakemake(cluster, folders[name], *runs[name], *common), runs))

    for run in ended:
        assert run.returncode == 0, report(cluster, run)
    local, slurm = (file_hashes(folder) for folder in folders.values())
    assert "results/models/demo.safetensors" in local
    assert sum(name.startswith("results/cache/demo/") for name in local) >= 2 * 16
    assert slurm == local

    jobs = completed_jobs(cluster)
    caches = {f"rule_{stage}_wildcards_1" for stage in ("cache_latents", "cache_text_encoder_outputs")}
    assert {*caches, "rule_train"} <= jobs.keys()
    assert {jobs[cache] for cache in caches} == set(NODES)

    again = snakemake(cluster, folders["slurm"], *runs["slurm"], *common)
    assert again.returncode == 0, report(cluster, again)
    assert "Nothing to be done" in again.stderr, report(cluster, again)


def snakemake(cluster: Cluster, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run this interpreter's snakemake in `folder`, with the throwaway cluster as the only one it can see."""
    return cluster.run(sys.executable, "-m", "snakemake", *arguments, cwd=folder, timeout=300)


def report(cluster: Cluster, run: subprocess.CompletedProcess) -> str:
    """Return what a failed assertion should show: Snakemake's output and the daemons' logs."""
    return f"{run.stdout}\n{run.stderr}\n{cluster.logs()}"


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every .safetensors file under results/, by its path in `folder`."""
    files = sorted((folder / "results").rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def completed_jobs(cluster: Cluster) -> dict[str, str]:
    """Return the node that each successful job ran on, by the plugin's name: rule_<rule>, _wildcards_<shard>."""
    jobs = cluster.run("squeue", "--states=COMPLETED", "--noheader", "--format=%k %N")
    return dict(line.split() for line in jobs.stdout.splitlines())
