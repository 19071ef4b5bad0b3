"""A tree of tensors and plain values as one safetensors file: how an optimizer's state is stored without pickle.

Tensors lie in the file under their numbers, bit for bit; what holds them together (dictionaries with keys of any plain
type, lists, tuples, numbers, text) is JSON in the file's metadata. JSON writes floats so that they read back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from qwen_image.bounded import parse_json
from qwen_image.container import write_safetensors

TREE_KEY = "tree"
PLAIN = (str, int, float, bool, type(None))


def write_tree(path: str | Path, tree: object) -> None:
    """Write a tree whole or not at all. Raises TypeError for a value that is none of those above."""
    tensors: dict[str, torch.Tensor] = {}
    description = json.dumps(_described(tree, tensors))
    write_safetensors(path, tensors, {TREE_KEY: description})


def read_tree(path: str | Path) -> object:
    """Read what `write_tree` wrote; tensors are on the CPU. Raises SafetensorError, OSError, ValueError or KeyError."""
    with safe_open(path, "pt") as stream:
        return _built(parse_json(stream.metadata()[TREE_KEY]), stream)


def _described(value: object, tensors: dict[str, torch.Tensor]) -> object:
    # the exact type: a subclass of Tensor keeps its numbers elsewhere, and would lose them here without a word
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_described(key, tensors), _described(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_described(inner, tensors) for inner in value]}
    if not isinstance(value, PLAIN):
        raise TypeError(f"a state cannot hold a {type(value).__module__}.{type(value).__qualname__}")
    return value


def _built(description: object, stream) -> object:
    if not isinstance(description, dict):
        return description
    ((kind, inner),) = description.items()
    if kind == "tensor":
        return stream.get_tensor(inner)
    if kind == "dict":
        return {_built(key, stream): _built(value, stream) for key, value in inner}
    values = [_built(value, stream) for value in inner]
    return tuple(values) if kind == "tuple" else values
