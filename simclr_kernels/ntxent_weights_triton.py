"""The weights w_ij of the gradient, tile by tile: what both routes of the backward pass share.

    w_ij = 2^(c s_ij - m) (g_i / T_i + g_j / T_j)      c = log2(e) / tau, j a negative of i

With a running maximum m differs by row, and each of the two terms has an exponential of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simclr_kernels.ntxent_rows_triton import (
    BOUNDED,
    UNKNOWN,
    constant_top,
    is_bounded,
    to_tf32,
)


@triton.jit
def row_operands(
    stretch_ptr,
    rates_ptr,
    row_m,
    inside,
    rows,
    c,
    exponent,
    LOGITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(scale, rate, offset) of rows [row_m, row_m + BLOCK_M), and whether logits are bounded."""
    at = row_m + tl.arange(0, BLOCK_M)
    scale = tl.zeros((BLOCK_M,), tl.float32) + c
    if ROUNDED:
        scale *= tl.load(stretch_ptr + at, mask=inside, other=0.0)
    rate_m = tl.load(rates_ptr + at, mask=inside, other=0.0)
    if LOGITS == BOUNDED:
        top_m = tl.zeros((BLOCK_M,), tl.float32) + constant_top(c)
        bounded = True
    else:
        top_m = tl.load(rates_ptr + rows + at, mask=inside, other=0.0)
        bounded = False
        if LOGITS == UNKNOWN:
            bounded = is_bounded(c)
    return scale, rate_m, top_m - exponent, bounded


@triton.jit
def weights(
    s,  # [BLOCK_M, BLOCK_N] similarities, rows not yet stretched
    stretch_ptr,
    rates_ptr,  # (3, rows) float32: rate, top
    rows,
    row_n,
    scale,
    rate_m,
    offset_m,
    exponent,
    RUNNING_TOP: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """w_ij times 2^exponent and the stretch of column j. Columns of EXTRA have no rate."""
    columns = row_n + tl.arange(0, BLOCK_N)
    if ROUNDED:
        stretch_n = tl.load(stretch_ptr + columns)
        s *= stretch_n[None, :]
    logits = s * scale[:, None]
    above = logits - offset_m[:, None]
    if RUNNING_TOP:
        # the zero rows behind the images may lie far above the maximum: an infinite weight is NaN
        above = tl.where(above > exponent + 1.0, exponent + 1.0, above)
    terms = tl.exp2(above)
    if EXTRA:
        w = terms * rate_m[:, None]
        if ROUNDED:
            w *= stretch_n[None, :]
        return w
    rate_n = tl.load(rates_ptr + columns)
    if RUNNING_TOP:
        offset_n = tl.load(rates_ptr + rows + columns) - exponent
        w = terms * rate_m[:, None] + tl.exp2(logits - offset_n[None, :]) * rate_n[None, :]
        if ROUNDED:
            w *= stretch_n[None, :]
        return w
    if ROUNDED:
        # one fused multiplication and addition an element
        return terms * (rate_m[:, None] * stretch_n[None, :] + (rate_n * stretch_n)[None, :])
    return terms * (rate_m[:, None] + rate_n[None, :])


@triton.jit
def as_operand(w, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """w as a product takes it: rounded once."""
    if PRECISION == "tf32":
        return to_tf32(w)
    else:
        return w.to(dtype)
