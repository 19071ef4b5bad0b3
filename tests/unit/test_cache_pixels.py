"""Decoding ahead of the encoder: order, memory, and pictures that give nothing or take their process along."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import skimage

from qwen_image.cache.pixels import CRASHED, Picture, PixelReader
from qwen_image.dataset.images import fit_to_bucket, load_image
from qwen_image.files import sha256_file

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
NAMES = ["astronaut.png", "camera.png", "coffee.png", "chelsea.png", "coins.png", "rocket.jpg", "page.png"]


def pictures(names=NAMES, folder=PHOTOGRAPHS):
    return [Picture(str(folder / name), sha(folder / name), (64, 48), "white") for name in names]


def sha(path):
    return sha256_file(path) if path.exists() else ""


def read(some, **how):
    with PixelReader(some, **{"workers": 2, "ahead": 4} | how) as reader:
        return list(reader)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES], ids=["one", "many"])
def test_pixels_come_in_order_and_are_those_of_one_process(names):
    for ours, name in zip(read(pictures(names)), names, strict=True):
        expected = fit_to_bucket(load_image(PHOTOGRAPHS / name), (64, 48))
        assert ours.shape == (48, 64, 3)
        np.testing.assert_array_equal(ours, expected)


def test_no_more_than_so_many_pictures_are_under_way():
    with PixelReader(pictures(NAMES * 3), workers=2, ahead=5) as reader:
        for _ in reader:
            assert len(reader._waiting) <= 5


def test_a_bad_picture_is_a_reason_and_the_others_still_come(tmp_path):
    (tmp_path / "bad.png").write_bytes((PHOTOGRAPHS / "coffee.png").read_bytes()[:5000])
    some = [*pictures(), *pictures(["bad.png", "gone.png"], tmp_path), *pictures()]
    results = read(some)
    assert [index for index, one in enumerate(results) if isinstance(one, str)] == [7, 8]
    assert "cut short" in results[7]
    assert "no such file" in results[8]


def test_a_killed_worker_costs_no_picture():
    with PixelReader(pictures(NAMES * 3), workers=2, ahead=6) as reader:
        results = iter(reader)
        got = [next(results)]
        os.kill(next(iter(reader._pool._processes)), signal.SIGKILL)
        got += results
    assert len(got) == 3 * len(NAMES)
    assert all(isinstance(one, np.ndarray) for one in got)


@pytest.mark.parametrize("others", [0, len(NAMES)], ids=["alone", "among others"])
def test_a_picture_that_kills_its_worker_is_left_out_alone(tmp_path, monkeypatch, others):
    """As a decoder's bug does it: the process that decodes it is gone without a word."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import qwen_image.dataset.images as images\n"
        "load = images.load_image\n"
        "images.load_image = lambda path, *more: os._exit(9) if 'killer' in path else load(path, *more)\n"
    )
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{scripts}")
    (tmp_path / "killer.png").write_bytes((PHOTOGRAPHS / "coins.png").read_bytes())
    some = pictures(NAMES[:others])
    results = read([*some, *pictures(["killer.png"], tmp_path), *some])
    assert [(index, one) for index, one in enumerate(results) if isinstance(one, str)] == [(others, CRASHED)]
    assert len(results) == 2 * others + 1
