"""Only safetensors are read as weights, told by content: a pickle is refused whatever it is called, and never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import convert_lora
import pytest
import tiny
import torch
from odd_values import COMMAND, make_canary

from qwen_image.adapter.files import open_adapter
from qwen_image.adapter.weights import check_weight_files
from qwen_image.cache.fingerprint import read_cache_header
from qwen_image.models.checkpoint import check_checkpoint
from qwen_image.problems import InputError
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.state import Facts, Saved, read_state


class Evil:
    """Runs the canary when it is unpickled."""

    def __reduce__(self):
        return os.system, (COMMAND,)


def zipped(path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "evil": Evil()}, path)


def legacy(path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "evil": Evil()}, path, _use_new_zipfile_serialization=False)


def padded(path: Path) -> None:
    """A pickle behind a header length that fits the file: text that a careless reader would go on with."""
    content = pickle.dumps(Evil(), protocol=0)
    path.write_bytes(len(content).to_bytes(8, "little") + content)


def of_protocol(number: int):
    return lambda path: path.write_bytes(pickle.dumps({"weight": [0.0], "evil": Evil()}, protocol=number))


PICKLES = {"zip": zipped, "legacy": legacy, "padded": padded, **{f"protocol {n}": of_protocol(n) for n in range(6)}}
NAMES = ("weights.safetensors", "weights.pt", "weights.bin", "weights")


@pytest.fixture
def canary(tmp_path, monkeypatch):
    canary = make_canary(tmp_path / "canary")
    monkeypatch.setenv("PATH", canary.environment["PATH"])
    yield canary
    assert canary.songs == []


def test_a_pickle_would_run_the_canary(tmp_path, monkeypatch):
    canary = make_canary(tmp_path / "canary")
    monkeypatch.setenv("PATH", canary.environment["PATH"])
    for name in ("protocol 2", "protocol 5"):
        PICKLES[name](tmp_path / "x")
        pickle.loads((tmp_path / "x").read_bytes())
    assert len(canary.songs) == 2


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_no_weights_whatever_it_is_called(kind, tmp_path, canary):
    for name in NAMES:
        path = tmp_path / name
        PICKLES[kind](path)
        for role in ("dit", "vae", "text_encoder"):
            (problem,) = check_checkpoint(path, role)
            assert problem.key == role
        with pytest.raises(InputError, match="safetensors"):
            open_adapter(path)
        with pytest.raises(InputError):
            check_weight_files(Settings(**with_defaults({"network_weights": str(path), "base_weights": [str(path)]})))
        with pytest.raises(InputError):
            convert_lora.main(["--input", str(path), "--output", str(tmp_path / "o.safetensors"), "--target", "kohya"])
        assert read_cache_header(path) is None
        assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_folder_an_index_and_a_state_with_a_pickle_are_refused(kind, tmp_path, canary):
    for folder, name in (("dit", "diffusion_pytorch_model.safetensors"), ("set", "x.safetensors"), ("state", "")):
        (tmp_path / folder).mkdir()
        if name:
            PICKLES[kind](tmp_path / folder / name)
    index = tmp_path / "set" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert check_checkpoint(tmp_path / "dit", "dit")
    assert check_checkpoint(index, "dit")
    for name in ("model.safetensors", "optimizer.safetensors"):
        PICKLES[kind](tmp_path / "state" / name)
    facts = Facts(
        step=1, epoch=1, skipped_steps=0, recent_losses=[], best_validation=None, made_from={}, kept=True
    )  # fmt: skip
    with pytest.raises(InputError, match="is damaged"):
        read_state(Saved(tmp_path / "state", facts))


def test_what_a_pickle_is_is_said(tmp_path, canary):
    for kind, words in (("zip", "zip archive"), ("protocol 2", "Python pickle"), ("protocol 5", "Python pickle")):
        PICKLES[kind](tmp_path / "x.safetensors")
        (problem,) = check_checkpoint(tmp_path / "x.safetensors", "dit")
        assert words in problem.found
        assert "can run code" in problem.found


def test_safetensors_are_read_whatever_they_are_called(tmp_path):
    shutil.copy(tiny.path("dit"), tmp_path / "dit.pt")
    assert check_checkpoint(tmp_path / "dit.pt", "dit") == []


def test_pickled_weights_beside_safetensors_are_not_looked_at(tmp_path, canary):
    shutil.copy(tiny.path("vae"), tmp_path / "diffusion_pytorch_model.safetensors")
    zipped(tmp_path / "diffusion_pytorch_model.bin")
    assert check_checkpoint(tmp_path, "vae") == []
