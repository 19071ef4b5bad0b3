"""Access tokens: taken from the environment, written nowhere, and refused unseen where a setting holds one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cache_archive
import check_config
import hub_server
import pytest
import yaml
from locked import write_project
from odd_values import ROOT, SNAKEMAKE, TOKENS
from parsers import settings

from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import list_items
from qwen_image.problems import InputError
from qwen_image.sampling.prompts import load_prompts
from qwen_image.tokens import TokenFilter, hide_tokens
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.trackers import tracker_options

pytestmark = pytest.mark.xdist_group("odd values")
HUB, WANDB = TOKENS.values()
ELSEWHERE = "hf_aTokenThatIsNotInTheEnvironment"
PATHS = {"dataset_config": "a", "dit": "b", "vae": "c", "text_encoder": "d", "output_dir": "e", "output_name": "f"}
MISPLACED = {
    "huggingface_token": HUB, "wandb_api_key": WANDB, "hf_token": HUB, "training_comment": f"made with {ELSEWHERE}",
    "log_prefix": WANDB, "learning_rate": HUB, "resume": f"user/name/{ELSEWHERE}", "dit": f"https://{HUB}@hub/x",
    "optimizer_args": [f"token={HUB}"], "network_weights": WANDB, "huggingface_repo_id": f"user/{HUB}",
    "caching_shards": ELSEWHERE, "runs_grid": {"training_comment": ["a", HUB]}, "save_precision": HUB,
}  # fmt: skip
"""Settings that somebody might put a token into."""


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)


def silent_about_tokens(text: str) -> bool:
    return not any(token in text for token in (HUB, WANDB, ELSEWHERE))


def test_no_file_of_a_run_holds_a_token_of_its_environment(odd_run):
    """It logs to TensorBoard and to wandb, with all settings, and leaves metadata, tables, logs and a state."""
    files = [path for path in odd_run.written if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(token.encode() in content for token in TOKENS.values()), path
    assert all(silent_about_tokens(result.stdout) for result in odd_run.said.values())


def test_a_failing_upload_shows_the_token_to_nobody(tmp_path):
    """The hub quotes it in its answer, and the library that asked quotes the hub in its traceback."""
    program = f"""
import logging
from pathlib import Path
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.hub import Uploader
logging.basicConfig(level=logging.DEBUG)
given = {{"huggingface_repo_id": "someone/lora", "output_dir": {str(tmp_path)!r}, "output_name": "lora"}}
uploader = Uploader(Settings(**with_defaults(given)))
uploader.file(Path("lora.safetensors").absolute())
try:
    uploader.finish()
finally:
    uploader._copy(Path("lora.safetensors").absolute())
