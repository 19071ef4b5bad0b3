"""The real Snakemake on the embedded demo, in folders of its own: what ran, what was encoded, what was said."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
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
        config = yaml.safe_load(self.config.read_text()) if self.config.exists() else demo_config() | SHORT
        write_config(self.config, config | changes)

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


def demo_config() -> dict:
    """Return the configuration of the embedded demo."""
    return yaml.safe_load((ROOT / "config/config.yaml").read_text())


def write_config(path: Path, config: Mapping) -> None:
    """Write a configuration without the keys that are None."""
    given = {key: value for key, value in config.items() if value is not None}
    path.write_text(yaml.safe_dump(given, allow_unicode=True))


def hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the files of these patterns, by their path within the folder."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}
