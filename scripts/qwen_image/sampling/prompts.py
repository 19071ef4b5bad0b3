"""Prompt files for sample pictures: lines of text with the field's switches, TOML or JSON. Imports no torch.

A line is a prompt and switches behind it: ``a red fox in snow --w 1024 --h 768 --d 7 --n blurry``. A switch starts at a
space and two dashes; what is no switch behind them stays in the prompt, and a word that looks like one is written
``\\--n``.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_image.bounded import MAX_DIGITS, parse_json, parse_toml, read_text
from qwen_image.dataset.keys import MAX_SIDE, describe
from qwen_image.dataset.listing import limit
from qwen_image.problems import InputError, Nearest, Problem
from qwen_image.training.randomness import derived_seed

STEP = 16
"""Sides are multiples of this: 8 pixels behind a latent value, two of these a side of a patch."""
MAX_STEPS = 1000
SWITCHES = {
    "w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "cfg_scale", "n": "negative_prompt",
    "fs": "discrete_flow_shift", "f": "frame_count", "g": "guidance_scale", "i": "image_path", "ei": "end_image_path",
    "cn": "control_video_path", "ci": "control_image_path", "of": "one_frame",
}  # fmt: skip
"""The field's switches of a text file, and the keys of TOML and JSON that mean the same."""
DEFAULTS = {
    "width": 256, "height": 256, "sample_steps": 20, "cfg_scale": 4.0, "negative_prompt": " ", "frame_count": 1,
    "discrete_flow_shift": None, "seed": None,
}  # fmt: skip
NO_PICTURE = "text-to-image starts from no picture; remove it"
REFUSED = {
    "guidance_scale": "this model was not distilled for it; set cfg_scale (--l), which is its guidance",
    "image_path": NO_PICTURE,
    "end_image_path": NO_PICTURE,
    "control_video_path": NO_PICTURE,
    "control_image_path": NO_PICTURE,
    "one_frame": "it belongs to a video model; remove it",
}
KEYS = ("prompt", *SWITCHES.values())


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One picture to make."""

    prompt: str
    negative_prompt: str
    """Used only where `cfg_scale` is above 1."""
    width: int
    height: int
    """In pixels, multiples of 16."""
    seed: int
    """Of the noise that the picture starts as."""
    sample_steps: int
    cfg_scale: float
    discrete_flow_shift: float | None
    """A shift of the noise levels in place of the one that the model's scheduler has for this size."""

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.cfg_scale > 1

    @property
    def texts(self) -> tuple[str, ...]:
        """What the text encoder must have encoded."""
        return (self.prompt, self.negative_prompt) if self.guided else (self.prompt,)


def load_prompts(path: str | Path, *, seed: int = 0) -> list[SamplePrompt]:
    """Read a prompt file. A prompt without a seed gets one that follows from `seed` and its place in the file.

    Raises InputError with every problem of the file, each with its line or place.
    """
    file = str(path)
    problems: list[Problem] = []
    prompts = []
    for where, values in _read(Path(path), problems):
        wrong = [Problem(file=file, key=where, found=found, mend=mend) for found, mend in _faults(values)]
        problems += wrong
        if not wrong:
            prompts.append(_prompt(values, derived_seed("sample", seed, len(prompts)) % 2**32))
    if not prompts and not problems:
        problems.append(
            Problem(file=file, found="holds no prompt", mend="write one a line; see config/sample_prompts.txt")
        )
    if problems:
        raise InputError(limit(problems))
    return prompts


def _prompt(values: Mapping[str, object], seed: int) -> SamplePrompt:
    filled = DEFAULTS | values
    shift = filled["discrete_flow_shift"]
    return SamplePrompt(
        prompt=filled["prompt"],
        negative_prompt=filled["negative_prompt"],
        width=filled["width"] // STEP * STEP,
        height=filled["height"] // STEP * STEP,
        seed=seed if filled["seed"] is None else filled["seed"],
        sample_steps=filled["sample_steps"],
        cfg_scale=float(filled["cfg_scale"]),
        discrete_flow_shift=None if shift is None else float(shift),
    )


