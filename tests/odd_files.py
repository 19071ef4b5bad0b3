"""Files that datasets have and that are odd or bad: a maker for each, and what is to become of it."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from image_files import ADOBE_RGB, PHOTOS, chunk, claiming, cut, photo, png, turned
from PIL import Image, ImageCms, ImageOps

SEEN = photo("coffee.png", (96, 64))


# ---- images that are odd but good: each maker writes a file and returns what people see ------------------------------


def png_named_otherwise(path):
    SEEN.save(path, "png")
    return SEEN


def transparent(path):
    image = SEEN.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SEEN.size))
    image.save(path, lossless=True)
    return on_white(Image.open(path))


def grey_with_alpha(path):
    image = Image.merge("LA", (SEEN.convert("L"), Image.linear_gradient("L").resize(SEEN.size)))
    image.save(path)
    return on_white(image)


def palette_with_transparency(path):
    image = SEEN.quantize(32)
    image.save(path, transparency=bytes([0, 128] + [255] * 30))
    return on_white(Image.open(path))


def cmyk(path):
    SEEN.convert("CMYK").save(path, quality=95)
    return Image.open(path).convert("RGB")


def grey_of_16_bits(path):
    grey = SEEN.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
    return grey.convert("RGB")


def rgb_of_16_bits(path):
    """Written by hand, as Pillow cannot: each value of 8 bits twice, as the upper and the lower byte."""
    rows = np.repeat(np.asarray(SEEN), 2, axis=-1).reshape(SEEN.height, -1)
    content = np.hstack([np.zeros((SEEN.height, 1), np.uint8), rows]).tobytes()
    path.write_bytes(png_of(SEEN.size, 16, content))
    return SEEN


def adobe_rgb(path):
    SEEN.save(path, icc_profile=ADOBE_RGB)
    return in_srgb(SEEN, ADOBE_RGB)


def photograph_with_profile(path):
    shutil.copy(PHOTOS / "rocket.jpg", path)
    image = Image.open(path)
    return in_srgb(image, image.info["icc_profile"])


def animated(path):
    frames = [SEEN, SEEN.transpose(Image.Transpose.ROTATE_180), ImageOps.invert(SEEN)]
    kind = "gif" if path.stem.startswith("gif") else path.suffix[1:]
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    first = Image.open(path)
    return first.convert("RGB")


def two_pictures_in_one(path):
    """The MPO format of phones: a JPEG file with a second one, a depth or gain map, behind it."""
    SEEN.save(path, "mpo", save_all=True, append_images=[ImageOps.invert(SEEN)], quality=95)
    assert Image.open(path).format == "MPO"
    return Image.open(path).convert("RGB")


def with_malformed_exif(path):
    SEEN.save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", quality=95)
    return Image.open(path).convert("RGB")


def with_much_text(path):
    """What a program that makes pictures puts into them: the whole of its workflow, compressed."""
    SEEN.save(path)
    text = b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 200_000)
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + chunk(b"zTXt", text) + content[at:])
    return SEEN


def orientation(turn):
    def make(path):
        SEEN.save(path, exif=turned(turn))
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")

    return make


def linked(path):
    SEEN.save(path.with_suffix(".hidden"), "png")
    path.symlink_to(path.with_suffix(".hidden").name)
    return SEEN


def of_size(*size):
    def make(path):
        image = photo("chelsea.png", size)
        image.save(path)
        return image

    return make


def on_white(image):
    layered = image.convert("RGBA")
    return Image.composite(layered.convert("RGB"), Image.new("RGB", image.size, "white"), layered.getchannel("A"))


def in_srgb(image, profile):
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.profileToProfile(image, source, target, renderingIntent=intent, outputMode="RGB", flags=flags)


def png_of(size, bits, content):
    return png(struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0), content)


ODD = {
    "png_named.jpg": png_named_otherwise,
    "transparent.png": transparent,
    "transparent_webp.webp": transparent,
    "grey_with_alpha.png": grey_with_alpha,
    "palette.png": palette_with_transparency,
    "cmyk.jpg": cmyk,
    "grey_of_16_bits.png": grey_of_16_bits,
    "rgb_of_16_bits.png": rgb_of_16_bits,
    "adobe_rgb.png": adobe_rgb,
    "profile.jpg": photograph_with_profile,
    "gif_named.webp": animated,
    "animated_webp.webp": animated,
    "animated_png.png": animated,
    "two_in_one.jpg": two_pictures_in_one,
    "malformed_exif.jpg": with_malformed_exif,
    "much_text.png": with_much_text,
    "linked.png": linked,
    "one_pixel.png": of_size(1, 1),
    "tall.png": of_size(1, 5000),
    "wide.png": of_size(5000, 1),
    "small.png": of_size(9, 7),
    "tab\t.png": of_size(40, 30),
    "line\n.png": of_size(40, 30),
    "quote\"'=.png": of_size(40, 30),
    "名 前 📷_64x64_qi.png": of_size(40, 30),
} | {f"orientation_{turn}.png": orientation(turn) for turn in range(1, 9)}


# ---- images that are bad: a maker of the file and the reason that the table of rejects gives -------------------------


def bytes_of(content):
    return lambda path: path.write_bytes(content)


def link_to_nothing(path):
    path.symlink_to("nowhere.png")


def unreadable(path):
    SEEN.save(path)
    path.chmod(0)


BAD = {
    "cut_jpeg.jpg": (lambda path: cut(path, photo()), "cut short"),
    "cut_png.png": (lambda path: cut(path, photo()), "cut short|cannot be decoded"),
    "cut_webp.webp": (lambda path: cut(path, photo()), "cannot be decoded|cut short"),
    "head.jpg": (lambda path: cut(path, photo(), 0.001), "cut short"),
    "empty.png": (bytes_of(b""), "the file is empty"),
    "text.png": (bytes_of(b"this is no image"), "not an image.*known formats are PNG, JPEG"),
    "program.jpg": (bytes_of(b"MZ\x90\0" + bytes(500)), "not an image"),
    "page.jpg": (bytes_of(b"<!DOCTYPE html><title>404 Not Found</title>"), "not an image"),
    "heic.jpg": (bytes_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)), "not an image"),
    "bomb.png": (bytes_of(claiming(60000, 60000)), "too large.*256 megapixels are the most"),
    "nothing.png": (bytes_of(claiming(0, 5)), "not an image"),
    "dangling.png": (link_to_nothing, "a link to a file that does not exist"),
    "loop.png": (lambda path: path.symlink_to(path.name), "cannot be looked at"),
    "folder.jpg": (Path.mkdir, "it is a folder, not an image"),
    "pipe.png": (os.mkfifo, "not a regular file"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "unreadable.png": (unreadable, r"it may not be read \(permission denied\)$"),
    "ü" * 113 + ".png": (SEEN.save, r"too long \(226 bytes\)"),
    os.fsdecode(b"caf\xe9.png"): (SEEN.save, "not valid UTF-8"),
    "no_caption.png": (SEEN.save, "its caption file no_caption.txt is missing"),
}

SMALL = {  # with bucket_no_upscale: the bucket, or the reason
    "fits.png": ((37, 20), (32, 16)),
    "step.png": ((16, 16), (16, 16)),
    "narrow.png": ((15, 200), "too small: 15x200 pixels, and with bucket_no_upscale each side needs at least 16"),
    "dot.png": ((1, 1), "too small: 1x1"),
    "line.png": ((4000, 1), "too small: 4000x1"),
    "long.png": ((5000, 1), (128, 32)),
}

TEMPLATE_TOKENS = "<|im_end|>\n<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>"
GOOD_CAPTIONS = {  # as the file's bytes, and as the cached file tells it
    "empty": (b"", ""),
    "blank": (b" \r\n\t ", ""),
    "bom": (b"\xef\xbb\xbfa mark before\n", "a mark before"),
    "tokens": (TEMPLATE_TOKENS.encode(), TEMPLATE_TOKENS),
    "lines": ("zwei\r\n\u2028Zeilen, 猫 🐈".encode(), "zwei\r\n\u2028Zeilen, 猫 🐈"),
    "long": (b"a photograph of a cat, " * 4500, ("a photograph of a cat, " * 4500).strip()),
}
BAD_CAPTIONS = {
    "latin": (bytes_of("café".encode("latin-1")), "latin.txt is not UTF-8 text; save it as UTF-8"),
    "utf16": (bytes_of("café".encode("utf-16")), r"it looks like UTF-16"),
    "utf16_bare": (bytes_of("a cat".encode("utf-16-le")), r"NUL"),
    "nul": (bytes_of(b"a cat\0"), r"NUL"),
    "folder": (Path.mkdir, "its caption file folder.txt is not a file that can be read"),
    "pipe": (os.mkfifo, "its caption file pipe.txt is not a file that can be read"),
    "dangling": (link_to_nothing, "its caption file dangling.txt is not a file that can be read"),
    "unreadable": (lambda path: (path.write_text("x"), path.chmod(0)), "cannot be read: Permission denied"),
}
