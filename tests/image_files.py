"""Pictures for the tests: real photographs, and hand-made PNG files and colour profiles that no library writes."""

import struct
import zlib
from pathlib import Path

import numpy as np
import skimage
from PIL import ExifTags, Image, ImageCms

from qwen_image.dataset.images import image_size, load_image

PHOTOS = Path(skimage.__file__).parent / "data"
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def photo(name="astronaut.png", size=None):
    image = Image.open(PHOTOS / name).convert("RGB")
    return image.resize(size) if size else image


def saved(path, image, **options):
    image.save(path, **options)
    assert load_image(path).shape[1::-1] == image_size(path)
    return path


def difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(header, row, extra=b""):
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def profile_bytes(name="sRGB"):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def matrix_profile(primaries, gamma, space=b"RGB "):
    """An ICC v2 display profile with the given red, green, blue XYZ columns (D50), or of a grey, and a pure gamma."""
    number = lambda value: struct.pack(">i", round(value * 65536))  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    xyz = {name: b"XYZ \0\0\0\0" + b"".join(map(number, column)) for name, column in primaries.items()}
    curves = {b"kTRC": curve} if space == b"GRAY" else {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return icc(space, b"mntr", b"XYZ ", xyz | curves)


def icc(space, kind, connection, tags):
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"t\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
    } | tags
    head, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        head += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    start = struct.pack(">I4xI", 128 + len(head) + len(body), 0x02100000) + kind + space + connection
    illuminant = struct.pack(">3i", 63190, 65536, 54061)
    return start + bytes(12) + b"acsp" + bytes(28) + illuminant + bytes(48) + head + body


ADOBE_RGB = matrix_profile(
    {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    },
    2.2,
)
GREY_LINEAR = matrix_profile({}, 1.0, b"GRAY")


def cmyk_profile():
    """A CMYK press, a table in Lab with 2x2x2x2 corners: white paper, black, and a cyan that is a pure blue."""
    lab = lambda lightness, a, b: bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])  # noqa: E731
    corners = b"".join(
        lab(0, 0, 0) if k or (c and m and y) else lab(30, 68, -112) if c else lab(100, 0, 0)
        for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
    )  # fmt: skip
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + corners + bytes(range(256)) * 3
    return icc(b"CMYK", b"prtr", b"Lab ", {b"A2B0": table})


def turned(turn):
    """EXIF data that ask for this orientation, 1 to 8."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    return exif


def claiming(width, height):
    """A PNG file of a few bytes whose header claims this size."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), bytes(1000))


def cut(path, image, part=0.5):
    """Save an image and keep only this part of its bytes."""
    image.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
