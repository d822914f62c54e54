"""GPU kernel of NT-Xent, forward, row by row: for what the triangle of blocks does not serve.

A running maximum (small tau, plain dot products), extra negatives, metrics, and the rows of one
rank. A program owns BLOCK_M rows and sweeps all columns; tiles that may hold a row's own image, in
either view, and the last one come after the loop, so that the loop runs without masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_rows_triton import (
    BOUNDED,
    LN2,
    UNKNOWN,
    Batch,
    constant_top,
    held_rows,
    is_bounded,
    logits_per_similarity,
    other_tile,
    own_tiles,
    similarity,
    source_row,
)


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
    pos_ptr,  # (padded,) float32: in base 2
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
    c = logits_per_similarity(tau, TAU_ON_DEVICE)
    fixed = False
    if LOGITS == UNKNOWN:
        fixed = is_bounded(c)
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
    z_m = held_rows(unit_ptr, row_m, WIDTH, BLOCK_M, BLOCK_D)
    scale = tl.zeros((BLOCK_M,), tl.float32) + c
    if ROUNDED:
        scale *= tl.load(stretch_ptr + row_m + offs_m, mask=inside, other=0.0)
    top = tl.zeros((BLOCK_M,), tl.float32) + constant_top(c)
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
            z_m, unit_ptr, row_m, unit_ptr, row_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
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
            z_m, unit_ptr, row_m, unit_ptr, row_n, WIDTH, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
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
                z_m, unit_ptr, row_m, extra_ptr, start_n, WIDTH, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_D
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
        pos = tl.load(pos_ptr + image_m, mask=inside, other=0.0)
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


def launch_rows(
    batch: Batch, with_metrics: bool, mass: Tensor, alone: bool = True
) -> tuple[Tensor, Tensor]:
    """(top (2 * padded,), metrics (3, rows asked for)) float32; the sums go to mass (2 * padded,).

    Unless alone, the triangle has been launched for the case that the logits are bounded.
    """
    rows, extra = batch.rows, batch.negatives
    tiles = batch.tiles("rows")
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
