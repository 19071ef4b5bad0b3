"""What a training saves, in every format, passes the check of what its readers make of it."""

import pytest
from check_lora import main
from convert_lora import main as convert
from safetensors.torch import load_file
from training_data import write_tiny_training

from qwen_image.training.arguments import parse_arguments
from qwen_image.training.loop import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("tiny"))


def trained(tiny, folder, **settings):
    """Train three steps without worker processes and return the folder of the files."""
    flags = tiny.flags(
        output_dir=folder, max_train_steps=3, max_data_loader_n_workers=0, network_dim=4, network_alpha=3,
        save_every_n_steps=1, save_last_n_steps=1, **settings,
    )  # fmt: skip
    train(parse_arguments(flags))
    return folder


def is_good(tiny, lora, *more):
    return main(["--lora", str(lora), "--dit", str(tiny.folder / "dit"), *map(str, more)]) == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lora_in_both_formats(tiny, tmp_path, precision):
    folder = trained(tiny, tmp_path / "models", save_format="both", save_precision=precision)
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {
        f"lora{step}{scheme}.safetensors"
        for step in ("-step00000002", "-step00000003", "")
        for scheme in ("", ".diffusers")
    }
    assert is_good(tiny, folder / "lora.safetensors", "--diffusers", folder / "lora.diffusers.safetensors")
    assert is_good(tiny, folder / "lora-step00000002.diffusers.safetensors")
    # the file that a conversion of kohya's gives is that which training writes beside it
    target = tmp_path / "converted.safetensors"
    convert(["--input", str(folder / "lora.safetensors"), "--output", str(target), "--target", "diffusers"])
    ours, theirs = load_file(target), load_file(folder / "lora.diffusers.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    assert is_good(tiny, target, "--diffusers", folder / "lora.safetensors")


def test_a_dora_in_diffusers_names_alone_and_without_metadata(tiny, tmp_path):
    folder = trained(
        tiny, tmp_path / "models", save_format="diffusers", network_args=["use_dora=True"], no_metadata=True
    )
    assert any("lora_magnitude_vector" in name for name in load_file(folder / "lora.safetensors"))
    assert is_good(tiny, folder / "lora.safetensors")


@pytest.mark.parametrize("module", ["networks.loha", "networks.lokr"])
def test_kinds_that_only_the_field_s_names_hold(tiny, tmp_path, module):
    folder = trained(tiny, tmp_path / "models", network_module=module)
    assert is_good(tiny, folder / "lora.safetensors")
