"""Check training settings: every problem at once, each with the key, what was found and how to mend it. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from qwen_image.adapter.options import wrong_network
from qwen_image.bounded import text_fault
from qwen_image.problems import Nearest, Problem
from qwen_image.tokens import FOUND, MEND, holds_token
from qwen_image.training.hub import wrong_uploads
from qwen_image.training.rate_checks import wrong_rates
from qwen_image.training.schema import (
    argument_names,
    coerce_numbers,
    key_schemas,
    key_types,
    load_schema,
    with_defaults,
)
from qwen_image.training.trackers import trackers_of

MAX_OUTPUT_NAME_BYTES = 200
"""A file name has at most 255; ``.tmp-…-step00000001-state-`` and 16 characters is the longest that is made of it."""
SECRET = ("huggingface_token", "wandb_api_key")
LOGIT_UNUSED = "neither weighting_scheme logit_normal nor timestep_sampling logsnr or qinglong_flux is set"
# a key on the left changes nothing unless the condition holds; saying so is better than ignoring it
NEEDS: dict[str, tuple[Callable[[Mapping], bool], str]] = {
    "log_with": (lambda v: v["log_with"] == "wandb" or v["logging_dir"] is not None, "logging_dir is not set"),
    **dict.fromkeys(
        ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"),
        (lambda v: bool(trackers_of(v)), "neither logging_dir nor log_with is set"),
    ),
    "wandb_run_name": (lambda v: "wandb" in trackers_of(v), "log_with is neither wandb nor all"),
    "save_last_n_epochs": (lambda v: v["save_every_n_epochs"] is not None, "save_every_n_epochs is not set"),
    "save_last_n_steps": (lambda v: v["save_every_n_steps"] is not None, "save_every_n_steps is not set"),
    "save_last_n_epochs_state": (
        lambda v: v["save_state"] and v["save_every_n_epochs"] is not None,
        "it needs save_state and save_every_n_epochs",
    ),
    "save_last_n_steps_state": (
        lambda v: v["save_state"] and v["save_every_n_steps"] is not None,
        "it needs save_state and save_every_n_steps",
    ),
    "save_state": (
        lambda v: v["save_every_n_epochs"] is not None or v["save_every_n_steps"] is not None,
        "neither save_every_n_epochs nor save_every_n_steps is set",
    ),
    "sample_every_n_steps": (lambda v: v["sample_prompts"] is not None, "sample_prompts is not set"),
    "sample_every_n_epochs": (lambda v: v["sample_prompts"] is not None, "sample_prompts is not set"),
    "sample_at_first": (lambda v: v["sample_prompts"] is not None, "sample_prompts is not set"),
    **dict.fromkeys(
        (
            "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility",
            "save_state_to_huggingface", "async_upload",
        ),
        (lambda v: v["huggingface_repo_id"] is not None, "huggingface_repo_id is not set"),
    ),
    "validate_every_n_steps": (lambda v: v["validation_split"] > 0, "validation_split is 0"),
    "validate_every_n_epochs": (lambda v: v["validation_split"] > 0, "validation_split is 0"),
    "network_dim": (lambda v: not v["dim_from_weights"], "dim_from_weights takes the rank from network_weights"),
    "network_alpha": (lambda v: not v["dim_from_weights"], "dim_from_weights takes alpha from network_weights"),
    "dim_from_weights": (lambda v: v["network_weights"] is not None, "network_weights is not set"),
    "base_weights_multiplier": (lambda v: bool(v["base_weights"]), "base_weights is not set"),
    "discrete_flow_shift": (
        lambda v: v["timestep_sampling"] in ("shift", "sigma"),
        "timestep_sampling is neither shift nor sigma (qwen_shift takes its shift from the size of the picture)",
    ),
    "sigmoid_scale": (
        lambda v: v["timestep_sampling"] not in ("uniform", "sigma", "logsnr", "ideogram4_shift"),
        "timestep_sampling is uniform, sigma, logsnr or ideogram4_shift",
    ),
    "weighting_scheme": (
        lambda v: v["timestep_sampling"] == "sigma" or v["weighting_scheme"] not in ("logit_normal", "mode"),
        "logit_normal and mode say what timestep_sampling sigma draws, and it is not sigma",
    ),
    "logit_mean": (lambda v: _uses_logit(v), LOGIT_UNUSED),
    "logit_std": (lambda v: _uses_logit(v), LOGIT_UNUSED),
    "mode_scale": (lambda v: v["weighting_scheme"] == "mode", "weighting_scheme is not mode"),
    "preserve_distribution_shape": (
        lambda v: (v["min_timestep"] or 0) > 0 or (v["max_timestep"] or 1000) < 1000,
        "neither min_timestep nor max_timestep narrows the range",
    ),
    "huber_delta": (lambda v: v["loss_type"] == "huber", "loss_type is not huber"),
}  # fmt: skip


def check_settings(settings: Mapping[str, object], file: str, required: Sequence[str] = ()) -> list[Problem]:
    """Check names, types, ranges, choices, combinations and what this version refuses; `file` is named in the problems.

    Null stands for the default. Numbers may be written as text, as `coerce_numbers` accepts them.
    """
    names = argument_names()
    problems = [unknown_key(name, file) for name in settings if name not in names]
    problems += [Problem(file=file, key=key, found=found, mend=mend) for key, found, mend in _unfit_texts(settings)]
    unfit = _keys(problems)
    known = {
        name: value
        for name, value in coerce_numbers(settings).items()
        if name in names and name not in unfit and value is not None
    }
    for name in required:
        if known.get(name) is None and name not in unfit:
            mend = f"set it: {key_schemas()[name]['description']}"
            problems.append(Problem(file=file, key=name, found="is not set", mend=mend))
    wrong = _refused(known, file)
    wrong += _wrong_values({name: value for name, value in known.items() if name not in _keys(wrong)}, file)
    # combinations are judged on the values that make sense on their own
    sound = with_defaults({name: value for name, value in known.items() if name not in _keys(wrong)})
    for key, found, mend in _wrong_combinations(sound):
        wrong.append(Problem(file=file, key=key, found=found, mend=mend))
    return problems + wrong


def unknown_key(name: str, file: str) -> Problem:
    """Return the problem of a key that no argument has, with the nearest name as a suggestion."""
    mend = Nearest(str(name), argument_names(), "remove it; --help of the training program lists every argument")
    return Problem(file=file, key=str(name), found="is no training argument", mend=mend)


def _keys(problems: Sequence[Problem]) -> set[str]:
    return {problem.key.split("[")[0] for problem in problems}


def _unfit_texts(settings: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield key, what was found and how to mend it, of texts that may not or cannot be written anywhere."""
    for name, value in settings.items():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if name not in SECRET and holds_token(texts):
            yield str(name), FOUND, MEND
        elif fault := next(filter(None, map(text_fault, texts)), None):
            yield str(name), fault, "write plain text"


