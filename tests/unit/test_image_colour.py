"""Colours of images: every mode, transparency and profile ends as plain 8-bit sRGB."""

import struct

import numpy as np
import pytest
from image_files import (
    ADOBE_RGB,
    BLACK,
    BLUE,
    GREEN,
    GREY_LINEAR,
    PHOTOS,
    RED,
    WHITE,
    chunk,
    cmyk_profile,
    difference,
    photo,
    png,
    profile_bytes,
    saved,
)
from PIL import Image

from qwen_image.dataset.images import ImageError, image_size, load_image

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


@pytest.mark.parametrize(
    "profile",
    [b"not a profile", profile_bytes()[:200], b"\0" * 128, cmyk_profile(), GREY_LINEAR],
    # profiles hold the second of their making, names of tests must not
    ids=["text", "cut off", "zeros", "of a press", "of grey"],
)
def test_a_broken_or_foreign_profile_is_ignored(tmp_path, profile):
    image = photo("coffee.png", (60, 40))
    path = saved(tmp_path / "a.png", image, icc_profile=profile)
    np.testing.assert_array_equal(load_image(path), np.asarray(image))
