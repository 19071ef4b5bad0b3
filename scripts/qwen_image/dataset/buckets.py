"""Aspect-ratio buckets: the sizes that images are resized and cropped to, so that a batch has one shape.

The same tables and choices as in the tools that people's caches and habits come from; tests/data/buckets.json holds
what those give.
"""

from __future__ import annotations

import math
from functools import lru_cache

STEP = 16
"""Both sides of a bucket are multiples of this: 8 of the VAE times 2 of the transformer's patches."""
MIN_AREA = (2 * STEP) ** 2
"""Smallest width x height of a resolution for which buckets exist: below it the narrowest would be 0 wide."""


def bucket_sizes(resolution: tuple[int, int]) -> list[tuple[int, int]]:
    """All buckets (width, height) in pixels for the area of `resolution`, sorted.

    They run from about 1:4 to 4:1 and none has a larger area than `resolution`. Raises ValueError below `MIN_AREA`.
    """
    return list(_sizes(resolution[0] * resolution[1]))


@lru_cache(maxsize=65536)
def choose_bucket(
    image_size: tuple[int, int], resolution: tuple[int, int], enable_bucket: bool, bucket_no_upscale: bool
) -> tuple[int, int]:
    """The size (width, height) that an image of `image_size` is resized and cropped to.

    With buckets off it is `resolution` itself. `bucket_no_upscale` keeps an image not larger than `resolution` at
    its own size, rounded down to `STEP`; ValueError with a reason for people when nothing would be left of it.
    """
    width, height = image_size
    assert width > 0 and height > 0, image_size
    if not enable_bucket:
        return resolution
    area = resolution[0] * resolution[1]
    if bucket_no_upscale and width * height <= area:
        if min(width, height) < STEP:
            raise ValueError(
                f"it is too small: {width}x{height} pixels, and with bucket_no_upscale each side needs at least {STEP}"
            )
        return width - width % STEP, height - height % STEP
    ratio = width / height
    # The plain difference of ratios treats wide and tall images unequally, but existing caches were made with it.
    return min(_sizes(area), key=lambda size: abs(size[0] / size[1] - ratio))


@lru_cache(maxsize=64)
def _sizes(area: int) -> tuple[tuple[int, int], ...]:
    if area < MIN_AREA:
        raise ValueError(f"a resolution of {area} pixels is too small for buckets; they need {MIN_AREA}")
    root = math.isqrt(area)
    sizes = set()
    for width in range(_floor(root // 2), root + STEP, STEP):
        height = _floor(area // width)
        sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def _floor(side: int) -> int:
    return side - side % STEP
