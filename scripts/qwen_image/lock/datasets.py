"""The datasets of a lock: their settings, checked as a dataset file's are, and which images and captions they list."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from qwen_image.bounded import parse_json
from qwen_image.dataset.items import IMAGE_EXTENSIONS
from qwen_image.dataset.keys import KEYS, describe
from qwen_image.lock.rows import DATASET, SETTING, Key, Source, parts_of
from qwen_image.problems import InputError, Problem

INDEX = r"\[([0-9]{1,6})\]"


@dataclass(frozen=True)
class LockedFile:
    """A dataset file as a lock has it."""

    place: str
    datasets: list[dict[str, Any]]
    """Their settings."""
    wanted: list[str]
    """The places of its JSONL files, images and captions."""
    left_out: list[str]
    """The places of images that are not usable, with their captions, of which some or all may not be there."""


def locked_files(rows: Mapping[Key, str], source: Source) -> list[LockedFile]:
    """Return the dataset files. Raises InputError for what is none."""
    parts = {f"{DATASET} {name}": _Part(f"{DATASET} {name}", source) for name in parts_of(rows, DATASET)}
    for key, value in rows.items():
        if key[0] in parts:
            parts[key[0]].rows[key] = value
    files = [part.file() for part in parts.values()]
    if problems := [problem for part in parts.values() for problem in part.problems]:
        raise InputError(problems)
    return files


def settings_fault(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return which key of a dataset's settings is no such setting, and why; None where all are."""
    for key, value in settings.items():
        if key not in KEYS or KEYS[key].ignored:
            return key, "is no setting of a dataset"
        try:
            KEYS[key].check(value)
        except ValueError as error:
            return key, f"is {describe(value)}: {error}"
    if ("image_directory" in settings) == ("image_jsonl_file" in settings):
        return "image_directory", "a dataset has either it or image_jsonl_file"
    if "image_directory" in settings and "caption_extension" not in settings:
        return "caption_extension", "is missing"
    return None


@dataclass
class _Part:
    """What a lock says of a dataset file."""

    name: str
    source: Source
    rows: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def file(self) -> LockedFile:
        place = self.rows.get((self.name, "file", "place"), "")
        if PurePath(place).suffix.lower() not in (".toml", ".json"):
            self._problem("file", "place", f"found {place[:60]!r}, which names no dataset file")
        by_index = self._settings()
        if sorted(by_index) != list(range(len(by_index))) or not by_index:
            self._problem("[0]", SETTING, "the datasets of a file are numbered from 0, and some are missing")
        if self.problems:
            return LockedFile(place, [], [], [])
        datasets = [by_index[index] for index in range(len(by_index))]
        return LockedFile(place, datasets, *self._places(datasets))

    def _settings(self) -> dict[int, dict[str, Any]]:
        by_index: dict[int, dict[str, Any]] = {}
        for (_, name, what), text in self.rows.items():
            match = re.fullmatch(INDEX, name)
            if not what.startswith(f"{SETTING} "):
                continue
            if match is None:
                self._problem(name, what, "is a setting of no dataset")
                continue
            try:
                value = parse_json(text)
            except ValueError as error:
                self._problem(name, what, f"is no JSON value ({error})")
            else:
                by_index.setdefault(int(match[1]), {})[what.removeprefix(f"{SETTING} ")] = value
        for index, settings in by_index.items():
            if not self.problems and (fault := settings_fault(settings)) is not None:
                self._problem(f"[{index}]", f"{SETTING} {fault[0]}", fault[1])
        return by_index

    def _places(self, datasets: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        """The places of what there must be, and of what there may be."""
        wanted = [one["image_jsonl_file"] for one in datasets if "image_jsonl_file" in one]
        left_out: list[str] = []
        for _, name, what in self.rows:
            match = re.match(rf"{INDEX} ", name)
            if match is None or what not in ("image", "left out"):
                continue
            index, image = int(match[1]), name[match.end() :]
            if index >= len(datasets):
                self._problem(name, what, "belongs to a dataset of which there are no settings")
            elif "image_directory" not in datasets[index]:
                # what a JSONL file leaves out is one of its lines, or an image that it says something wrong of
                wanted += [image] if what == "image" else []
            elif _is_image(image):
                settings = datasets[index]
                (left_out if what == "left out" else wanted).extend(_pair(settings, image))
            else:
                self._problem(name, what, "is no image in a folder")
        return wanted, left_out

    def _problem(self, name: str, what: str, found: str) -> None:
        self.problems.append(self.source.problem((self.name, name, what), found))


def _is_image(name: str) -> bool:
    return "/" not in name and os.path.splitext(name)[1].lower() in (*IMAGE_EXTENSIONS, ".jxl")


def _pair(settings: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The places of an image and of its caption."""
    caption = os.path.splitext(name)[0] + settings["caption_extension"]
    return os.path.join(settings["image_directory"], name), os.path.join(settings["image_directory"], caption)
