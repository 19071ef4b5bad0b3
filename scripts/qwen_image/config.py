"""The workflow's configuration: read, checked, filled with defaults, and sorted by who needs what.

``config/schemas/config.schema.yaml`` declares the workflow's own keys, ``config/schemas/training.schema.yaml`` every
training argument. The keys are flat, and no key is accepted that neither declares. Imports no torch.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen_image.bounded import check_bounds, parse_yaml, read_text, text_fault
from qwen_image.problems import InputError, Nearest, Problem
from qwen_image.tokens import FOUND, MEND, holds_token
from qwen_image.training.arguments import argument_names, check_settings, coerce_numbers
from qwen_image.training.schema import key_schemas

SCHEMA = Path(__file__).parents[2] / "config" / "schemas" / "config.schema.yaml"
# named by both schemas: the workflow hands them to the launcher, not to the trainer's TOML
LAUNCH_KEYS = (
    "mixed_precision", "num_processes", "num_machines", "gpu_ids", "main_process_port", "num_cpu_threads_per_process",
    "dynamo_backend", "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic",
)  # fmt: skip
# training arguments that are no keys of the configuration: the workflow sets them itself, or no LoRA comes of them
OWN_ARGUMENTS = (
    "config_file", "latents_manifest", "text_encoder_outputs_manifest", "prompts_manifest", "show_timesteps",
)  # fmt: skip
BY_HAND = {
    "show_timesteps": "remove it; once results/train/<name>/config.toml is there, run python "
    "scripts/qwen_image_train_network.py --config_file results/train/<name>/config.toml --show_timesteps image"
}


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML configuration. Raises InputError when it is missing or is no table of keys."""
    try:
        config = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        found = f"cannot be read ({error})"
        raise InputError([Problem(file=str(path), found=found, mend="give a YAML file")]) from error
    if not isinstance(config, dict):
        raise InputError([Problem(file=str(path), found="holds no keys", mend="see config/config.example.yaml")])
    check_values(config, str(path))
    return config


def check_values(config: Mapping[str, Any], file: str) -> None:
    """Raise InputError for what YAML can say and no key can mean, before anything else looks at a configuration.

    That is: more than the bounds of a file of settings, keys that are no text, dates, sets, text that no file can hold,
    access tokens.
    """
    try:
        check_bounds(config)
    except ValueError as error:
        mend = "write each key with a plain value or a list of them"
        raise InputError([Problem(file=file, found=f"cannot be read ({error})", mend=mend)]) from error
    problems = []
    for key, value in config.items():
        if (found := _value_fault(key) or _value_fault(value)) is not None:
            mend = "write a text (dates and the like in quotes), a number, true or false, or a list of these"
            problems.append(Problem(file=file, key=str(key), found=found, mend=mend))
        elif holds_token(value):
            problems.append(Problem(file=file, key=str(key), found=FOUND, mend=MEND))
        elif not isinstance(key, str):
            problems.append(Problem(file=file, key=str(key), found="is not a known key", mend="remove it"))
    if problems:
        raise InputError(problems)


def _value_fault(value: object) -> str | None:
    """What makes a value none of a configuration's, if anything does."""
    if isinstance(value, str):
        return text_fault(value)
    if isinstance(value, Mapping):
        keys = None if all(isinstance(key, str) for key in value) else "holds a key that is no text"
        return keys or next(filter(None, map(_value_fault, [*value, *value.values()])), None)
    if isinstance(value, list):
        return next(filter(None, map(_value_fault, value)), None)
    plain = value is None or isinstance(value, bool | int | float)
    return None if plain else f"is a value of the kind {type(value).__name__}"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a program takes the configuration: as a file, or as text from the workflow."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="configuration file (YAML)")
    source.add_argument("--config_json", help="the configuration itself, as JSON")


