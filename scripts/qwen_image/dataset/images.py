"""Reads an image file as people see it (rotated, in sRGB, without transparency) and fits it to a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from qwen_image.dataset import colour, orientation

MAX_PIXELS = 256 * 2**20
"""Largest image that is decoded, width times height: 0.75 GB of pixels. A small file can claim more than fits."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF")
"""Pillow formats that are tried, whatever the file is called. Not all, since some run programs (EPS) or are stubs."""


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason, without the file's name."""


def load_image(path: str | Path, background: str = "white") -> np.ndarray:
    """The image as uint8 sRGB, shape (height, width, 3): EXIF rotation applied, alpha composited, first frame only.

    `background`, seen through transparent pixels, is "white", "black" or "#rrggbb". Raises ImageError with a reason for
    people when the file cannot be read as an image.
    """
    with _opened(path) as image:
        turn = orientation.of(image)
        with _decoding():
            image.load()
            pixels = colour.to_srgb(image, background)
        return np.array(orientation.apply(pixels, turn))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of what `load_image` gives, read from the file's header only. Raises ImageError as that does."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if orientation.swaps_sides(orientation.of(image)) else (width, height)


def fit_to_bucket(pixels: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """Resize `pixels` (height, width, 3) until they cover `bucket` (width, height), and crop what sticks out evenly.

    Enlarges with Pillow's Lanczos and shrinks with OpenCV's area average, as in the tools of people's caches.
    Raises ImageError for a shape so extreme that the resized image would not fit into memory.
    """
    height, width = pixels.shape[:2]
    bucket_width, bucket_height = bucket
    if (width, height) == bucket:
        return pixels
    scale = max(bucket_width / width, bucket_height / height)
    # Round half up; int() truncates and sizes are positive.
    new_width, new_height = int(width * scale + 0.5), int(height * scale + 0.5)
    if new_width * new_height > MAX_PIXELS:
        raise ImageError(f"its shape, {width}x{height}, is too extreme for a bucket of {bucket_width}x{bucket_height}")
    if scale > 1:
        resized = np.array(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.LANCZOS))
    else:
        # Half a second to import, and whoever only lists or measures images does without it.
        import cv2

        resized = cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_AREA)
    left, top = (new_width - bucket_width) // 2, (new_height - bucket_height) // 2
    return np.ascontiguousarray(resized[top : top + bucket_height, left : left + bucket_width])


def file_reason(error: OSError) -> str:
    """Why an image's file cannot be read, for people and without its name."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not an image"
    if isinstance(error, PermissionError):
        return "it may not be read (permission denied)"
    return f"it cannot be read: {error.strerror or error}"


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The image with its header read and its size checked."""
    # Pillow's own limit is one for the whole process and lower than ours; it also guards the frames inside a file.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    # One compressed text may be as long as all together: programs that make pictures put their whole workflow into one.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with Path(path).open("rb") as file:
            with _decoding():
                image = _open_image(file, Path(path).suffix.lower())
            with image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(_too_large(f"{width}x{height}"))
                yield image
    except OSError as error:
        raise ImageError(file_reason(error)) from error


def _open_image(file: BinaryIO, suffix: str) -> Image.Image:
    if not file.read(1):
        raise ImageError("the file is empty")
    file.seek(0)
    formats = (*FORMATS, "JXL") if suffix == ".jxl" and _import_jxl_plugin() else FORMATS
    try:
        return Image.open(file, formats=formats)
    except Image.UnidentifiedImageError as error:
        known = ", ".join(formats)
        raise ImageError(f"it is not an image, or damaged from its start; known formats are {known}") from error


def _import_jxl_plugin() -> bool:
    """Make Pillow know JPEG XL, if one of its plugins is installed."""
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401

        return True
    with suppress(ImportError):
        from jxlpy import JXLImagePlugin  # noqa: F401

        return True
    return False


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file into an ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_too_large(f"more than {MAX_PIXELS}")) from error
    except OSError as error:
        if error.errno is not None:  # the file system, not the decoder
            raise
        raise ImageError(f"it is damaged or cut short: {error}") from error
    except Exception as error:  # decoders raise SyntaxError, struct.error, IndexError and more on damaged files
        raise ImageError(f"it cannot be decoded: {error or type(error).__name__}") from error


def _too_large(found: str) -> str:
    limit = f"{MAX_PIXELS / 2**20:.0f} megapixels"
    return f"it is too large: {found} pixels, where {limit} are the most; if it is genuine, make it smaller"