"""
    (tmp_path / "lora.safetensors").write_text("content")
    with hub_server.serve() as hub:
        hub.refuse["preupload"] = 403
        more = {"HF_TOKEN": hub_server.TOKEN, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_DEBUG": "1"}
        result = subprocess.run(
            [sys.executable, ROOT / "scripts/run_stage.py", "--stage", "train", "--log", "train.log", "--",
             sys.executable, "-c", program],
            cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | more | {"PYTHONPATH": str(ROOT / "scripts")},
        )  # fmt: skip
    assert result.returncode == 1
    for text in (result.stdout + result.stderr, *(path.read_text() for path in tmp_path.glob("train.*"))):
        assert "not now, Bearer (a token)" in text
        assert hub_server.TOKEN not in text


def test_no_archive_holds_a_token_of_its_environment(tmp_path, monkeypatch):
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    write_project(tmp_path / "project")
    assert cache_archive.main(["pack", "--dataset_config", "pets.toml", "--archive", "pets.tar"]) == 0
    content = Path("pets.tar").read_bytes()
    assert not any(token.encode() in content for token in TOKENS.values())


@pytest.mark.parametrize("key", MISPLACED)
def test_a_configuration_with_a_token_is_refused_and_the_token_not_shown(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(PATHS | {key: MISPLACED[key]}), encoding="utf-8")
    with pytest.raises(InputError) as told:
        check_config.main(["--config", "my.yaml"])
    assert [problem.key for problem in told.value.problems] == [key]
    assert "HF_TOKEN" in str(told.value)
    assert silent_about_tokens(str(told.value))


@pytest.mark.parametrize("key", sorted(MISPLACED.keys() - {"runs_grid", "caching_shards", "hf_token"}))
def test_the_trainer_refuses_it_too(key, tmp_path):
    value = MISPLACED[key]
    words = value if isinstance(value, list) else [value]
    (tmp_path / "c.toml").write_text(f"{key} = {value!r}\n", encoding="utf-8")
    for argv in ([f"--{key}", *words], ["--config_file", str(tmp_path / "c.toml")]):
        with pytest.raises(InputError) as told:
            parse_arguments(argv)
        assert key in {problem.key for problem in told.value.problems}
        assert silent_about_tokens(str(told.value))


def test_other_files_with_a_token_are_not_quoted(tmp_path):
    texts = {
        "a.toml": f'[general]\nhf_token = "{HUB}"\nresolution = "{HUB}"\n[[datasets]]\nimage_directory = "{HUB}"\n',
        "b.toml": f'[[datasets]]\nimage_directory = "{HUB}"\ncaption_extension = ".txt"\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as told:
            [list_items(one) for one in load_dataset_config(tmp_path / name)]
        assert silent_about_tokens(str(told.value))
    (tmp_path / "log.toml").write_text(f'[wandb]\napi_key = "{WANDB}"\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text(f"a --w {ELSEWHERE}\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(f'{{"image_path": "a.png", "caption": 1, "{HUB}": "{HUB}"}}\n', encoding="utf-8")
    with pytest.raises(InputError) as wandb:
        tracker_options(str(tmp_path / "log.toml"))
    with pytest.raises(InputError) as prompts:
        load_prompts(tmp_path / "p.txt")
    rejects = list_items(settings(image_jsonl_file=str(tmp_path / "a.jsonl"))).rejects
    assert silent_about_tokens(f"{wandb.value}{prompts.value}{rejects}")


def test_the_workflow_stops_on_it_and_writes_it_nowhere(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(PATHS | {key: MISPLACED[key] for key in ("hf_token", "learning_rate")}))
    result = subprocess.run(
        [SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", tmp_path, "--cores", "1", "--configfile", config,
         "--config", f"wandb_api_key={WANDB}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | TOKENS,
    )  # fmt: skip
    assert result.returncode
    assert "holds an access token" in result.stdout
    assert silent_about_tokens(result.stdout)
    for path in Path(tmp_path).rglob("*"):
        assert path == config or path.is_dir() or silent_about_tokens(path.read_text(errors="replace")), path


def test_a_stream_in_any_parts_shows_what_the_whole_text_would():
    text = f"a hf_{HUB} {WANDB[:9]}{WANDB}w wandb_v1_{'x' * 20}, {ELSEWHERE}\n\r"
    text += f"hf_ wandb {WANDB[:-1]} hf_{'A' * 19}-planted0w"
    whole, data = hide_tokens(text), text.encode()
    assert whole.count("(a token)") == 4
    for first in range(len(data) + 1):
        for parts in ((data[:first], data[first:]), (data[:first], data[first : first + 7], data[first + 7 :])):
            tokens = TokenFilter()
            assert b"".join([*map(tokens.pass_on, parts), tokens.rest()]).decode() == whole, parts
    tokens = TokenFilter()
    assert b"".join([*(tokens.pass_on(bytes([one])) for one in data), tokens.rest()]).decode() == whole


def test_what_only_looks_like_a_token_is_left_alone(monkeypatch):
    for name in TOKENS:
        monkeypatch.delenv(name)
    for text in ("hf_hub", "a photo of hf_models and wandb", "0" * 40, "models/hf_download/qwen.safetensors"):
        assert hide_tokens(text) == text
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("WANDB_API_KEY", "a")
    assert hide_tokens("a cat") == "a cat"