def _refused(known: Mapping[str, object], file: str) -> list[Problem]:
    problems = []
    for name, value in known.items():
        schema = key_schemas()[name]
        shown = "a value" if name in SECRET else repr(value)
        reason = schema.get("x-refused") if value != schema["default"] else None
        if reason is None and isinstance(value, str):
            reason = schema.get("x-refused-values", {}).get(value)
        if reason is not None:
            problems.append(Problem(file=file, key=name, found=f"{shown} is not supported", mend=reason))
    return problems


def _wrong_values(known: Mapping[str, object], file: str) -> list[Problem]:
    from jsonschema import Draft202012Validator

    problems: dict[str, Problem] = {}
    for error in Draft202012Validator(load_schema()).iter_errors(dict(known)):
        name, *inside = error.absolute_path
        key = name + "".join(f"[{step}]" for step in inside)
        if name not in _keys(list(problems.values())):
            problems[key] = Problem(file=file, key=key, found=error.message, mend=_expected(key_schemas()[name], error))
    for name, value in known.items():
        # a schema's minimum lets NaN pass: every comparison with it is false
        if isinstance(value, float) and not math.isfinite(value) and name not in problems:
            mend = f"give a finite number: {key_schemas()[name]['description']}"
            problems[name] = Problem(file=file, key=name, found=f"{value} is no finite number", mend=mend)
    return list(problems.values())


def _expected(schema: Mapping, error) -> str | Nearest:
    if error.validator != "enum":
        wanted = [kind for kind in key_types(schema) if kind != "null"]
        return f"give {' or '.join(_WORDS[kind] for kind in wanted)}: {schema['description']}"
    choices = [str(choice) for choice in schema["enum"] if choice is not None]
    refused = schema.get("x-refused-values", {})
    offered = ", ".join(choice for choice in choices if choice not in refused)
    form = f"did you mean {{}}? The choices are {offered}"
    return Nearest(str(error.instance), choices, f"choose one of {offered}", form)


_WORDS = {
    "integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false",
    "array": "a list",
}  # fmt: skip


def _wrong_combinations(values: Mapping) -> Iterator[tuple[str, str, str]]:
    """Yield key, what was found and how to mend it. `values` holds every key."""
    for name, (holds, why) in NEEDS.items():
        if values[name] != key_schemas()[name]["default"] and not holds(values):
            yield name, f"{values[name]!r} changes nothing: {why}", "remove it, or set what it needs"
    yield from wrong_rates(values, with_defaults({}))
    if values["persistent_data_loader_workers"] and values["max_data_loader_n_workers"] == 0:
        yield "persistent_data_loader_workers", "there are no workers", "set max_data_loader_n_workers to 1 or more"
    if values["ddp_static_graph"] and values["gradient_accumulation_steps"] > 1:
        found = "does not work with gradient_accumulation_steps above 1 (a limit of PyTorch)"
        yield "ddp_static_graph", found, "remove one of the two"
    low, high = values["min_timestep"] or 0, values["max_timestep"] or 1000
    if low >= high:
        yield "min_timestep", f"{low} is not below max_timestep {high}", "give a range that is not empty"
    if values["output_name"] in (".", ".."):
        yield "output_name", f"{values['output_name']!r} is no file name", "choose a name such as my_lora"
    if len((values["output_name"] or "").encode()) > MAX_OUTPUT_NAME_BYTES:
        mend = f"{MAX_OUTPUT_NAME_BYTES} bytes are the most: states and checkpoints are named after it, and more"
        yield "output_name", "is too long a name", mend
    yield from wrong_network(values)
    yield from wrong_uploads(values)


def _uses_logit(values: Mapping) -> bool:
    return values["weighting_scheme"] == "logit_normal" or values["timestep_sampling"] in ("logsnr", "qinglong_flux")
