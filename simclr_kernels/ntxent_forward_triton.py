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

The rows kernel owns BLOCK_M rows and sweeps all columns: for what the triangle does not serve, a
running maximum (small tau, plain dot products), extra negatives, metrics, and the rows of one rank.
Tiles exist in registers only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_rows_triton import (
    BOUNDED,
    LN2,
    LOG2E,
    UNKNOWN,
    Batch,
    constant_top,
    inverse_tau,
    is_bounded,
    source_row,
)
from simclr_kernels.ntxent_tile_table import rows_tiles, triangle_tiles

BLOCKS_OF_A_VIEW = 16  # 528 programs for both: 4 for each of 132 multiprocessors


@triton.jit
def load_tile(unit_ptr, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Whole rows [row, row + BLOCK) of the padded unit rows."""
    offs = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(unit_ptr + tl.cast(row, tl.int64) * WIDTH + offs)


@triton.jit
def similarity(
    m_ptr,
    row_m,
    n_ptr,
    row_n,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] by chunks of BLOCK_D features, where whole rows do not fit."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    m_ptrs = (
        m_ptr + tl.cast(row_m, tl.int64) * WIDTH + tl.arange(0, BLOCK_M)[:, None] * WIDTH + offs_d
    )
    n_ptrs = (
        n_ptr + tl.cast(row_n, tl.int64) * WIDTH + tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_d
    )
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, WIDTH, BLOCK_D):
        s = tl.dot(tl.load(m_ptrs), tl.trans(tl.load(n_ptrs)), s, input_precision=PRECISION)
        m_ptrs += BLOCK_D
        n_ptrs += BLOCK_D
    return s


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
        if BLOCK_D == WIDTH:
            z_n = load_tile(unit_ptr, start_n, WIDTH, BLOCK_N)
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
                s = similarity(
                    unit_ptr,
                    start_m,
                    unit_ptr,
                    start_n,
                    WIDTH,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                )
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
    inv_tau = inverse_tau(tau, TAU_ON_DEVICE)
    if LOGITS == UNKNOWN:
        if not is_bounded(inv_tau):
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
    c = inv_tau * LOG2E
    top = constant_top(inv_tau)
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


@triton.jit
def own_tiles(image, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The range of tiles of a view that may hold one of the images [image, image + BLOCK_M)."""
    return image // BLOCK_N, tl.minimum((image + BLOCK_M + BLOCK_N - 1) // BLOCK_N, tiles)


@triton.jit
def other_tile(k, others, first, last):
    """(view, tile) of the k-th of the `others` tiles of each view outside [first, last)."""
    view = tl.where(k >= others, 1, 0)
    tile = k - view * others
    return view, tile + tl.where(tile >= first, last - first, 0)


@triton.jit
def _add_terms(
    logits, top, total, largest, moment, fixed, RUNNING_TOP: tl.constexpr, METRICS: tl.constexpr
):
    """Adds one tile of logits in base 2, -inf where a column is no negative."""
    tile_top = tl.max(logits, 1)
    if RUNNING_TOP:
        # finite, so that a row without negatives so far does not subtract infinities
        higher = tl.maximum(tl.maximum(top, tile_top), -3.4e38)
        higher = tl.where(fixed, top, higher)
        total *= tl.exp2(top - higher)
        if METRICS:
            moment *= tl.exp2(top - higher)
        top = higher
    terms = tl.exp2(logits - top[:, None])
    total += tl.sum(terms, 1)
    if METRICS:
        largest = tl.maximum(largest, tile_top)
        moment += tl.sum(tl.where(logits > float("-inf"), terms * logits, 0.0), 1)
    return top, total, largest, moment


@triton.jit
def _ntxent_fwd_rows_kernel(
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32: of the rows, if ROUNDED
    extra_ptr,  # (extra_padded, WIDTH) unit rows of further negatives, if EXTRA
    extra_stretch_ptr,
    tau,
    pos_ptr,  # (padded,) float32
    top_ptr,  # (2 * padded,) float32, out: the maximum m of each row asked for
    mass_ptr,  # (2 * padded,) float32, out: sum of 2^(logit - m)
    metrics_ptr,  # (3, 2 * count) float32, out if METRICS: positive, largest, entropy, in nats
    images,
    padded,
    half,
    extras,
    first_image,
    count,
    WIDTH: tl.constexpr,
    LOGITS: tl.constexpr,
    ALONE: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    METRICS: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums the negatives of BLOCK_M rows of one view over all columns."""
    inv_tau = inverse_tau(tau, TAU_ON_DEVICE)
    fixed = False
    if LOGITS == UNKNOWN:
        fixed = is_bounded(inv_tau)
        if not ALONE:
            if fixed:
                return
    RUNNING_TOP: tl.constexpr = LOGITS != BOUNDED
    first = tl.program_id(0) * BLOCK_M
    view = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    image_m = first_image + first + offs_m
    inside = first + offs_m < count
    row_m = view * padded + first_image + first
    scale = tl.zeros((BLOCK_M,), tl.float32) + inv_tau * LOG2E
    if ROUNDED:
        scale *= tl.load(stretch_ptr + row_m + offs_m, mask=inside, other=0.0)
    top = tl.zeros((BLOCK_M,), tl.float32) + constant_top(inv_tau)
    if RUNNING_TOP:
        top = tl.where(fixed, top, float("-inf"))
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)

    # whole tiles without an image of these rows go unmasked, then the others
    whole = images // BLOCK_N
    tiles = (images + BLOCK_N - 1) // BLOCK_N
    own_first, own_last = own_tiles(first_image + first, tiles, BLOCK_M, BLOCK_N)
    others = whole - (tl.minimum(own_last, whole) - own_first)
    for k in range(0, 2 * others):
        view_n, tile = other_tile(k, others, own_first, own_last)
        row_n = view_n * padded + tile * BLOCK_N
        # fmt: off
        s = similarity(
            unit_ptr, row_m, unit_ptr, row_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
        )
        # fmt: on
        if ROUNDED:
            s *= tl.load(stretch_ptr + row_n + offs_n)[None, :]
        logits = s * scale[:, None]
        top, total, largest, moment = _add_terms(
            logits, top, total, largest, moment, fixed, RUNNING_TOP, METRICS
        )
    masked = own_last - own_first + tl.where((whole < tiles) & (own_last <= whole), 1, 0)
    for k in range(0, 2 * masked):
        view_n, tile = other_tile(k, masked, 0, 0)
        tile = tl.where(tile < own_last - own_first, own_first + tile, whole)
        row_n = view_n * padded + tile * BLOCK_N
        # fmt: off
        s = similarity(
            unit_ptr, row_m, unit_ptr, row_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
        )
        # fmt: on
        if ROUNDED:
            s *= tl.load(stretch_ptr + row_n + offs_n)[None, :]
        image_n = tile * BLOCK_N + offs_n
        negative = (image_m[:, None] != image_n[None, :]) & (image_n < images)[None, :]
        logits = tl.where(negative, s * scale[:, None], float("-inf"))
        top, total, largest, moment = _add_terms(
            logits, top, total, largest, moment, fixed, RUNNING_TOP, METRICS
        )
    if EXTRA:
        for start_n in range(0, extras, BLOCK_N):
            # fmt: off
            s = similarity(
                unit_ptr, row_m, extra_ptr, start_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
            )
            # fmt: on
            if ROUNDED:
                s *= tl.load(extra_stretch_ptr + start_n + offs_n)[None, :]
            negative = (start_n + offs_n < extras)[None, :]
            logits = tl.where(negative, s * scale[:, None], float("-inf"))
            top, total, largest, moment = _add_terms(
                logits, top, total, largest, moment, fixed, RUNNING_TOP, METRICS
            )

    tl.store(top_ptr + row_m + offs_m, top, mask=inside)
    tl.store(mass_ptr + row_m + offs_m, total, mask=inside)
    if METRICS:
        pos = tl.load(pos_ptr + image_m, mask=inside, other=0.0) * LOG2E
        higher = tl.maximum(top, pos)
        total *= tl.exp2(top - higher)
        moment *= tl.exp2(top - higher)
        positive = tl.exp2(pos - higher)
        total += positive
        entropy = (higher + tl.log2(total) - (moment + pos * positive) / total) * LN2
        source = source_row(image_m, view, half) - source_row(first_image, 0, half)
        tl.store(metrics_ptr + source, pos * LN2, mask=inside)
        tl.store(metrics_ptr + 2 * count + source, largest * LN2, mask=inside)
        tl.store(metrics_ptr + 4 * count + source, entropy, mask=inside)


def launch_triangle(batch: Batch) -> Tensor:
    """(parts, 2 * padded) float32: the sums of the negatives, for all rows; needs bounded logits."""
    rows = batch.rows
    tiles = triangle_tiles(batch.architecture, rows.unit.dtype, batch.precision, rows.width)
    tiles_of_a_view = rows.padded // tiles.BLOCK_N
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
        tiles_of_a_block * tiles.BLOCK_N,
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


def launch_rows(
    batch: Batch, with_metrics: bool, mass: Tensor, alone: bool = True
) -> tuple[Tensor, Tensor]:
    """(top (2 * padded,), metrics (3, rows asked for)) float32; the sums go to mass (2 * padded,).

    Unless alone, the triangle has been launched for the case that the logits are bounded.
    """
    rows, extra = batch.rows, batch.negatives
    tiles = rows_tiles(batch.architecture, rows.unit.dtype, batch.precision, rows.width)
    top = torch.empty_like(mass)
    metrics = mass.new_empty(3, 2 * batch.count if with_metrics else 0)
    _ntxent_fwd_rows_kernel[(triton.cdiv(batch.count, tiles.BLOCK_M), 2)](
        rows.unit,
        rows.stretch,
        extra.unit if extra else None,
        extra.stretch if extra else None,
        batch.tau,
        batch.pos,
        top,
        mass,
        metrics if with_metrics else None,
        rows.images,
        rows.padded,
        batch.half,
        extra.images if extra else 0,
        batch.first_image,
        batch.count,
        WIDTH=rows.width,
        LOGITS=batch.logits,
        ALONE=alone,
        ROUNDED=batch.rounded,
        EXTRA=extra is not None,
        METRICS=with_metrics,
        TAU_ON_DEVICE=batch.tau_on_device,
        PRECISION=batch.precision,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_D=tiles.BLOCK_D,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return top, metrics
