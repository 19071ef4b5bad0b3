"""show_timesteps: text and picture of the very draws of a training, without a model; no key of the workflow's."""

import pytest
import torch
from qwen_image_train_network import main
from training_data import cached_batches, write_tiny_training

from qwen_image.config import check_config
from qwen_image.dataset.config import load_dataset_config
from qwen_image.training import noise_picture
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.batches import Batch, Draw
from qwen_image.training.items import join_manifests
from qwen_image.training.noise_picture import draw_visits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_training(tmp_path_factory.mktemp("picture"))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(noise_picture, "DRAWS", 500)


def test_as_text(tiny, tmp_path, capsys):
    assert main(tiny.flags(show_timesteps="console", dit="nowhere", output_dir=tmp_path / "new")) == 0
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head == "noise levels of 500 draws: timestep_sampling qwen_shift"
    assert columns.split() == ["noise", "level", "draws"]
    shares = [float(line.split()[1].rstrip("%")) for line in lines[:25]]
    assert sum(shares) == pytest.approx(100, abs=2)
    bars = [line.count("#") for line in lines[:25]]
    assert max(bars) == 50
    assert bars.index(50) == shares.index(max(shares))
    # of the two sizes each has its own law
    assert [line.split(": ")[1] for line in lines[25:]] == [
        "all 5 visits of an epoch", "64 x 64 (3 visits)", "96 x 48 (2 visits)",
    ]  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_weights_as_text(tiny, capsys):
    assert main(tiny.flags(show_timesteps="console", timestep_sampling="uniform", weighting_scheme="sigma_sqrt")) == 0
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("timestep_sampling uniform, weighting_scheme sigma_sqrt")
    assert columns.split()[-1] == "weight"
    weights = [float(line.split()[2].rstrip("%")) for line in lines[:25]]
    assert weights[0] > 80
    assert sum(weights) == pytest.approx(100, abs=2)
    assert len(lines) == 27, "a law that is the same for all sizes is shown once"


@pytest.mark.parametrize("more", [{}, {"weighting_scheme": "sigma_sqrt", "num_timestep_buckets": 5}])
def test_as_a_picture(tiny, tmp_path, capsys, more):
    pictures = []
    for folder in ("one", "two"):
        flags = tiny.flags(show_timesteps="image", dit="nowhere", output_dir=tmp_path / folder, **more)
        assert main(flags) == 0
        path = tmp_path / folder / "lora.timesteps.png"
        assert capsys.readouterr().out == f"{path}\n"
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG\r\n")


def test_only_the_first_process_shows_them(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(tiny.flags(show_timesteps="image", output_dir=tmp_path / "new")) == 0
    assert not capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_the_draws_are_the_training_s(tiny):
    settings = {"seed": 3, "timestep_sampling": "qinglong_qwen", "num_timestep_buckets": 4}
    datasets = load_dataset_config(tiny.folder / "dataset.toml")
    items = join_manifests(str(tiny.folder / "latents.tsv"), str(tiny.folder / "text.tsv"), datasets).items
    batches = cached_batches(tiny.folder, items, **settings)
    trained = [batches[Batch(epoch, 0, (Draw(index, 0),))].t_b for epoch in (1, 2) for index in range(5)]
    shown = draw_visits(parse_arguments(tiny.flags(**settings)))
    assert torch.equal(torch.cat(trained), torch.tensor(shown.every.levels[:10]))


def test_of_many_visits_some_are_shown(tiny, monkeypatch):
    monkeypatch.setattr(noise_picture, "DRAWS", 2)
    shown = draw_visits(parse_arguments(tiny.flags()))
    assert len(shown.every.levels) == 2
    assert shown.every.name == "all 5 visits of an epoch"


def test_the_workflow_says_how_to_show_them():
    (problem,) = [problem for problem in check_config({"show_timesteps": "image"}, "f") if "show" in problem.key]
    assert "--show_timesteps image" in problem.mend
    assert not [problem for problem in check_config({"show_timesteps": None}, "f") if "show" in problem.key]
