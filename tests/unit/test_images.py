"""Reading images: every rotation ends upright, every broken file as a clear reason, and buckets are filled."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import BLACK, PHOTOS, RED, chunk, claiming, difference, photo, saved, turned
from PIL import Image, ImageOps

from qwen_image.dataset import images, orientation
from qwen_image.dataset.buckets import choose_bucket
from qwen_image.dataset.images import ImageError, fit_to_bucket, image_size, load_image

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


def test_the_first_of_a_phones_two_pictures_in_one_file_is_read(tmp_path):
    image = photo("chelsea.png", (90, 60))
    path = tmp_path / "a.jpg"
    image.save(path, "mpo", save_all=True, append_images=[ImageOps.invert(image)], exif=turned(6), quality=95)
    assert Image.open(path).format == "MPO"
    assert image_size(path) == (60, 90)
    assert difference(load_image(path), np.rot90(np.asarray(image), -1)).mean() < 8


def test_a_long_compressed_text_in_a_png_is_no_obstacle(tmp_path):
    """Programs that make pictures put their whole workflow into them; Pillow's own limit is a megabyte of it."""
    path = saved(tmp_path / "a.png", photo(size=(48, 32)))
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))
    content = path.read_bytes()
    path.write_bytes(content[:33] + text + content[33:])  # behind the header chunk
    np.testing.assert_array_equal(load_image(path), np.asarray(photo(size=(48, 32))))


def test_a_bomb_of_text_in_a_png_is_refused(tmp_path):
    path = saved(tmp_path / "a.png", photo(size=(48, 32)))
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 70_000_000))
    content = path.read_bytes()
    path.write_bytes(content[:33] + text + content[33:])
    with pytest.raises(ImageError, match=r"cannot be decoded: .*too large"):
        load_image(path)


# EXIF rotation


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
def test_all_eight_rotations_are_undone(tmp_path, turn, suffix):
    image = photo("coffee.png", (96, 64))
    path = saved(tmp_path / f"a.{suffix}", image, exif=turned(turn), quality=95)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert image_size(path) == ((64, 96) if turn >= 5 else (96, 64))
    np.testing.assert_array_equal(load_image(path), np.asarray(expected))


def test_the_quarter_turn_of_a_phone_goes_clockwise(tmp_path):
    image = Image.new("RGB", (64, 32), BLACK)
    image.paste(RED, (0, 0, 32, 32))
    pixels = load_image(saved(tmp_path / "a.png", image, exif=turned(6)))
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
    saved(tmp_path / "a.jpg", photo(size=(48, 32)), exif=turned(turn))
    assert image_size(tmp_path / "a.jpg") == (48, 32)


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path):
    path = saved(tmp_path / "a.png", photo(size=(48, 32)))
    exif = turned(8)
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
    (tmp_path / "a.png").write_bytes(claiming(*size))
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
    options = {} if suffix in ("GIF", "BMP") else {"exif": turned(6)}
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
