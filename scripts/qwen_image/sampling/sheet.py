"""The contact sheet: pictures in rows and columns with a label at each, to compare checkpoints at a glance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LONGEST_SIDE = 384
"""Of a picture on the sheet, in pixels; the picture's own file has all of them."""
FONT_SIZE = 15
LINE = 20
MARGIN = 8
ROW_LABEL_WIDTH = 200
LINES = 4  # of a label; a longer one is cut
CHARACTER = 8  # pixels of one, on average


def contact_sheet(rows: Sequence[str], columns: Sequence[str], files: Sequence[Sequence[Path | None]]) -> Image.Image:
    """Return the sheet; `files` holds a list of picture files a row, one a column; None leaves a gap."""
    pictures = [[thumbnail(file) if file else Image.new("RGB", (1, 1), "white") for file in row] for row in files]
    widths = [max(row[column].width for row in pictures) for column in range(len(columns))]
    heights = [max(picture.height for picture in row) for row in pictures]
    top = MARGIN + LINES * LINE
    left = MARGIN + ROW_LABEL_WIDTH
    size = (left + sum(widths) + MARGIN * (len(widths) + 1), top + sum(heights) + MARGIN * (len(heights) + 1))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    x = left + MARGIN
    for label, width in zip(columns, widths, strict=True):
        _write(draw, (x, MARGIN), label, width)
        x += width + MARGIN
    y = top + MARGIN
    for label, height, row in zip(rows, heights, pictures, strict=True):
        _write(draw, (MARGIN, y), label, ROW_LABEL_WIDTH)
        x = left + MARGIN
        for picture, width in zip(row, widths, strict=True):
            sheet.paste(picture, (x, y))
            x += width + MARGIN
        y += height + MARGIN
    return sheet


def thumbnail(file: Path) -> Image.Image:
    """Return a picture at the size that it has on the sheet."""
    with Image.open(file) as picture:
        small = picture.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return small


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    # Pillow's own font, so that the sheet is the same on every machine; what it has no letters for are boxes
    font = ImageFont.load_default(FONT_SIZE)
    lines = textwrap.wrap(text, max(1, width // CHARACTER), max_lines=LINES, placeholder=" ...")
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * LINE), line, fill="black", font=font)
