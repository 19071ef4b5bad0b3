"""Dataset files written: settings as they were read, with other paths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any


def dataset_file_text(name: str, datasets: Sequence[Mapping[str, Any]]) -> str:
    """Return a dataset file of these settings, in the format that its name asks for. What is None is left out."""
    tables = [{key: value for key, value in one.items() if value is not None and key != "index"} for one in datasets]
    if PurePath(name).suffix.lower() == ".json":
        return json.dumps({"datasets": tables}, ensure_ascii=False, indent=2) + "\n"
    # JSON's texts, numbers and lists are valid TOML, but for one character
    lines = (["[[datasets]]", *(f"{key} = {_value(value)}" for key, value in table.items()), ""] for table in tables)
    return "\n".join(line for table in lines for line in table)


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
