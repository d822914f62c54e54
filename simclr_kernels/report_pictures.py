"""Pictures of views and of features: a gallery, a contact sheet of one image, an embedding.

Views are pasted pixel by pixel, enlarged by whole factors only: what the file shows is what the
encoder was fed, to the nearest of 256 levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from simclr_kernels.figure_style import (
    BLUE,
    CLASS_COLORS,
    MUTED,
    figure_style,
    write_png,
)
from simclr_kernels.picture_sheet import (
    LINE,
    Sheet,
    enlarge,
    fit_image,
    text_width,
    view_pixels,
    wrap,
)

MAX_EMBEDDED = 1500
MAX_CLASSES = 2 * len(CLASS_COLORS)


def save_gallery(
    views: Tensor,
    out_png: str | Path,
    *,
    sources: Sequence[np.ndarray | Tensor] | None = None,
    captions: Sequence[str] | None = None,
    across: int = 2,
) -> None:
    """Draws each image beside its two views, unresampled but for a whole factor of enlargement.

    Args:
        views: (2B, 3, S, S) floating, view-major, in [0, 1]; rows i and i + B are one image.
        out_png: the file to write. A view is S k pixels wide, k = max(1, round(192 / S)).
        sources: B uint8 arrays (H, W, 3), scaled to fit the size of a view.
        captions: B texts, one under each image.
        across: images beside each other in a line of the sheet.

    Raises:
        TypeError: views are not floating, or a source is not uint8.
        ValueError: a shape disagrees, a view leaves [0, 1], or there are not B sources or captions.
    """
    tiles = view_pixels(views)
    if len(tiles) % 2:
        raise ValueError(
            f"views must have an even number of rows (two per image), got {len(tiles)}"
        )
    count = len(tiles) // 2
    for name, given in (("sources", sources), ("captions", captions)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name} must have one entry per image ({count}), got {len(given)}")
    tiles = enlarge(tiles, 192)
    side, gap, gutter = tiles.shape[1], 8, 48
    columns = 2 if sources is None else 3
    step_x = columns * (side + gap) - gap + gutter
    step_y = side + gap
    if captions is not None:
        step_y += 10 + LINE * (1 + max(caption.count("\n") for caption in captions))
    across = min(across, count)
    lines = -(-count // across)
    with figure_style():
        sheet = Sheet(across * step_x - gutter + 2 * gap, lines * step_y + gap)
        for i in range(count):
            x, y = gap + i % across * step_x, gap + i // across * step_y
            row = [tiles[i], tiles[i + count]]
            if sources is not None:
                row.insert(0, fit_image(sources[i], side, side))
            for column, tile in enumerate(row):
                left = x + column * (side + gap) + (side - tile.shape[1]) // 2
                sheet.image(tile, left, y + (side - tile.shape[0]) // 2)
            if captions is not None:
                sheet.text(captions[i], x, y + side + 8)
        write_png(sheet.figure, out_png)


def save_contact_sheet(
    source: np.ndarray | Tensor,
    views: Tensor,
    captions: Sequence[str],
    crops: np.ndarray | Tensor | None,
    out_png: str | Path,
    *,
    columns: int = 4,
) -> None:
    """Draws an image with its crop boxes, then every view with the parameters that made it.

    Args:
        source: (H, W, 3) uint8.
        views: (K, 3, S, S) floating, in [0, 1].
        captions: K texts of a few lines, written under the views; lines of more than 30
            characters are broken after commas.
        crops: (K, 4) y, x, height, width of each view in pixels of the source; None for no boxes.
        out_png: the file to write.
        columns: views beside each other.

    Raises:
        TypeError: views are not floating, or the source is not uint8.
        ValueError: a shape disagrees, a view leaves [0, 1], or there are not K captions or crops.
    """
    tiles = enlarge(view_pixels(views), 224)
    count, side = tiles.shape[:2]
    if len(captions) != count:
        raise ValueError(f"captions must have one text per view ({count}), got {len(captions)}")
    crops = np.asarray([] if crops is None else crops)
    if crops.size and crops.shape != (count, 4):
        raise ValueError(f"crops must be (K, 4) with K = {count} views, got {crops.shape}")
    columns = min(columns, count)
    lines = -(-count // columns)
    texts = [wrap(caption) for caption in captions]
    step_y = side + LINE * max(map(len, texts)) + 30
    picture = fit_image(source, max(480, lines * step_y - 30), 560)
    left = picture.shape[1] + 40
    with figure_style():
        widest = max(text_width(line) for text in texts for line in text)
        step_x = max(side, widest) + 24
        height = max(lines * step_y, picture.shape[0] + 8) + 8
        sheet = Sheet(left + columns * step_x, height)
        sheet.image(picture, 8, 8)
        for i, tile in enumerate(tiles):
            x, y = left + i % columns * step_x, 8 + i // columns * step_y
            sheet.image(tile, x, y)
            sheet.text("\n".join(texts[i]), x, y + side + 8)
            sheet.badge(i, x, y)
        scale = picture.shape[1] / source.shape[1]
        boxes = [(8 + x * scale, 8 + y * scale, w * scale, h * scale) for y, x, h, w in crops]
        for i, box in enumerate(boxes):
            sheet.box(*box, i)
        for i, (x, y, width, height) in enumerate(boxes):
            # by turns in the four corners: boxes of one image often share one
            sheet.badge(i, x + width * (i % 4 in (1, 2)), y + height * (i % 4 in (2, 3)), corner=i)
        write_png(sheet.figure, out_png)


def save_embedding(
    features: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None,
    out_png: str | Path,
    title: str,
) -> None:
    """Draws features in the plane by t-SNE of the unit features, each class named at its median.

    Two principal axes show many classes badly: of ten synthetic clusters that a kNN classifier
    tells apart without error, it gets 66 to 87 % right in that plane and all in this one.
    Distances between far groups mean little in such a picture; which features are neighbours does.
    The same features give the same picture on one machine.

    Args:
        features: (n, C) floating, any device; at most 1500 evenly spaced rows are drawn.
        labels: (n,) integers. Up to 20 classes have colours, more are drawn in one colour.
        class_names: the name of each label, or None for its number.
        out_png: the file to write, 1200 x 1100 pixels.
        title: one line.

    Raises:
        ValueError: the shapes disagree, n < 5, a feature is not finite, or a label has no name.
    """
    shape = tuple(features.shape)
    if len(shape) != 2 or shape[0] < 5 or shape[1] < 2:
        raise ValueError(f"features must be (n, C) with n >= 5 and C >= 2, got {shape}")
    if labels.shape != shape[:1]:
        raise ValueError(f"labels must be (n,) with n = {shape[0]}, got {tuple(labels.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity")
    n = len(features)
    rows = torch.linspace(0, n - 1, min(n, MAX_EMBEDDED), dtype=torch.float64).round().long()
    points = _tsne(torch.nn.functional.normalize(features.detach().cpu()[rows].float()))
    labels = labels.cpu()[rows]
    classes = labels.unique().tolist()
    if class_names is not None and not 0 <= classes[0] <= classes[-1] < len(class_names):
        raise ValueError(
            f"class_names must name labels {classes[0]} to {classes[-1]}, got {len(class_names)}"
        )
    with figure_style():
        figure = Figure(figsize=(6, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_title(title)
        dots = {"s": 9, "alpha": 0.75, "linewidths": 0}
        if len(classes) > MAX_CLASSES:
            axes.scatter(*points.T, color=BLUE, **dots)
            classes = []
        for i, label in enumerate(classes):
            shape, color = divmod(i, len(CLASS_COLORS))
            own = points[labels == label]
            axes.scatter(*own.T, color=CLASS_COLORS[color], marker="o^"[shape], **dots)
            axes.annotate(
                str(label) if class_names is None else class_names[label],
                own.median(0).values.tolist(),
                ha="center",
                va="center",
                weight="bold",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
        note = f"t-SNE of {len(rows)} of {n} features"
        axes.text(0, 0, note, transform=axes.transAxes, color=MUTED, fontsize=7)
        write_png(figure, out_png)


def _tsne(x: Tensor, steps: int = 400) -> Tensor:
    """Exact t-SNE (van der Maaten and Hinton, 2008) of (n, C) into (n, 2), from principal axes.

    Perplexity n / 40 within 5 to 30; step size n / 12 with early exaggeration 12 after Belkina et
    al. (Nature Communications, 2019). O(n^2) memory, O(n^2) time per step: about 1 s for
    n = 1000 on two idle CPU cores.
    """
    n = len(x)
    squared = torch.cdist(x, x).square().fill_diagonal_(math.inf)
    target = math.log(min(max(n / 40, 5.0), 30.0, (n - 1) / 3))
    low, high = torch.zeros(n, 1, dtype=x.dtype), torch.full((n, 1), 1e6, dtype=x.dtype)
    for _ in range(60):
        beta = (low + high) / 2
        p = (-beta * squared).softmax(1)
        too_wide = -torch.special.xlogy(p, p).sum(1, keepdim=True) > target
        low, high = torch.where(too_wide, beta, low), torch.where(too_wide, high, beta)
    p = (p + p.T) / (2 * n)
    centred = x - x.mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    y = left[:, :2] * scale[:2]
    y, velocity = 1e-4 * y / y.std().clamp_min(1e-12), torch.zeros_like(y)
    exaggerated = 12 * p
    for step in range(steps):
        early = step < steps // 4
        # in place: fresh n x n buffers would cost more than the arithmetic
        kernel = torch.cdist(y, y).square_().add_(1).reciprocal_().fill_diagonal_(0)
        pull = (kernel / -kernel.sum()).add_(exaggerated if early else p).mul_(kernel)
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        velocity = (0.5 if early else 0.8) * velocity - max(n / 12, 10.0) * gradient
        y = y + velocity
    return y - y.mean(0)
