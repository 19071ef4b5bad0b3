"""How an image file says it must be turned to stand upright, read without decoding its pixels."""

from __future__ import annotations

import struct

from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; 1 is upright."""


def of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of an image that was opened and not loaded yet. 1 when it says none or nonsense."""
    if image.format in ("TIFF", "JXL"):
        return 1  # their decoders turn the pixels and report the turned size themselves
    try:
        if image.format == "PNG" and "exif" not in image.info:
            _find_late_exif(image)
        # Not image.getexif(): the one of PNG files decodes all of the pixels in search for a late EXIF chunk.
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF is written by everybody, and a broken one raises whatever its bytes lead to
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def swaps_sides(turn: int) -> bool:
    """Whether width and height change places."""
    return turn >= 5


def apply(image: Image.Image, turn: int) -> Image.Image:
    """The image, upright."""
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _find_late_exif(image: Image.Image) -> None:
    """Put an EXIF chunk that stands behind the pixels of a PNG file into `image.info`; reads only chunk heads."""
    file = image.fp
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"eXIf":
                image.info["exif"] = b"Exif\0\0" + file.read(length)
                return
            file.seek(length + 4, 1)  # its content and checksum
    finally:
        file.seek(position)
