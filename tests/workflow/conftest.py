"""The real Snakemake on the demo, in folders of its own: what ran, what was encoded, what was said."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import yaml

from qwen_image.files import lock

ROOT = Path(__file__).parents[2]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
SHORT = {
    "max_train_epochs": None, "max_train_steps": 2, "network_dim": 4, "logging_dir": None, "save_every_n_epochs": None,
    # the demo's warm-up is longer than two steps
    "lr_warmup_steps": None,
}  # fmt: skip


@dataclass
class Result:
    """One call of snakemake."""

    code: int
    text: str
    rules: list[str]
    """Rules that finished, in order, without `all`."""

    @property
    def nothing_done(self) -> bool:
        """Whether it found everything up to date."""
        return "Nothing to be done" in self.text


class Project:
    """A working directory with a configuration file of its own."""

    def __init__(self, folder: Path, python: Path | None = None) -> None:
        self.folder = folder
        self.python = python
        """What runs Snakemake and, for it, the stages' programs; None is the environment's own."""
        self.config = folder / "my.yaml"
        self.started = 0.0

    def configure(self, **changes) -> None:
        """Write my.yaml: the demo's configuration, shortened, with changes; None removes a key."""
        config = yaml.safe_load((ROOT / "config/config.yaml").read_text()) | SHORT
        if self.config.exists():
            config = yaml.safe_load(self.config.read_text())
        config |= changes
        self.config.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}, allow_unicode=True))

    def copy(self, folder: Path) -> Project:
        """Return a copy, file times and Snakemake's memory included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder, self.python)

    def command(self, *more: str, cores: int = 2) -> list:
        """Return the command line that runs snakemake here."""
        snakemake = [self.python, "-m", "snakemake"] if self.python else [SNAKEMAKE]
        return [
            *snakemake, "--snakefile", ROOT / "Snakefile", "--directory", self.folder, "--cores", str(cores),
            "--configfile", self.config, *more,
        ]  # fmt: skip

    def run(self, *more: str, cores: int = 2, timeout: float = 570, preexec_fn=None) -> Result:
        """Run snakemake from another directory than the project's and the workflow's."""
        command = self.command(*more, cores=cores)
        self.started = time.time()
        return run_snakemake(command, cwd=self.folder.parent, timeout=timeout, preexec_fn=preexec_fn)

    def encoded(self, stage: str) -> int:
        """Items that the stage's shards encoded in the last run; it must have run."""
        logs = (self.folder / "results/logs" / stage).rglob("*.log")
        texts = [log.read_text() for log in logs if log.stat().st_mtime >= self.started]
        assert texts, f"{stage} did not run"
        return sum(int(re.findall(r": (\d+) encoded", text)[-1]) for text in texts)


def run_snakemake(command, *, cwd: Path, timeout: float = 570, env=None, preexec_fn=None) -> Result:
    """Run a snakemake command line."""
    process = subprocess.run(
        [str(part) for part in command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
        env=env or os.environ, preexec_fn=preexec_fn,
    )  # fmt: skip
    text = process.stdout.decode("utf-8", errors="replace")
    rules = [rule for rule in re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", text) if rule != "all"]
    return Result(process.returncode, text, rules)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id, python) -> tuple[Project, Result]:
    """A project whose first run is done, once for all processes that run tests, by the environment's own python.

    Do not change it: copy it.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "finished"
    project, told = Project(folder / "project"), folder / "result.json"
    with lock(folder.with_suffix(".lock")):
        if not told.exists():
            project.folder.mkdir(parents=True)
            project.configure()
            result = project.run(preexec_fn=lambda: os.umask(0o022))
            assert result.code == 0, result.text
            told.write_text(json.dumps(asdict(result)))
    return Project(project.folder, python), Result(**json.loads(told.read_text()))


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A copy of the finished project."""
    return finished[0].copy(tmp_path / "project")
