"""Make everything again in an empty folder, from a lock or from a LoRA, and verify that it is the same, byte for byte.

    python scripts/rebuild.py --lock dataset.lock --inputs . --folder /tmp/again -- --cores all
    python scripts/rebuild.py --lora cats.safetensors --dit dit.safetensors --vae vae.safetensors \
        --text_encoder text_encoder --images cats --folder /tmp/again -- --cores all

The inputs stay where they are: they are linked. They are compared with the lock before anything is made. What stands
behind -- goes to snakemake. Exit code 0 when what was made is what was locked, 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qwen_image.lock.causes import HOW
from qwen_image.lock.from_lora import known_images, rows_of_lora
from qwen_image.lock.outputs import SOURCE_DATE_EPOCH
from qwen_image.lock.plan import CONFIG_FILE, Sources, plan_from_lock, threads
from qwen_image.lock.rows import CONFIG, MODEL, RUN, SETTING, Rows, read_lock, settings_of, write_lock
from qwen_image.problems import InputError, Problem, run

SCRIPTS = Path(__file__).parent
LOCK = "rebuild.lock"
"""In the folder: what it is compared with."""
MODEL_KEYS = ("dit", "vae", "text_encoder", "tokenizer")


def main(argv: list[str] | None = None) -> int:
    """Prepare the folder, make everything there, and verify it."""
    args = _parser().parse_args(argv)
    rows, sources = _from_lora(args) if args.lora else (read_lock(args.lock), Sources(args.inputs, dict(args.input)))
    plan_from_lock(rows, sources, dict(args.how)).make(args.folder)
    # of a LoRA's facts those stay that can be compared
    write_lock(args.folder / LOCK, _comparable(rows) if args.lora else rows)
    verify = [sys.executable, SCRIPTS.resolve() / "verify_lock.py", "--config", CONFIG_FILE, "--lock", LOCK]
    verify += ["--known_only"] if args.lora else []
    if code := subprocess.run([*verify, "--inputs_only"], cwd=args.folder, check=False).returncode:
        mend = f"nothing was made; to go on all the same: snakemake --configfile {CONFIG_FILE} in {args.folder}"
        print(f"rebuild: the inputs are not those that were locked\n    -> {mend}", file=sys.stderr)
        return code
    if code := subprocess.run(_snakemake(args, rows), env=_environment(rows), check=False).returncode:
        return code
    return subprocess.run(verify, cwd=args.folder, check=False).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make again what was locked, and verify it.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--lock", type=Path, help="the lock")
    source.add_argument("--lora", type=Path, help="a LoRA, where there is no lock")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--inputs", type=Path, default=Path(), help="folder with the lock's inputs at their places")
    parser.add_argument(
        "--input", type=_place, action="append", default=[], metavar="PLACE=PATH", help="one that is elsewhere"
    )
    for key in MODEL_KEYS:
        parser.add_argument(f"--{key}", type=Path, help="with --lora: its checkpoint")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="with --lora: each dataset's folder")
    parser.add_argument(
        "--how", type=_setting, action="append", default=[], metavar="KEY=VALUE",
        help="another number of shards, workers and the like than was locked",
    )  # fmt: skip
    parser.add_argument("snakemake", nargs="*", help="options for snakemake, after -- (default: --cores all)")
    return parser


def _from_lora(args: argparse.Namespace) -> tuple[Rows, Sources]:
    """What the LoRA tells, and where the command line says that the inputs are."""
    models = {key: getattr(args, key) for key in MODEL_KEYS if getattr(args, key) is not None}
    if missing := [f"--{key}" for key in MODEL_KEYS[:3] if key not in models]:
        found, mend = "is missing: a LoRA knows its checkpoints by their content alone", "name each checkpoint"
        raise InputError([Problem(file="command line", key=key, found=found, mend=mend) for key in missing])
    rows = rows_of_lora(args.lora, models)
    config = {key: json.loads(value) for key, value in settings_of(rows, CONFIG).items()}
    given = {config[key]: path for key, path in models.items()} | dict(args.input)
    rows |= known_images(rows, args.images)
    for (_, name, what), value in rows.items():
        if what == f"{SETTING} image_directory":
            given[json.loads(value)] = args.images[int(name.strip("[]"))]
    return rows, Sources(args.inputs, given)


def _comparable(rows: Rows) -> Rows:
    return {key: value for key, value in rows.items() if key[0] == MODEL or key[0].startswith(f"{RUN} ")}


def _snakemake(args: argparse.Namespace, rows: Rows) -> list[str | Path]:
    """The command line; each stage's jobs have the threads that they had, however many cores there are."""
    counts = [f"{stage}={count}" for stage, count in threads(rows).items()]
    return [
        Path(sys.executable).with_name("snakemake"), "--snakefile", SCRIPTS.resolve().parent / "Snakefile",
        "--directory", args.folder, *(args.snakemake or ["--cores", "all"]),
        *(["--set-threads", *counts] if counts else []), "--configfile", args.folder / CONFIG_FILE,
    ]  # fmt: skip


def _environment(rows: Rows) -> Mapping[str, str]:
    moments = {value for key, value in rows.items() if key[1:] == ("lora made with", SOURCE_DATE_EPOCH)}
    environment = {key: value for key, value in os.environ.items() if key != SOURCE_DATE_EPOCH}
    if moments:
        environment[SOURCE_DATE_EPOCH] = moments.pop()
    return environment


def _place(text: str) -> tuple[str, Path]:
    place, equals, path = text.partition("=")
    if not (place and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not PLACE=PATH")
    return place, Path(path)


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    if key not in HOW:
        raise argparse.ArgumentTypeError(f"{key!r} is none of {', '.join(sorted(HOW))}")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    sys.exit(run(main))
