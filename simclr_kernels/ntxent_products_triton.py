"""NT-Xent backward on a GPU for rows too wide to be kept in registers, and for IEEE float32.

A kernel writes w for a block of rows, in the dtype of the rows; torch multiplies it with the unit
rows. 2 U of FLOPs as in ntxent_backward_triton.py, and the block is of bounded size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_finish_triton import Rates, launch_finish
from simclr_kernels.ntxent_rows_triton import (
    Batch,
    UnitRows,
    held_rows,
    logits_per_similarity,
    similarity,
)
from simclr_kernels.ntxent_tile_table import PADDING, Tiles
from simclr_kernels.ntxent_weights_triton import as_operand, row_operands, weights

# of w at a time, or one block of rows of it
WEIGHTS_BYTES = 64 << 20


@triton.jit
def _ntxent_weights_kernel(
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32: of the rows, if ROUNDED
    columns_ptr,  # (columns, WIDTH) unit rows: unit_ptr, or further negatives if EXTRA
    columns_stretch_ptr,
    rates_ptr,  # (3, 2 * padded) float32: rate, top
    tau,
    w_ptr,  # (blocks of rows * BLOCK_M, columns) in the dtype of the rows, out
    arrived_ptr,  # () int32, out: 0
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
    block = tl.program_id(1)
    row = first_row + block * BLOCK_M
    view = row // stride
    first = row - view * stride
    row_n = tl.program_id(0) * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    inside = first + offs_m < count
    row_m = view * padded + first_image + first
    # fmt: off
    z_m = held_rows(unit_ptr, row_m, WIDTH, BLOCK_M, BLOCK_D)
    s = similarity(
        z_m, unit_ptr, row_m, columns_ptr, row_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )
    # fmt: on
    c = logits_per_similarity(tau, TAU_ON_DEVICE)
    # fmt: off
    scale, rate_m, offset_m, bounded = row_operands(
        stretch_ptr, rates_ptr, row_m, inside, 2 * padded, c, exponent,
        LOGITS, ROUNDED, BLOCK_M
    )
    # fmt: on
    # fmt: off
    if bounded:
        w = weights(
            s, columns_stretch_ptr, rates_ptr, 2 * padded, row_n, scale, rate_m, offset_m, exponent,
            False, ROUNDED, EXTRA, BLOCK_N
        )
    else:
        w = weights(
            s, columns_stretch_ptr, rates_ptr, 2 * padded, row_n, scale, rate_m, offset_m, exponent,
            True, ROUNDED, EXTRA, BLOCK_N
        )
    # fmt: on
    if not EXTRA:
        # a row's own image is no negative of it
        image_m = first_image + first + offs_m
        image_n = row_n % padded + offs_n
        w = tl.where(image_m[:, None] != image_n[None, :], w, 0.0)
    at = (block * BLOCK_M + offs_m).to(tl.int64)[:, None] * columns
    w = as_operand(w, w_ptr.dtype.element_ty, PRECISION)
    tl.store(w_ptr + at + (row_n + offs_n)[None, :], w)
    if (row_n == 0) & (block == 0):
        tl.store(arrived_ptr, 0)


def launch_products(batch: Batch, rates: Rates, exponent: float) -> tuple[Tensor, Tensor | None]:
    """See launch_backward; w times 2^exponent fits its dtype."""
    rows = batch.rows
    tiles = batch.tiles("weights")
    stride = triton.cdiv(batch.count, tiles.BLOCK_M) * tiles.BLOCK_M
    sum_w = rows.stretch.new_empty(1, 2 * stride, rows.width)
    extra_along = rows.stretch.new_empty(1, 2 * stride) if batch.negatives else None
    columns = 2 * rows.padded
    block = WEIGHTS_BYTES // (columns * rows.unit.element_size())
    block = max(block // tiles.BLOCK_M, 1) * tiles.BLOCK_M
    arrived = torch.empty((), dtype=torch.int32, device=batch.z.device)
    down = 2.0**-exponent
    for first in range(0, 2 * stride, block):
        run = slice(first, min(first + block, 2 * stride))
        w = _launch_weights(batch, rates, tiles, stride, run, exponent, rows, arrived)
        _multiply(w, rows.unit[:columns], down, out=sum_w[0, run])
        if batch.negatives:
            del w
            extra = batch.negatives
            w = _launch_weights(batch, rates, tiles, stride, run, exponent, extra, arrived)
            added = torch.empty_like(sum_w[0, run])
            _multiply(w, extra.unit[: w.shape[1]], down, out=added)
            sum_w[0, run] += added
            extra_along[0, run] = (added * _stretched_rows(batch, stride, run)).sum(1)
        # before the next block is made
        del w
    return launch_finish(batch, rates, sum_w, extra_along, arrived)


def _launch_weights(
    batch: Batch,
    rates: Rates,
    tiles: Tiles,
    stride: int,
    run: slice,
    exponent: float,
    columns: UnitRows,
    arrived: Tensor,
) -> Tensor:
    """(rows of the run, columns) weights in the dtype of the rows; columns are all rows or others.

    Sets arrived to 0.
    """
    rows = batch.rows
    width = columns.unit.shape[0] - PADDING
    w = rows.unit.new_empty(run.stop - run.start, width)
    _ntxent_weights_kernel[(width // tiles.BLOCK_N, w.shape[0] // tiles.BLOCK_M)](
        rows.unit,
        rows.stretch,
        columns.unit,
        columns.stretch,
        rates.rows,
        batch.tau,
        w,
        arrived,
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


def _multiply(w: Tensor, rows: Tensor, down: float, out: Tensor) -> None:
    """out = down w @ rows, summed in float32; float32 operands follow torch's switch as it is."""
    if w.dtype == torch.float32:
        # down is 1; autocast leaves alone what has an output
        torch.mm(w, rows, out=out)
    elif w.is_cuda:
        torch.mul(torch.mm(w, rows, out_dtype=torch.float32), down, out=out)
    else:
        torch.mul(w.float() @ rows.float(), down, out=out)


def _stretched_rows(batch: Batch, stride: int, run: slice) -> Tensor:
    """The rows of the run as the similarities have them, in float32."""
    row = torch.arange(run.start, run.stop, device=batch.z.device)
    view = row // stride
    at = view * batch.rows.padded + batch.first_image + row - view * stride
    return batch.rows.unit[at].float() * batch.rows.stretch[at, None]
