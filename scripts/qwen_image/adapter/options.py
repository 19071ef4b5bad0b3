"""What the settings say about the adapter: its kind, the options of that kind and the modules it is on.

No torch here: the check of a config reads them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwen_image.training.key_values import KeyValueError, is_number, read_key_values

KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
DEFAULT_MODULE = "networks.lora_qwen_image"
MODULES = {"lora": DEFAULT_MODULE, "dora": DEFAULT_MODULE, "loha": "networks.loha", "lokr": "networks.lokr"}
"""The field's network_module of each kind."""
DEFAULT_EXCLUDE = r".*_mod\..*"  # a third of each block is modulation, which depends on the timestep alone


@dataclass(frozen=True, kw_only=True)
class TargetPatterns:
    """Which modules get an adapter: those that no exclude pattern matches, or that an include pattern takes back."""

    exclude: tuple[str, ...] = (DEFAULT_EXCLUDE,)
    include: tuple[str, ...] = ()

    def wants(self, path: str) -> bool:
        """Whether the module at this dotted path gets an adapter. Patterns match the whole path."""
        if any(re.fullmatch(pattern, path) for pattern in self.include):
            return True
        return not any(re.fullmatch(pattern, path) for pattern in self.exclude)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """``network_args``, read."""

    patterns: TargetPatterns
    verbose: bool = False
    """Name every adapted module in the log."""
    use_dora: bool = False
    loraplus_lr_ratio: float = 1.0
    """How many times higher the learning rate of the up matrices is."""
    rank_dropout: float = 0.0
    """Chance that a row of the change to a weight is dropped in a step."""
    module_dropout: float = 0.0
    """Chance that a module's whole change is dropped in a step."""
    factor: int = -1
    """Size of the small Kronecker factor; -1 is the divisor nearest to the square root."""
    decompose_both: bool = False
    """Whether the small Kronecker factor is a product of two as well."""


def network_options(settings: Mapping[str, object], kind: str | None = None) -> NetworkOptions:
    """Return the options of ``network_args``. The modulation layers' exclusion is always among them.

    `kind` is the adapter's where it is known already; otherwise ``network_module`` tells. Raises KeyValueError for
    keys and values that the kind does not have.
    """
    module = MODULES[kind] if kind else settings["network_module"]
    from_weights = bool(settings["dim_from_weights"])
    # a file may hold any kind, so all options may make sense until it is read
    modules = [module] if module else list(_OPTIONS) if from_weights else [DEFAULT_MODULE]
    known = {**_COMMON, **{key: check for name in modules for key, check in _OPTIONS[name].items()}}
    refused = _REFUSED | {key: why for key, why in _ELSEWHERE.items() if key not in known}
    if from_weights:
        refused |= dict.fromkeys(_IN_THE_FILE, "dim_from_weights takes it from network_weights; remove it")
    values = read_key_values(settings["network_args"], known, refused)
    patterns = TargetPatterns(
        exclude=(DEFAULT_EXCLUDE, *values.pop("exclude_patterns", ())),
        include=tuple(values.pop("include_patterns", ())),
    )
    return NetworkOptions(patterns=patterns, **values)


def network_kind(settings: Mapping[str, object]) -> str | None:
    """Return the kind that the settings ask for, or None where ``network_weights`` decides it."""
    if settings["dim_from_weights"]:
        return None
    kind = next(kind for kind, module in MODULES.items() if module == (settings["network_module"] or DEFAULT_MODULE))
    return "dora" if network_options(settings).use_dora else kind


def effective_alpha(alpha: float | None, rank: int) -> float:
    """Return the alpha in use: 0 or none stands for the rank."""
    return alpha if alpha else rank


