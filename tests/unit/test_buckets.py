"""Buckets: the tables and choices that existing caches were made with, and what must hold for every image."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_image.dataset.buckets import MIN_AREA, STEP, bucket_sizes, choose_bucket

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "buckets.json").read_text())
side = st.integers(1, 20_000)
resolution_side = st.integers(32, 2048)


@pytest.mark.parametrize(
    "table", GOLDEN, ids=lambda t: f"{t['resolution']}-{t['enable_bucket']}-{t['bucket_no_upscale']}"
)
def test_tables_and_choices_equal_the_recorded_ones(table):
    resolution, modes = tuple(table["resolution"]), (table["enable_bucket"], table["bucket_no_upscale"])
    if table["enable_bucket"]:
        assert bucket_sizes(resolution) == [tuple(size) for size in table["buckets"]]
    for case in table["cases"]:
        assert choose_bucket(tuple(case["size"]), resolution, *modes) == tuple(case["bucket"]), case


@given(resolution_side, resolution_side)
def test_buckets_are_sorted_symmetric_and_no_larger_than_the_resolution(width, height):
    sizes = bucket_sizes((width, height))
    assert sizes == sorted(set(sizes))
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(w >= STEP and h >= STEP and w % STEP == h % STEP == 0 and w * h <= width * height for w, h in sizes)
    assert sizes == bucket_sizes((height, width))


@given(side, side, resolution_side, resolution_side)
def test_no_bucket_has_a_closer_ratio_than_the_chosen_one(width, height, resolution_width, resolution_height):
    resolution = (resolution_width, resolution_height)
    chosen = choose_bucket((width, height), resolution, True, False)
    errors = {size: abs(size[0] / size[1] - width / height) for size in bucket_sizes(resolution)}
    assert errors[chosen] == min(errors.values())


@given(st.integers(STEP, 4096), st.integers(STEP, 4096))
def test_no_upscale_keeps_small_images_at_their_size(width, height):
    chosen = choose_bucket((width, height), (1024, 1024), True, True)
    if width * height <= 1024 * 1024:
        assert chosen == (width // STEP * STEP, height // STEP * STEP)
    else:
        assert chosen == choose_bucket((width, height), (1024, 1024), True, False)


@given(side, side)
def test_without_buckets_every_image_gets_the_resolution(width, height):
    assert choose_bucket((width, height), (960, 544), False, True) == (960, 544)


@pytest.mark.parametrize("size", [(15, 300), (300, 15), (1, 1)])
def test_an_image_that_no_upscale_would_leave_nothing_of_is_refused(size):
    with pytest.raises(ValueError, match=rf"too small: {size[0]}x{size[1]} pixels.* at least 16"):
        choose_bucket(size, (512, 512), True, True)
    assert choose_bucket(size, (512, 512), True, False) in bucket_sizes((512, 512))


def test_a_resolution_without_buckets_is_refused():
    assert bucket_sizes((32, 32)) == [(16, 64), (32, 32), (64, 16)]
    with pytest.raises(ValueError, match=str(MIN_AREA)):
        bucket_sizes((31, 33))


def test_callers_cannot_spoil_the_table():
    bucket_sizes((512, 512)).clear()
    assert len(bucket_sizes((512, 512))) == 33
