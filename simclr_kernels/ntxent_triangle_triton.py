"""GPU kernels of NT-Xent, forward: the sums over the negatives of each row, in base 2.

    L_i = sum_j 2^(c s_ij - m_i)      c = log2(e) / tau, over the negatives j of row i

Unit rows are at most 1 in similarity, so from tau = 0.0128 on m_i is the constant max(c - 100, 0):
then c s - m lies in [-126, 100] and neither a term nor a sum of 2^27 of them leaves float32.

The triangle. s is symmetric: each tile is made once and serves its rows and its columns, 0.5 U of
FLOPs (U = 2 M^2 D) and M^2 / 2 exponentials. The rows of each view are cut into up to 16 blocks;
the program of blocks (I <= J) sweeps their rectangle and is the only writer of `partial[J, rows of
I]` and `partial[I, rows of J]`: no atomics, the same bits in every run and on every GPU. It holds
BLOCK_N rows of J and streams the rows of I past them in tiles of BLOCK_M. What a tile adds to the
held rows stays in registers, elementwise, until the sweep ends; only the streamed rows, whose sums
need no other warp, are summed in each tile. A row meets itself only where J = I, and its positive
only where the two are the same block of the two views: all other programs run without masks.

Tiles exist in registers only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_rows_triton import (
    UNKNOWN,
    Batch,
    constant_top,
    held_rows,
    is_bounded,
    load_tile,
    logits_per_similarity,
    similarity,
)

BLOCKS_OF_A_VIEW = 16  # 528 programs for both: 4 for each of 132 multiprocessors


@triton.jit
def _sweep_rectangle(
    unit_ptr,
    stretch_ptr,
    row_sums_ptr,
    column_sums_ptr,
    first_m,
    last_m,
    first_n,
    last_n,
    c,
    top,
    images,
    padded,
    store_rows,
    WIDTH: tl.constexpr,
    ROUNDED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows [first_m, last_m) against rows [first_n, last_n), each within one view."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    for start_n in range(first_n, last_n, BLOCK_N):
        z_n = held_rows(unit_ptr, start_n, WIDTH, BLOCK_N, BLOCK_D)
        if ROUNDED:
            stretch_n = tl.load(stretch_ptr + start_n + offs_n)
        if MASKED:
            image_n = start_n % padded + offs_n
            # of a row behind the images: equal to no row's
            image_n = tl.where(image_n < images, image_n, -1)
        column_terms = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_m in range(first_m, last_m, BLOCK_M):
            if BLOCK_D == WIDTH:
                z_m = load_tile(unit_ptr, start_m, WIDTH, BLOCK_M)
                s = tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            else:
                # fmt: off
                s = similarity(
                    start_m, unit_ptr, start_m, unit_ptr, start_n, WIDTH, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_D
                )
                # fmt: on
            if ROUNDED:
                scale_m = c * tl.load(stretch_ptr + start_m + offs_m)
                logits = s * stretch_n[None, :] * scale_m[:, None] - top
            else:
                logits = s * c - top
            if MASKED:
                image_m = start_m % padded + offs_m
                negative = (image_m < images)[:, None] & (image_n >= 0)[None, :]
                negative &= image_m[:, None] != image_n[None, :]
                logits = tl.where(negative, logits, float("-inf"))
            terms = tl.exp2(logits)
            column_terms += terms
            if store_rows:
                sums = tl.sum(terms, 1)
                ptrs = row_sums_ptr + start_m + offs_m
                if start_n > first_n:
                    sums += tl.load(ptrs)
                tl.store(ptrs, sums)
        tl.store(column_sums_ptr + start_n + offs_n, tl.sum(column_terms, 0))
        # the next sweep adds to the row sums that this one stored
        tl.debug_barrier()


@triton.jit
def _ntxent_fwd_triangle_kernel(
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32: of the rows, if ROUNDED
    tau,
    partial_ptr,  # (2 * blocks, 2 * padded) float32, out
    images,
    padded,
    blocks,  # of a view
    block_rows,
    WIDTH: tl.constexpr,
    LOGITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sweeps one rectangle of the triangle of blocks: see the module."""
    c = logits_per_similarity(tau, TAU_ON_DEVICE)
    if LOGITS == UNKNOWN:
        if not is_bounded(c):
            return
    # row y of the triangle and the row as far from its end fill one row of the grid
    x, y = tl.program_id(0), tl.program_id(1)
    ends = 2 * blocks - y
    block_m = tl.where(x < ends, y, ends - 1)
    block_n = tl.where(x < ends, y + x, x - 1)
    view_m, view_n = block_m // blocks, block_n // blocks
    image_m, image_n = (block_m % blocks) * block_rows, (block_n % blocks) * block_rows
    last_m = tl.minimum(image_m + block_rows, padded)
    last_n = tl.minimum(image_n + block_rows, padded)
    masked = (image_m == image_n) | (last_m > images) | (last_n > images)
    first_m, last_m = view_m * padded + image_m, view_m * padded + last_m
    first_n, last_n = view_n * padded + image_n, view_n * padded + last_n
    row_sums_ptr = partial_ptr + tl.cast(block_n, tl.int64) * (2 * padded)
    column_sums_ptr = partial_ptr + tl.cast(block_m, tl.int64) * (2 * padded)
    top = constant_top(c)
    # a block with itself is swept whole, for its columns
    store_rows = block_m != block_n
    # fmt: off
    if masked:
        _sweep_rectangle(
            unit_ptr, stretch_ptr, row_sums_ptr, column_sums_ptr, first_m, last_m, first_n, last_n,
            c, top, images, padded, store_rows, WIDTH, ROUNDED, True, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D
        )
    else:
        _sweep_rectangle(
            unit_ptr, stretch_ptr, row_sums_ptr, column_sums_ptr, first_m, last_m, first_n, last_n,
            c, top, images, padded, store_rows, WIDTH, ROUNDED, False, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D
        )
    # fmt: on


def launch_triangle(batch: Batch) -> Tensor:
    """(parts, 2 * padded) float32: the sums of the negatives of all rows, if logits are bounded."""
    rows = batch.rows
    tiles = batch.tiles("triangle")
    # a block holds whole tiles both ways
    step = max(tiles.BLOCK_M, tiles.BLOCK_N)
    tiles_of_a_view = rows.padded // step
    tiles_of_a_block = triton.cdiv(tiles_of_a_view, BLOCKS_OF_A_VIEW)
    blocks = triton.cdiv(tiles_of_a_view, tiles_of_a_block)
    partial = rows.stretch.new_empty(2 * blocks, 2 * rows.padded)
    _ntxent_fwd_triangle_kernel[(2 * blocks + 1, blocks)](
        rows.unit,
        rows.stretch,
        batch.tau,
        partial,
        rows.images,
        rows.padded,
        blocks,
        tiles_of_a_block * step,
        WIDTH=rows.width,
        LOGITS=batch.logits,
        ROUNDED=batch.rounded,
        TAU_ON_DEVICE=batch.tau_on_device,
        PRECISION=batch.precision,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_D=tiles.BLOCK_D,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return partial
