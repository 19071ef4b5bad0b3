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
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qwen_image.lock.causes import HOW
from qwen_image.lock.from_lora import known_images, rows_of_lora
from qwen_image.lock.outputs import SOURCE_DATE_EPOCH
from qwen_image.lock.plan import CONFIG_FILE, LOCK, Sources, plan_from_lock, threads
from qwen_image.lock.rows import (
    CONFIG,
    MODEL,
    RUN,
    SETTING,
    Rows,
    Source,
    read_lock,
    settings_of,
    source_of,
    write_lock,
)
from qwen_image.lock.settings import ALLOW, AWAY, without_away
from qwen_image.problems import InputError, Problem, run

SCRIPTS = Path(__file__).parent
MODEL_KEYS = ("dit", "vae", "text_encoder", "tokenizer")


def main(argv: list[str] | None = None) -> int:
    """Prepare the folder, make everything there, and verify it."""
    args = _parser().parse_args(argv)
    rows, sources, source = _from_lora(args) if args.lora else _from_lock(args)
    environment = _environment(rows, source)
    if left := sorted({what for _, name, what in rows if name == SETTING and what in AWAY}):
        print(f"rebuild: goes without {', '.join(left)}: nothing is published or logged again", file=sys.stderr)
    plan_from_lock(rows, sources, dict(args.how), allowed=args.allow_class, source=source).make(args.folder)
    # of a LoRA's facts those stay that can be compared
    write_lock(args.folder / LOCK, without_away(_comparable(rows) if args.lora else rows))
    verify = [sys.executable, SCRIPTS.resolve() / "verify_lock.py", "--config", CONFIG_FILE, "--lock", LOCK]
    verify += ["--known_only"] if args.lora else []
    if code := subprocess.run([*verify, "--inputs_only"], cwd=args.folder, check=False).returncode:
        command = shlex.join(map(str, _snakemake(args, rows)))
        mend = f"nothing was made; to go on all the same: {command}"
        print(f"rebuild: the inputs are not those that were locked\n    -> {mend}", file=sys.stderr)
        return code
    if code := subprocess.run(_snakemake(args, rows), env=environment, check=False).returncode:
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
    parser.add_argument(
        ALLOW, action="append", default=[], metavar="PATH",
        help="a class of another package that the lock or the LoRA names, and that you trust",
    )  # fmt: skip
    parser.add_argument("snakemake", nargs="*", help="options for snakemake, after -- (default: --cores all)")
    return parser


def _from_lock(args: argparse.Namespace) -> tuple[Rows, Sources, Source]:
    rows = read_lock(args.lock)
    return rows, Sources(args.inputs, dict(args.input)), source_of(args.lock, rows)


def _from_lora(args: argparse.Namespace) -> tuple[Rows, Sources, Source]:
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
    return rows, Sources(args.inputs, given), Source(str(args.lora))


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


def _environment(rows: Rows, source: Source) -> Mapping[str, str]:
    moments = {value: key for key, value in rows.items() if key[1:] == ("lora made with", SOURCE_DATE_EPOCH)}
    environment = {key: value for key, value in os.environ.items() if key != SOURCE_DATE_EPOCH}
    for moment, key in moments.items():
        if not re.fullmatch(r"-?[0-9]{1,12}", moment):
            raise InputError([source.problem(key, f"found {moment[:60]!r}, and no number of seconds")])
        environment[SOURCE_DATE_EPOCH] = moment
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
