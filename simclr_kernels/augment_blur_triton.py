"""GPU Gaussian blur of a view: along x within the rows of a program, then along y.

Taps k have the weight exp(-k^2 / (2 sigma^2)) over the sum of all to radius (SIZE // 10) // 2;
those beyond 5.5 sigma, together under 1e-6, are left out. Pixels outside the view are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simclr_kernels.augment_store_triton import (
    a_step,
    clip,
    keep_steps,
    kept_steps,
    two_kept_steps,
    write,
)

REACH = tl.constexpr(5.5)  # of the taps, in sigma
RADII = tl.constexpr(16)
COLUMNS = tl.constexpr(32)  # of a tile: one warp reads neighbours


@triton.jit
def taps_of(sigma, RADIUS: tl.constexpr):
    """(number of taps on either side, weight of the middle one, exponent).

    A tap at distance k weighs 2^(exponent k^2) of the middle one; a vanishing sigma makes it -inf.
    """
    # -log2(e) / 2
    exponent = -0.7213475204444817 / (sigma * sigma)
    total = 1.0
    for start in tl.static_range(1, RADIUS + 1, RADII):
        k = start + tl.arange(0, RADII)
        total += 2.0 * tl.sum(tl.where(k <= RADIUS, tl.exp2(exponent * (k * k)), 0.0))
    reach = tl.minimum(tl.ceil(sigma * REACH), RADIUS)
    return reach.to(tl.int32), 1.0 / total, exponent


@triton.jit
def _blurred_along_x(
    from_ptrs, inside, x, reach, middle, exponent, SIZE: tl.constexpr, EDGE: tl.constexpr
):
    """A tile of pixels in steps; only at an EDGE taps may lie outside of the view."""
    total = kept_steps(from_ptrs, inside & (x < SIZE)) * middle
    for k in range(1, reach + 1):
        left = inside
        right = inside
        if EDGE:
            left = inside & (x >= k) & (x < SIZE + k)
            right = inside & (x < SIZE - k)
        near = two_kept_steps(from_ptrs - k, left, from_ptrs + k, right)
        total += near * (tl.exp2(exponent * (k * k)) * middle)
    return total


@triton.jit
def blur_rows(
    from_ptr,  # one channel of the rows, kept
    to_ptr,  # the same rows, kept, out
    rows,
    taps,  # see taps_of
    SIZE: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blurs whole rows along x."""
    reach, middle, exponent = taps
    for start_y in range(0, rows, BLOCK // COLUMNS):
        y = start_y + tl.arange(0, BLOCK // COLUMNS)
        inside = (y < rows)[:, None]
        for start_x in range(0, SIZE, COLUMNS):
            # a thread that had neighbours would read them in as many lines of the cache
            x = tl.max_contiguous(start_x + tl.arange(0, COLUMNS), 1)[None, :]
            offs = (y * SIZE)[:, None] + x
            if start_x >= RADIUS and start_x + COLUMNS + RADIUS <= SIZE:
                total = _blurred_along_x(
                    from_ptr + offs, inside, x, reach, middle, exponent, SIZE, False
                )
            else:
                total = _blurred_along_x(
                    from_ptr + offs, inside, x, reach, middle, exponent, SIZE, True
                )
            keep_steps(to_ptr + offs, total, inside & (x < SIZE))


@triton.jit
def _blurred_along_y(from_ptrs, mask, y, taps, SIZE: tl.constexpr):
    """One channel of pixels, clipped."""
    reach, middle, exponent = taps
    total = kept_steps(from_ptrs, mask) * middle
    for k in range(1, reach + 1):
        above, below = mask & (y >= k), mask & (y < SIZE - k)
        near = two_kept_steps(from_ptrs - k * SIZE, above, from_ptrs + k * SIZE, below)
        total += near * (tl.exp2(exponent * (k * k)) * middle)
    return clip(total * a_step(from_ptrs))


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
        taps = taps_of(sigma, RADIUS)
        stage_ptrs = stage_ptr + offs
        r = _blurred_along_y(stage_ptrs, mask, y, taps, SIZE)
        g = _blurred_along_y(stage_ptrs + PLANE, mask, y, taps, SIZE)
        b = _blurred_along_y(stage_ptrs + 2 * PLANE, mask, y, taps, SIZE)
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
