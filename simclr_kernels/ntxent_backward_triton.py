"""GPU kernels of NT-Xent, backward: the sums of weighted rows, from tiles made again.

    sum_w_i = sum_j w_ij z^_j     w_ij = 2^(c s_ij - m) (1 / T_i + 1 / T_j)     over the negatives j

w is symmetric, so that one product per tile gives the complete gradient of a row: 2 U of FLOPs, no
atomics, each program the only writer of its rows. A program owns BLOCK_M rows and streams all
others past them; tiles that may hold a row's own image, in either view, come after the loop, so
that the loop runs without masks. The rows behind the images are zero: they add nothing.

w is formed in float32 and rounded once, to the dtype of the rows. In float16 it is 2^13 times as
large: it is at most 4, and without the factor all weights vanish from 2N = 16384 on.

Where there are too few rows to fill the chip the columns are split, and the parts summed in their
order. The positives and the way back through the normalisation are a kernel of their own
(ntxent_finish_triton.py): in the epilogue of this one they need 255 registers and spill 56 bytes,
where the loop needs 180; what they cost apart is 8 D bytes a row.

Rows too wide for registers (route "weights") take w in blocks of rows, of bounded size, through
matrix products of torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_finish_triton import Rates, launch_finish
from simclr_kernels.ntxent_forward_triton import load_tile, other_tile, own_tiles, similarity
from simclr_kernels.ntxent_rows_triton import (
    BOUNDED,
    LOG2E,
    UNKNOWN,
    Batch,
    UnitRows,
    constant_top,
    inverse_tau,
    is_bounded,
)
from simclr_kernels.ntxent_tile_table import PADDING, Tiles, backward_tiles, weights_tiles

# programs that fill a chip; the same for all, so that all give the same bits
PROGRAMS = 128
FEWEST_TILES = 4  # of a program that has a part of the columns
WEIGHTS_BYTES = 64 << 20


@triton.jit
def _weights(
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
    terms = tl.exp2(logits - offset_m[:, None])
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
    WIDTH: tl.constexpr,
    RUNNING_TOP: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    PARTS: tl.constexpr,
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
    for k in range(part * 2 * others // PARTS, (part + 1) * 2 * others // PARTS):
        view_n, tile = other_tile(k, others, own_first, own_last)
        row_n = view_n * padded + tile * BLOCK_N
        z_n = load_tile(unit_ptr, row_n, WIDTH, BLOCK_N)
        s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        # fmt: off
        w = _weights(
            s, stretch_ptr, rates_ptr, rows, row_n, scale, rate_m, offset_m, exponent,
            RUNNING_TOP, ROUNDED, False, BLOCK_N
        )
        # fmt: on
        sum_w = tl.dot(w.to(z_n.dtype), z_n, sum_w, input_precision=PRECISION)
    masked = own_last - own_first
    for k in range(part * 2 * masked // PARTS, (part + 1) * 2 * masked // PARTS):
        view_n, tile = other_tile(k, masked, 0, 0)
        tile += own_first
        row_n = view_n * padded + tile * BLOCK_N
        z_n = load_tile(unit_ptr, row_n, WIDTH, BLOCK_N)
        s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)
        # fmt: off
        w = _weights(
            s, stretch_ptr, rates_ptr, rows, row_n, scale, rate_m, offset_m, exponent,
            RUNNING_TOP, ROUNDED, False, BLOCK_N
        )
        # fmt: on
        image_m = image + tl.arange(0, BLOCK_M)
        w = tl.where(image_m[:, None] != (tile * BLOCK_N + offs_n)[None, :], w, 0.0)
        sum_w = tl.dot(w.to(z_n.dtype), z_n, sum_w, input_precision=PRECISION)
    if EXTRA:
        tiles = (extras + BLOCK_N - 1) // BLOCK_N
        for k in range(part * tiles // PARTS, (part + 1) * tiles // PARTS):
            z_n = load_tile(extra_ptr, k * BLOCK_N, WIDTH, BLOCK_N)
            s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)
            # fmt: off
            w = _weights(
                s, extra_stretch_ptr, rates_ptr, rows, k * BLOCK_N, scale, rate_m, offset_m, exponent,
                RUNNING_TOP, ROUNDED, True, BLOCK_N
            )
            # fmt: on
            extra_along += tl.sum(w * s, 1)
            sum_w = tl.dot(w.to(z_n.dtype), z_n, sum_w, input_precision=PRECISION)
    return sum_w, extra_along


@triton.jit
def _ntxent_bwd_kernel(
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32: of the rows, if ROUNDED
    extra_ptr,  # (extra_padded, WIDTH) unit rows of further negatives, if EXTRA
    extra_stretch_ptr,
    rates_ptr,  # (3, 2 * padded) float32: rate, top, share
    tau,
    sum_w_ptr,  # (PARTS, 2 * stride, WIDTH) float32, out
    extra_along_ptr,  # (PARTS, 2 * stride) float32, out if EXTRA
    arrived_ptr,  # () int32, out: 0
    padded,
    extras,
    first_image,
    count,
    stride,
    exponent,
    WIDTH: tl.constexpr,
    LOGITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    PARTS: tl.constexpr,
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
    inv_tau = inverse_tau(tau, TAU_ON_DEVICE)
    scale = tl.zeros((BLOCK_M,), tl.float32) + inv_tau * LOG2E
    if ROUNDED:
        scale *= tl.load(stretch_ptr + row_m + offs_m, mask=inside, other=0.0)
    rate_m = tl.load(rates_ptr + row_m + offs_m, mask=inside, other=0.0)
    top_m = tl.zeros((BLOCK_M,), tl.float32) + constant_top(inv_tau)
    bounded = LOGITS == BOUNDED
    if LOGITS != BOUNDED:
        running = tl.load(rates_ptr + 2 * padded + row_m + offs_m, mask=inside, other=0.0)
        if LOGITS == UNKNOWN:
            bounded = is_bounded(inv_tau)
            running = tl.where(bounded, top_m, running)
        top_m = running
    offset_m = top_m - exponent
    # fmt: off
    if bounded:
        sum_w, extra_along = _sweep_columns(
            unit_ptr, stretch_ptr, extra_ptr, extra_stretch_ptr, rates_ptr, padded, extras, image,
            row_m, scale, rate_m, offset_m, exponent, part,
            WIDTH, False, ROUNDED, EXTRA, PARTS, PRECISION, BLOCK_M, BLOCK_N
        )
    else:
        sum_w, extra_along = _sweep_columns(
            unit_ptr, stretch_ptr, extra_ptr, extra_stretch_ptr, rates_ptr, padded, extras, image,
            row_m, scale, rate_m, offset_m, exponent, part,
            WIDTH, True, ROUNDED, EXTRA, PARTS, PRECISION, BLOCK_M, BLOCK_N
        )
    # fmt: on
    sum_w *= tl.exp2(-exponent)
    row = (part * 2 + view) * stride + first + offs_m
    offs = row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(sum_w_ptr + offs, sum_w)
    if EXTRA:
        # the similarities in it lack the stretch of the row itself
        extra_along *= scale / (inv_tau * LOG2E) * tl.exp2(-exponent)
        tl.store(extra_along_ptr + row, extra_along)
    if (tl.program_id(0) == 0) & (view == 0) & (part == 0):
        tl.store(arrived_ptr, 0)


@triton.jit
def _ntxent_weights_kernel(
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32: of the rows, if ROUNDED
    columns_ptr,  # (columns, WIDTH) unit rows: unit_ptr, or further negatives if EXTRA
    columns_stretch_ptr,
    rates_ptr,  # (3, 2 * padded) float32: rate, top
    tau,
    w_ptr,  # (blocks of rows * BLOCK_M, columns) in the dtype of the rows, out
    padded,
    columns,
    first_row,  # of the run, in view-by-view rows of `stride` a view
    stride,
    first_image,
    count,
    exponent,
    WIDTH: tl.constexpr,
    LOGITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of w, of the route that takes it through matrix products."""
    row = first_row + tl.program_id(0) * BLOCK_M
    view = row // stride
    first = row - view * stride
    row_n = tl.program_id(1) * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    inside = first + offs_m < count
    row_m = view * padded + first_image + first
    # fmt: off
    s = similarity(
        unit_ptr, row_m, columns_ptr, row_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )
    # fmt: on
    inv_tau = inverse_tau(tau, TAU_ON_DEVICE)
    scale = tl.zeros((BLOCK_M,), tl.float32) + inv_tau * LOG2E
    if ROUNDED:
        scale *= tl.load(stretch_ptr + row_m + offs_m, mask=inside, other=0.0)
    rate_m = tl.load(rates_ptr + row_m + offs_m, mask=inside, other=0.0)
    top_m = tl.zeros((BLOCK_M,), tl.float32) + constant_top(inv_tau)
    bounded = LOGITS == BOUNDED
    if LOGITS != BOUNDED:
        running = tl.load(rates_ptr + 2 * padded + row_m + offs_m, mask=inside, other=0.0)
        if LOGITS == UNKNOWN:
            bounded = is_bounded(inv_tau)
            running = tl.where(bounded, top_m, running)
        top_m = running
    offset_m = top_m - exponent
    # fmt: off
    if bounded:
        w = _weights(
            s, columns_stretch_ptr, rates_ptr, 2 * padded, row_n, scale, rate_m, offset_m, exponent,
            False, ROUNDED, EXTRA, BLOCK_N
        )
    else:
        w = _weights(
            s, columns_stretch_ptr, rates_ptr, 2 * padded, row_n, scale, rate_m, offset_m, exponent,
            True, ROUNDED, EXTRA, BLOCK_N
        )
    # fmt: on
    if not EXTRA:
        image_m = first_image + first + offs_m
        image_n = row_n % padded + offs_n
        w = tl.where(image_m[:, None] != image_n[None, :], w, 0.0)
    at = (tl.program_id(0) * BLOCK_M + offs_m).to(tl.int64)[:, None] * columns
    tl.store(w_ptr + at + (row_n + offs_n)[None, :], w.to(w_ptr.dtype.element_ty))


