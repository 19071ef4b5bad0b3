"""The workflow on the demo in folders of its own, through the SLURM profile on the throwaway cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from cluster.slurm import Cluster
from demo_project import demo_config, hashes, write_config

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "profiles" / "slurm"
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
PICTURES = 18
STEPS = 16
# seconds; only a test that fails waits that long
PATIENCE = 900

# The throwaway cluster has no accounting, and its jobs take seconds: by the second look some have ended. When none has,
# the plugin waits ten seconds longer each time.
ON_THE_CLUSTER = [
    *("--profile", PROFILE, "--slurm-no-account", "--slurm-status-command", "squeue"),
    *("--slurm-init-seconds-before-status-checks", "2"),
]
# a sum's last bits depend on how it is divided, so both sides have the same threads; one, for many run side by side
THREADS = ["--max-threads", "1"]


@dataclass(frozen=True)
class Scene:
    """What a scenario starts from."""

    cluster: Cluster
    """The one that all share."""
    _finished: Future[Project]
    folder: Path
    """Its own; not there yet."""

    def finished(self) -> Project:
        """Return the project that ran on this machine, without SLURM. Do not change it: copy it."""
        return self._finished.result()

    def copy(self, cluster: Cluster | None = None) -> Project:
        """Return the scenario's own copy, with file times and Snakemake's memory, on the shared or another cluster."""
        shutil.copytree(self.finished().folder, self.folder, symlinks=True)
        return Project(self.folder, cluster or self.cluster)


class Project:
    """A working directory with a configuration of its own."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder.resolve()
        self.cluster = cluster
        self.env = dict(cluster.env)
        self.folder.mkdir(parents=True, exist_ok=True)

    def configure(self, **changes) -> None:
        """Write my.yaml: the demo's configuration with few steps, two shards and changes; None removes a key."""
        config = demo_config()
        config |= {"caching_shards": 2, "max_train_epochs": None, "max_train_steps": STEPS, "logging_dir": None}
        # states, for what is killed without notice
        config |= {"save_every_n_epochs": None, "save_every_n_steps": 4, "save_state": True}
        write_config(self.folder / "my.yaml", config | changes)

    def forget_training(self) -> Project:
        """Remove what was trained."""
        for name in ("models", "train"):
            shutil.rmtree(self.folder / "results" / name)
        return self

    def forget_latents(self, shard: int = 1) -> Project:
        """Remove what was trained, and one shard's latents with its manifest."""
        manifests = self.folder / "results/manifests/dataset"
        manifest = manifests / f"shards/latents.{shard}-of-2.tsv"
        for name in re.findall(r"[^/\s]+_qi\.safetensors", manifest.read_text()):
            (cached,) = (self.folder / "results/cache").rglob(name)
            cached.unlink()
        for made in (manifest, *manifests.glob("latents.*")):
            made.unlink()
        return self.forget_training()

    def command(self, *more: str | Path) -> list[str | Path]:
        """Return the command line that a user types here, with the throwaway cluster's options."""
        return [*SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--configfile", "my.yaml", *THREADS, *more]

    def start(self, *more: str | Path) -> Run:
        """Start the workflow through the profile."""
        return Run(self, self.command(*ON_THE_CLUSTER, *more))

    def run(self, *more: str | Path) -> Run:
        """Run the workflow through the profile to its end, which must be a good one."""
        run = self.start(*more)
        assert run.wait() == 0, run.report()
        return run

    def run_locally(self) -> Run:
        """Run the workflow on this machine to its end, which must be a good one."""
        run = Run(self, self.command("--cores", "2", "--resources", "local_gpu=2"))
        assert run.wait() == 0, run.report()
        return run

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every cache file and LoRA, by its path."""
        return hashes(self.folder / "results", ("cache/**/*.safetensors", "models/*.safetensors"))

    def latents(self) -> int:
        """Return how many latents are cached."""
        return len(list((self.folder / "results/cache").rglob("*_qi.safetensors")))

    def steps(self) -> int:
        """Return how many steps the training under way has done, those before an interruption included."""
        table = self.folder / "results/models/demo.loss.csv.part"
        return len(table.read_text().splitlines()) - 1 if table.exists() else 0

    def log(self, name: str) -> str:
        """Return a stage's log."""
        return (self.folder / "results/logs" / name).read_text()

    def jobs(self, rule: str, states: str = "all") -> list[str]:
        """Return the numbers of the rule's SLURM jobs that were submitted here, oldest first."""
        listing = self.cluster.run("squeue", f"--states={states}", "--noheader", "--format=%A %k %Z").stdout
        jobs = [line.split(" ", 2) for line in listing.splitlines()]
        return sorted(
            (number for number, comment, folder in jobs if f"{comment}_".startswith(f"rule_{rule}_")
             and Path(folder) == self.folder),
            key=int,
        )  # fmt: skip


class Run:
    """A Snakemake that runs in a project."""

    def __init__(self, project: Project, command: list[str | Path]) -> None:
        self.project = project
        self.output = project.folder / f"output-{time.monotonic_ns()}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=project.folder, env=project.env, stdout=output, stderr=output
            )

    def text(self) -> str:
        """Return what was printed so far."""
        return self.output.read_text(errors="replace")

    def wait(self) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(timeout=PATIENCE)

    def until(self, condition: Callable[[], object], *, every: float = 0.1) -> None:
        """Wait for a condition that comes true while Snakemake runs; look every so many seconds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.report()
            time.sleep(every)

    def report(self) -> str:
        """Return what a failed assertion should show: Snakemake's output and the daemons' logs."""
        return f"{self.text()}\n{self.project.cluster.logs()}"


def passed(scenario: Future) -> None:
    """Wait for a scenario that plays beside the others; raise what one of its own assertions raised."""
    assert scenario.result() is None, "a scenario asserts by itself and returns nothing"
