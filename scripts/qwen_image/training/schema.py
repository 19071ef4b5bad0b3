"""The schema of the training arguments, and what it tells: names, types, defaults, numbers written as text."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from qwen_image.bounded import is_number_text

SCHEMA_FILE = Path(__file__).resolve().parents[3] / "config" / "schemas" / "training.schema.yaml"


@functools.cache
def load_schema() -> dict:
    """Read the schema file."""
    import yaml

    with open(SCHEMA_FILE, encoding="utf-8") as stream:
        return yaml.safe_load(stream)


def key_schemas() -> dict[str, dict]:
    """Return each argument's own schema, in the file's order."""
    return load_schema()["properties"]


def argument_names() -> list[str]:
    """Return the names of all training arguments, in the schema's order."""
    return list(key_schemas())


def key_types(schema: Mapping) -> list[str]:
    """Return the JSON types a key may have, as a list also where there is only one."""
    return [schema["type"]] if isinstance(schema["type"], str) else list(schema["type"])


def with_defaults(settings: Mapping[str, object]) -> dict[str, object]:
    """Return all keys in the schema's order; those not given, or given as null, have their default."""
    return {
        name: schema["default"] if settings.get(name) is None else settings[name]
        for name, schema in key_schemas().items()
    }


def coerce_numbers(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with what YAML and the command line write differently turned into what was meant.

    YAML 1.1 reads ``1e-4`` as text and ``no`` as false; a command line has only text. Text that looks like a number
    becomes one where a number is wanted, and true and false become the choice that is spelled so. The rest is left for
    the check to name.
    """
    schemas = key_schemas()
    return {name: _coerced(value, schemas[name]) if name in schemas else value for name, value in settings.items()}


def _coerced(value: object, schema: Mapping) -> object:
    types = key_types(schema)
    if isinstance(value, list) and "items" in schema:
        return [_coerced(element, schema["items"]) for element in value]
    if isinstance(value, str) and {"number", "integer"} & set(types) and is_number_text(value):
        value = float(value) if re.search(r"[.eE]", value) else int(value)
    choice, _, number = value.partition(":") if isinstance(value, str) else ("", "", "")
    if choice in schema.get("x-with-number", ()) and is_number_text(number):
        return choice
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return int(value)
    if isinstance(value, bool) and "boolean" not in types:
        spellings = {True: ("true", "yes", "on"), False: ("false", "no", "off")}[value]
        return next((choice for choice in schema.get("enum", []) if str(choice).lower() in spellings), value)
    return value
