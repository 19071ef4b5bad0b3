"""Finding and loading the tokenizer that belongs to the text encoder, from this machine only.

It is looked for where the ``tokenizer`` key says, else beside the text encoder, else in the local hub cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.bounded import MAX_WRITTEN_BYTES, parse_json, read_text
from qwen_image.container import ContainerError, read_header
from qwen_image.models.locate import locate
from qwen_image.problems import InputError, Problem

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

HUB_SOURCES = (("Qwen/Qwen-Image", "tokenizer/"), ("Qwen/Qwen2.5-VL-7B-Instruct", ""))
"""Repositories of the hub that hold it, and where in them."""

IDENTITY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Files that decide which ids a text becomes. The chat template does not: the prompts have a template of their own."""

NEEDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_DOWNLOAD = (
    'run: hf download Qwen/Qwen-Image --include "tokenizer/*" --local-dir resources/qwen-image, '
    "then set tokenizer to resources/qwen-image/tokenizer"
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def load_tokenizer(text_encoder_path: str | Path, tokenizer: str | Path | None = None) -> Qwen2Tokenizer:
    """Load the tokenizer; ``tokenizer`` is a folder or the id of a repository in the local hub cache.

    Never asks the network. Raises InputError that says how to get it.
    """
    problems = check_tokenizer(text_encoder_path, tokenizer)
    if problems:
        raise InputError(problems)
    from transformers import Qwen2Tokenizer

    folder = find_tokenizer(text_encoder_path, tokenizer)
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise on damaged files
        raise InputError([_problem(folder, f"cannot be loaded ({error})", _DOWNLOAD)]) from error


def find_tokenizer(text_encoder_path: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Return the folder with the tokenizer's files. Raises InputError when there is none on this machine."""
    if tokenizer:
        folders = _with_subfolder(Path(tokenizer))
        if not Path(tokenizer).exists() and _REPOSITORY.fullmatch(str(tokenizer)):
            folders = [_hub_folder(str(tokenizer), subfolder) for subfolder in ("", "tokenizer/")]
        found = _first(folders)
        if found is None:
            what = "has no tokenizer files" if Path(tokenizer).exists() else "neither a folder nor in the hub cache"
            raise InputError([_problem(tokenizer, f"{what} (tokenizer.json, or vocab.json and merges.txt)", _DOWNLOAD)])
        return found
    path = Path(text_encoder_path)
    base = path if path.is_dir() else path.parent
    beside = [*_with_subfolder(base), base.parent / "tokenizer"]
    # the hub's library takes a while to import, so its cache is looked at only when nothing lies beside
    found = _first(beside) or _first([_hub_folder(repository, subfolder) for repository, subfolder in HUB_SOURCES])
    if found is None:
        what = "the tokenizer is neither beside the text encoder nor in the local hub cache"
        raise InputError([_problem(path, what, _DOWNLOAD)])
    return found


def tokenizer_files(text_encoder_path: str | Path, tokenizer: str | Path | None = None) -> list[Path]:
    """Return the files that decide which ids a text becomes. Raises InputError when there is no tokenizer."""
    folder = find_tokenizer(text_encoder_path, tokenizer)
    return [folder / name for name in IDENTITY_FILES if (folder / name).is_file()]


def check_tokenizer(text_encoder_path: str | Path, tokenizer: str | Path | None = None) -> list[Problem]:
    """Return what is wrong with the tokenizer, told from its files alone: absent, unreadable, of another model."""
    try:
        folder = find_tokenizer(text_encoder_path, tokenizer)
    except InputError as error:
        return error.problems
    except OSError as error:
        return [_problem(tokenizer or text_encoder_path, f"cannot be read ({error.strerror})", "correct the path")]
    try:
        ids = _ids(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [_problem(folder, f"its files cannot be read ({type(error).__name__}: {error})", _DOWNLOAD)]
    missing = [token for token in NEEDED_TOKENS if token not in ids]
    if missing:
        return [_problem(folder, f"not Qwen's tokenizer (it has no {' or '.join(missing)})", _DOWNLOAD)]
    rows, largest = _embedding_rows(text_encoder_path), max(ids.values())
    if rows is not None and largest >= rows:
        found = f"its ids go up to {largest}, but the text encoder has only {rows} embeddings"
        return [_problem(folder, found, "set tokenizer to the one that belongs to this text encoder")]
    return []


def _problem(path: str | Path, found: str, mend: str) -> Problem:
    return Problem(file=str(path), key="tokenizer", found=found, mend=mend)


def _with_subfolder(folder: Path) -> list[Path]:
    # a pipeline's root has the tokenizer in a folder of that name; naming one of the files means its folder
    return [folder.parent if folder.is_file() else folder, folder / "tokenizer"]


def _first(folders: list[Path | None]) -> Path | None:
    for folder in folders:
        if folder is not None and _has_tokenizer(folder):
            return folder
    return None


def _has_tokenizer(folder: Path) -> bool:
    if (folder / "tokenizer.json").is_file():
        return True
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _hub_folder(repository: str, subfolder: str) -> Path | None:
    """The folder in the local hub cache's snapshot, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(repository, f"{subfolder}{name}") for name in ("tokenizer.json", "vocab.json")]
    except ValueError:  # no valid id of a repository
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def _ids(folder: Path) -> dict[str, int]:
    """Every token's id, from whichever of the files hold them."""
    ids: dict[str, int] = {}
    content = {name: _json(folder / name) for name in IDENTITY_FILES if name.endswith(".json")}
    whole = content["tokenizer.json"]
    if whole:
        ids |= whole["model"]["vocab"] if isinstance(whole["model"]["vocab"], dict) else {}
        ids |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    ids |= content["vocab.json"] | content["added_tokens.json"]
    added = content["tokenizer_config.json"].get("added_tokens_decoder", {})
    return ids | {token["content"]: int(number) for number, token in added.items()}


def _json(file: Path) -> dict:
    return parse_json(read_text(file, MAX_WRITTEN_BYTES)) if file.is_file() else {}


def _embedding_rows(text_encoder_path: str | Path) -> int | None:
    """How many ids the text encoder knows; None when it cannot be told, which is reported elsewhere."""
    try:
        headers = [read_header(file) for file in locate(text_encoder_path, "text_encoder").weights]
    except (InputError, OSError, ContainerError):
        return None
    rows = [
        info.shape[0]
        for header in headers
        for name, info in header.tensors.items()
        if name.endswith("embed_tokens.weight")
    ]
    return rows[0] if rows else None
