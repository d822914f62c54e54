"""Pictures that compare views: pipelines side by side on one image, and recipes row by row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from simclr_kernels.compare import Difference, difference, levels_apart
from simclr_kernels.figure_style import GRID, MUTED, figure_style, write_png
from simclr_kernels.picture_sheet import Sheet, enlarge, text_width, view_pixels, wrap

GAIN = 8  # of the differences that are drawn
SIDE = 224
MARGIN, GAP = 8, 10
SMALL, SMALL_LINE = 6, 23  # points, pixels
CHARACTERS = 24  # of a small line as wide as a view


def save_comparison(
    exact: Tensor,
    views: Mapping[str, Tensor | str],
    captions: Sequence[str],
    out_png: str | Path,
) -> list[dict[str, Difference]]:
    """Draws the views of one image by each pipeline, and below them how far they are off.

    A column is a pipeline, the first is the reference. Below each view is |difference from the
    reference| times 8, black where there is none, with its mean and its 99th percentile in levels
    of 8 bits.

    Args:
        exact: (K, 3, S, S) floating, in [0, 1], the views of the reference.
        views: by the name of each pipeline its views, or one line on why there are none.
        captions: K texts: the parameters, written below the view of the reference.
        out_png: the file to write. A view is S k pixels wide, k = max(1, round(224 / S)).

    Returns:
        For each of the K views the difference by the name of the pipeline.

    Raises:
        TypeError: views are not floating.
        ValueError: a shape disagrees, a view leaves [0, 1], or there are not K captions.
    """
    count = len(exact)
    if len(captions) != count:
        raise ValueError(f"captions must have one text per view ({count}), got {len(captions)}")
    made = {name: given for name, given in views.items() if isinstance(given, Tensor)}
    for name, given in made.items():
        if given.shape != exact.shape:
            raise ValueError(
                f"views of {name} must have the shape of the reference, {tuple(exact.shape)}, "
                f"got {tuple(given.shape)}"
            )
    tiles = {name: enlarge(view_pixels(given), SIDE) for name, given in made.items()}
    reference = enlarge(view_pixels(exact), SIDE)
    levels = {name: levels_apart(given, exact) for name, given in made.items()}
    apart = {
        name: enlarge(view_pixels((of * (GAIN / 255)).clamp(0, 1)), SIDE)
        for name, of in levels.items()
    }
    differences = [{name: difference(of[k]) for name, of in levels.items()} for k in range(count)]
    side = reference.shape[1]
    # a head line; a view, its difference, a line on it, and some air
    head, step_x, step_y = 36, side + GAP, 2 * (side + GAP) + SMALL_LINE + 18
    small = {"fontsize": SMALL, "step": SMALL_LINE}
    with figure_style():
        width = (1 + len(views)) * step_x - GAP + 2 * MARGIN
        sheet = Sheet(width, head + count * step_y - 18 + MARGIN)
        for column, name in enumerate(("reference", *views)):
            sheet.text(name, MARGIN + column * step_x, 8, fontsize=8, weight="bold")
        for k in range(count):
            y = head + k * step_y
            below = y + side + GAP
            last = below + side + 3
            sheet.image(reference[k], MARGIN, y)
            sheet.text("\n".join(wrap(captions[k], CHARACTERS)), MARGIN, below, **small)
            legend = f"|difference| x {GAIN}\nin levels of 255:"
            sheet.text(legend, MARGIN, last - SMALL_LINE, color=MUTED, **small)
            for column, name in enumerate(views, 1):
                x = MARGIN + column * step_x
                if name not in made:
                    sheet.field(x, y, side, 2 * side + GAP, GRID)
                    reason = textwrap.fill(views[name], CHARACTERS - 2)
                    sheet.text(reason, x + 8, y + 8, color=MUTED, **small)
                    continue
                sheet.image(tiles[name][k], x, y)
                sheet.image(apart[name][k], x, below)
                value = differences[k][name]
                text = f"mean {_levels(value.mean)}, 99 % {_levels(value.p99)}"
                sheet.text(text, x, last, **small)
        write_png(sheet.figure, out_png)
    return differences


def _levels(value: float) -> str:
    """Two digits after the point, one from 10 on."""
    if 0 < value < 0.005:
        return "< 0.01"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class Row(NamedTuple):
    """A line of a sheet of recipes.

    Attributes:
        title: its name, in bold.
        text: lines below the name.
        views: (K, 3, S, S) floating, in [0, 1].
        captions: a word or two below each view; None for none.
    """

    title: str
    text: str
    views: Tensor
    captions: Sequence[str] | None = None


def save_recipes(rows: Sequence[Row], out_png: str | Path, *, side: int = 112) -> None:
    """Draws a line of views for each recipe, its name and a few words to the left.

    Args:
        rows: at least one.
        out_png: the file to write.
        side: of a view in the picture, about: views are shrunk or enlarged by a whole factor.

    Raises:
        TypeError: views are not floating.
        ValueError: there are no rows, a view leaves [0, 1], or a row's captions are not K.
    """
    if not rows:
        raise ValueError("rows must be at least one, got 0")
    for row in rows:
        if row.captions is not None and len(row.captions) != len(row.views):
            raise ValueError(
                f"captions of {row.title!r} must be one per view ({len(row.views)}), "
                f"got {len(row.captions)}"
            )
    tiles = [_shrink(view_pixels(row.views), side) for row in rows]
    side = tiles[0].shape[1]
    gap = 6
    with figure_style():
        widths = [text_width(row.title) for row in rows]
        widths += [text_width(line, SMALL) for row in rows for line in row.text.split("\n")]
        # letters of the bold title are wider by a tenth
        left = MARGIN + 14 + round(1.1 * max(widths))
        widest = max(map(len, tiles))
        heights = [side + gap + (SMALL_LINE if row.captions is not None else 0) for row in rows]
        sheet = Sheet(left + widest * (side + gap) - gap + MARGIN, sum(heights) - gap + 2 * MARGIN)
        y = MARGIN
        small = {"fontsize": SMALL, "color": MUTED, "step": SMALL_LINE}
        for row, line, height in zip(rows, tiles, heights, strict=True):
            sheet.text(row.title, MARGIN, y, weight="bold")
            sheet.text(row.text, MARGIN, y + SMALL_LINE + 2, **small)
            for k, tile in enumerate(line):
                x = left + k * (side + gap)
                sheet.image(tile, x, y)
                if row.captions is not None:
                    sheet.text(row.captions[k], x, y + side + 2, **small)
            y += height
        write_png(sheet.figure, out_png)


def _shrink(tiles: np.ndarray, side: int) -> np.ndarray:
    """(K, S, S, 3) uint8 as near to `side` as whole factors go; smaller ones by area.

    Those come in steps of 3 levels: half the bytes of the file, and not to be seen.
    """
    factor = round(tiles.shape[1] / side)
    if factor <= 1:
        return enlarge(tiles, side)
    count, own = len(tiles), tiles.shape[1] // factor
    tiles = tiles[:, : own * factor, : own * factor].astype(np.float32)
    tiles = tiles.reshape(count, own, factor, own, factor, 3).mean((2, 4))
    return ((tiles / 3).round() * 3).astype(np.uint8)
