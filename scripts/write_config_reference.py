"""Write config/README.md, the list of every configuration key, from the two schemas.

python scripts/write_config_reference.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_image.config import LAUNCH_KEYS, OWN_ARGUMENTS, workflow_schema
from qwen_image.files import write_if_changed
from qwen_image.training.schema import load_schema

TARGET = Path(__file__).parents[1] / "config" / "README.md"
HEAD = """# Configuration keys

Written by `python scripts/write_config_reference.py` from the schemas in [schemas/](schemas); do not edit it by hand.

[config.yaml](config.yaml) is the embedded demo, [config.example.yaml](config.example.yaml) a start for your own data,
[dataset.toml](dataset.toml) an annotated dataset file. Keys are flat. A key that is left out, or has no value, takes
its default; an unknown key is an error. Paths are relative to the folder that `snakemake` runs in.
"""


def main(argv: list[str] | None = None) -> int:
    """Write the file, when it changed."""
    argparse.ArgumentParser(description="Write config/README.md from the schemas.").parse_args(argv)
    changed = write_if_changed(TARGET, reference())
    print(f"{TARGET.name}: {'written' if changed else 'up to date'}", file=sys.stderr)
    return 0


def reference() -> str:
    """Return the whole page."""
    workflow = workflow_schema()
    training = {
        key: entry
        for key, entry in load_schema()["properties"].items()
        if key not in (*workflow["properties"], *LAUNCH_KEYS, *OWN_ARGUMENTS)
    }
    honoured = {key: entry for key, entry in training.items() if "x-refused" not in entry}
    refused = {key: entry for key, entry in training.items() if "x-refused" in entry}
    own = {key: entry for key, entry in workflow["properties"].items() if key not in LAUNCH_KEYS}
    launch = {key: entry for key, entry in workflow["properties"].items() if key in LAUNCH_KEYS}
    return "\n".join(
        [
            HEAD,
            "## Data, models, caching\n", *_table(own, workflow["required"]), "",
            "## Launch\n", "Options of `accelerate launch`, no part of the trainer's TOML.\n", *_table(launch), "",
            "## Training\n", *_table(honoured), "",
            "## Known, and refused by this version\n", "| key | why |", "|---|---|",
            *(f"| `{key}` | {_cell(entry['x-refused'])} |" for key, entry in refused.items()), "",
        ]
    )  # fmt: skip


def _table(entries: Mapping[str, Mapping], required: tuple[str, ...] | list[str] = ()) -> Iterator[str]:
    yield "| key | default | values | meaning |"
    yield "|---|---|---|---|"
    for key, entry in entries.items():
        default = "**required**" if key in required else f"`{_value(entry.get('default'))}`"
        yield f"| `{key}` | {default} | {_cell(_values(entry))} | {_cell(entry['description'])} |"


def _values(entry: Mapping) -> str:
    if "enum" in entry:
        refused = entry.get("x-refused-values", {})
        return ", ".join(f"`{value}`" for value in entry["enum"] if value is not None and value not in refused)
    types = entry.get("type", "string")
    names = [name for name in ([types] if isinstance(types, str) else types) if name != "null"]
    bounds = [f"≥ {entry['minimum']}"] if "minimum" in entry else []
    bounds += [f"> {entry['exclusiveMinimum']}"] if "exclusiveMinimum" in entry else []
    bounds += [f"≤ {entry['maximum']}"] if "maximum" in entry else []
    bounds += [f"< {entry['exclusiveMaximum']}"] if "exclusiveMaximum" in entry else []
    return ", ".join([" or ".join(names), *bounds])


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