def launch_backward(batch: Batch, rates: Rates) -> tuple[Tensor, Tensor | None]:
    """(dz of the rows asked for, dtau if tau is on the device)."""
    rows = batch.rows
    tiles = backward_tiles(batch.architecture, rows.unit.dtype, batch.precision, rows.width)
    # max |w| is 4 with dloss scaled to 2 at most
    exponent = 13.0 if rows.unit.dtype == torch.float16 else 0.0
    if tiles is None:
        return _backward_through_products(batch, rates, exponent)
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
        exponent,
        WIDTH=rows.width,
        LOGITS=batch.logits,
        ROUNDED=batch.rounded,
        EXTRA=extra is not None,
        PARTS=parts,
        TAU_ON_DEVICE=batch.tau_on_device,
        PRECISION=batch.precision,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return launch_finish(batch, rates, sum_w, extra_along, arrived)


def _backward_through_products(
    batch: Batch, rates: Rates, exponent: float
) -> tuple[Tensor, Tensor | None]:
    """w in blocks of rows, each taken through a matrix product while it is in the cache."""
    rows = batch.rows
    tiles = weights_tiles(batch.architecture, rows.unit.dtype, batch.precision)
    stride = triton.cdiv(batch.count, tiles.BLOCK_M) * tiles.BLOCK_M
    sum_w = rows.stretch.new_empty(1, 2 * stride, rows.width)
    extra_along = rows.stretch.new_empty(1, 2 * stride) if batch.negatives else None
    columns = 2 * rows.padded
    block = WEIGHTS_BYTES // (columns * rows.unit.element_size())
    block = max(block // tiles.BLOCK_M, 1) * tiles.BLOCK_M
    down = 2.0**-exponent
    for first in range(0, 2 * stride, block):
        run = slice(first, min(first + block, 2 * stride))
        w = _launch_weights(batch, rates, tiles, stride, run, exponent, rows)
        torch.mul(_product(w, rows.unit[:columns]), down, out=sum_w[0, run])
        if batch.negatives:
            w = _launch_weights(batch, rates, tiles, stride, run, exponent, batch.negatives)
            added = _product(w, batch.negatives.unit[: w.shape[1]]) * down
            sum_w[0, run] += added
            extra_along[0, run] = (added * _stretched_rows(batch, stride, run)).sum(1)
    arrived = torch.zeros((), dtype=torch.int32, device=batch.z.device)
    return launch_finish(batch, rates, sum_w, extra_along, arrived)


def _launch_weights(
    batch: Batch,
    rates: Rates,
    tiles: Tiles,
    stride: int,
    run: slice,
    exponent: float,
    columns: UnitRows,
) -> Tensor:
    """(rows of the run, columns) weights in the dtype of the rows, all of `columns` or all rows."""
    rows = batch.rows
    width = columns.unit.shape[0] - PADDING
    w = rows.unit.new_empty(run.stop - run.start, width)
    _ntxent_weights_kernel[(w.shape[0] // tiles.BLOCK_M, width // tiles.BLOCK_N)](
        rows.unit,
        rows.stretch,
        columns.unit,
        columns.stretch,
        rates.rows,
        batch.tau,
        w,
        rows.padded,
        width,
        run.start,
        stride,
        batch.first_image,
        batch.count,
        exponent,
        WIDTH=rows.width,
        LOGITS=batch.logits,
        ROUNDED=batch.rounded,
        EXTRA=columns is not rows,
        TAU_ON_DEVICE=batch.tau_on_device,
        PRECISION=batch.precision,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_D=tiles.BLOCK_D,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return w


def _product(w: Tensor, rows: Tensor) -> Tensor:
    """w @ rows, summed in float32; float32 operands follow torch's switch as they find it."""
    if w.dtype == torch.float32:
        return w @ rows
    if w.is_cuda:
        return torch.mm(w, rows, out_dtype=torch.float32)
    return w.float() @ rows.float()


def _stretched_rows(batch: Batch, stride: int, run: slice) -> Tensor:
    """The rows of the run as the similarities have them, in float32."""
    row = torch.arange(run.start, run.stop, device=batch.z.device)
    view = row // stride
    at = view * batch.rows.padded + batch.first_image + row - view * stride
    return batch.rows.unit[at].float() * batch.rows.stretch[at, None]
