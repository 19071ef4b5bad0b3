"""Converts decoded images of any mode (palette, grey, 16 bit, CMYK, transparent, ICC-tagged) to plain 8-bit sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""The colour space that a profile must be for, by the mode of the image it came with."""


def to_srgb(image: Image.Image, background: str) -> Image.Image:
    """The decoded image as mode RGB in sRGB, with what is transparent composited on `background`.

    Raises ValueError for modes without a defined range (floating point, 32-bit integers).
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        plain, alpha = _from_16_bit_grey(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits a channel")
    else:
        plain, alpha = _split_alpha(image)
    rgb = _apply_profile(plain, profile) if isinstance(profile, bytes) and profile else plain.convert("RGB")
    if alpha is None:
        return rgb
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in mode RGB, L or CMYK, and the alpha channel in mode L or None."""
    if image.has_transparency_data:
        transparent = image.info.get("transparency")
        if isinstance(transparent, tuple) and max(transparent) > 255:
            # Of 16-bit channels the decoder keeps the upper byte, but the transparent colour it leaves as it was.
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        grey = image.mode in ("LA", "La", "L", "1")
        layered = image.convert("LA" if grey else "RGBA")
        return layered.convert("L" if grey else "RGB"), layered.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _from_16_bit_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """As `_split_alpha` for 16-bit greys, which Pillow's own conversion would clip at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are integers outside 0..65535; save it with 8 or 16 bits a channel")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey, None
    return grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB in sRGB; a profile that is broken, or for another kind of image, is ignored as browsers do."""
    transform = _transform(profile, image.mode)
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from `profile` to sRGB, or None where it has nothing to do or cannot be built."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _PROFILE_SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if mode != "CMYK" and _is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the profile is sRGB under one of its many names: then the pixels stay untouched, free of rounding."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "RGB":
        probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(16, 256, 3))
    else:
        probe = Image.fromarray(levels.reshape(1, 16))
    before = np.asarray(probe.convert("RGB")).astype(int)
    after = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return int(np.abs(after - before).max()) <= 1
