"""The demo's dataset: small drawn pictures with captions, several formats and shapes, the same on every machine."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from qwen_image.files import atomic_write

SCALE = 2  # drawn larger and reduced: smooth edges
COLOURS = {
    "red": (214, 60, 52), "orange": (235, 140, 40), "yellow": (240, 205, 70), "green": (70, 150, 80),
    "blue": (52, 96, 190), "violet": (120, 70, 160), "white": (242, 242, 238), "black": (28, 28, 34),
    "teal": (40, 140, 150), "pink": (232, 140, 170),
}  # fmt: skip
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Picture:
    """One picture of the demo, upright."""

    name: str
    size: tuple[int, int]
    shape: str
    colour: str
    ground: str
    caption: str
    rotation_tag: int = 1
    """EXIF orientation it is stored with; the pixels on disk are turned the other way."""
    transparent: bool = False
    """Whether the ground is left transparent."""


def _picture(name: str, size: tuple[int, int], colour: str, shape: str, ground: str, **more) -> Picture:
    ending = "no background" if more.get("transparent") else f"a {ground} background"
    return Picture(name, size, shape, colour, ground, f"flat sticker of a {colour} {shape} on {ending}", **more)


PICTURES = (
    _picture("001_circle.jpg", (320, 320), "red", "circle", "white"),
    _picture("002_square.jpg", (400, 300), "blue", "square", "yellow"),
    _picture("003_triangle.jpg", (300, 400), "green", "triangle", "white"),
    _picture("004_star.png", (320, 320), "yellow", "star", "violet"),
    _picture("005_ring.png", (480, 270), "teal", "ring", "white"),
    _picture("006_wave.png", (270, 480), "blue", "wave", "pink"),
    _picture("007_circle.webp", (320, 320), "orange", "circle", "black"),
    _picture("008_star.webp", (420, 280), "red", "star", "white"),
    _picture("009_square.jpg", (280, 420), "violet", "square", "white"),
    _picture("010_triangle.jpg", (360, 270), "orange", "triangle", "teal", rotation_tag=6),
    _picture("011_ring.png", (320, 320), "pink", "ring", "white", transparent=True),
    _picture("012_wave.jpg", (512, 256), "green", "wave", "white"),
    _picture("013_star.jpg", (256, 512), "black", "star", "yellow"),
    _picture("014_circle.png", (400, 300), "violet", "circle", "white"),
    _picture("015_square.webp", (300, 400), "teal", "square", "orange"),
    _picture("016_triangle.png", (320, 320), "red", "triangle", "white"),
    _picture("017_ring.jpg", (480, 320), "blue", "ring", "white"),
    _picture("018_wave.png", (320, 480), "orange", "wave", "blue"),
)


def write_pictures(folder: Path) -> int:
    """Write the pictures and captions that are not there yet. Returns how many pictures were written."""
    written = 0
    for picture in PICTURES:
        path = folder / picture.name
        if not path.exists():
            atomic_write(path, _encode(picture))
            written += 1
        if not path.with_suffix(".txt").exists():
            atomic_write(path.with_suffix(".txt"), f"{picture.caption}\n")
    return written


def _encode(picture: Picture) -> bytes:
    image = _draw(picture)
    exif = Image.Exif()
    if picture.rotation_tag == 6:  # viewers turn it by 90 degrees clockwise
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[ORIENTATION_TAG] = 6
    stream = io.BytesIO()
    match Path(picture.name).suffix:
        case ".jpg":
            image.convert("RGB").save(stream, "JPEG", quality=92, exif=exif)
        case ".webp":
            image.convert("RGB").save(stream, "WEBP", lossless=True)
        case _:
            image.save(stream, "PNG")
    return stream.getvalue()


def _draw(picture: Picture) -> Image.Image:
    width, height = (side * SCALE for side in picture.size)
    ground = (*COLOURS[picture.ground], 0 if picture.transparent else 255)
    image = Image.new("RGBA", (width, height), ground)
    _shape(ImageDraw.Draw(image), picture.shape, COLOURS[picture.colour], width, height)
    image = image.resize(picture.size, Image.Resampling.BOX)
    return image if picture.transparent else image.convert("RGB")


def _shape(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], width: int, height: int) -> None:
    x, y, r = width / 2, height / 2, min(width, height) * 0.36
    match shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        case "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=int(r * 0.4))
        case "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        case "triangle":
            draw.polygon(_corners(x, y, [r] * 3), fill=colour)
        case "star":
            draw.polygon(_corners(x, y, [r, r * 0.45] * 5), fill=colour)
        case "wave":
            for band in range(5):
                points = [(px, height * (band + 0.6) / 5 + r * 0.12 * math.sin(px / width * 12)) for px in range(width)]
                draw.line(points, fill=colour, width=int(height * 0.06))


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * step), y - r * math.cos(i * step)) for i, r in enumerate(radii)]
