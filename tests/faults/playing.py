"""Plays a fault in a real workflow, then runs the same command until it is done, as a user would."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo_project import demo_config, hashes, write_config
from faults.points import Point
from faults.witness import FILLER, READ_ERROR

ROOT = Path(__file__).parents[2]
WITNESS = Path(__file__).with_name("witness.py")
CONFIG = {
    # an epoch, in which every file is read, with states on the way, from which it can go on
    "max_train_epochs": None, "max_train_steps": 12, "save_every_n_epochs": None, "save_every_n_steps": 4,
    "save_state": True, "network_dim": 4, "logging_dir": None, "lr_warmup_steps": None,
}  # fmt: skip
TRIES = 8
PATIENCE = 570
LONGEST_STOP = 90
MADE = (
    "results/cache/**/*.safetensors",
    "results/manifests/**/*.tsv",
    "results/train/**/*",
    "results/models/*.safetensors",
)
"""What must have the same bytes in the end."""
PROBLEM = re.compile(r"^\s*- (?P<file>.+?): (?P<found>.*)\n\s+-> (?P<mend>.*)$", re.MULTILINE)


class Failure(AssertionError):
    """What a user must never see; says which."""


@dataclass(frozen=True)
class Outcome:
    """How a point ended."""

    point: Point
    how: str
    """What had to be done: nothing, the same command again, what a message said."""
    runs: int
    """Commands until it was done, the disturbed one included."""


@dataclass(frozen=True)
class Run:
    """A workflow that runs."""

    process: subprocess.Popen
    output: Path

    def end(self) -> tuple[int, str]:
        """Wait for it; return its exit status and what it printed. One that takes forever is killed: Failure."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise Failure(f"it did not end:\n{self.text()}") from error
        return self.process.returncode, self.text()

    def text(self) -> str:
        """Return what was printed so far."""
        return self.output.read_text(errors="replace")

    def kill(self) -> None:
        """Kill it with all that belongs to it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Project:
    """A folder in which the demo is trained."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = python

    def configure(self) -> None:
        """Write the configuration."""
        write_config(self.folder / "my.yaml", demo_config() | CONFIG)

    def start(self, *more: str, witness: dict | None = None) -> Run:
        """Start the workflow in a process group of its own."""
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if witness:
            env |= {"WITNESS": json.dumps(witness), "RUN_FIRST": str(WITNESS)}
        command = [
            self.python, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--configfile", "my.yaml",
            "--cores", "2", "--max-threads", "1", *more,
        ]  # fmt: skip
        # beside the folder, whose file system may be full
        output = self.folder.with_name(f"{self.folder.name}.{time.monotonic_ns()}.out")
        with output.open("wb") as stream:
            process = subprocess.Popen(
                list(map(str, command)), cwd=self.folder, env=env, process_group=0, stdout=stream,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        if witness:
            (self.folder / "snakemake.pid").write_text(str(process.pid))
        return Run(process, output)

    def run(self, *more: str) -> tuple[int, str]:
        """Run the workflow; return its exit status and what it printed."""
        return self.start(*more).end()

    def made(self) -> dict[str, str]:
        """Return the SHA-256 of all that must be the same in the end, by path."""
        return hashes(self.folder, MADE)

    def given(self) -> dict[str, str]:
        """Return the SHA-256 of the user's files, by path."""
        return hashes(self.folder, ("resources/**/*", "my.yaml"))

    def names(self) -> set[str]:
        """Return the paths of all files and empty folders but logs, locks, remembered hashes, and Snakemake's notes."""
        found = (path for path in self.folder.rglob("*") if not (path.is_dir() and any(path.iterdir())))
        paths = (path.relative_to(self.folder) for path in found)
        counted = (path for path in paths if not re.fullmatch(r"\..*\.(lock|hashes\.json)", path.name))
        return {
            str(path) for path in counted if path.parts[0] in ("results", "resources") and path.parts[1:2] != ("logs",)
        }


class Stage:
    """Where points are played: what they start from, and what they are compared with."""

    def __init__(self, folder: Path, python: Path) -> None:
        """Run the workflow once, undisturbed."""
        self.folder = folder
        self.undisturbed = Project(folder / "undisturbed", python)
        self.undisturbed.folder.mkdir(parents=True)
        self.undisturbed.configure()
        counts = folder / "counts"
        counts.mkdir()
        code, text = self.undisturbed.start(witness={"counts": str(counts)}).end()
        assert code == 0, text
        lines = {path.name: list(map(json.loads, path.read_text().splitlines())) for path in counts.iterdir()}
        self.counts = {
            program: {what: min(line[what] for line in its) for what in its[0]} for program, its in lines.items()
        }
        self.made, self.given, self.names = (
            self.undisturbed.made(), self.undisturbed.given(), self.undisturbed.names(),
        )  # fmt: skip

    @contextmanager
    def project(self, point: Point) -> Iterator[Project]:
        """Yield a project in which nothing is made yet, on a small file system where the point needs one."""
        project = Project(self.folder / f"point-{point.seed}", self.undisturbed.python)
        project.folder.mkdir()
        mounted = point.kind == "disk full"
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", project.folder], check=True)
        try:
            project.configure()
            if point.program != "make_demo.py":
                shutil.copytree(self.undisturbed.folder / "resources", project.folder / "resources")
            yield project
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", project.folder], check=True)
            shutil.rmtree(project.folder)

    def play(self, point: Point) -> Outcome:
        """Disturb one run, and run the same command until it is done. Raises Failure."""
        with self.project(point) as project:
            done = self.folder / f"done-{point.seed}"
            of = "reads" if point.kind == READ_ERROR else "operations"
            at = 1 + int(point.moment * self.counts[point.program][of])
            witness = {
                "program": point.program, "at": at, "deed": point.kind, "seed": point.seed, "done": str(done),
            }  # fmt: skip
            first = project.start(witness=witness)
            texts, before = [], []
            if point.kind.startswith("another workflow"):
                before.append(_start_another(point, project, first, done, texts))
            if point.kind.startswith("SIGTERM"):
                before += _unhang(first)
            code, text = first.end()
            texts.append(text)
            if not done.exists():
                raise Failure(f"it did not happen\n{text}")
            (project.folder / FILLER).unlink(missing_ok=True)
            how, runs = self._finish(project, texts)
            self._compare(project, texts)
            return Outcome(point, ", ".join([*before, how if code or runs else "nothing"]), 1 + runs)

    def _finish(self, project: Project, texts: list[str]) -> tuple[str, int]:
        """Run the same command until there is nothing to do; return what else was needed and how many runs."""
        how, targets, runs = ["the same command"], [], 0
        for _ in range(TRIES):
            code, text = project.run(*(["--forcerun", *targets] if targets else []))
            texts.append(text)
            targets = []
            if code == 0 and "Nothing to be done" in text:
                return ", ".join(dict.fromkeys(how)), runs
            runs += 1
            if code == 0:
                continue
            if "--unlock" in text:
                how.append("--unlock")
                project.run("--unlock")
                continue
            for problem in PROBLEM.finditer(text):
                path = project.folder / problem["file"]
                if problem["mend"].startswith("delete it"):
                    how.append("delete it")
                    path.unlink(missing_ok=True)
                if problem["mend"].startswith("give it the present time"):
                    how.append("touch")
                    path.touch()
                if folder := re.search(r"its cache file (\S+) cannot be written: Is a directory", problem["found"]):
                    how.append("remove the folder")
                    shutil.rmtree(project.folder / folder[1], ignore_errors=True)
                if forced := re.search(r"--forcerun ([\w ]+)", problem["mend"]):
                    how.append("--forcerun")
                    targets = forced[1].split()
            # Snakemake's own words
            for late in re.findall(r"has older modification time .* than input (\S+) \(2040", text):
                how.append("touch")
                (project.folder / late).touch()
        raise Failure(f"not done after {TRIES} more runs\n" + "\n----\n".join(texts))

    def _compare(self, project: Project, texts: list[str]) -> None:
        """Compare everything with the undisturbed run.

        Only damage that came after the last look may still be there: the next training must end at it, with its name,
        or not need it.
        """
        said = "\n----\n".join(texts)
        wrong = self._wrong(project, said)
        if not wrong:
            return
        if any(not name.startswith(("results/cache/", "results/manifests/")) for name in wrong):
            raise Failure(f"other bytes in {wrong}\n{said}")
        for name in ("models", "train"):
            shutil.rmtree(project.folder / "results" / name)
        code, text = project.run("--forcerun", "merge_latents", "merge_text_encoder_outputs")
        said += f"\n----\n{text}"
        if code and not any(Path(name).name in text for name in wrong):
            raise Failure(f"another error than that {wrong} are damaged\n{said}")
        self._finish(project, [said])
        if wrong := self._wrong(project, said):
            raise Failure(f"nobody noticed that {wrong} are damaged\n{said}")

    def _wrong(self, project: Project, said: str) -> list[str]:
        """Return the paths that have other bytes than they must have, or are missing."""
        if (given := project.given()) != self.given:
            raise Failure(f"files of the user differ: {differing(given, self.given)}\n{said}")
        names = project.names()
        if left := sorted(names - self.names):
            raise Failure(f"left behind {left}\n{said}")
        return sorted({*differing(project.made(), self.made), *(self.names - names)})


def _start_another(point: Point, project: Project, first: Run, done: Path, texts: list[str]) -> str:
    """Run the same command as soon as the first is where the point wants it; return what came of it."""
    deadline = time.monotonic() + PATIENCE
    while not done.exists() and first.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    code, text = project.run(*(["--nolock"] if "nolock" in point.kind else []))
    texts.append(text)
    if code == 0:
        return "the other done"
    if "nolock" not in point.kind and "--unlock" not in text:
        raise Failure(f"the other was neither refused nor done\n{text}")
    return "the other refused" if "--unlock" in text else "the other stopped"


def _unhang(run: Run) -> list[str]:
    """Kill a Snakemake that waits for itself: 9.27 does when the signal comes while it books a finished job."""
    try:
        run.process.wait(LONGEST_STOP)
    except subprocess.TimeoutExpired:
        run.kill()
        return ["kill -9 of the Snakemake that hung"]
    return []


def differing(one: dict, other: dict) -> list[str]:
    """Return the keys of which the values differ."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small file system."""
    place = folder / "mountable"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["umount", place], check=True)
    return mounted
