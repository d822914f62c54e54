"""decode_image: every kind of readable file, and one error for every unreadable one."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import shared_path
from PIL import Image, ImageCms, features

from simclr_kernels.decode import DecodeError, decode_image

RAMP = np.add.outer(np.arange(20) * 10, np.arange(32)).astype(np.uint8)  # (20, 32)
COLOR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunk += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_lossless_files_give_their_pixels(kind):
    palette = Image.fromarray(COLOR).quantize(64) if kind == "GIF" else Image.fromarray(COLOR)
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_image(encoded(palette, kind, **options))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(palette.convert("RGB")))


def test_jpeg_is_close_to_its_original():
    error = decode_image(encoded(COLOR, "JPEG", quality=95)).astype(int) - COLOR
    assert np.abs(error).mean() < 6


def test_grey_becomes_rgb():
    pixels = decode_image(encoded(RAMP))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, 2))


def test_16_bit_grey_is_scaled_and_not_clipped():
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = decode_image(encoded(grey))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_black_and_white_spans_the_range():
    pixels = decode_image(encoded(Image.fromarray(RAMP > 100)))
    assert set(np.unique(pixels)) == {0, 255}


def test_transparency_is_laid_over_white():
    alpha = np.array([[0, 128, 255]], np.uint8)
    rgba = np.dstack([np.zeros((1, 3, 3), np.uint8), alpha])
    assert decode_image(encoded(rgba))[0, :, 0].tolist() == [255, 127, 0]
    grey = Image.fromarray(rgba[..., 2:], "LA")
    assert decode_image(encoded(grey))[0, :, 0].tolist() == [255, 127, 0]


def test_transparent_palette_entry_becomes_white_and_others_keep_their_colour():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encoded(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    data = encoded(image, transparency=0)
    assert decode_image(data)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_transparent_colour_of_an_rgb_png_becomes_white():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    data = encoded(image, transparency=(1, 2, 3))
    assert decode_image(data)[0].tolist() == [[255, 255, 255], [4, 5, 6]]


def test_cmyk_is_converted():
    cmyk = Image.fromarray(COLOR).convert("CMYK")
    error = decode_image(encoded(cmyk, "JPEG", quality=95)).astype(int) - COLOR
    assert np.abs(error).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # Pillow itself turns the latter
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
    stored = Image.fromarray(COLOR)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # what the viewer sees, by the words of the EXIF standard: where row 0 and column 0 lie
    upright = {
        1: COLOR,
        2: COLOR[:, ::-1],
        3: COLOR[::-1, ::-1],
        4: COLOR[::-1],
        5: COLOR.transpose(1, 0, 2),
        6: COLOR.transpose(1, 0, 2)[:, ::-1],
        7: COLOR.transpose(1, 0, 2)[::-1, ::-1],
        8: COLOR.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(decode_image(encoded(stored, kind, exif=exif)), upright)


def test_damaged_exif_does_not_cost_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(COLOR, "JPEG", exif=exif)
    damaged = data.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    assert damaged != data
    assert decode_image(damaged).shape == (20, 32, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.fromarray(np.full((8, 9, 3), value, np.uint8)) for value in (0, 255, 128)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert decode_image(data).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_images_one_pixel_wide_are_images(size):
    data = encoded(np.zeros((*size, 3), np.uint8))
    assert decode_image(data).shape == (*size, 3)


def test_20_megapixels_decode():
    data = encoded(Image.new("L", (5000, 4000), 7), "JPEG")
    assert decode_image(data).shape == (4000, 5000, 3)


def test_embedded_colour_profiles_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(decode_image(encoded(COLOR, icc_profile=profile)), COLOR)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\0" * 1000,
        encoded(COLOR)[:-30],
        encoded(COLOR)[:40],
        encoded(COLOR, "JPEG")[:200],
        encoded(COLOR, "JPEG")[: len(encoded(COLOR, "JPEG")) // 2 + 300],
        encoded(COLOR, "WEBP")[:60],
        encoded(COLOR, "BMP")[:500],
        encoded(np.zeros((4, 4), np.float32), "TIFF"),
    ],
    ids=[
        "empty",
        "text",
        "zeros",
        "png without its end",
        "png header",
        "jpeg header",
        "half a jpeg",
        "webp header",
        "half a bmp",
        "float tiff",
    ],
)
def test_unreadable_data_raise_one_error_that_names_the_item(data):
    with pytest.raises(
        DecodeError, match=rf"^cats/7.jpg: unreadable image of {len(data)} bytes: ."
    ):
        decode_image(data, name="cats/7.jpg")


def test_flipped_bytes_raise_decode_errors_and_nothing_else():
    rng = np.random.default_rng(0)
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"] + ["AVIF"] * features.check("avif")
    files = [encoded(COLOR, kind) for kind in kinds]
    errors = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
        for data in files:
            for _ in range(150):
                damaged = np.frombuffer(data, np.uint8).copy()
                where = rng.integers(0, min(len(data), 400), 5)
                damaged[where] = rng.integers(0, 256, 5)
                try:
                    assert decode_image(damaged.tobytes()).ndim == 3
                except DecodeError:
                    errors += 1
    assert errors > 100


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_absurd_sizes_are_refused_before_they_are_decoded(size):
    with pytest.raises(DecodeError, match="unreadable image"):
        decode_image(png_header(*size))


def test_size_limit_is_named_and_can_be_set():
    data = encoded(COLOR)
    assert decode_image(data, max_pixels=640).shape == (20, 32, 3)
    with pytest.raises(DecodeError, match=r"at most 639 pixels \(max_pixels\), got 32 x 20"):
        decode_image(data, max_pixels=639)


def test_all_photos_decode():
    paths = sorted(shared_path("data/imagenet_samples").rglob("*.*"))
    assert len(paths) == 192
    for path in paths:
        pixels = decode_image(path.read_bytes())
        with Image.open(path) as image:
            assert pixels.shape == (image.height, image.width, 3)
