"""A checkpoint as it lies on disk: which files it is, what they hold and whether they fit their role.

All of it is told from file headers, without torch, so that the check stage can do it in a moment for any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_image.bounded import MAX_WRITTEN_BYTES, parse_json, read_text
from qwen_image.container import ContainerError, Header, TensorInfo, read_header
from qwen_image.models.dimensions import CONFIG_OF_ROLE, differences
from qwen_image.models.layouts import official_names
from qwen_image.models.locate import Located, is_pipeline, locate
from qwen_image.models.recognise import Recognised, recognise, recognise_foreign
from qwen_image.models.roles import EXPECTED, wanted
from qwen_image.problems import InputError, Problem


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that fits its role; its weights are still on disk."""

    path: Path
    """The path as the user gave it."""
    role: str
    headers: dict[Path, Header]
    """Header of each weight file."""
    recognised: Recognised
    config: dict | None
    """The content of config.json, when the layout has one."""

    def tensors(self) -> Iterator[tuple[Path, str, TensorInfo]]:
        """Yield file, stored name and description of each tensor, in the order in which the files hold them."""
        for file, header in self.headers.items():
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
                yield file, name, info

    def main_dtype(self) -> str:
        """Return the container's name of the dtype of most bytes; a file may keep a few norms in another one."""
        sizes: Counter[str] = Counter()
        for _, _, info in self.tensors():
            sizes[info.dtype] += info.end - info.start
        return sizes.most_common(1)[0][0]

    def official_names(self) -> dict[str, str | None]:
        """Map stored names to those of the model class, None where a tensor is knowingly left out."""
        return official_names((name for _, name, _ in self.tensors()), self.recognised)

    def model_config(self) -> dict:
        """Return config.json where there is one, otherwise the model's arguments told from the tensors' shapes.

        Raises InputError when the shapes describe no such model or contradict config.json.
        """
        official = self.official_names()
        shapes = {
            official[name] or name.removeprefix(self.recognised.prefix): info.shape for _, name, info in self.tensors()
        }
        try:
            inferred = CONFIG_OF_ROLE[self.role](shapes)
        except ValueError as error:
            if self.config is not None:
                return self.config  # an unusual model: its config.json knows better
            mend = f"use a folder with its config.json, or {wanted(self.role)}"
            raise InputError([self.problem(f"this is {self.recognised.description}, but {error}", mend)]) from error
        if self.config is None:
            return inferred
        contradictions = differences(self.config, inferred)
        if contradictions:
            found = f"config.json does not belong to these weights: {'; '.join(contradictions)}"
            raise InputError([self.problem(found, "download the folder again, all from one place")])
        return self.config

    def problem(self, found: str, mend: str) -> Problem:
        """Return a problem that names this checkpoint's path and config key."""
        return Problem(file=str(self.path), key=self.role, found=found, mend=mend)


def open_checkpoint(path: str | Path, role: str) -> Checkpoint:
    """Find a checkpoint's files, read their headers and make sure that they are what ``role`` needs.

    ``role`` is ``dit``, ``vae`` or ``text_encoder``. Raises InputError with everything that is wrong.
    """
    located = locate(path, role)
    headers, problems = {}, []
    for file in located.weights:
        header = _read(file, role)
        if isinstance(header, Problem):
            problems.append(header)
        else:
            headers[file] = header
    if not problems:
        problems = _shard_problems(Path(path), role, located, headers)
    if problems:
        raise InputError(problems)
    recognised = recognise({name: info for header in headers.values() for name, info in header.tensors.items()})
    if recognised.role != role or recognised.unsupported:
        raise InputError([_misfit(Path(path), role, recognised)])
    return Checkpoint(Path(path), role, headers, recognised, _read_config(located.config, role))


def check_checkpoint(path: str | Path, role: str) -> list[Problem]:
    """Return what is wrong with a checkpoint, told from its headers alone; an empty list when it can be loaded."""
    try:
        checkpoint = open_checkpoint(path, role)
        if checkpoint.recognised.layout != "wan":  # renaming that layout needs torch
            checkpoint.model_config()
    except InputError as error:
        return error.problems
    return []


def checkpoint_files(path: str | Path, role: str | None = None) -> list[Path]:
    """Return the files whose content is the checkpoint's identity: the weights, then config.json where it counts.

    A pipeline's root folder needs the role; without it the files of all its models are returned.
    """
    if role is None and is_pipeline(path):
        return [
            file for part, expected in EXPECTED.items() if (Path(path) / expected.subfolder).is_dir()
            for file in checkpoint_files(path, part)
        ]  # fmt: skip
    located = locate(path, role or "")
    return [*located.weights, *([located.config] if located.config else [])]


def _read(file: Path, role: str) -> Header | Problem:
    try:
        return read_header(file)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        return Problem(file=str(file), key=role, found=found, mend="make the file readable")
    except ContainerError as error:
        foreign = recognise_foreign(file)
        if foreign is None:
            mend = f"download it again; {wanted(role)}"
            return Problem(file=str(file), key=role, found=str(error), mend=mend)
        return Problem(file=str(file), key=role, found=f"{foreign}, not safetensors", mend=wanted(role))


def _shard_problems(path: Path, role: str, located: Located, headers: dict[Path, Header]) -> list[Problem]:
    """Tensors that stand in two shards, or that the index promises in a shard that lacks them."""
    home: dict[str, Path] = {}
    problems = []
    for file, header in headers.items():
        twice = sorted(name for name in header.tensors if name in home)
        if twice:
            found = f"{len(twice)} tensors such as {twice[0]!r} stand both in {home[twice[0]].name} and {file.name}"
            mend = "remove the file that does not belong to the set"
            problems.append(Problem(file=str(path), key=role, found=found, mend=mend))
        home |= dict.fromkeys(header.tensors, file)
    index = located.index or {}
    lost = sorted(name for name, file in index.items() if name not in home or home[name].name != file)
    if lost:
        found = f"{len(lost)} tensors such as {lost[0]!r} are not where the index says ({index[lost[0]]})"
        mend = "download the set again, all from one place"
        problems.append(Problem(file=str(path), key=role, found=found, mend=mend))
    return problems


def _read_config(file: Path | None, role: str) -> dict | None:
    if file is None:
        return None
    try:
        config = parse_json(read_text(file, MAX_WRITTEN_BYTES))
        problem = f"no model's config ({type(config).__name__})" if not isinstance(config, dict) else ""
    except (OSError, ValueError) as error:
        config, problem = {}, f"cannot be read ({error})"
    expected = EXPECTED[role]
    kind = None if problem else config.get("_class_name") or config.get("model_type")
    if kind not in expected.class_names:
        found = problem or f"describes {kind or 'no model'}, not {expected.name} ({expected.class_names[0]})"
        mend = f"download it again with its weights; {wanted(role)}"
        raise InputError([Problem(file=str(file), key=role, found=found, mend=mend)])
    return config


def _misfit(path: Path, role: str, recognised: Recognised) -> Problem:
    found = f"this is {recognised.description}"
    if recognised.unsupported:
        found += f" with weights stored as {recognised.unsupported}"
    if recognised.role == role:
        mend = wanted(role) + ("; fp8_vl makes it fp8 while loading" if role == "text_encoder" else "")
    else:
        found += f", not {EXPECTED[role].name}"
        mend = wanted(role) + (f"; this file belongs in {recognised.role}" if recognised.role else "")
    return Problem(file=str(path), key=role, found=found, mend=mend)
