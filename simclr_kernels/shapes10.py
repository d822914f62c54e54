"""The pixels of shapes10, the built-in data set: ten shape classes of random colour and pose.

Each image is one signed distance function d(x, y) of its class, evaluated at the pixel centres
after a random shift, scale and rotation; coverage clamp(1/2 - d) with d in pixels smooths the
edges and blends a foreground over a background colour. Colour says nothing of the class, so a
contrastive method learns the classes only if its views make it give up colour.

The bits are meant to be the same everywhere: uniforms are made by hand from the raw 64-bit words of
Philox, and only correctly rounded operations (+ - * / sqrt) follow.
"""

from __future__ import annotations

import math

import numpy as np
from numpy import maximum, minimum

CLASSES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "star",
    "crescent",
    "bars",
    "two discs",
)
SPLITS = {"train": 4096, "test": 1000}  # images

SCALE = (0.65, 0.85)  # reach of the shape, in half image sides
MAX_SHIFT = 0.15  # of the centre, in half image sides, per axis
MAX_TAN_HALF_ANGLE = 0.1511  # tan(0.15): rotations up to 0.3 rad
MIN_CONTRAST = 0.25  # largest channel difference of foreground and background, white being 1
COLOR_DRAWS = 8  # foregrounds tried per image; the first with enough contrast is taken
NOISE = 0.03  # standard deviation per channel, white being 1
BLOCK = 512  # images rendered at once: keeps the temporaries in the cache

SQRT3 = math.sqrt(3.0)
# a star is where at most one of the five sides of a pentagon, prolonged, is overstepped
STAR_NORMALS = (
    (0.0, 1.0),
    (0.9510565163, 0.3090169944),
    (-0.9510565163, 0.3090169944),
    (0.5877852523, -0.8090169944),
    (-0.5877852523, -0.8090169944),
)
STAR_INRADIUS = 0.3090169944  # cos(72 degrees), for points at distance 1


def render(split: str, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one split: (n, size, size, 3) uint8 images and (n,) int64 labels, classes in turn."""
    n = SPLITS[split]
    labels = np.arange(n) % len(CLASSES)
    words = np.random.Philox(key=np.array([seed, list(SPLITS).index(split)], np.uint64))
    u = _uniform(words, n, 4 + 3 + 3 * COLOR_DRAWS)
    colors = _colors(u[:, 4:7], u[:, 7:].reshape(n, COLOR_DRAWS, 3))
    images = np.empty((n, size, size, 3), np.uint8)
    for start in range(0, n, BLOCK):
        block = np.arange(start, min(start + BLOCK, n))
        cover = np.empty((len(block), size, size), np.float32)
        for kind in range(len(CLASSES)):
            members = np.flatnonzero(labels[block] == kind)
            cover[members] = _coverage(kind, u[block[members], :4], size)
        background, foreground = colors[0, block], colors[1, block]  # [n, 1, 1, 3]
        image = background + cover[..., None] * (foreground - background)
        image += _noise(words, image.shape)
        images[block] = (image.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return images, labels


def _uniform(words: np.random.Philox, *shape: int) -> np.ndarray:
    """float32 in [0, 1) with 24 random bits each."""
    raw = words.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return (raw.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def _noise(words: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    """float32 noise of deviation NOISE: the centred sum of the four 16-bit parts of a word."""
    raw = words.random_raw(int(np.prod(shape)))
    parts = raw.view(np.uint16).reshape(-1, 4)
    total = parts[:, 0].astype(np.float32)
    for k in range(1, 4):
        total += parts[:, k]
    # the sum of four uniforms of width 1 has variance 4/12
    return ((total - 4 * 32767.5) * np.float32(NOISE * SQRT3 / 65536.0)).reshape(shape)


def _colors(background: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(2, n, 1, 1, 3): background, and the first of its foreground draws with enough contrast."""
    contrast = np.abs(draws - background[:, None]).max(2)  # [n, COLOR_DRAWS]
    # where no draw has enough the first is kept: below one image in ten million
    chosen = (contrast >= MIN_CONTRAST).argmax(1)
    foreground = draws[np.arange(len(draws)), chosen]
    return np.stack([background, foreground])[:, :, None, None]


def _coverage(kind: int, pose: np.ndarray, size: int) -> np.ndarray:
    """(n, size, size) float32 in [0, 1]: how much of each pixel the shape covers."""
    shift_x, shift_y, grow, turn = pose.T[:, :, None, None]  # [n, 1, 1], in [0, 1)
    scale = SCALE[0] + grow * np.float32(SCALE[1] - SCALE[0])
    tan = (2 * turn - 1) * np.float32(MAX_TAN_HALF_ANGLE)
    cos, sin = (1 - tan * tan) / (1 + tan * tan), 2 * tan / (1 + tan * tan)
    centres = (2 * np.arange(size, dtype=np.float32) + 1) / np.float32(size) - 1
    x = (centres[None, None, :] - (2 * shift_x - 1) * np.float32(MAX_SHIFT)) / scale
    y = (centres[None, :, None] - (2 * shift_y - 1) * np.float32(MAX_SHIFT)) / scale
    distance = _distance(kind, cos * x + sin * y, cos * y - sin * x)
    return (0.5 - distance * (scale * np.float32(size / 2))).clip(0.0, 1.0)


def _distance(kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the shape, negative inside, near its edge; shapes reach about 1."""
    match CLASSES[kind]:
        case "disc":
            return _disc(x, y, 0.95)
        case "ring":
            return np.abs(_disc(x, y, 0.75)) - 0.2
        case "square":
            return _box(x, y, 0.8, 0.8)
        case "frame":
            return np.abs(_box(x, y, 0.65, 0.65)) - 0.18
        case "triangle":
            return maximum(SQRT3 / 2 * np.abs(x) - y / 2, y) - 0.5
        case "cross":
            return minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95))
        case "star":
            sides = [nx * x + ny * y - STAR_INRADIUS for nx, ny in STAR_NORMALS]
            return np.sort(sides, axis=0)[-2]
        case "crescent":
            return maximum(_disc(x, y, 0.95), -_disc(x - 0.45, y, 0.75))
        case "bars":
            return maximum(minimum(np.abs(x), np.abs(np.abs(x) - 0.65)) - 0.18, np.abs(y) - 0.85)
        case "two discs":
            return _disc(np.abs(x) - 0.5, y, 0.42)


def _disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.sqrt(x * x + y * y) - radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return maximum(np.abs(x) - half_width, np.abs(y) - half_height)
