"""GPU kernels of NT-Xent, backward: the sums of weighted rows, from tiles made again.

    sum_w_i = sum_j w_ij z^_j     w_ij = 2^(c s_ij - m) (1 / T_i + 1 / T_j)     over the negatives j

w is symmetric, so that one product per tile gives the complete gradient of a row: 2 U of FLOPs, no
atomics, each program the only writer of its rows. A program owns BLOCK_M rows and streams all
others past them; tiles that may hold a row's own image, in either view, come after the loop, so
that the loop runs without masks. The rows behind the images are zero: they add nothing.

w is formed in float32 and rounded once, to the dtype of the rows. In float16 it is 2^13 times as
large: it is at most 4, and without the factor all weights vanish from 2N = 16384 on.

Where there are too few rows to fill the chip the columns are split, the same on every GPU, and the
parts summed in their order. The positives and the way back through the normalisation are a kernel
of their own (ntxent_finish_triton.py): in the epilogue of this one they need 255 registers and
spill 56 bytes, where the loop needs 167; apart they cost 8 D bytes of traffic a row.

Rows too wide for registers go through ntxent_products_triton.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_finish_triton import Rates, launch_finish
from simclr_kernels.ntxent_products_triton import launch_products
from simclr_kernels.ntxent_rows_triton import (
    Batch,
    load_tile,
    logits_per_similarity,
    other_tile,
    own_tiles,
)
from simclr_kernels.ntxent_weights_triton import as_operand, row_operands, weights

# programs that fill a chip; the same for all, so that all give the same bits
PROGRAMS = 128
FEWEST_TILES = 4  # of a program that has a part of the columns


@triton.jit
def _sweep_columns(
    unit_ptr,
    stretch_ptr,
    extra_ptr,
    extra_stretch_ptr,
    rates_ptr,
    padded,
    extras,
    image,  # first of this program
    row_m,
    scale,
    rate_m,
    offset_m,
    exponent,
    part,
    parts,
    WIDTH: tl.constexpr,
    RUNNING_TOP: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(sum_w, sum of w s over the extra negatives) of one part of the columns."""
    rows = 2 * padded
    offs_n = tl.arange(0, BLOCK_N)
    z_m = load_tile(unit_ptr, row_m, WIDTH, BLOCK_M)
    sum_w = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    extra_along = tl.zeros((BLOCK_M,), tl.float32)
    tiles = padded // BLOCK_N
    own_first, own_last = own_tiles(image, tiles, BLOCK_M, BLOCK_N)
    others = tiles - (own_last - own_first)
    for k in range(part * 2 * others // parts, (part + 1) * 2 * others // parts):
        view_n, tile = other_tile(k, others, own_first, own_last)
        row_n = view_n * padded + tile * BLOCK_N
        z_n = load_tile(unit_ptr, row_n, WIDTH, BLOCK_N)
        s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        # fmt: off
        w = weights(
            s, stretch_ptr, rates_ptr, rows, row_n, scale, rate_m, offset_m, exponent,
            RUNNING_TOP, ROUNDED, False, BLOCK_N
        )
        # fmt: on
        w = as_operand(w, z_n.dtype, PRECISION)
        sum_w = tl.dot(w, z_n, sum_w, input_precision=PRECISION)
    masked = own_last - own_first
    for k in range(part * 2 * masked // parts, (part + 1) * 2 * masked // parts):
        view_n, tile = other_tile(k, masked, 0, 0)
        tile += own_first
        row_n = view_n * padded + tile * BLOCK_N
        z_n = load_tile(unit_ptr, row_n, WIDTH, BLOCK_N)
        s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)
        # fmt: off
        w = weights(
            s, stretch_ptr, rates_ptr, rows, row_n, scale, rate_m, offset_m, exponent,
            RUNNING_TOP, ROUNDED, False, BLOCK_N
        )
        # fmt: on
        image_m = image + tl.arange(0, BLOCK_M)
        w = tl.where(image_m[:, None] != (tile * BLOCK_N + offs_n)[None, :], w, 0.0)
        w = as_operand(w, z_n.dtype, PRECISION)
        sum_w = tl.dot(w, z_n, sum_w, input_precision=PRECISION)
    if EXTRA:
        tiles = (extras + BLOCK_N - 1) // BLOCK_N
        for k in range(part * tiles // parts, (part + 1) * tiles // parts):
            z_n = load_tile(extra_ptr, k * BLOCK_N, WIDTH, BLOCK_N)
            s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)
            # fmt: off
            w = weights(
                s, extra_stretch_ptr, rates_ptr, rows, k * BLOCK_N, scale, rate_m, offset_m,
                exponent, RUNNING_TOP, ROUNDED, True, BLOCK_N
            )
            # fmt: on
            extra_along += tl.sum(w * s, 1)
            w = as_operand(w, z_n.dtype, PRECISION)
            sum_w = tl.dot(w, z_n, sum_w, input_precision=PRECISION)
    return sum_w, extra_along


@triton.jit
def _ntxent_bwd_kernel(
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32: of the rows, if ROUNDED
    extra_ptr,  # (extra_padded, WIDTH) unit rows of further negatives, if EXTRA
    extra_stretch_ptr,
    rates_ptr,  # (3, 2 * padded) float32: rate, top, share
    tau,
    sum_w_ptr,  # (parts, 2 * stride, WIDTH) float32, out
    extra_along_ptr,  # (parts, 2 * stride) float32, out if EXTRA
    arrived_ptr,  # () int32, out: 0
    padded,
    extras,
    first_image,
    count,
    stride,
    parts,
    exponent,
    WIDTH: tl.constexpr,
    LOGITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program has BLOCK_M rows of one view and one part of the columns: see the module."""
    first = tl.program_id(0) * BLOCK_M
    view = tl.program_id(1)
    part = tl.program_id(2)
    offs_m = tl.arange(0, BLOCK_M)
    inside = first + offs_m < count
    image = first_image + first
    row_m = view * padded + image
    c = logits_per_similarity(tau, TAU_ON_DEVICE)
    # fmt: off
    scale, rate_m, offset_m, bounded = row_operands(
        stretch_ptr, rates_ptr, row_m, inside, 2 * padded, c, exponent,
        LOGITS, ROUNDED, BLOCK_M
    )
    # fmt: on
    # fmt: off
    if bounded:
        sum_w, extra_along = _sweep_columns(
            unit_ptr, stretch_ptr, extra_ptr, extra_stretch_ptr, rates_ptr, padded, extras, image,
            row_m, scale, rate_m, offset_m, exponent, part, parts,
            WIDTH, False, ROUNDED, EXTRA, PRECISION, BLOCK_M, BLOCK_N
        )
    else:
        sum_w, extra_along = _sweep_columns(
            unit_ptr, stretch_ptr, extra_ptr, extra_stretch_ptr, rates_ptr, padded, extras, image,
            row_m, scale, rate_m, offset_m, exponent, part, parts,
            WIDTH, True, ROUNDED, EXTRA, PRECISION, BLOCK_M, BLOCK_N
        )
    # fmt: on
    sum_w *= tl.exp2(-exponent)
    row = (part * 2 + view) * stride + first + offs_m
    offs = row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(sum_w_ptr + offs, sum_w)
    if EXTRA:
        # the similarities in it lack the stretch of the row itself
        extra_along *= scale / c * tl.exp2(-exponent)
        tl.store(extra_along_ptr + row, extra_along)
    if (tl.program_id(0) == 0) & (view == 0) & (part == 0):
        tl.store(arrived_ptr, 0)


def launch_backward(batch: Batch, rates: Rates) -> tuple[Tensor, Tensor | None]:
    """(dz of the rows asked for, dtau if tau is on the device)."""
    rows = batch.rows
    tiles = batch.tiles("backward")
    # max |w| is 4 with dloss scaled to 2 at most
    exponent = 13.0 if rows.unit.dtype == torch.float16 else 0.0
    if tiles is None:
        return launch_products(batch, rates, exponent)
    extra = batch.negatives
    row_programs = triton.cdiv(batch.count, tiles.BLOCK_M)
    parts = min(PROGRAMS // (2 * row_programs), 2 * rows.padded // tiles.BLOCK_N // FEWEST_TILES)
    parts = max(parts, 1)
    stride = row_programs * tiles.BLOCK_M
    sum_w = rows.stretch.new_empty(parts, 2 * stride, rows.width)
    extra_along = rows.stretch.new_empty(parts, 2 * stride) if extra else None
    arrived = torch.empty((), dtype=torch.int32, device=batch.z.device)
    _ntxent_bwd_kernel[(row_programs, 2, parts)](
        rows.unit,
        rows.stretch,
        extra.unit if extra else None,
        extra.stretch if extra else None,
        rates.rows,
        batch.tau,
        sum_w,
        extra_along,
        arrived,
        rows.padded,
        extra.images if extra else 0,
        batch.first_image,
        batch.count,
        stride,
        parts,
        exponent,
        WIDTH=rows.width,
        LOGITS=batch.logits,
        ROUNDED=batch.rounded,
        EXTRA=extra is not None,
        TAU_ON_DEVICE=batch.tau_on_device,
        PRECISION=batch.precision,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return launch_finish(batch, rates, sum_w, extra_along, arrived)
