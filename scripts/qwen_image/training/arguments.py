"""The training arguments: read from the command line and a TOML file, checked, and handed on as one frozen object.

Names, types, defaults, ranges and choices stand in ``config/schemas/training.schema.yaml`` and nowhere else; a file
and the command line go through the same checks. Imports no torch, so that the workflow can check a config with it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from qwen_image.bounded import parse_toml, read_text
from qwen_image.problems import InputError, Problem
from qwen_image.training.checks import check_settings, unknown_key
from qwen_image.training.schema import argument_names, coerce_numbers, key_schemas, key_types, with_defaults

__all__ = ["Settings", "argument_names", "check_settings", "coerce_numbers", "parse_arguments", "with_defaults"]

COMMAND_LINE = "command line"
REQUIRED = (
    "dataset_config", "latents_manifest", "text_encoder_outputs_manifest", "dit", "output_dir", "output_name",
)  # fmt: skip


class Settings(SimpleNamespace):
    """The checked settings: one attribute for every key of the schema, with its default where it was not given.

    Types are those of the schema: ``settings.learning_rate`` is a float, ``settings.max_train_epochs`` an int or None,
    ``settings.optimizer_args`` a list of strings or None. The object cannot be changed.
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: settings are decided once."""
        raise AttributeError(f"settings cannot be changed (tried {name})")

    def as_dict(self) -> dict[str, object]:
        """Return key and value in the schema's order."""
        return dict(vars(self))


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line and the TOML file it names; the command line wins.

    Raises InputError with every problem of both.
    """
    given, problems = _read_command_line(argv)
    file = str(given.get("config_file") or COMMAND_LINE)
    from_file: dict[str, object] = {}
    if given.get("config_file"):
        from_file, file_problems = _read_toml(Path(given["config_file"]))
        problems += file_problems
    merged = coerce_numbers(from_file | given)
    for problem in check_settings(merged, file, required=REQUIRED):
        on_command_line = problem.key.split("[")[0] in given
        problems.append(dataclasses.replace(problem, file=COMMAND_LINE) if on_command_line else problem)
    if problems:
        raise InputError(problems)
    return Settings(**with_defaults(merged))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: every key of the schema is a flag, and its description the flag's help."""
    parser = _Parser(
        prog="qwen_image_train_network.py",
        description="Train a LoRA on cached latents and text-encoder outputs. Every flag may stand in a TOML file too.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, schema in key_schemas().items():
        text = schema["description"]
        if "x-refused" in schema:
            text = f"{text} (not supported: {schema['x-refused']})"
        elif schema["default"] is not None:
            text = f"{text} (default: {schema['default']})"
        text = text.replace("%", "%%")
        types = key_types(schema)
        if "boolean" in types:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
        elif "array" in types:
            parser.add_argument(f"--{name}", nargs="*", metavar="VALUE", help=text)
        else:
            # values stay text here: the schema checks them, as it checks the file's
            parser.add_argument(f"--{name}", metavar="VALUE", help=text)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError([Problem(file=COMMAND_LINE, found=message, mend="--help lists every argument")])


def _read_command_line(argv: Sequence[str] | None) -> tuple[dict[str, object], list[Problem]]:
    namespace, rest = build_parser().parse_known_args(argv)
    flags = [word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")]
    problems = [unknown_key(flag, COMMAND_LINE) for flag in flags]
    if rest and not flags:
        mend = "every value follows its flag: --learning_rate 1e-4"
        problems = [Problem(file=COMMAND_LINE, key=word, found="a value without a flag", mend=mend) for word in rest]
    return vars(namespace), problems


def _read_toml(path: Path) -> tuple[dict[str, object], list[Problem]]:
    """Return the file's keys with its sections flattened."""
    try:
        tables = parse_toml(read_text(path))
    except OSError as error:
        return {}, [Problem(file=str(path), found=f"cannot be read ({error.strerror})", mend="give an existing file")]
    except ValueError as error:
        return {}, [Problem(file=str(path), found=f"is no TOML file ({error})", mend="mend the line it names")]
    values: dict[str, object] = {}
    problems: list[Problem] = []
    for key, value in _flattened(tables):
        if key in values:
            problems.append(Problem(file=str(path), key=key, found="stands in two sections", mend="keep one of them"))
        values[key] = value
    if "config_file" in values:
        mend = "remove it; put all arguments into one file"
        problems.append(Problem(file=str(path), key="config_file", found="names another file", mend=mend))
        del values["config_file"]
    return values, problems


def _flattened(table: Mapping[str, object]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in table.items():
        pairs += _flattened(value) if isinstance(value, dict) else [(key, value)]
    return pairs
