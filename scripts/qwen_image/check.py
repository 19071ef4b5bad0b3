"""The check stage: everything that can be known to be wrong before any work is done, in one message.

It reads the configuration, the dataset file, folder listings and checkpoint headers; it opens no picture, loads no
model and needs no GPU.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from qwen_image.config import check_config, resolve_config
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.dataset.items import Listing, list_datasets
from qwen_image.dataset.listing import MAX_PROBLEMS, limit
from qwen_image.models.checkpoint import check_checkpoint, checkpoint_files, open_checkpoint
from qwen_image.models.tokenizer import check_tokenizer, tokenizer_files
from qwen_image.problems import InputError, Problem
from qwen_image.runs.caches import own_values
from qwen_image.runs.folders import folder_problems
from qwen_image.runs.keys import TABLE
from qwen_image.runs.table import Run, expand_runs, placed
from qwen_image.sampling.prompts import load_prompts
from qwen_image.training.arguments import argument_names, with_defaults
from qwen_image.training.trackers import check_trackers

Datasets = list[tuple[DatasetSettings, Listing]]
MODEL_KEYS = ("dit", "vae", "text_encoder", "caching_teo_text_encoder", "tokenizer")
ROLES = {"dit": "dit", "vae": "vae", "caching_teo_text_encoder": "text_encoder"}
"""What the checkpoint of a key must be."""
OTHER_FILES = ("network_weights", "base_weights", "sample_prompts", "log_tracker_config")
"""Keys that name files which a training reads as well."""
MAX_NAME_BYTES = 255
"""Of a file or folder, on the usual file systems."""
LONGEST_SKEW = 60
"""Seconds that the clocks of a file server and of this machine may differ."""


@dataclass(frozen=True)
class Checked:
    """A configuration in which nothing was found wrong."""

    runs: dict[str, dict[str, Any]]
    """Each run's configuration by its name, defaults filled in."""
    datasets: dict[str, Datasets]
    """What each dataset file lists."""


def check_all(config: Mapping[str, Any], file: str, made: Iterable[Path] = ()) -> Checked:
    """Check a configuration, each of its runs, everything they name, and the times of what was made before.

    Raises InputError with every problem found. Bad items among good ones are none: the caching stages deal with them
    once the good ones are cached. The times of the items' files are left to who asks for their sizes anyway: there may
    be very many (`check_times`).
    """
    runs = expand_runs(config, file)
    seen = _Seen({}, {})
    # what the runs have in common is wrong once
    problems = [problem for run in runs for problem in placed(run, _check_run(run, file, seen), file)]
    settings = {path: [one for one, _ in datasets] for path, datasets in seen.datasets.items()}
    problems += folder_problems(settings, own_values(config), file) if not problems else []
    if problems:
        raise InputError(limit(list(dict.fromkeys(problems))))
    configs = {run.name: resolve_config(run.config) for run in runs}
    files = [*_inputs(configs.values(), seen.datasets), *_named(config.get(TABLE)), *made]
    if any(is_still_to_come(_changed(path)) for path in files):
        check_times(seen.datasets, files)
    return Checked(configs, seen.datasets)


@dataclass(frozen=True)
class _Seen:
    """What was looked at already: runs have much in common."""

    models: dict[tuple, list[Problem]]
    datasets: dict[str, Datasets]


def _check_run(run: Run, file: str, seen: _Seen) -> list[Problem]:
    config = run.config
    problems = check_config(config, file)
    keys_at_fault = {problem.key for problem in problems}
    named = {key: value for key, value in config.items() if isinstance(value, str) and key not in keys_at_fault}
    models = tuple((key, named.get(key)) for key in MODEL_KEYS)
    if models not in seen.models:
        seen.models[models] = _check_models(named)
    problems += seen.models[models]
    problems += _check_layers(config, named) if not problems else []
    problems += _check_output(named, file)
    problems += _check_prompts(named)
    problems += _check_trackers(config, keys_at_fault)
    return problems + _check_datasets(named, seen.datasets)


def is_still_to_come(seconds: float) -> bool:
    """Whether a file's time of change lies in the future."""
    return seconds > time.time() + LONGEST_SKEW


