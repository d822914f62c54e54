"""A sheet of pictures, pixel by pixel: pasting, text beside it, and what is pasted.

Views are enlarged by whole factors only: what the file shows is what the encoder was fed, to the
nearest of 256 levels.
"""

from __future__ import annotations

import math
import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.transforms import IdentityTransform
from PIL import Image
from torch import Tensor

from simclr_kernels.figure_style import DPI, PALETTE

LINE = 26
CAPTION_CHARACTERS = 30


class Sheet:
    """A white sheet in pixels, (0, 0) at the top left, on which images are pasted unresampled."""

    def __init__(self, width: int, height: int):
        self.height = height
        # a quarter of a pixel more: the canvas rounds down, and 29 / 200 * 200 is below 29
        self.figure = Figure(figsize=((width + 0.25) / DPI, (height + 0.25) / DPI), dpi=DPI)

    def image(self, pixels: np.ndarray, x: int, y: int) -> None:
        self.figure.figimage(pixels, x, self.height - y - pixels.shape[0])

    def text(self, text: str, x: float, y: float, *, step: float = LINE, **style) -> None:
        """Writes lines of text, step pixels apart, below y."""
        style = {"va": "top", "fontsize": 7, "transform": IdentityTransform()} | style
        for i, line in enumerate(text.split("\n")):
            self.figure.text(x, self.height - y - i * step, line, **style)

    def box(self, x: float, y: float, width: float, height: float, number: int) -> None:
        """Outlines a box in the colour of a number, with a white rim on either side."""
        place = (x, self.height - y - height), width, height
        for color, points in (("white", 2.4), (PALETTE[number % 6], 1.4)):
            style = {"fill": False, "edgecolor": color, "linewidth": points}
            self.figure.add_artist(Rectangle(*place, **style, transform=IdentityTransform()))

    def field(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fills a box with a colour."""
        place = (x, self.height - y - height), width, height
        style = {"facecolor": color, "edgecolor": "none"}
        self.figure.add_artist(Rectangle(*place, **style, transform=IdentityTransform()))

    def badge(self, number: int, x: float, y: float, corner: int = 0) -> None:
        """Writes number + 1 on its colour into corner 0 to 3: clockwise from the top left."""
        right, bottom = corner % 4 in (1, 2), corner % 4 in (2, 3)
        self.text(
            str(number + 1),
            x + (-6 if right else 6),
            y + (-6 if bottom else 6),
            ha="right" if right else "left",
            va="bottom" if bottom else "top",
            color="white",
            weight="bold",
            bbox={"facecolor": PALETTE[number % 6], "edgecolor": "none", "pad": 1.6},
        )


def view_pixels(views: Tensor) -> np.ndarray:
    """(K, 3, S, S) floating views in [0, 1] -> (K, S, S, 3) uint8, to the nearest level."""
    if views.ndim != 4 or views.shape[1] != 3 or views.shape[2] != views.shape[3] or not len(views):
        raise ValueError(f"views must be (K, 3, S, S), got {tuple(views.shape)}")
    if not views.is_floating_point():
        raise TypeError(f"views must be floating and in [0, 1], got {views.dtype}")
    views = views.detach().float().cpu()
    if not ((views > -1e-3) & (views < 1 + 1e-3)).all():
        low, high = views.min().item(), views.max().item()
        raise ValueError(f"views must lie in [0, 1], before mean and std, got {low:g} to {high:g}")
    return (views.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def enlarge(tiles: np.ndarray, side: int) -> np.ndarray:
    """Repeats the pixels of (K, S, S, 3) by the whole factor that comes nearest to `side`."""
    factor = max(1, round(side / tiles.shape[1]))
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def fit_image(image: np.ndarray | Tensor, height: int, width: int) -> np.ndarray:
    """Scales (H, W, 3) uint8 into a frame: up by a whole factor, or down by area."""
    image = np.ascontiguousarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"source must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"source must be (H, W, 3), got {image.shape}")
    scale = min(height / image.shape[0], width / image.shape[1])
    if scale >= 1:
        return image.repeat(int(scale), axis=0).repeat(int(scale), axis=1)
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def text_width(line: str, size: float = 7) -> int:
    """Width in pixels of a line of a caption, of that font size in points."""
    if not line.strip():
        return 0  # matplotlib has no path of a space
    return math.ceil(TextPath((0, 0), line, size=size).get_extents().x1 * DPI / 72)


def wrap(caption: str, characters: int = CAPTION_CHARACTERS) -> list[str]:
    """The lines of a caption, long ones broken after commas outside brackets."""
    lines = []
    for line in caption.split("\n"):
        lines.append("")
        for phrase in re.split(r"(?<=,) (?![^(]*\))", line):
            if lines[-1] and len(lines[-1]) + 1 + len(phrase) > characters:
                lines.append(phrase)
            else:
                lines[-1] = f"{lines[-1]} {phrase}".lstrip()
    return lines
