"""Write the trainer's TOML, filtered from the workflow's configuration, and the resolved configuration beside it.

    python scripts/write_train_config.py --config my.yaml --latents_manifest latents.tsv \
        --text_encoder_outputs_manifest text.tsv --toml train.toml --resolved resolved.yaml

The TOML holds training arguments and nothing else: no caching, launch or workflow key. Both files are written only
when their content changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import toml
import yaml

from qwen_image.config import add_config_arguments, check_config, config_from, resolve_config, training_arguments
from qwen_image.files import write_if_changed
from qwen_image.problems import InputError, run


def main(argv: list[str] | None = None) -> int:
    """Filter, and write both files."""
    parser = argparse.ArgumentParser(description="Write the trainer's TOML from the workflow's configuration.")
    add_config_arguments(parser)
    parser.add_argument("--latents_manifest", required=True)
    parser.add_argument("--text_encoder_outputs_manifest", required=True)
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
    write_if_changed(args.toml, toml.dumps(dict(sorted(arguments.items()))))
    write_if_changed(args.resolved, yaml.safe_dump(resolved, sort_keys=True, allow_unicode=True))
    print(f"train_config: {len(arguments)} training arguments in {args.toml}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