def check_times(datasets: Mapping[str, Datasets], others: Iterable[str | Path] = ()) -> None:
    """Raise InputError for every file from the future: what is made from it is never newer, and would be made forever.

    Looks at the items' files and at `others`.
    """
    items = [item for several in datasets.values() for _, listing in several for item in listing.items]
    paths = [*others, *(path for item in items for path in (item.image_path, item.caption_path) if path)]
    times = {str(path): _changed(path) for path in paths}
    mend = "give it the present time (touch), or set this machine's clock right"
    problems = [
        Problem(file=path, found=f"was changed on {_day(changed)}, says its time", mend=mend)
        for path, changed in times.items()
        if is_still_to_come(changed)
    ]
    if problems:
        raise InputError(limit(problems))


def summary(datasets: Datasets) -> str:
    """Return what the datasets hold, one line each, for the check stage's report."""
    lines = []
    for settings, listing in datasets:
        source = settings.image_directory or settings.image_jsonl_file
        kinds = Counter(Path(item.image_path).suffix.lower().lstrip(".") for item in listing.items)
        kinds_text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        width, height = settings.resolution
        lines.append(
            f"datasets[{settings.index}] {source}: {len(listing.items)} items ({kinds_text}), "
            f"{len(listing.rejects)} left out, {width}x{height}{' in buckets' if settings.enable_bucket else ''}, "
            f"batch size {settings.batch_size}, {settings.num_repeats} repeats"
            f"{', several captions an item' if settings.multiple_captions else ''}"
            f"{f', loss weight {settings.loss_weight:g}' if settings.loss_weight != 1 else ''}"
        )
        lines += [f"  left out: {reject.path}: {reject.reason}" for reject in listing.rejects[:MAX_PROBLEMS]]
        if (more := len(listing.rejects) - MAX_PROBLEMS) > 0:
            lines.append(f"  left out: {more} more")
        if settings.control_directory:
            lines.append("  control_directory is not used: the original model has no control images")
    return "\n".join(lines) + "\n"


def bad_items(datasets: Datasets, on_bad_item: str) -> str:
    """Return one line that says how many items cannot be used and what becomes of it; empty when all can."""
    rejects = [reject for _, listing in datasets for reject in listing.rejects]
    if not rejects:
        return ""
    count = len(rejects) + sum(len(listing.items) for _, listing in datasets)
    follows = "the others are cached first, then the stage fails" if on_bad_item == "error" else "they are left out"
    example = f"for example {rejects[0].path}: {rejects[0].reason}"
    return f"{len(rejects)} of {count} items cannot be used, {example}; {follows} (on_bad_item: {on_bad_item})"


def _inputs(configs: Collection[Mapping[str, Any]], datasets: Mapping[str, Datasets]) -> list[str | Path]:
    """Every file that something is made from, but for the items': dataset files, checkpoints, adapters and prompts."""
    models = {(config[key], role) for config in configs for key, role in ROLES.items()}
    tokenizers = {(config["caching_teo_text_encoder"], config["tokenizer"]) for config in configs}
    return [
        *datasets,
        *(path for model, role in sorted(models) for path in checkpoint_files(model, role)),
        *(path for words in tokenizers for path in tokenizer_files(*words)),
        *(path for config in configs for key in OTHER_FILES for path in _named(config.get(key))),
    ]


def _named(value: str | list[str] | None) -> list[str]:
    """The files that a key names: none, one or several."""
    return value if isinstance(value, list) else [value] if value else []


def _day(seconds: float) -> str:
    try:
        return str(date.fromtimestamp(seconds))
    except (OSError, OverflowError, ValueError):
        return "a day of no calendar"


def _changed(path: str | Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:  # it went away a moment ago; who needs it will say so
        return 0


def _check_models(named: Mapping[str, str]) -> list[Problem]:
    problems = []
    for key in ("dit", "vae", "text_encoder"):
        if key in named:
            problems += check_checkpoint(named[key], key)
    encoder = named.get("caching_teo_text_encoder") or named.get("text_encoder")
    if "caching_teo_text_encoder" in named:
        for problem in check_checkpoint(named["caching_teo_text_encoder"], "text_encoder"):
            problems.append(replace(problem, key="caching_teo_text_encoder"))
    if not problems:
        problems += _check_fit(named)
    if encoder and os.path.exists(encoder):
        problems += check_tokenizer(encoder, named.get("tokenizer"))
    return problems


def _check_output(named: Mapping[str, str], file: str) -> list[Problem]:
    problems = _check_overwriting(named, file)
    for key in ("output_dir", "logging_dir"):
        if key in named:
            problems += check_folder(Path(named[key]), file, key)
    return problems


def check_folder(folder: Path, file: str, key: str) -> list[Problem]:
    """Return what keeps a folder from being made and written to."""
    if long := next((part for part in folder.parts if len(os.fsencode(part)) > MAX_NAME_BYTES), None):
        found = f"the name {long[:40]}... is longer than {MAX_NAME_BYTES} bytes"
        return [Problem(file=file, key=key, found=found, mend="choose a shorter one")]
    existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path("."))
    if not existing.is_dir():
        mend = "name a folder; it is made when it does not exist"
        return [Problem(file=file, key=key, found=f"{existing} is not a folder", mend=mend)]
    if not os.access(existing, os.W_OK | os.X_OK):
        mend = "give yourself the right to write there, or name another folder"
        return [Problem(file=file, key=key, found=f"{existing} cannot be written to", mend=mend)]
    return []


