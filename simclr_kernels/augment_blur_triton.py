"""GPU Gaussian blur of a view: along x within the rows of a program, then along y.

Taps k have the weight exp(-k^2 / (2 sigma^2)) over the sum of all to radius (SIZE // 10) // 2;
those beyond 5.5 sigma, together under 1e-6, are left out. Pixels outside the view are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simclr_kernels.augment_store_triton import clip, keep, kept, write

REACH = tl.constexpr(5.5)  # of the taps, in sigma
RADII = tl.constexpr(16)


@triton.jit
def _exponent(sigma):
    """-log2(e) / (2 sigma^2): a tap at distance k weighs 2 to k^2 of it. -inf if sigma vanishes."""
    return -0.7213475204444817 / (sigma * sigma)


@triton.jit
def _taps(sigma, RADIUS: tl.constexpr):
    """(number of taps on either side, weight of the middle one)."""
    total = 1.0
    exponent = _exponent(sigma)
    for start in tl.static_range(1, RADIUS + 1, RADII):
        k = start + tl.arange(0, RADII)
        total += 2.0 * tl.sum(tl.where(k <= RADIUS, tl.exp2(exponent * (k * k)), 0.0))
    reach = tl.minimum(tl.ceil(sigma * REACH), RADIUS)
    return reach.to(tl.int32), 1.0 / total


@triton.jit
def blur_rows(
    from_ptr,  # one channel of the rows, kept
    to_ptr,  # the same rows, kept, out
    pixels,
    sigma,
    SIZE: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blurs whole rows along x."""
    reach, middle = _taps(sigma, RADIUS)
    exponent = _exponent(sigma)
    for start in range(0, pixels, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < pixels
        x = offs % SIZE
        total = kept(from_ptr + offs, mask) * middle
        for k in range(1, reach + 1):
            weight = tl.exp2(exponent * (k * k)) * middle
            near = kept(from_ptr + offs - k, mask & (x >= k))
            near += kept(from_ptr + offs + k, mask & (x < SIZE - k))
            total += weight * near
        keep(to_ptr + offs, total, mask)


@triton.jit
def _blur_columns(from_ptr, offs, mask, y, sigma, SIZE: tl.constexpr, RADIUS: tl.constexpr):
    """One channel of pixels, blurred along y and clipped."""
    reach, middle = _taps(sigma, RADIUS)
    exponent = _exponent(sigma)
    total = kept(from_ptr + offs, mask) * middle
    for k in range(1, reach + 1):
        weight = tl.exp2(exponent * (k * k)) * middle
        near = kept(from_ptr + offs - k * SIZE, mask & (y >= k))
        near += kept(from_ptr + offs + k * SIZE, mask & (y < SIZE - k))
        total += weight * near
    return clip(total)


@triton.jit
def _blur_kernel(
    stage_ptr,  # (views, 3, SIZE, SIZE) int16 or float32: blurred along x, kept
    views_ptr,  # (views, 3, SIZE, SIZE) out, in its memory format
    sigma_ptr,
    solarize_ptr,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blurs BLOCK pixels of a view along y and writes them; a view without blur is left alone."""
    PLANE: tl.constexpr = SIZE * SIZE
    PARTS: tl.constexpr = (PLANE + BLOCK - 1) // BLOCK
    view = tl.program_id(0) // PARTS
    sigma = tl.load(sigma_ptr + view)
    if sigma > 0.0:
        offs = tl.program_id(0) % PARTS * BLOCK + tl.arange(0, BLOCK)
        mask = offs < PLANE
        y = offs // SIZE
        stage_ptr += view.to(tl.int64) * (3 * PLANE)
        views_ptr += view.to(tl.int64) * (3 * PLANE)
        solarize = tl.load(solarize_ptr + view)
        r = _blur_columns(stage_ptr, offs, mask, y, sigma, SIZE, RADIUS)
        g = _blur_columns(stage_ptr + PLANE, offs, mask, y, sigma, SIZE, RADIUS)
        b = _blur_columns(stage_ptr + 2 * PLANE, offs, mask, y, sigma, SIZE, RADIUS)
        write(
            views_ptr,
            offs,
            mask,
            r,
            g,
            b,
            solarize,
            (scale_r, scale_g, scale_b),
            (shift_r, shift_g, shift_b),
            SIZE,
            CHANNELS_LAST,
        )