def config_from(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the configuration that a program was given, and the name to call it by in messages."""
    if args.config is not None:
        return load_config(args.config), args.config
    return json.loads(args.config_json), "config"


def check_config(config: Mapping[str, Any], file: str) -> list[Problem]:
    """Return what is wrong with the keys: names, types, ranges, choices, combinations. Opens no file."""
    config = normalise(config)
    known = sorted({*workflow_schema()["properties"], *argument_names()})
    problems = [_unknown(key, known, file) for key in config if key not in known or key in OWN_ARGUMENTS]
    problems += _check_workflow_keys(config, file)
    training = {key: value for key, value in config.items() if key in _training_keys()}
    told = {problem.key for problem in problems}  # a path is a key of both; one message about it is enough
    return problems + [problem for problem in check_settings(training, file) if problem.key not in told]


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every workflow key, defaults filled in, and the training arguments that were set."""
    config = normalise(config)
    defaults = {key: entry["default"] for key, entry in workflow_schema()["properties"].items() if "default" in entry}
    resolved = {**defaults, **config}
    resolved["caching_teo_text_encoder"] = resolved["caching_teo_text_encoder"] or resolved["text_encoder"]
    return resolved


def training_arguments(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what belongs in the trainer's TOML: training arguments that were set, and nothing else."""
    return {key: value for key, value in resolved.items() if key in _training_keys() and value is not None}


def launch_arguments(resolved: Mapping[str, Any]) -> list[str]:
    """Return the options of ``accelerate launch`` that bear on the result. All are given: no hidden default decides."""
    arguments = ["--quiet"]
    for key in ("num_processes", "num_machines", "mixed_precision", "dynamo_backend", "dynamo_mode"):
        if resolved[key] is not None:
            arguments += [f"--{key}", str(resolved[key]).lower()]
    arguments += ["--multi_gpu"] if resolved["num_processes"] > 1 else []
    arguments += ["--dynamo_use_fullgraph"] if resolved["dynamo_fullgraph"] else []
    return arguments + (["--dynamo_use_dynamic"] if resolved["dynamo_dynamic"] else [])


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Undo two habits of YAML: ``1e-4`` is read as text, and a key without a value means "the default"."""
    filled = {key: value for key, value in config.items() if value is not None}
    workflow = {key: value for key, value in filled.items() if key in workflow_schema()["properties"]}
    # the launch port and the GPU list may come as numbers in quotes; everything else keeps its type
    # YAML reads a bare `no` as false
    spelt = {"mixed_precision": "no", "dynamo_backend": "NO"}
    words = {key: word for key, word in spelt.items() if filled.get(key) is False}
    return {**filled, **coerce_numbers({key: filled[key] for key in filled if key not in workflow}), **words}


@functools.cache
def workflow_schema() -> dict[str, Any]:
    """Return the schema of the workflow's own keys."""
    return yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Return every key that a configuration may hold, the workflow's own first."""
    return tuple(dict.fromkeys([*workflow_schema()["properties"], *sorted(_training_keys())]))


def value_schema(key: str) -> Mapping[str, Any]:
    """Return the schema of a key's value."""
    return workflow_schema()["properties"].get(key) or key_schemas()[key]


@functools.cache
def _training_keys() -> frozenset[str]:
    return frozenset(argument_names()) - set(LAUNCH_KEYS) - set(OWN_ARGUMENTS)


def _check_workflow_keys(config: Mapping[str, Any], file: str) -> list[Problem]:
    import jsonschema

    schema = workflow_schema()
    own = {key: value for key, value in config.items() if key in schema["properties"]}
    problems = []
    for error in sorted(jsonschema.Draft202012Validator(schema).iter_errors(own), key=lambda error: str(error.path)):
        if error.validator == "required":
            missing = next(key for key in schema["required"] if key not in own and f"'{key}'" in error.message)
            found, key, mend = "is missing", missing, schema["properties"][missing]["description"]
        else:
            key = str(error.path[0])
            found = f"found {error.instance!r}, {_expected(error)}"
            mend = schema["properties"][key]["description"]
        problems.append(Problem(file=file, key=key, found=found, mend=mend))
    return problems + _without_effect(own, file) + _contradictions(own, file)


def _without_effect(own: Mapping[str, Any], file: str) -> list[Problem]:
    """A key that changes nothing is an error: saying so is better than ignoring it."""
    if own.get("dynamo_backend", "NO") != "NO":
        return []
    keys = [key for key in ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic") if own.get(key)]
    found, mend = "has no effect while dynamo_backend is NO", "set dynamo_backend, or remove the key"
    return [Problem(file=file, key=key, found=found, mend=mend) for key in keys]


def _contradictions(own: Mapping[str, Any], file: str) -> list[Problem]:
    problems = []
    if own.get("adopt_existing") and own.get("deterministic"):
        found = "contradicts deterministic: nobody knows how another program's files came about"
        problems.append(Problem(file=file, key="adopt_existing", found=found, mend="set one of them"))
    processes, machines = own.get("num_processes", 1), own.get("num_machines", 1)
    if all(isinstance(count, int) and count > 0 for count in (processes, machines)) and processes % machines:
        found = f"{processes} processes cannot be shared evenly by {machines} machines"
        mend = "make it a multiple of num_machines: it counts the processes of all machines"
        problems.append(Problem(file=file, key="num_processes", found=found, mend=mend))
    return problems


def _expected(error) -> str:
    expected = error.validator_value
    match error.validator:
        case "type":
            return f"expected {' or '.join(expected) if isinstance(expected, list) else expected}"
        case "enum":
            return f"expected one of {', '.join(map(str, expected))}"
        case "minimum" | "maximum":
            return f"expected a number of {'at least' if error.validator == 'minimum' else 'at most'} {expected}"
        case "pattern" if error.path and error.path[-1] == "gpu_ids":
            return "expected GPUs by number or name, such as 0,1; a device such as cpu or cuda:1 is for the caching"
        case "pattern":
            return f"expected text like {expected}"
        case "minLength" | "maxLength":
            return "expected text that is neither empty nor longer than a file name"
    return error.message


def _unknown(key: str, known: Sequence[str], file: str) -> Problem:
    if key in BY_HAND:
        return Problem(file=file, key=key, found="would make no LoRA", mend=BY_HAND[key])
    if key in OWN_ARGUMENTS:
        return Problem(file=file, key=key, found="is set by the workflow itself", mend="remove the key")
    mend = Nearest(str(key), known, "remove it, or look the name up in config/README.md")
    return Problem(file=file, key=str(key), found="is not a known key", mend=mend)
