"""Write the trainer's TOML, filtered from the workflow's configuration, and the resolved configuration beside it.

    python scripts/write_train_config.py --config my.yaml --latents_manifest latents.tsv \
        --text_encoder_outputs_manifest text.tsv --toml train.toml --resolved resolved.yaml

The TOML holds training arguments and nothing else: no caching, launch or workflow key. Both files are written only
when their content changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path

import toml
import yaml

from qwen_image.config import (
    OWN_ARGUMENTS,
    add_config_arguments,
    check_config,
    config_from,
    resolve_config,
    training_arguments,
)
from qwen_image.files import write_if_changed
from qwen_image.problems import InputError, run
from qwen_image.training.schema import key_schemas, with_defaults


def main(argv: list[str] | None = None) -> int:
    """Filter, and write both files."""
    parser = argparse.ArgumentParser(description="Write the trainer's TOML from the workflow's configuration.")
    add_config_arguments(parser)
    parser.add_argument("--latents_manifest", required=True)
    parser.add_argument("--text_encoder_outputs_manifest", required=True)
    parser.add_argument("--prompts_manifest", help="of the texts that belong to no picture, where there are any")
    parser.add_argument("--toml", type=Path, required=True, help="where the training arguments go")
    parser.add_argument("--resolved", type=Path, required=True, help="where the resolved configuration goes")
    args = parser.parse_args(argv)
    config, name = config_from(args)
    if problems := check_config(config, name):
        raise InputError(problems)
    resolved = resolve_config(config)
    arguments = training_arguments(resolved) | {
        "latents_manifest": args.latents_manifest,
        "text_encoder_outputs_manifest": args.text_encoder_outputs_manifest,
    }
    if args.prompts_manifest is not None:
        arguments["prompts_manifest"] = args.prompts_manifest
    write_if_changed(args.toml, toml_text(dict(sorted(arguments.items()))))
    full = honoured_defaults() | resolved
    write_if_changed(args.resolved, yaml.safe_dump(full, sort_keys=True, allow_unicode=True))
    print(f"train_config: {len(arguments)} training arguments in {args.toml}", file=sys.stderr)
    return 0


def honoured_defaults() -> dict:
    """Return the default of every training argument that this version honours."""
    keys = {key for key, entry in key_schemas().items() if "x-refused" not in entry}
    return {key: value for key, value in with_defaults({}).items() if key in keys - set(OWN_ARGUMENTS)}


def toml_text(values: dict) -> str:
    """Return a TOML document that reads back as `values`, whatever characters its texts hold."""
    encoder = toml.TomlEncoder()
    # toml's own quoting of text spoils backslashes before an x and control characters; JSON's is valid TOML
    encoder.dump_funcs[str] = lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    text = toml.dumps(values, encoder=encoder)
    assert tomllib.loads(text) == values, "the TOML writer changed a value"
    return text


if __name__ == "__main__":
    sys.exit(run(main))
