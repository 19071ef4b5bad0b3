"""The safetensors container: its header read without torch, and files written so that equal content is equal bytes.

The reference writer stores metadata in random order and leaves files with mode 0600; this one sorts both tensors and
metadata and lets the umask decide. Any safetensors reader accepts the result.
Format: 8-byte little-endian header length, JSON header, raw data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.bounded import open_file
from qwen_image.files import atomic_write

if TYPE_CHECKING:
    import torch

# made once: this runs for every file of a cache
_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
MAX_HEADER_BYTES = 2**25
"""A header's length. Those of the largest models have 1 MB, and reading this much takes 1 GB of memory for a moment."""
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**62
"""Torch counts a tensor's elements in 64 bits, those of a shape with a zero in it too, without the zero."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class ContainerError(ValueError):
    """The file is not a whole safetensors file; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: str
    """The container's name, for example ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the data section."""
    end: int

    @property
    def torch_dtype(self) -> str:
        """The torch name without ``torch.``, for example ``bfloat16``."""
        return TORCH_DTYPES.get(self.dtype, self.dtype)


@dataclass(frozen=True)
class Header:
    """A safetensors header."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    """Offset of the data section in the file, in bytes."""
    is_ours: bool = False
    """Whether every byte of it is as `serialize` writes it. Programs that change a file in place write another form."""


def read_header(path: str | Path) -> Header:
    """Read and check a file's header: lengths, dtypes, shapes and offsets must agree with each other and the file.

    Raises ContainerError with the reason, or OSError when the file cannot be read. Imports no torch.
    """
    try:
        stream = open_file(path)
    except ValueError as error:
        raise ContainerError(f"not a safetensors file ({error})") from error
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise ContainerError(f"only {size} bytes long, too short for a safetensors file")
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ContainerError("not a safetensors file (the first 8 bytes are no header length)")
        if length > size - 8:
            raise ContainerError(f"truncated: the header needs {length} bytes, the file has {size - 8}")
        raw = stream.read(length)
    try:
        entries = _DECODER.decode(raw.decode("utf-8"))
        if b"\\u" in raw:  # half of a surrogate pair can only be written so, and is no text for any other reader
            _JSON.encode(entries).encode("utf-8")
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ContainerError(f"not a safetensors file (broken header: {error})") from error
    if not isinstance(entries, dict):
        raise ContainerError("not a safetensors file (the header is no table)")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ContainerError("not a safetensors file (the metadata is no table of strings)")
    tensors = {name: _tensor_info(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, size - 8 - length)
    described = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    return Header(tensors, metadata, 8 + length, raw == _header(described, metadata))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata atomically. Equal content gives equal bytes, in whatever order it is passed.

    Raises OSError, or ValueError as `serialize` does.
    """

    def write(stream) -> None:
        for part in serialize(tensors, metadata or {}):
            stream.write(part)

    atomic_write(path, write)


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview | bytes]:
    """Yield the file's bytes: the header first, then one part a tensor, largest dtype first and then by name.

    Raises ValueError for half of a surrogate pair in a name or in the metadata, which no reader takes.
    """
    assert all(isinstance(value, str) for value in metadata.values()), "metadata values are strings"
    raw = _header({name: (_container_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
    yield len(raw).to_bytes(8, "little") + raw
    yield from _data(tensors)


def data_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the hex SHA-256 of the data section that `serialize` would write."""
    digest = hashlib.sha256()
    for part in _data(tensors):
        digest.update(part)
    return digest.hexdigest()


def _header(described: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of tensors (dtype, shape), padded to whole words of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    # the largest alignment first keeps every tensor aligned, as the reference writer does
    for name in sorted(described, key=lambda name: (-DTYPE_BYTES[described[name][0]], name)):
        dtype, shape = described[name]
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = _JSON.encode(header).encode("utf-8")
    return raw + b" " * (-len(raw) % 8)


def _data(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    import torch

    for name in _order(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    # the largest alignment first keeps every tensor aligned, as the reference writer does
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _container_dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return next(key for key, value in TORCH_DTYPES.items() if value == name)


def _tensor_info(name: str, entry: object) -> TensorInfo:
    try:
        (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        if len(entry) > 3:
            raise ValueError("more than these three")
    except (TypeError, KeyError, ValueError) as error:
        raise ContainerError(f"broken header: tensor {name!r} is not described") from error
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    whole = all(type(number) is int and 0 <= number < MAX_ELEMENTS for number in numbers)
    known = isinstance(dtype, str) and dtype in DTYPE_BYTES
    if not (whole and known and _elements(shape) * DTYPE_BYTES[dtype] == end - start):
        raise ContainerError(f"broken header: tensor {name!r} has dtype, shape and offsets that do not agree")
    return TensorInfo(dtype, tuple(shape), start, end)


def _elements(shape: list[int]) -> int:
    """The number of a shape's elements, or -1 for a shape that no tensor has. The product never grows long."""
    elements = 1
    for size in filter(None, shape):
        elements *= size
        if elements > MAX_ELEMENTS:
            return -1
    return -1 if len(shape) > MAX_DIMENSIONS else elements * (0 not in shape)


def _check_layout(tensors: dict[str, TensorInfo], data_size: int) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise ContainerError(f"broken header: tensor {name!r} overlaps another or leaves a gap")
        position = info.end
    if position > data_size:
        raise ContainerError(f"truncated: {position} bytes of tensors expected, {data_size} found")
    if position < data_size:
        raise ContainerError(f"damaged: {data_size - position} bytes after the last tensor")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _natural(text: str) -> int:
    if text.startswith("-"):  # -0 too, which other readers take for a fraction
        raise ValueError(f"{text[:40]} is below 0")
    return int(text)


def _no_fraction(text: str) -> int:
    raise ValueError(f"{text[:40]} is no whole number")


# a header has no other numbers than sizes
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_natural, parse_float=_no_fraction, parse_constant=_no_fraction
)
