"""Whole trainings with several captions and dropped ones: going on gives the same bytes; items left out are told."""

import shutil

import pytest
from training_data import add_captions, write_empty_caption, write_tiny_training

from qwen_image.problems import InputError
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.loop import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tiny = write_tiny_training(tmp_path_factory.mktemp("tiny"), num_repeats=2)
    add_captions(tiny.folder, "b", 3)
    prompts = write_empty_caption(tiny.folder)
    more = {"network_dim": "2", "max_data_loader_n_workers": "0", "prompts_manifest": str(prompts)}
    tiny.arguments.update(more)
    return tiny


def trained(tiny, folder, *, rate=0.4, **settings):
    """The LoRA's bytes after a training into this folder."""
    return train(parse_arguments(tiny.flags(output_dir=folder, caption_dropout_rate=rate, **settings))).read_bytes()


def test_a_training_that_goes_on_trains_with_the_same_captions(tiny, tmp_path):
    whole = trained(tiny, tmp_path / "whole", max_train_steps=5)
    trained(tiny, tmp_path / "parts", max_train_steps=2, save_state_on_train_end=True)
    assert trained(tiny, tmp_path / "parts", max_train_steps=5) == whole
    assert trained(tiny, tmp_path / "other", max_train_steps=5, rate=0) != whole
    assert (tmp_path / "whole" / "lora.left_out.tsv").read_text() == "dataset\tkey\treason\n"


def test_items_held_out_are_listed(tiny, tmp_path):
    trained(tiny, tmp_path, max_train_steps=1, validation_split=0.3)
    header, *rows = (tmp_path / "lora.left_out.tsv").read_text().splitlines()
    assert header == "dataset\tkey\treason"
    assert rows and all(row.endswith("\theld out to validate with (validation_split)") for row in rows)


def test_an_empty_caption_that_is_not_cached_stops_before_the_model_is_loaded(tiny, tmp_path):
    shutil.copytree(tiny.folder / "prompts", tmp_path / "prompts")
    manifest = shutil.copy(tiny.folder / "prompts.tsv", tmp_path)
    (file,) = (tmp_path / "prompts").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        trained(tiny, tmp_path / "m", prompts_manifest=manifest, dit=tiny.folder / "nothing")
    assert caught.value.problems[0].file == str(file)