def _read(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each prompt's place in the file and its values by key, unchecked; null stands for the default."""
    file, suffix = str(path), path.suffix.lower()
    if suffix not in (".txt", ".toml", ".json"):
        found = f"a prompt file ends in .txt, .toml or .json, not in `{suffix}`"
        raise InputError([Problem(file=file, found=found, mend="give the path of such a file")])
    try:
        text = read_text(path)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise InputError([Problem(file=file, found=found, mend="give the path of an existing file")]) from error
    except UnicodeDecodeError as error:
        raise InputError([Problem(file=file, found="is not UTF-8 text", mend="save it as UTF-8")]) from error
    except ValueError as error:
        raise InputError([Problem(file=file, found=str(error), mend="give a file of prompts")]) from error
    if suffix == ".txt":
        yield from _lines(file, text, problems)
        return
    try:
        data = parse_toml(text) if suffix == ".toml" else parse_json(text)
    except ValueError as error:
        found = f"is no {suffix[1:].upper()} file ({error})"
        raise InputError([Problem(file=file, found=found, mend="mend the place it names")]) from error
    entries = _tables(file, data, problems) if suffix == ".toml" else _objects(file, data, problems)
    for where, values in entries:
        yield where, {key: value for key, value in values.items() if value is not None}


def _lines(file: str, text: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, object]]]:
    # no other line ends than a text editor's: a prompt may hold characters that Unicode counts among them
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.startswith("#"):
            where = f"line {number}"
            yield where, _split_line(file, where, line, problems)


def _split_line(file: str, where: str, line: str, problems: list[Problem]) -> dict[str, object]:
    """Return the values of a line: the prompt, and those of the switches that are known and given once."""
    prompt, *parts = re.split(r"(?:^|(?<=\s))--(?=[A-Za-z])", line)
    values: dict[str, object] = {"prompt": _literal(prompt)}
    if not values["prompt"]:
        mend = "write the prompt first, then its switches"
        problems.append(Problem(file=file, key=where, found="has switches and no prompt", mend=mend))
    # the text that words belong to when they turn out to be no switch
    follows = "prompt"
    for part in parts:
        name, equals, value = re.fullmatch(r"([^\s=]+)(=?)(.*)", part.strip(), re.DOTALL).groups()
        key, value = SWITCHES.get(name.lower()), _literal(value)
        if key is None and (mend := _instead(name)):
            problems.append(Problem(file=file, key=where, found=f"--{name} is no switch", mend=mend))
        elif key is None:
            values[follows] = f"{values[follows]} --{_literal(part)}"
            continue
        elif equals:
            mend = f"write --{name} {value}"
            problems.append(Problem(file=file, key=where, found=f"--{name}= has a sign too many", mend=mend))
        elif key in values:
            problems.append(Problem(file=file, key=where, found=f"--{name} stands twice", mend="keep one of them"))
        else:
            values[key] = _number(value) if key != "negative_prompt" else value
            if value == "":
                problems.append(Problem(file=file, key=where, found=f"--{name} has no value", mend=f"add one to {key}"))
                values[key] = None
        follows = "negative_prompt" if values.get("negative_prompt") and key == "negative_prompt" else "prompt"
    return {key: value for key, value in values.items() if value is not None}


def _literal(text: str) -> str:
    """Return the text without the backslashes that keep dashes from being a switch."""
    return re.sub(r"(?<!\S)\\--", "--", text.strip())


def _instead(name: str) -> str | None:
    """Return how to mend a word that looks like a switch and is none; None for a word that does not."""
    near = difflib.get_close_matches(name.lower(), SWITCHES.values(), n=1, cutoff=0.5)
    if not near and len(name) > max(map(len, SWITCHES)):
        return None
    known = next((f"did you mean --{letter}" for letter, key in SWITCHES.items() if key in near), None)
    known = known or f"they are --{', --'.join(SWITCHES)}"
    return f"{known}; where the words belong to the prompt, write \\--{name}"


