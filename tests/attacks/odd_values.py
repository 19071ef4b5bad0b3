"""Values that a shell, a template or a path would take for something else, and a canary that sings if one does."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
TOKENS = {"HF_TOKEN": "hf_plantedTokenOfTheHub0123456789", "WANDB_API_KEY": "planted0wandb0key0" + "f" * 22}
UMASK = 0o077
COMMAND = "canary"
"""A program on the PATH that leaves a file behind whenever anything runs it."""
# in any of these a shell, Python's format, YAML, Snakemake or a regular expression would see more than letters
ODD = {
    "spaces": "two  words ",
    "quotes": "it's \"quoted\" 'so'",
    "substitution": "$(canary) ${IFS}canary",
    "backticks": "`canary`",
    "separators": "; canary && canary || canary | canary & canary",
    "newline": "one\ncanary\nthree",
    "braces": "{canary} {0} {wildcards.run} {{}} {input.toml:q}",
    "redirection": "> canary < canary >> canary 2>&1",
    "globs": "*?[a-z]~!#%^",
    "dashes": "--help -rf",
    "backslashes": "\\n\\$(canary)\\",
    "dots": "a..canary.. . ..",
    "emoji": "名前 🐈‍⬛ é e\u0301 \u202e",
    "python": "__import__('os').system('canary')",
    "yaml": "!!python/object/apply:os.system [canary]",
    "markup": "<script>canary</script>&amp;",
}
EVERYTHING = "-$(canary)`canary`;canary '\"\\ {canary}{x} 🐈\n*"
"""All of it in one name without a slash, 50 bytes."""
AGAIN = f"again {EVERYTHING}"
"""A folder in which everything is planned again."""
ROWS = {
    "one": {"training_comment": EVERYTHING, "metadata_title": ODD["backticks"], "metadata_tags": ODD["separators"]},
    "two": {"training_comment": ODD["redirection"], "metadata_title": EVERYTHING, "metadata_tags": ODD["python"]},
}
"""A table of runs."""


def file_stem(text: str) -> str:
    """Return the text as a file's name."""
    return text.replace("/", "")


def long_name(ending: str = "", length: int = 255) -> str:
    """Return a file name of this many bytes that ends so and has all of it in it."""
    room = length - len(f"{EVERYTHING}{ending}".encode())
    return EVERYTHING + "🐈" * (room // 4) + "x" * (room % 4) + ending


@dataclass(frozen=True)
class Canary:
    """A program that tells when it was run."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}

    @property
    def songs(self) -> list[str]:
        """How often it ran."""
        song = self.folder / "song"
        return song.read_text().splitlines() if song.exists() else []


def make_canary(folder: Path) -> Canary:
    """Put the program into a folder of its own."""
    folder.mkdir()
    program = folder / COMMAND
    program.write_text(f'#!/bin/sh\necho "run by $PPID: $*" >> "{folder}/song"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return Canary(folder)
