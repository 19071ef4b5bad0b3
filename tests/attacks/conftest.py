"""One run of the real workflow in which every name and text is hostile, tokens are planted, and the umask is strict."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import toml
import yaml
from odd_values import (
    AGAIN,
    EVERYTHING,
    ODD,
    ROOT,
    ROWS,
    SNAKEMAKE,
    TOKENS,
    UMASK,
    Canary,
    file_stem,
    long_name,
    make_canary,
)
from PIL import Image

CONFIGURATION = "my $(canary) {x}.yaml"


@dataclass(frozen=True)
class OddRun:
    """A finished run of the workflow."""

    home: Path
    """Holds the folders below, and those that a user has: HOME, TMPDIR."""
    project: Path
    """The working directory."""
    config: dict
    canary: Canary
    before: frozenset[Path]
    """The files there were before it."""
    said: dict[str, subprocess.CompletedProcess]
    """What came of `run`, which makes all there is, and after it of `verify`, `rebuild` and a `table` of runs."""

    @property
    def configfile(self) -> str:
        """Its configuration's file."""
        return CONFIGURATION

    @property
    def written(self) -> list[Path]:
        """Every file and folder that came to be."""
        return sorted(set(self.home.rglob("*")) - self.before)


@pytest.fixture(scope="session")
def odd_run(tmp_path_factory) -> OddRun:
    """Train on odd pictures with odd captions by odd settings in an odd folder, and prove it. Change nothing of it."""
    home = tmp_path_factory.mktemp("odd")
    canary = make_canary(home / "canary")
    project = home / f"work {EVERYTHING}"
    for folder in (project, home / "HOME", home / "TMPDIR"):
        folder.mkdir()
    config = write_project(project)
    environment = os.environ | canary.environment | TOKENS | {
        "HOME": str(home / "HOME"), "TMPDIR": str(home / "TMPDIR"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name in [name for name in environment if name.startswith("XDG_")]:
        del environment[name]
    before = frozenset(home.rglob("*"))

    def call(*command: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=home, env=environment, preexec_fn=lambda: os.umask(UMASK),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def snakemake(configuration: str, *targets: str) -> subprocess.CompletedProcess:
        options = ["--cores", "2", "--configfile", project / configuration, "--printshellcmds"]
        return call(SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", project, *options, "--", *targets)

    said = {"run": snakemake(CONFIGURATION, "all", "samples", "compare", "lock")}
    said["verify"] = snakemake(CONFIGURATION, "verify")
    places = ["--lock", project / "dataset.lock", "--inputs", project, "--folder", home / AGAIN]
    rebuild = [sys.executable, ROOT / "scripts/rebuild.py", *places, "--", "--cores", "1", "--dry-run", "--quiet"]
    said["rebuild"] = call(*rebuild)
    said["table"] = snakemake(f"runs {CONFIGURATION}", *(f"results/train/{run}/config.toml" for run in ROWS))
    return OddRun(home, project, config, canary, before, said)


def write_project(folder: Path) -> dict:
    """Write everything that the runs need; returns the configuration."""
    config = {
        # a dash before, and no space that would give it away as no option
        "dataset_config": "-data$(canary){x};'.toml",
        "dit": _link(folder / f"{EVERYTHING} dit" / f"{EVERYTHING}.safetensors", tiny.path("dit")),
        "vae": _link(folder / "-vae`canary`{x}.safetensors", tiny.path("vae")),
        "text_encoder": _link(folder / f"text {EVERYTHING}", tiny.path("text_encoder")),
        "output_dir": f"-out {EVERYTHING}/../out {EVERYTHING}",
        # a backslash in it is refused, for those who take the file to Windows
        "output_name": long_name(length=200).replace("\\", "_"),
        "logging_dir": f"logs {EVERYTHING}",
        "log_with": "all",
        "log_config": True,
        "log_prefix": "$(canary){x} ",
        "log_tracker_name": "tracker $(canary);`canary`",
        "wandb_run_name": EVERYTHING,
        "training_comment": "\n".join(ODD.values()),
        "metadata_title": EVERYTHING,
        "metadata_author": ODD["substitution"],
        "metadata_tags": ODD["separators"],
        "sample_prompts": f"prompts {EVERYTHING}.txt",
        "optimizer_args": ["weight_decay=0.01"],
        "network_dim": 2,
        "max_train_steps": 2,
        "save_every_n_steps": 1,
        "save_state": True,
        "seed": 1,
        "caching_latent_keep_cache": False,
    }
    table = {"runs": f"runs {EVERYTHING}.tsv"}
    several = {key: value for key, value in config.items() if key != "output_name"} | table
    (folder / CONFIGURATION).write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    (folder / f"runs {CONFIGURATION}").write_text(yaml.safe_dump(several, allow_unicode=True), encoding="utf-8")
    with open(folder / table["runs"], "w", newline="", encoding="utf-8") as stream:
        rows = [{"output_name": run, **values} for run, values in ROWS.items()]
        writer = csv.DictWriter(stream, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    prompt = " ".join(text.replace("\n", " ").replace("--", "\\--") for text in ODD.values())
    (folder / config["sample_prompts"]).write_text(f"{prompt} --w 32 --h 32 --s 1 --l 1\n", encoding="utf-8")
    extension = ".{x}$(canary)';`canary`"
    pictures = folder / f"-pictures {EVERYTHING}"
    for number, (name, text) in enumerate(ODD.items()):
        _picture(pictures / f"{file_stem(text)}.png", number)
        (pictures / f"{file_stem(text)}{extension}").write_text(f"{text} a picture of {name}\n", encoding="utf-8")
    longest = long_name(length=225)
    _picture(pictures / f"{longest}.jpg", 50)
    (pictures / f"{longest}{extension}").write_text(longest, encoding="utf-8")
    general = {"resolution": [32, 32], "enable_bucket": True, "caption_extension": extension, "batch_size": 6}
    datasets = [{"image_directory": pictures.name, "cache_directory": f"{pictures.name}/../cache {EVERYTHING}"}]
    (folder / config["dataset_config"]).write_text(
        toml.dumps({"general": general}) + f"[[datasets]]\n{_toml(datasets[0])}", encoding="utf-8"
    )
    return config


def _toml(values: dict[str, str]) -> str:
    from write_train_config import toml_text

    return toml_text(values)


def _picture(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.linear_gradient("L").rotate(seed * 7).resize((36, 34)).convert("RGB").save(path)


def _link(path: Path, target: Path) -> str:
    """Have a checkpoint lie here, and return the name that the configuration has for it."""
    path.parent.mkdir(exist_ok=True)
    (shutil.copytree if target.is_dir() else shutil.copy)(target, path)
    start = path.parent if "dit" in path.parent.name else path
    return os.path.relpath(path, start.parent)
