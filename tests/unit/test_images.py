"""Reading images: every mode, rotation and colour profile ends as upright sRGB; every broken file as a clear reason."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from qwen_image.dataset import images, orientation
from qwen_image.dataset.buckets import choose_bucket
from qwen_image.dataset.images import ImageError, fit_to_bucket, image_size, load_image

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


# Plain photographs


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg"])
def test_a_photograph_is_read_as_it_is(name):
    pixels = load_image(PHOTOS / name)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(PHOTOS / name).convert("RGB")))
    assert image_size(PHOTOS / name) == (pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "avif", "tiff", "gif"])
def test_every_format_is_read_whatever_the_file_is_called(tmp_path, suffix):
    image = photo("chelsea.png", (90, 60))
    path = saved(tmp_path / f"a.{suffix}", image)
    assert difference(load_image(path), image).mean() < 8
    renamed = path.rename(tmp_path / "名 前.png")
    assert load_image(renamed).shape == (60, 90, 3)


# EXIF rotation


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
def test_all_eight_rotations_are_undone(tmp_path, turn, suffix):
    image = photo("coffee.png", (96, 64))
    exif = Image.Exif()
    exif[0x0112] = turn
    path = saved(tmp_path / f"a.{suffix}", image, exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert image_size(path) == ((64, 96) if turn >= 5 else (96, 64))
    np.testing.assert_array_equal(load_image(path), np.asarray(expected))


def test_the_quarter_turn_of_a_phone_goes_clockwise(tmp_path):
    image = Image.new("RGB", (64, 32), BLACK)
    image.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = load_image(saved(tmp_path / "a.png", image, exif=exif))
    assert pixels.shape == (64, 32, 3)
    assert tuple(pixels[0, 0]) == RED and tuple(pixels[-1, 0]) == BLACK


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif",
    [b"", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_malformed_exif_means_no_rotation(tmp_path, exif, suffix):
    path = tmp_path / f"a.{suffix}"
    photo(size=(48, 32)).save(path, exif=exif)
    assert image_size(path) == (48, 32)
    assert load_image(path).shape == (32, 48, 3)


@pytest.mark.parametrize("turn", [0, 9, 65535])
def test_an_unknown_rotation_means_none(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    saved(tmp_path / "a.jpg", photo(size=(48, 32)), exif=exif)
    assert image_size(tmp_path / "a.jpg") == (48, 32)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(header, row, extra=b""):
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path):
    path = saved(tmp_path / "a.png", photo(size=(48, 32)))
    exif = Image.Exif()
    exif[0x0112] = 8
    content = path.read_bytes()
    end = content.rindex(struct.pack(">I", 0) + b"IEND")
    path.write_bytes(content[:end] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + content[end:])
    assert image_size(path) == (32, 48)
    np.testing.assert_array_equal(load_image(path), np.rot90(np.asarray(photo(size=(48, 32)))))


def test_the_size_is_read_without_decoding(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", photo())
    jpeg = saved(tmp_path / "a.jpg", photo())
    jpeg.write_bytes(jpeg.read_bytes()[:2000])
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    assert image_size(path) == image_size(jpeg) == (512, 512)


# Transparency


@pytest.mark.parametrize(("background", "seen"), [("white", WHITE), ("black", BLACK), ("#1a2B3c", (26, 43, 60))])
def test_colours_hidden_under_transparency_stay_hidden(tmp_path, background, seen):
    image = Image.new("RGBA", (4, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    image.putpixel((2, 0), (*RED, 128))
    path = saved(tmp_path / "a.png", image)
    pixels = load_image(path, background)[0]
    assert tuple(pixels[0]) == seen and tuple(pixels[1]) == RED
    half = np.round(np.array(RED) * 128 / 255 + np.array(seen) * 127 / 255)
    assert difference(pixels[2], half).max() <= 1
    webp = saved(tmp_path / "a.webp", image, lossless=True)
    np.testing.assert_array_equal(load_image(webp, background)[0][:2], pixels[:2])


def test_grey_and_palette_transparency_is_composited(tmp_path):
    grey = Image.merge("LA", (Image.new("L", (2, 1), 40), Image.new("L", (2, 1), 0)))
    grey.putpixel((1, 0), (40, 255))
    assert load_image(saved(tmp_path / "la.png", grey))[0].tolist() == [[255] * 3, [40] * 3]

    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.putdata([0, 1, 2])
    one = saved(tmp_path / "one.png", palette, transparency=1)
    assert load_image(one)[0].tolist() == [list(RED), list(WHITE), list(BLUE)]
    several = saved(tmp_path / "several.png", palette, transparency=bytes([0, 255, 128]))
    assert load_image(several, "black")[0].tolist() == [list(BLACK), list(GREEN), [0, 0, 128]]
    gif = saved(tmp_path / "a.gif", palette, transparency=0)
    assert load_image(gif)[0].tolist() == [list(WHITE), list(GREEN), list(BLUE)]


def test_a_single_transparent_colour_is_composited(tmp_path):
    rgb = Image.new("RGB", (2, 1), RED)
    rgb.putpixel((1, 0), BLUE)
    assert load_image(saved(tmp_path / "rgb.png", rgb, transparency=RED))[0].tolist() == [list(WHITE), list(BLUE)]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 8)
    assert load_image(saved(tmp_path / "l.png", grey, transparency=7))[0].tolist() == [[255] * 3, [8] * 3]
    deep = Image.fromarray(np.array([[257 * 10, 257 * 20]], dtype=np.uint16))
    deep = saved(tmp_path / "deep.png", deep)
    content = deep.read_bytes()
    at = content.index(b"IDAT") - 4
    deep.write_bytes(content[:at] + chunk(b"tRNS", struct.pack(">H", 257 * 10)) + content[at:])
    assert load_image(deep)[0].tolist() == [[255] * 3, [20] * 3]


def test_a_transparent_colour_of_16_bit_channels_is_composited(tmp_path):
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)
    (tmp_path / "a.png").write_bytes(png(header, row, chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0))))
    assert load_image(tmp_path / "a.png")[0].tolist() == [list(WHITE), list(BLUE)]


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    image = photo("coffee.png", (60, 40))
    path = saved(tmp_path / "a.png", image.convert("RGBA"))
    np.testing.assert_array_equal(load_image(path, "black"), np.asarray(image))


# Modes


def test_grey_palette_and_one_bit_images_are_widened(tmp_path):
    grey = photo("camera.png", (60, 40)).convert("L")
    np.testing.assert_array_equal(load_image(saved(tmp_path / "l.png", grey)), np.asarray(grey.convert("RGB")))
    palette = photo("coffee.png", (60, 40)).quantize(64)
    np.testing.assert_array_equal(load_image(saved(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB")))
    one = Image.fromarray(np.array([[True, False]]))
    assert load_image(saved(tmp_path / "1.png", one))[0].tolist() == [list(WHITE), list(BLACK)]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 64 * 8).round().astype(np.uint16).reshape(8, 64)
    pixels = load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert pixels.min() == 0 and pixels.max() == 255
    np.testing.assert_array_equal(pixels[..., 0], np.floor(values * (255 / 65535) + 0.5))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_integers_in_mode_i_count_as_16_bit_and_numbers_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.int32)).save(tmp_path / "i.tiff")
    assert load_image(tmp_path / "i.tiff")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "large.tiff")
    with pytest.raises(ImageError, match=r"outside 0\.\.65535"):
        load_image(tmp_path / "large.tiff")
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match="floating-point"):
        load_image(tmp_path / "f.tiff")


def test_cmyk_without_a_profile_is_converted(tmp_path):
    image = photo("coffee.png", (64, 48)).convert("CMYK")
    pixels = load_image(saved(tmp_path / "a.jpg", image, quality=95))
    assert difference(pixels, photo("coffee.png", (64, 48))).mean() < 4


def test_only_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (32, 16), colour) for colour in (RED, GREEN, BLUE)]
    for suffix in ("gif", "webp", "png", "tiff", "avif"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
        assert difference(load_image(path), frames[0]).max() <= 3, suffix
        assert image_size(path) == (32, 16)


# Colour profiles


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
def test_a_wide_gamut_profile_is_converted_to_srgb(tmp_path, suffix):
    image = Image.new("RGB", (16, 16), (120, 180, 90))
    pixels = load_image(saved(tmp_path / f"a.{suffix}", image, icc_profile=ADOBE_RGB, quality=100))
    # AdobeRGB (120, 180, 90) is sRGB (83, 181, 82) by the two standards' own formulas.
    assert difference(pixels[8, 8], adobe_to_srgb(120, 180, 90)).max() <= 3
    assert difference(pixels[8, 8], (120, 180, 90)).max() > 20


def adobe_to_srgb(*values):
    linear = (np.stack(values, axis=-1) / 255) ** (563 / 256)
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    to_rgb = np.array([[3.24045, -1.53714, -0.49853], [-0.96927, 1.87601, 0.04156], [0.05564, -0.20403, 1.05723]])
    out = np.clip(linear @ (to_rgb @ to_xyz).T, 0, 1)
    return 255 * np.where(out <= 0.0031308, 12.92 * out, 1.055 * out ** (1 / 2.4) - 0.055)


def test_a_real_photograph_in_adobe_rgb_is_converted():
    stored = np.asarray(Image.open(PHOTOS / "rocket.jpg"))
    errors = difference(load_image(PHOTOS / "rocket.jpg"), adobe_to_srgb(*np.moveaxis(stored, -1, 0)))
    assert errors.mean() < 0.6 and np.quantile(errors, 0.999) <= 2


def test_an_srgb_profile_leaves_every_pixel_alone(tmp_path):
    image = photo("coffee.png", (120, 80))
    path = saved(tmp_path / "a.png", image, icc_profile=profile_bytes())
    np.testing.assert_array_equal(load_image(path), np.asarray(image))


def test_profiles_work_beside_alpha_and_palettes(tmp_path):
    image = Image.new("RGBA", (2, 1), (120, 180, 90, 255))
    image.putpixel((1, 0), (120, 180, 90, 0))
    pixels = load_image(saved(tmp_path / "a.png", image, icc_profile=ADOBE_RGB))[0]
    assert difference(pixels[0], adobe_to_srgb(120, 180, 90)).max() <= 2
    assert tuple(pixels[1]) == WHITE
    palette = Image.new("P", (1, 1))
    palette.putpalette([120, 180, 90])
    pixels = load_image(saved(tmp_path / "p.png", palette, icc_profile=ADOBE_RGB))[0]
    assert difference(pixels[0], adobe_to_srgb(120, 180, 90)).max() <= 2


def test_a_grey_profile_is_applied(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("L", (4, 4), 55), icc_profile=GREY_LINEAR)
    # Linear 55/255 in the sRGB curve is 128.
    assert difference(load_image(path), 128).max() <= 1


def test_a_cmyk_profile_is_applied(tmp_path):
    image = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (16, 0, 32, 32))
    path = saved(tmp_path / "a.jpg", image, icc_profile=cmyk_profile(), quality=100, subsampling=0)
    pixels = load_image(path)
    assert difference(pixels[16, 4], BLUE).max() < 15, "the press's cyan is blue, unlike the naive formula's"
    assert difference(pixels[16, 28], WHITE).max() <= 2


@pytest.mark.parametrize("profile", [b"not a profile", profile_bytes()[:200], b"\0" * 128, cmyk_profile(), GREY_LINEAR])
def test_a_broken_or_foreign_profile_is_ignored(tmp_path, profile):
    image = photo("coffee.png", (60, 40))
    path = saved(tmp_path / "a.png", image, icc_profile=profile)
    np.testing.assert_array_equal(load_image(path), np.asarray(image))


# Broken files


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "bmp"])
def test_a_truncated_image_is_refused(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", photo())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"cut short|cannot be decoded|damaged"):
        load_image(path)


def test_what_is_no_image_is_refused(tmp_path):
    cases = {"empty.png": (b"", "file is empty"), "text.jpg": (b"<html>not here</html>", "not an image")}
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        for read in (load_image, image_size):
            with pytest.raises(ImageError, match=reason):
                read(tmp_path / name)
    (tmp_path / "run.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(ImageError, match="known formats are PNG, JPEG"):
        load_image(tmp_path / "run.png")


def test_what_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="there is no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="folder"):
        image_size(tmp_path)

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path / "a.png", photo(size=(8, 8)))
    monkeypatch.setattr(Path, "open", forbidden)  # a test may run as root, whom no mode stops
    with pytest.raises(ImageError, match="permission denied"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(16385, 16384), (60000, 60000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, bytes(1000)))
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=r"too large.*256 megapixels"):
            read(tmp_path / "a.png")


def test_images_larger_than_pillows_own_limit_are_fine(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (16000, 13000)).save(path)
    assert image_size(path) == (16000, 13000)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_give_pixels_or_an_image_error(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if suffix in ("GIF", "BMP") else {"exif": exif}
    photo("coffee.png", (24, 16)).save(buffer, suffix, **options)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        pixels = load_image(path)
    except ImageError as error:
        assert str(error)
    else:
        assert pixels.shape[1::-1] == image_size(path)


# Fitting to a bucket


def test_an_image_of_the_buckets_size_is_left_alone():
    pixels = load_image(PHOTOS / "astronaut.png")
    assert fit_to_bucket(pixels, (512, 512)) is pixels


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg"])
def test_shrinking_is_opencvs_area_average_of_the_covering_size(name):
    pixels = load_image(PHOTOS / name)
    height, width = pixels.shape[:2]
    bucket = choose_bucket((width, height), (256, 256), True, False)
    scale = max(bucket[0] / width, bucket[1] / height)
    new = int(width * scale + 0.5), int(height * scale + 0.5)
    whole = cv2.resize(pixels, new, interpolation=cv2.INTER_AREA)
    left, top = (new[0] - bucket[0]) // 2, (new[1] - bucket[1]) // 2
    fitted = fit_to_bucket(pixels, bucket)
    assert fitted.flags.c_contiguous
    np.testing.assert_array_equal(fitted, whole[top : top + bucket[1], left : left + bucket[0]])


def test_enlarging_is_pillows_lanczos():
    pixels = load_image(PHOTOS / "chelsea.png")  # 451 x 300
    whole = np.asarray(Image.fromarray(pixels).resize((770, 512), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(fit_to_bucket(pixels, (512, 512)), whole[:, 129:641])


def test_the_crop_is_in_the_middle_and_an_odd_pixel_goes_right():
    pixels = np.zeros((16, 19, 3), np.uint8)
    pixels[:, :, 0] = np.arange(19)
    assert fit_to_bucket(pixels, (16, 16))[0, :, 0].tolist() == list(range(1, 17))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 12), st.integers(2, 12))
def test_every_image_fits_every_bucket(width, height, columns, rows):
    bucket = (16 * columns, 16 * rows)
    fitted = fit_to_bucket(np.full((height, width, 3), 77, np.uint8), bucket)
    assert fitted.shape == (bucket[1], bucket[0], 3)
    assert (fitted == 77).all()


def test_a_shape_too_extreme_to_resize_is_refused():
    with pytest.raises(ImageError, match="1x5000, is too extreme"):
        fit_to_bucket(np.zeros((5000, 1, 3), np.uint8), (256, 1024))


# The module itself


def test_importing_changes_nothing_for_others():
    code = (
        "import sys, cv2, PIL.Image; before = cv2.getNumThreads(), PIL.Image.MAX_IMAGE_PIXELS\n"
        "import qwen_image.dataset.images\n"
        "assert before == (cv2.getNumThreads(), PIL.Image.MAX_IMAGE_PIXELS)\n"
        "assert not {'torch', 'pandas'} & sys.modules.keys()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(images.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_each_turn_undoes_what_a_viewer_would():
    for turn in range(1, 9):
        image = photo(size=(30, 20))
        exif = image.getexif()
        exif[0x0112] = turn
        expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(np.asarray(orientation.apply(image, turn)), expected)
        assert orientation.swaps_sides(turn) == (expected.shape != (20, 30, 3))