def _number(text: str) -> object:
    if len(text) > MAX_DIGITS:
        return text
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) else text


def _tables(file: str, data: Mapping, problems: list[Problem]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the entries of ``[[prompt.subset]]``, each with the keys of ``[prompt]``."""
    common = data.get("prompt")
    subsets = common.get("subset") if isinstance(common, dict) else None
    if not (isinstance(subsets, list) and all(isinstance(entry, dict) for entry in subsets)):
        mend = "write each prompt as a table [[prompt.subset]], and what they share under [prompt]"
        problems.append(Problem(file=file, key="prompt.subset", found="there is no such list", mend=mend))
        return
    for key in data.keys() - {"prompt"}:
        mend = "remove it; everything stands under [prompt]"
        problems.append(Problem(file=file, key=key, found="is no key of a prompt file", mend=mend))
    shared = {key: value for key, value in common.items() if key != "subset"}
    for number, entry in enumerate(subsets):
        where = f"prompt.subset[{number}]"
        for key in sorted(shared.keys() & entry.keys()):
            found = f"{key} stands in [prompt] as well"
            problems.append(Problem(file=file, key=where, found=found, mend="keep one of them"))
        yield where, shared | entry


def _objects(file: str, data: object, problems: list[Problem]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the elements of a JSON list: objects, or texts that are read like lines."""
    if not isinstance(data, list):
        mend = 'write a list: ["a red fox --w 512", {"prompt": "a blue bird"}]'
        raise InputError([Problem(file=file, found=f"{describe(data)} is no list of prompts", mend=mend)])
    for number, entry in enumerate(data):
        where = f"[{number}]"
        if isinstance(entry, str):
            yield where, _split_line(file, where, entry, problems)
        elif isinstance(entry, dict):
            yield where, entry
        else:
            mend = "write a text, or an object with its keys"
            problems.append(Problem(file=file, key=where, found=f"{describe(entry)} is no prompt", mend=mend))


def _faults(values: Mapping[str, object]) -> Iterator[tuple[str, str | Nearest]]:
    """Yield what is wrong with a prompt's values, and how to mend it."""
    if "prompt" not in values:
        yield "has no prompt", "give it a prompt"
    for key, value in values.items():
        if key not in KEYS:
            yield f"{key} is no key of a prompt", Nearest(key, KEYS, f"the keys are {', '.join(KEYS)}")
        elif key in REFUSED:
            yield f"{key} has no meaning here", REFUSED[key]
        elif wanted := _wanted(key, value):
            yield f"{key} is {describe(value)}", f"give {wanted}"
    scale = values.get("cfg_scale", DEFAULTS["cfg_scale"])
    if "negative_prompt" in values and isinstance(scale, int | float) and scale <= 1:
        yield "negative_prompt changes nothing where cfg_scale is not above 1", "remove it, or raise cfg_scale (--l)"


def _wanted(key: str, value: object) -> str | None:
    """Return what the key wants when the value is something else."""
    if key in ("prompt", "negative_prompt"):
        # half a character pair, as JSON can write it, has no UTF-8
        sound = isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
        return None if sound else "a text"
    whole = isinstance(value, int) and not isinstance(value, bool)
    # neither NaN nor an infinity, nor a whole number that no float can hold
    real = (whole or isinstance(value, float)) and abs(value) <= sys.float_info.max
    match key:
        case "width" | "height":
            return None if whole and STEP <= value <= MAX_SIDE else f"a number of pixels from {STEP} to {MAX_SIDE}"
        case "sample_steps":
            return None if whole and 1 <= value <= MAX_STEPS else f"a whole number from 1 to {MAX_STEPS}"
        case "seed":
            return None if whole and 0 <= value < 2**63 else "a whole number from 0 on"
        case "frame_count":
            return None if whole and value == 1 else "1 or nothing: a picture has one frame"
        case "discrete_flow_shift":
            return None if real and value > 0 else "a number above 0, or nothing for the model's own shift"
    return None if real and value >= 0 else "a number from 0 on; 1 or less makes pictures without a negative prompt"
