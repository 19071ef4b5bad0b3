"""The safetensors container: readable by the reference reader, equal bytes for equal content, damage named."""

import json
import os
import random

import pytest
import safetensors.torch
import torch

from qwen_image.container import ContainerError, data_sha256, read_header, write_safetensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.linspace(0, 1, 5),
    "scalar": torch.tensor(3.0),
    "eight": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "empty": torch.zeros(3, 0),
    "strided": torch.arange(12.0).reshape(3, 4).T,
}


def test_the_reference_reader_gets_back_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"caption": 'a ✿ – 漢字 "quoted"\n'})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"caption": 'a ✿ – 漢字 "quoted"\n'}


def test_order_of_arguments_does_not_change_a_byte(tmp_path):
    metadata = {str(i): str(i) for i in range(40)}
    write_safetensors(tmp_path / "1", TENSORS, metadata)
    names, keys = list(TENSORS), list(metadata)
    random.Random(1).shuffle(names)
    random.Random(2).shuffle(keys)
    write_safetensors(tmp_path / "2", {n: TENSORS[n] for n in names}, {k: metadata[k] for k in keys})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_text_that_no_reader_takes_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        write_safetensors(tmp_path / "x", TENSORS, {"caption": "\ud800"})
    assert list(tmp_path.iterdir()) == []


def test_data_hash_is_that_of_the_data_section(tmp_path):
    import hashlib

    path = tmp_path / "x"
    write_safetensors(path, TENSORS)
    raw = path.read_bytes()[read_header(path).data_start :]
    assert data_sha256(TENSORS) == hashlib.sha256(raw).hexdigest()


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "x", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_headers_of_the_reference_writer_are_understood(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"k": "v"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"k": "v"}
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert {name: info.shape for name, info in header.tensors.items()} == shapes
    assert header.tensors["b"].torch_dtype == "bfloat16"


def _raw(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too short"),
        (b"abc", "too short"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated|not a safetensors"),
        ((2**40).to_bytes(8, "little") + b"x" * 50, "no header length"),
        (_raw({"a": ONE}, b"\0" * 7), "truncated: 8 bytes of tensors expected, 7 found"),
        (_raw({"a": ONE}, b"\0" * 9), "1 bytes after the last tensor"),
        (_raw(b"{not json", b""), "broken header"),
        (_raw(b'{"a": 1, "a": 2}', b""), "stands twice"),
        (_raw([1], b""), "no table"),
        (_raw({"a": {"dtype": "F32", "shape": [2]}}, b""), "not described"),
        (_raw({"a": {**ONE, "shape": [3]}}, b"\0" * 8), "do not agree"),
        (_raw({"a": {**ONE, "dtype": "Q9"}}, b"\0" * 8), "do not agree"),
        (_raw({"a": {**ONE, "shape": [-2]}}, b"\0" * 8), "below 0"),
        (_raw({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12), "overlaps"),
        (_raw({"a": {**ONE, "data_offsets": [8, 16]}}, b"\0" * 16), "gap"),
        (_raw({"__metadata__": {"a": 1}, "b": ONE}, b"\0" * 8), "metadata"),
        # the reference reader would pass over what it does not know; nothing writes it
        (_raw({"a": {**ONE, "x": 1}}, b"\0" * 8), "not described"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ContainerError, match=reason):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_raw({"__metadata__": {"a": "\ud800"}, "b": ONE}, b"\0" * 8), "surrogates not allowed"),
        (_raw({"__metadata__": {"\udc00\ud800": "a"}, "b": ONE}, b"\0" * 8), "surrogates not allowed"),
        (_raw({"\ud800": ONE}, b"\0" * 8), "surrogates not allowed"),
        (_raw(b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}', b""), "below 0"),
        (_raw(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}', b"1"), "below 0"),
        (_raw(b'{"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}', b"1"), "1.0 is no whole number"),
        (_raw({"a": {**ONE, "x": float("nan")}}, b"\0" * 8), "NaN is no whole number"),
        (_raw(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": 1e999}}', b"1"), "no whole number"),
        (_raw({"a": {**ONE, "x": json.loads("[" * 200 + "]" * 200)}}, b"\0" * 8), "not described"),
    ],
)
def test_what_the_reference_reader_refuses_is_refused(tmp_path, content, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)
    with pytest.raises(ContainerError, match=reason):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, {"k": "v"})
    whole = (tmp_path / "x").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ContainerError):
            read_header(tmp_path / "cut")
