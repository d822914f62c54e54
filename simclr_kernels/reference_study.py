"""The operations beyond SimCLR's recipe in plain PyTorch: cutout, rotation, Sobel, Gaussian noise.

The paper composes them with the recipe's own in its study (arXiv 2002.05709, figures 4 and 5), but
published neither code nor magnitudes for them; what is chosen here is said at each function. They
belong to the reference and to the Kornia pipeline; the fused kernels have none of them. Their
order among the recipe's operations is that of reference.augment. As everything in reference.py:
float64-clean, device-free, differentiable in the planes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_kernels.philox import philox, uniform


def rotate(planes: Tensor, quarter_turns: Tensor) -> Tensor:
    """Turns images counter-clockwise by 90 degrees times quarter_turns; pixels are only moved.

    Args:
        planes: (B, 3, S, S).
        quarter_turns: (B,) integer, 0 to 3; an image with 0 is left as it is.
    """
    for turns in (1, 2, 3):
        chosen = (quarter_turns == turns).nonzero()[:, 0]
        if len(chosen):
            turned = planes.index_select(0, chosen).rot90(turns, (2, 3))
            planes = planes.index_copy(0, chosen, turned)
    return planes


def sobel(planes: Tensor, chosen: Tensor) -> Tensor:
    """Size of the Sobel gradient of each channel, clipped to [0, 1]; the border is replicated.

    By channel, as tf.image.sobel_edges, so that it composes with the operations on colour. The
    kernels [-1 0 1; -2 0 2; -1 0 1] and its transpose are divided by 4: an upright or level edge
    from black to white becomes 1.

    Args:
        planes: (B, 3, H, W) float32 or float64. Where the gradient is 0, that of its size is 0.
        chosen: (B,) bool; the other images are left as they are.
    """
    chosen = chosen.nonzero()[:, 0]
    if not len(chosen):
        return planes
    padded = F.pad(planes.index_select(0, chosen), (1, 1, 1, 1), "replicate")
    above, level, below = padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]
    columns = above + 2 * level + below
    rows = below - above
    dx = columns[..., 2:] - columns[..., :-2]
    dy = rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]
    size = torch.linalg.vector_norm(torch.stack([dx, dy]) / 4, dim=0)
    return planes.index_copy(0, chosen, size.clamp(0, 1))


def normal_pixels(key: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent standard normal numbers for every value of a view, by Philox and Box-Muller.

    Value v = (channel size + y) size + x of an image is number v % 4 of the Philox4x32-10 block
    of the image's key and the counter (v // 4, 0, 0, 0). With u_i = (word i >> 8) 2^-24 these are
    r cos(2 pi u_1), r sin(2 pi u_1) where r = sqrt(-2 ln(1 - u_0)), and the same of u_2 and u_3.
    The largest possible is 5.77.

    Args:
        key: (B, 2) int64, two 32-bit words; nothing else decides the numbers.
        size: side of the view.
        dtype: float32 or float64, of the arithmetic and the result.

    Returns:
        (B, 3, size, size).
    """
    values = 3 * size * size
    counter = torch.zeros(1, -(-values // 4), 4, dtype=torch.int64, device=key.device)
    counter[..., 0] = torch.arange(counter.shape[1], device=key.device)
    u = uniform(philox((key[:, :1], key[:, 1:]), counter)).to(dtype)
    radius = (-2 * (1 - u[..., ::2]).log()).sqrt()
    angle = 2 * math.pi * u[..., 1::2]
    numbers = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)  # [B, blocks, 2, 2]
    return numbers.flatten(1)[:, :values].view(-1, 3, size, size)


def gaussian_noise(planes: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    """Adds sigma times normal_pixels(key) and clips to [0, 1].

    Args:
        planes: (B, 3, S, S) float32 or float64.
        sigma: (B,) standard deviation in units of 1.0 = white; an image with 0 is left as it is.
        key: (B, 2) int64.
    """
    chosen = (sigma > 0).nonzero()[:, 0]
    if not len(chosen):
        return planes
    noise = normal_pixels(key[chosen], planes.shape[3], planes.dtype)
    noise *= sigma[chosen].to(planes.dtype).view(-1, 1, 1, 1)
    return planes.index_copy(0, chosen, (planes.index_select(0, chosen) + noise).clamp(0, 1))


def cutout(planes: Tensor, box: Tensor) -> Tensor:
    """Sets a box to 0 in all channels (DeVries and Taylor, arXiv 1708.04552).

    Args:
        planes: (B, C, H, W).
        box: (B, 4) integer y, x, height, width in pixels, inside the view; height 0 is off.
    """
    y, x, height, width = box.long()[:, :, None, None].unbind(1)  # [B, 1, 1] each
    rows = torch.arange(planes.shape[2], device=planes.device)[:, None] - y
    columns = torch.arange(planes.shape[3], device=planes.device) - x
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return planes.masked_fill(inside[:, None], 0.0)