def _check_prompts(named: Mapping[str, str]) -> list[Problem]:
    if "sample_prompts" not in named:
        return []
    try:
        load_prompts(named["sample_prompts"])
    except InputError as error:
        return error.problems
    return []


def _check_trackers(config: Mapping[str, Any], keys_at_fault: set[str]) -> list[Problem]:
    known = {key: value for key, value in config.items() if key in argument_names() and key not in keys_at_fault}
    return check_trackers(with_defaults(known))


def _check_datasets(named: Mapping[str, str], seen: dict[str, Datasets]) -> list[Problem]:
    file = named.get("dataset_config")
    if file is None or file in seen:
        return []
    try:
        settings = load_dataset_config(file)
        listings = list_datasets(settings, file)
    except InputError as error:
        return error.problems
    seen[file] = list(zip(settings, listings, strict=True))
    return [problem for one in settings for problem in _check_cache_folder(one, file)]


def _check_overwriting(named: Mapping[str, str], file: str) -> list[Problem]:
    """The LoRA must not be written over a file that it is made from."""
    if "output_dir" not in named or "output_name" not in named:
        return []
    lora = Path(named["output_dir"]) / f"{named['output_name']}.safetensors"
    for key in ("dit", "vae", "text_encoder", "caching_teo_text_encoder"):
        role = key.removeprefix("caching_teo_")
        files = checkpoint_files(named[key], role) if key in named and not check_checkpoint(named[key], role) else []
        if any(os.path.realpath(lora) == os.path.realpath(path) for path in files):
            mend = "choose another output_name or output_dir"
            return [Problem(file=file, key="output_name", found=f"{lora} is the {key} itself", mend=mend)]
    return []


def _check_fit(named: Mapping[str, str]) -> list[Problem]:
    """The DiT must be the text-to-image model, and take the embeddings that the text encoder gives."""
    encoder = named.get("caching_teo_text_encoder") or named.get("text_encoder")
    if "dit" not in named or not encoder:
        return []
    dit = open_checkpoint(named["dit"], "dit")
    config = dit.model_config()
    if config.get("zero_cond_t") or config.get("use_additional_t_cond"):
        kind = "layered" if config.get("use_additional_t_cond") else "edit"
        return [dit.problem(f"this is the {kind} model", "this version trains the original text-to-image model")]
    text = open_checkpoint(encoder, "text_encoder").model_config()
    width = text.get("text_config", text).get("hidden_size")
    if width != config["joint_attention_dim"]:
        found = f"it takes embeddings {config['joint_attention_dim']} wide, {encoder} gives {width}"
        return [dit.problem(found, "give the DiT and the text encoder of one model")]
    return []


def _check_layers(config: Mapping[str, Any], named: Mapping[str, str]) -> list[Problem]:
    wanted = config.get("num_layers")
    if wanted is None or "dit" not in named:
        return []
    dit = open_checkpoint(named["dit"], "dit")
    found = dit.model_config()["num_layers"]
    if found == int(wanted):
        return []
    return [
        dit.problem(f"it has {found} layers, num_layers says {wanted}", "remove num_layers, or give its checkpoint")
    ]


def _check_cache_folder(settings: DatasetSettings, file: str) -> list[Problem]:
    key = f"datasets[{settings.index}].cache_directory"
    if os.path.isdir(settings.cache_directory):
        return []  # one that is complete need not be writable; a stage that has to write says so before it encodes
    return check_folder(Path(settings.cache_directory), file, key)
