"""The LoRA's file: metadata, hashes, and which files in between are kept."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as reference_save

from qwen_image.adapter.files import save_adapter
from qwen_image.container import read_header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.training.arguments import Settings, with_defaults
from qwen_image.training.checks import check_settings
from qwen_image.training.file_names import lora_name
from qwen_image.training.metadata import KEPT, RunFacts, progress_metadata, run_metadata, with_hashes
from qwen_image.training.saving import outdated_epoch, outdated_step

FIELD = json.loads((Path(__file__).parents[1] / "data" / "lora_2_blocks_rank_16.json").read_text())["metadata"]
TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}
RANDOM = {"ss_session_id"}
FACTS = RunFacts(
    rank=16, alpha=1, mixed_precision="bf16", train_items=24, batches_per_epoch=24, epochs=1, total_steps=10
)
DATASET = DatasetSettings(
    index=0, resolution=(512, 512), enable_bucket=True, bucket_no_upscale=False, caption_extension=".txt",
    multiple_captions=False, batch_size=1, num_repeats=1, loss_weight=1.0, image_directory="/secret/place/data/",
    image_jsonl_file=None, cache_directory="/x", control_directory=None, multiple_target=False, no_resize_control=False,
    control_resolution=None, alpha_background="white",
)  # fmt: skip
# those of the training that made the golden file
GOLDEN = {
    "output_name": "peer", "learning_rate": 5e-5, "gradient_checkpointing": True, "timestep_sampling": "shift",
    "discrete_flow_shift": 2.2, "dit": "/secret/place/dit2.safetensors", "seed": 42,
    "vae": "/secret/place/diffusion_pytorch_model.safetensors",
}  # fmt: skip


def metadata(step=10, epoch=1, **settings):
    given = Settings(**with_defaults({**GOLDEN, **settings}))
    return {**run_metadata(given, [DATASET], FACTS), **progress_metadata(given, step=step, epoch=epoch)}


def test_equals_the_field_s(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    ours = with_hashes({"a": torch.zeros(1)}, metadata())
    assert set(FIELD) - set(ours) == TIMES | RANDOM
    assert set(ours) - set(FIELD) == {"ss_text_encoder_name"}
    same = set(FIELD) - TIMES - RANDOM - {"sshs_model_hash", "sshs_legacy_hash"}
    assert {key: ours[key] for key in same} == {key: FIELD[key] for key in same}
    assert "/secret" not in str(ours)


def test_times_only_from_the_source_date(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    ours = metadata()
    assert ours["modelspec.date"] == "2023-11-14T22:13:20"
    assert ours["ss_training_started_at"] == ours["ss_training_finished_at"] == "1700000000.0"
    assert "ss_session_id" not in ours


def test_what_stays_without_metadata():
    ours = metadata(no_metadata=True, network_args=["verbose=True"])
    assert {key for key in ours if key.startswith("ss_")} == set(KEPT)
    assert ours["ss_network_args"] == '{"verbose": "True"}'
    assert ours["modelspec.title"] == "peer"


def test_model_spec():
    ours = metadata(
        metadata_title="T", metadata_author="A", metadata_description="D", metadata_license="L", metadata_tags="x,y",
        metadata_reso="1024, 768", metadata_arch="Other", min_timestep=100,
    )  # fmt: skip
    spec = {key.removeprefix("modelspec."): value for key, value in ours.items() if key.startswith("modelspec.")}
    assert (spec["title"], spec["author"], spec["description"], spec["license"], spec["tags"]) == (*"TADL", "x,y")
    assert (spec["resolution"], spec["architecture"], spec["timestep_range"]) == ("1024x768", "Other/lora", "100,1000")
    assert metadata(optimizer_args=["betas=(0.9,0.99)"])["ss_optimizer"] == "torch.optim.adamw.AdamW(betas=(0.9, 0.99))"


def test_hashes(tmp_path):
    tensors = {name: torch.randn(300, 1000) for name in ("b", "a")}
    given = {"ss_seed": "1", "modelspec.title": "t"}
    save_adapter(tmp_path / "lora.safetensors", tensors, given)
    header = read_header(tmp_path / "lora.safetensors")
    data = (tmp_path / "lora.safetensors").read_bytes()[header.data_start :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    # one ss_ key, so that the reference writer has only one order to write it in
    reference = reference_save(tensors, {"ss_seed": "1"})
    expected = hashlib.sha256(reference[0x100000:0x110000]).hexdigest()[:8]
    assert header.metadata["sshs_legacy_hash"] == expected
    loaded = load_file(tmp_path / "lora.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_with_alpha_folded_in_says_so(tmp_path):
    tensors = {
        "transformer.proj_out.lora_A.weight": torch.ones(4, 8),
        "transformer.proj_out.lora_B.weight": torch.ones(8, 4),
    }
    save_adapter(tmp_path / "lora.safetensors", tensors, {"ss_network_dim": "4", "ss_network_alpha": "1"})
    assert read_header(tmp_path / "lora.safetensors").metadata["ss_network_alpha"] == "4"


@pytest.mark.parametrize("module, refused", [("networks.lora_qwen_image", False), ("networks.loha", True)])
@pytest.mark.parametrize("save_format", ["kohya", "diffusers", "both"])
def test_formats_that_a_kind_has_no_names_in_are_refused(module, refused, save_format):
    problems = check_settings({"network_module": module, "save_format": save_format}, "train.toml")
    expected = ["save_format"] if refused and save_format != "kohya" else []
    assert [problem.key for problem in problems] == expected
    assert "diffusers cannot load a LoHa" in problems[0].found if expected else True


def test_file_names():
    assert lora_name("a", epoch=3) == "a-000003.safetensors"
    assert lora_name("a", step=250) == "a-step00000250.safetensors"


def test_retention_of_epochs():
    kept = set()
    for epoch in range(2, 21, 2):
        kept.add(epoch)
        kept.discard(outdated_epoch(epoch, every=2, keep=3))
    assert kept == {16, 18, 20}
    assert outdated_epoch(4, every=2, keep=None) is None


def test_retention_of_steps():
    assert outdated_step(50, every=10, keep=30) == 10
    assert [outdated_step(n, every=10, keep=30) for n in (10, 20, 30, 40)] == [None] * 4
    assert outdated_step(50, every=10, keep=None) is None


@pytest.mark.parametrize("value", ["yesterday", "99999999999999999999"])
def test_a_source_date_that_is_none(monkeypatch, value):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(ValueError, match="is no time"):
        metadata()
