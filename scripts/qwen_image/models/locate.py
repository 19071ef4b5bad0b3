"""From a path in the config to the weight files it means: one file, a sharded set, a folder or a whole pipeline."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_image.bounded import MAX_WRITTEN_BYTES, parse_json, read_text
from qwen_image.models.roles import EXPECTED, wanted
from qwen_image.problems import InputError, Problem

INDEX_SUFFIX = ".safetensors.index.json"
STANDARD_STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weights; beside a file of such a name, config.json belongs to it."""

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Located:
    """The files of one checkpoint; nothing of them has been read but the index."""

    weights: tuple[Path, ...]
    config: Path | None
    """config.json, when the layout has one."""
    index: dict[str, str] | None = None
    """Tensor name to file name, as the index has it."""


def locate(path: str | Path, role: str) -> Located:
    """Find the files behind ``path``.

    ``path`` may be a ``.safetensors`` file, a shard of a set, an index, a folder with any of these, or the root of a
    diffusers pipeline, where the role's own folder is taken. Raises InputError naming what is missing.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _in_folder(path, role)
    except OSError as error:
        mend = "make the folder readable" if isinstance(error, PermissionError) else f"correct the path; {wanted(role)}"
        raise _error(path, role, f"cannot be read ({error.strerror})", mend) from error
    if not path.exists():
        # a dangling link is not missing to the eye, so say what it is
        found = "a link to a file that does not exist" if path.is_symlink() else "no such file or folder"
        raise _error(path, role, found, f"correct the path; {wanted(role)}")
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path, role)
    if match := _SHARD.fullmatch(path.name):
        return _shard_set(path, match, role)
    return Located((path,), _config_beside(path) if path.stem in STANDARD_STEMS else None)


def is_pipeline(path: str | Path) -> bool:
    """Whether ``path`` is the root folder of a diffusers pipeline, which holds several checkpoints."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return True
    return path.is_dir() and not _weights(path) and any((path / role.subfolder).is_dir() for role in EXPECTED.values())


def _in_folder(folder: Path, role: str) -> Located:
    if is_pipeline(folder):
        subfolder = folder / EXPECTED[role].subfolder
        if subfolder.is_dir():
            return _in_folder(subfolder, role)
        raise _error(folder, role, f"a diffusers pipeline without its {subfolder.name}/ folder", wanted(role))
    candidates = _standard(folder) or _weights(folder)
    if len(candidates) > 1:
        shards = [_SHARD.fullmatch(path.name) for path in candidates]
        if all(shards) and len({(shard["stem"], shard["count"]) for shard in shards}) == 1:
            return _shard_set(candidates[0], shards[0], role)
        names = ", ".join(path.name for path in candidates[:5]) + (", ..." if len(candidates) > 5 else "")
        found = f"a folder with several checkpoints ({names})"
        raise _error(folder, role, found, f"set {role} to the file you mean")
    if not candidates:
        raise _error(folder, role, _what_instead(folder), wanted(role))
    if candidates[0].name.endswith(INDEX_SUFFIX):
        return _from_index(candidates[0], role)
    if match := _SHARD.fullmatch(candidates[0].name):
        return _shard_set(candidates[0], match, role)
    return Located((candidates[0],), _config_beside(candidates[0]))


def _standard(folder: Path) -> list[Path]:
    """The one index or weight file with a library's own name, which goes before any other file of the folder."""
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        found = [folder / f"{stem}{suffix}" for stem in STANDARD_STEMS if (folder / f"{stem}{suffix}").is_file()]
        if found:
            return found
    return sorted(path for path in folder.glob(f"*{INDEX_SUFFIX}") if not path.name.startswith("."))


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _what_instead(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    unsafe = [name for name in names if name.endswith(_UNSAFE_SUFFIXES)]
    if unsafe:
        return f"a folder with pickled weights only ({unsafe[0]}), which can run code when they are read"
    if any(name.endswith(".gguf") for name in names):
        return "a folder with GGUF (quantized) weights only"
    return "a folder without .safetensors files" if names else "an empty folder"


def _from_index(index_path: Path, role: str) -> Located:
    try:
        weight_map = parse_json(read_text(index_path, MAX_WRITTEN_BYTES))["weight_map"]
        names = sorted(set(weight_map.values()))
        # an index names files of its own folder, never a path
        valid = bool(names) and all(name == Path(name).name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise _error(index_path, role, "not a readable index (no weight_map of file names)", "download it again")
    weights = tuple(index_path.parent / name for name in names)
    _require(weights, index_path, role)
    return Located(weights, _config_beside(index_path), weight_map)


def _shard_set(path: Path, match: re.Match[str], role: str) -> Located:
    index_path = path.with_name(f"{match['stem']}{INDEX_SUFFIX}")
    if index_path.is_file():
        return _from_index(index_path, role)
    count = int(match["count"])
    weights = tuple(path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1))
    _require(weights, path, role)
    return Located(weights, _config_beside(path))


def _require(weights: tuple[Path, ...], named_by: Path, role: str) -> None:
    # not Path's: it raises for a name that is too long
    missing = [path.name for path in weights if not os.path.isfile(path)]
    if missing:
        found = f"{len(missing)} of {len(weights)} shards missing: {', '.join(missing[:5])}"
        found += ", ..." if len(missing) > 5 else ""
        raise _error(named_by, role, found, f"download the missing files into {named_by.parent}")


def _config_beside(path: Path) -> Path | None:
    config = path.with_name("config.json")
    return config if config.is_file() else None


def _error(path: Path, role: str, found: str, mend: str) -> InputError:
    return InputError([Problem(file=str(path), key=role, found=found, mend=mend)])
