"""Encoded image in, (H, W, 3) uint8 pixels out, whatever the file: Pillow with the gaps closed.

What Pillow leaves to its caller is decided here: the limit on the number of pixels is an error and
not a warning, 16-bit grey is scaled and not clipped, transparency is laid over white, and the EXIF
orientation is applied. Whatever cannot be read raises one error, DecodeError.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000

# what Pillow's plugins are known to raise on damaged files
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # AVIF; NotImplementedError of rare formats
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # raised where warnings are errors
)
# not all that Pillow reads: some of its plugins start other programs
Image.init()
FORMATS = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
    if name in Image.OPEN
]
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """An item of a source is not a readable image; the message names the item and the reason."""


def decode_image(data: bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF or PPM.

    Grey and palette images become RGB, CMYK is converted by Pillow's formula without colour
    profiles, 16-bit grey is divided by 257, transparency (alpha channel or transparent colour) is
    composited over white, and the image is turned upright by its EXIF orientation. Of an animation
    the first frame is taken.

    Args:
        data: the encoded file, all of it.
        name: where it comes from, for the message of an error.
        max_pixels: images whose header declares more are refused before they are decoded. Pillow's
            own limit, twice Image.MAX_IMAGE_PIXELS (179 megapixels), holds as well. Decoding takes
            up to 20 bytes a pixel for a moment.

    Returns:
        (H, W, 3) uint8 array, RGB, contiguous.

    Raises:
        DecodeError: data is empty, not an image, truncated, damaged, or above max_pixels.
    """
    with _opened(data, name) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"an image must have at most {max_pixels} pixels (max_pixels), "
                f"got {width} x {height}"
            )
        return rgb_pixels(image)


def declared_size(data: bytes) -> tuple[int, int]:
    """Height and width by the header alone, before the image is turned upright.

    Raises:
        DecodeError: there is no such header.
    """
    with _opened(data, "") as image:
        return image.height, image.width


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image behind data; whatever is wrong with it becomes a DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        prefix = f"{name}: " if name else ""
        raise DecodeError(f"{prefix}unreadable image of {len(data)} bytes: {reason}") from error


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an opened image of any mode, upright, as decode_image describes.

    Raises:
        One of DAMAGE: the file behind the image turns out to be damaged.
    """
    # before the orientation is read: a TIFF turns itself upright while it loads
    image.load()
    return np.array(_rgb(_upright(image)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except DAMAGE:
        # damaged metadata says nothing about the pixels
        orientation = None
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range of values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
