"""Crop and resize of the reference: see reference.py, which hands these names out."""

from __future__ import annotations

import torch
from torch import Tensor

KEYS_A = -0.5  # of the bicubic kernel
POSITION_BITS = 10  # the original reads its bicubic weights from a table of 1024 steps


def resize_taps(
    start: Tensor, length: Tensor, out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The four source pixels and weights behind each output pixel, along one side of a crop.

    Bicubic (Keys, A = -0.5), half-pixel centres, no antialias. The position of output x is
    ((2x + 1) length - out) / (2 out) in source pixels, rounded to 1/1024 (ties to even); taps
    outside the crop get weight 0 and the others are renormalised (tf.image.resize of TF2). Its
    float32 positions fall on the same 1/1024 for outputs of 24, 32, 48, 64, 96, 128, 160, 192 and
    256 and crop sides up to 2048; for 224 a few differ from a side of 898 on.

    Args:
        start: (B,) integer, first pixel of each crop in its image.
        length: (B,) integer >= 1, pixels of each crop.
        out: output pixels.
        dtype: of the weights.

    Returns:
        (B, out, 4) int64 source pixels and (B, out, 4) weights that sum to 1.
    """
    start, length = start.long()[:, None, None], length.long()[:, None, None]
    x = torch.arange(out, device=start.device)[:, None]
    num = ((2 * x + 1) * length - out) << POSITION_BITS
    doubled = 2 * num + 2 * out
    position = doubled.div(4 * out, rounding_mode="floor")
    # a tie went up: back to the even neighbour
    position = position - ((doubled == position * (4 * out)) & (position % 2 == 1)).long()

    tap = (position >> POSITION_BITS) + torch.arange(-1, 3, device=start.device)  # [B, out, 4]
    distance = ((tap << POSITION_BITS) - position).abs().to(dtype) / (1 << POSITION_BITS)
    a = KEYS_A
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    inside = (tap >= 0) & (tap < length)
    weight = torch.where(distance < 1, near, far) * inside
    return start + tap.clamp_min(0).minimum(length - 1), weight / weight.sum(2, keepdim=True)


def crop_resize(
    images: Tensor,
    crop: Tensor,
    size: int | tuple[int, int],
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cuts a box out of each image and resizes it; bicubic overshoot is kept. See resize_taps.

    Args:
        images: (B, H, W, 3) uint8.
        crop: (B, 4) integer (y, x, height, width) in source pixels, inside the image.
        size: output side, or (height, width), in pixels.
        flip: (B,) bool, mirrors left and right after the resize.
        dtype: float32 or float64, of the arithmetic and the result.

    Returns:
        (B, 3, height, width) in units of 1.0 = white: pixels are multiplied by 1/255.
    """
    out_height, out_width = (size, size) if isinstance(size, int) else size
    y, x, height, width = crop.unbind(1)
    rows, row_weights = resize_taps(y, height, out_height, dtype)
    columns, column_weights = resize_taps(x, width, out_width, dtype)
    if flip is not None:
        flip = flip[:, None, None]
        columns = torch.where(flip, columns.flip(1), columns)
        column_weights = torch.where(flip, column_weights.flip(1), column_weights)
    B, _, W, _ = images.shape
    table = (images.to(dtype) * (1 / 255)).flatten(2)  # [B, H, W * 3]
    table = _weighted_rows(table, rows, row_weights)
    # columns become rows, so that both passes gather contiguous runs
    table = table.view(B, out_height, W, 3).permute(0, 2, 3, 1).flatten(2)
    table = _weighted_rows(table, columns, column_weights)
    return table.view(B, out_width, 3, out_height).permute(0, 2, 3, 1).contiguous()


def _weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """(B, out, C): of table (B, rows, C), the sum of 4 rows by index and weight (B, out, 4)."""
    B, rows, C = table.shape
    index = index + torch.arange(B, device=table.device)[:, None, None] * rows
    index, weight, table = index.view(-1, 4), weight.view(-1, 4, 1), table.reshape(B * rows, C)
    total = table.index_select(0, index[:, 0]) * weight[:, 0]
    for k in range(1, 4):
        total.addcmul_(table.index_select(0, index[:, k]), weight[:, k])
    return total.view(B, -1, C)
