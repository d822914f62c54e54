"""The one look of all figures: colours, sizes, and writing a PNG without pyplot or a window.

Twice the resolution of a web page (200 pixels per inch), white ground, thin lines. Colours are
those of Okabe and Ito (Color Universal Design, 2008) and, for classes, Paul Tol's "muted" scheme:
readers with any of the common colour deficiencies can tell them apart.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 200
INK, MUTED, GRID = "#262626", "#767676", "#e4e4e4"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9",
)  # fmt: skip
CLASS_COLORS = (
    "#332288", "#88ccee", "#44aa99", "#117733", "#999933",
    "#ddcc77", "#cc6677", "#882255", "#aa4499", "#8a8a8a",
)  # fmt: skip
STYLE = {
    "figure.dpi": DPI,
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


def figure_style() -> AbstractContextManager:
    """The style within a `with` block, whatever the user's own matplotlib settings are."""
    return matplotlib.style.context(["default", STYLE])


def write_png(figure: Figure, out_png: str | Path) -> None:
    """Draws a figure at its own size into a file; OSError where the file cannot be written.

    Without the opaque alpha channel that matplotlib writes: an eighth fewer bytes.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    image.save(out_png, "PNG", optimize=True)