def wrong_network(settings: Mapping[str, object], kind: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield key, what was found and how to mend it, for adapter settings that do not go together.

    `kind` is the adapter's where it is known already.
    """
    try:
        network_options(settings, kind)
        kind = kind or network_kind(settings)
    except KeyValueError as error:
        for found, mend in error.problems:
            yield "network_args", found, mend
        return
    yield from _wrong_for_kind(settings, kind)
    files, multipliers = settings["base_weights"], settings["base_weights_multiplier"]
    if files and multipliers and len(files) != len(multipliers):
        found = f"{len(multipliers)} for {len(files)} base_weights"
        yield "base_weights_multiplier", found, "give one for each, in the same order"


def _wrong_for_kind(settings: Mapping[str, object], kind: str | None) -> Iterator[tuple[str, str, str]]:
    if settings["network_dropout"] and kind in ("loha", "lokr"):
        mend = "remove it, or give rank_dropout or module_dropout in network_args"
        yield "network_dropout", f"{KINDS[kind]} has no inputs of its own that could be dropped", mend
    if settings["save_format"] != "kohya" and kind in ("loha", "lokr"):
        found = f"diffusers cannot load a {KINDS[kind]} for Qwen-Image"
        yield "save_format", found, "set it to kohya, which ComfyUI reads, or train a LoRA or DoRA"
    if settings["scale_weight_norms"] is not None:
        if kind == "dora":
            mend = "remove it, or lower learning_rate"
            yield "scale_weight_norms", "DoRA keeps the size of its weights in a vector of its own", mend
        if "schedulefree" in (settings["optimizer_type"] or "").lower():
            found = "a schedule-free optimizer keeps other weights than those that would be scaled"
            yield "scale_weight_norms", found, "remove it, or choose another optimizer_type"


def _is_patterns(value: object) -> bool:
    if not isinstance(value, list | tuple) or not all(isinstance(pattern, str) for pattern in value):
        return False
    try:
        return all(re.compile(pattern) for pattern in value)
    except re.error:
        return False


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_chance(value: object) -> bool:
    return is_number(value) and 0 <= value < 1


_PATTERNS = (_is_patterns, "a Python list of regular expressions, such as ['.*attn.*']")
_SWITCH = (_is_bool, "True or False")
_CHANCE = (_is_chance, "a chance of 0 or more and below 1")
_FACTOR = (
    lambda value: type(value) is int and (value == -1 or value >= 1), "a whole number such as 8, or -1 for the largest",
)  # fmt: skip
_RATIO = (lambda value: is_number(value) and value > 0, "a number above 0; 16 is usual")
_COMMON = {"exclude_patterns": _PATTERNS, "include_patterns": _PATTERNS, "verbose": _SWITCH}
_OPTIONS = {
    "networks.lora_qwen_image": {"use_dora": _SWITCH, "loraplus_lr_ratio": _RATIO},
    "networks.loha": {"rank_dropout": _CHANCE, "module_dropout": _CHANCE},
    "networks.lokr": {
        "rank_dropout": _CHANCE, "module_dropout": _CHANCE, "factor": _FACTOR, "decompose_both": _SWITCH,
    },
}  # fmt: skip
_IN_THE_FILE = ("exclude_patterns", "include_patterns", "use_dora", "factor", "decompose_both")
_NO_LORA_DROPOUT = "peft has it for LoHa and LoKr only; give network_dropout instead"
_NO_UP = "it is for the up matrices of LoRA and DoRA, which this kind does not have; remove it"
_ONLY_LOKR = "it belongs to LoKr; remove it, or set network_module to networks.lokr"
# why a key that another kind has is refused
_ELSEWHERE = {
    "rank_dropout": _NO_LORA_DROPOUT,
    "module_dropout": _NO_LORA_DROPOUT,
    "loraplus_lr_ratio": _NO_UP,
    "use_dora": f"it turns a LoRA into a DoRA; remove it, or set network_module to {DEFAULT_MODULE}",
    "factor": _ONLY_LOKR,
    "decompose_both": _ONLY_LOKR,
}
_NO_CONVOLUTION = "the transformer has no convolutions; remove it"
_REFUSED = {
    "conv_dim": _NO_CONVOLUTION,
    "conv_alpha": _NO_CONVOLUTION,
    "dora_wd": "it is called use_dora here; write use_dora=True",
}
