"""Where things may lie in a folder that is made from a lock, whoever wrote it: nothing is written outside of it.

A checkpoint's folder is linked as a whole, so what is below a link lies in a folder of the user's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_image.dataset.keys import path_fault
from qwen_image.lock.rows import Source
from qwen_image.problems import InputError, Problem
from qwen_image.runs.caches import LATENT_MODEL, TEXT_MODEL

MEND = "if it is yours, name another place where it was made, and make it anew; else do not use it"
WEIGHTS = ".safetensors"
"""Such a file is only ever replaced: a LoRA to start from may lie where LoRAs go."""


@dataclass(frozen=True)
class Written:
    """What the folder will have of its own."""

    files: Sequence[str]
    folders: Collection[str]
    """All in them may be written, too."""
    caches: Collection[str]
    """Those of the folders that are cache directories."""
    datasets: Collection[str]
    """Names of the dataset files, which subfolders of the cache directories are named after."""


def check_within(places: Iterable[str], source: Source) -> None:
    """Raise InputError for a place that leads out of the folder, or that no file can have."""
    problems = []
    for place in dict.fromkeys(places):
        if fault := path_fault(place):
            problems.append(Problem(file=source.file, key=repr(place), found=f"is no path: it {fault}", mend=MEND))
        elif PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            problems.append(Problem(file=source.file, key=place, found="leads out of the folder", mend=MEND))
    if problems:
        raise InputError(problems)


def links_of(sources: Mapping[str, Path], written: Written, source: Source) -> dict[str, Path]:
    """Return what is to be linked to what. What a link of a folder around it gives already needs none by itself.

    Raises InputError where something would be linked or written below a link, or linked where the workflow writes.
    """
    links: dict[PurePosixPath, Path] = {}
    problems = []
    for place, path in sorted(sources.items(), key=lambda pair: len(PurePosixPath(pair[0]).parts)):
        pure = PurePosixPath(place)
        outer = next((one for one in pure.parents if one in links), None)
        if outer is None:
            links[pure] = path
        elif links[outer] / pure.relative_to(outer) != path:
            problems.append(_problem(place, f"lies within {outer}, which is linked as a whole", source))
    for place in (*written.files, *written.folders):
        pure = PurePosixPath(place)
        if below := next((one for one in (pure, *pure.parents) if one in links), None):
            problems.append(_problem(place, f"is written, and {below} is linked and not to be written to", source))
    problems += _in_the_way(links, written, source)
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return {str(place): path for place, path in links.items()}


def _in_the_way(links: Mapping[PurePosixPath, Path], written: Written, source: Source) -> Iterator[Problem]:
    """Links, files and folders where something else is written, or where a program would be looked for."""
    files = [PurePosixPath(place) for place in written.files]
    for pure in (*links, *files, *map(PurePosixPath, written.folders)):
        if outer := next((one for one in pure.parents if one in files), None):
            yield _problem(str(pure), f"lies within {outer}, which is a file", source)
    for pure in (*links, *files):
        if not pure.parts or files.count(pure) > 1:
            yield _problem(str(pure), "is the place of something else", source)
        elif _is_program(pure):
            yield _problem(str(pure), "is where Snakemake looks for what it runs", source)
    caches = {PurePosixPath(place) for place in written.caches}
    # see runs/caches.py: a set's files may go into a subfolder that is named after its dataset file and its models
    model = rf"({'|'.join((*LATENT_MODEL, *TEXT_MODEL))})[-_].*"
    names = "|".join(map(re.escape, written.datasets))
    subfolder = re.compile(rf"({names})(-[0-9a-f]{{8}})?([.]{model})?|{model}", re.DOTALL)
    for pure, path in links.items():
        in_results = pure.parts[:1] == ("results",) and pure.suffix != WEIGHTS
        if in_results or (pure.parent in caches and subfolder.fullmatch(pure.name) and path.is_dir()):
            yield _problem(str(pure), "is an input, and lies where the workflow writes", source)


def _is_program(pure: PurePosixPath) -> bool:
    """Whether Snakemake, started in the folder, would take this for its workflow, its profile or its own notes."""
    return (
        pure.name.lower() == "snakefile"
        or pure.parts[0] == ".snakemake"
        or pure.parts[:2] == ("profiles", "default")
        or str(pure) in ("profiles", "workflow")
    )


def _problem(place: str, found: str, source: Source) -> Problem:
    return Problem(file=source.file, key=place, found=found, mend=MEND)
