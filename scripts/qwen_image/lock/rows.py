"""The lock file: a sorted table of text, a line a fact, so that a diff shows what changed and nothing else.

A fact has a place of three names and a value: ``dataset cats <tab> [0] tom.jpg <tab> image <tab> <sha256>``. Neither
time nor machine path stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwen_image.bounded import read_bytes
from qwen_image.files import atomic_write
from qwen_image.problems import InputError, Problem

Key = tuple[str, str, str]
"""The part (``run cats``), what the fact is about there (``lora``), and what of it (``sha256``)."""
Rows = dict[Key, str]

HEAD = "# dataset.lock, format 1: part, name, what, value (docs/reproducibility.md)\n"
DATASET, MODEL, INPUT, CACHE, RUN = "dataset", "model", "input", "cache", "run"
"""First words of the parts that there may be several of; a name follows."""
CONFIG, SOFTWARE, CODE, DEVICE = "config", "software", "code", "device"
MAX_LOCK_BYTES = 2**29
"""Of a million images."""
ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
PLAIN = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
SHA256 = "sha256"
SETTING = "setting"


@dataclass(frozen=True)
class Source:
    """Where facts come from, for messages about them."""

    file: str = "dataset.lock"
    lines: Mapping[Key, int] = field(default_factory=dict)
    """Of a lock."""

    def problem(self, key: Key, found: str, mend: str = "take it anew from where it was made") -> Problem:
        """Return what is wrong with a fact."""
        line = f"line {self.lines[key]}, " if key in self.lines else ""
        return Problem(file=self.file, key=f"{line}{', '.join(key)}", found=found, mend=mend)


def source_of(path: str | Path, rows: Mapping[Key, str]) -> Source:
    """Return the source of facts that `read_lock` read from a file."""
    return Source(str(path), {key: number for number, key in enumerate(rows, start=2)})


def write_lock(path: str | Path, rows: Mapping[Key, str]) -> None:
    """Write the facts, sorted, atomically."""
    lines = ("\t".join(map(_escaped, (*key, rows[key]))) for key in sorted(rows))
    # file names may hold bytes that are no UTF-8
    atomic_write(path, "".join([HEAD, *(f"{line}\n" for line in lines)]).encode("utf-8", errors="surrogateescape"))


def read_lock(path: str | Path) -> Rows:
    """Read the facts. Raises InputError when the file is missing or is no lock."""
    try:
        text = read_bytes(path, MAX_LOCK_BYTES).decode("utf-8", errors="surrogateescape")
        if not text.startswith(HEAD):
            raise ValueError("its first line is not that of a lock of this version")
        lines = [map(_plain, line.split("\t")) for line in text.removeprefix(HEAD).removesuffix("\n").split("\n")]
        rows = {(part, name, what): value for part, name, what, value in lines}
        if len(rows) != len(lines):
            raise ValueError("a fact stands twice")
    except (OSError, ValueError) as error:
        mend = "take it from your version control, or write it with: snakemake lock"
        raise InputError([Problem(file=str(path), found=f"is no readable lock ({error})", mend=mend)]) from error
    return rows


def settings_of(rows: Mapping[Key, str], part: str, name: str = SETTING) -> dict[str, str]:
    """Return the values of one name in a part, by what they are."""
    return {key[2]: value for key, value in rows.items() if key[:2] == (part, name)}


def parts_of(keys: Iterable[Key], kind: str) -> list[str]:
    """Return the names of the parts of a kind, sorted: ``["cats"]`` where there is a part ``run cats``."""
    return sorted({part.removeprefix(f"{kind} ") for part, _, _ in keys if part.startswith(f"{kind} ")})


def only_inputs(rows: Mapping[Key, str]) -> Rows:
    """Return the facts that are not about what was made."""
    return {key: value for key, value in rows.items() if key[0].partition(" ")[0] != CACHE and not _made(key)}


def _escaped(cell: str) -> str:
    return cell.translate(ESCAPES)


def _plain(cell: str) -> str:
    # almost none has any, and there may be very many
    return re.sub(r"\\.", lambda match: PLAIN.get(match[0], match[0]), cell) if "\\" in cell else cell


def _made(key: Key) -> bool:
    made_by_run = key[0].startswith(f"{RUN} ") and key[1] not in (SETTING, "order")
    return made_by_run or (key[0] == DEVICE and key[2] == "computed on")
