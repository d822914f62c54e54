"""GPU kernels of NT-Xent that end a pass, row by row in float32.

Forward: from the sums of a row's negatives its loss and what its gradient needs. Backward: adds the
positives to the sums of weighted rows, and goes back through the normalisation. The formulas are in
ntxent.py, the layout of rows in ntxent_rows_triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_rows_triton import (
    BOUNDED,
    LN2,
    RUNNING,
    UNKNOWN,
    Batch,
    constant_top,
    is_bounded,
    logits_per_similarity,
    row_blocks,
    source_row,
)

BLOCK = 256  # rows of a program that reads no whole rows


@triton.jit
def _sum_over_programs(value, sums_ptr, arrived_ptr, BLOCK: tl.constexpr):
    """(whether this program is the last to come here, then the sum of all values).

    In the order of the programs, whoever comes last: the same bits in every run.
    """
    programs = tl.num_programs(0)
    tl.store(sums_ptr + tl.program_id(0), value)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    last = arrived == programs - 1
    total = tl.zeros((BLOCK,), tl.float32)
    if last:
        for start in range(0, programs, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            total += tl.load(sums_ptr + offs, mask=offs < programs, other=0.0, cache_modifier=".cg")
    return last, tl.sum(total)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 to float32 rounding: 2 artanh(x / (2 + x)) as a series."""
    t = x / (2.0 + x)
    y = t * t
    tail = 1.0 / 7 + y * (1.0 / 9 + y * (1.0 / 11 + y * (1.0 / 13)))
    return 2.0 * t * (1.0 + y * (1.0 / 3 + y * (1.0 / 5 + y * tail)))


@triton.jit
def _combine_kernel(
    tau,
    pos_ptr,  # (padded,) float32: logit of the positive in base 2
    top_ptr,  # (2 * padded,) float32: maximum of the negatives in base 2, unless bounded
    partial_ptr,  # (parts, 2 * padded) float32: sums of the negatives in units of 2^top
    loss_ptr,  # (2 * images,) float32 in source order, or () for their sum times scale: out
    stats_ptr,  # (3, 2 * padded) float32, out: 1 / total, top, negative share
    sums_ptr,  # (programs,) float32
    arrived_ptr,  # () int32
    images,
    padded,
    half,
    parts,
    scale,
    LOGITS: tl.constexpr,
    PER_ROW: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the sums of its negatives, each row's loss and what its gradient needs.

    total 2^top sums exp(logit) over all candidates; 1 / total is 0 in the rows behind the images.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = 2 * padded
    view = row // padded
    image = row - view * padded
    inside = (row < rows) & (image < images)
    c = logits_per_similarity(tau, TAU_ON_DEVICE)
    top = tl.zeros((BLOCK,), tl.float32) + constant_top(c)
    if LOGITS == RUNNING:
        top = tl.load(top_ptr + row, mask=inside, other=0.0)
    if LOGITS == UNKNOWN:
        running = tl.load(top_ptr + row, mask=inside, other=0.0)
        top = tl.where(is_bounded(c), top, running)
        parts = tl.where(is_bounded(c), parts, 1)
    negatives = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = partial_ptr + row
    for _ in range(0, parts):
        negatives += tl.load(part_ptrs, mask=inside, other=0.0)
        part_ptrs += rows

    pos = tl.load(pos_ptr + image, mask=inside, other=0.0)
    excess = (top - pos + tl.log2(negatives)) * LN2
    # softplus; the comparison keeps NaN, and an excess of -inf (no negatives) gives 0
    grown = tl.exp(-tl.abs(excess))
    loss = tl.where(excess < 0, 0.0, excess) + _log1p(grown)
    if LOGITS != BOUNDED:
        # as a comparison, so that NaN stays
        higher = tl.where(pos > top, pos, top)
        if LOGITS == UNKNOWN:
            # backward expects the constant, which the positive may exceed
            higher = tl.where(is_bounded(c), top, higher)
        negatives *= tl.exp2(top - higher)
        top = higher
    total = negatives + tl.exp2(pos - top)
    tl.store(stats_ptr + row, tl.where(inside, 1.0 / total, 0.0), mask=row < rows)
    tl.store(stats_ptr + rows + row, tl.where(inside, top, 0.0), mask=row < rows)
    tl.store(stats_ptr + 2 * rows + row, negatives / total, mask=inside)
    if PER_ROW:
        tl.store(loss_ptr + source_row(image, view, half), loss, mask=inside)
    else:
        value = tl.sum(tl.where(inside, loss, 0.0))
        last, value = _sum_over_programs(value, sums_ptr, arrived_ptr, BLOCK)
        if last:
            tl.store(loss_ptr, value * scale)


@triton.jit
def _rates_kernel(
    dloss_ptr,  # (2 * images,) float32, source order
    largest_ptr,  # () float32: max |dloss|
    stats_ptr,  # (3, 2 * padded) float32
    rates_ptr,  # (3, 2 * padded) float32, out: dloss / total, top, dloss * negative share
    down_ptr,  # () float32, out: what takes back the power of two in dloss
    images,
    padded,
    half,
    BLOCK: tl.constexpr,
):
    """Upstream gradients of rows into their stats, scaled so that the largest lies in [1, 2)."""
    exponent = (tl.load(largest_ptr).to(tl.int32, bitcast=True) >> 23) & 0xFF
    # a maximum of 0, or near the ends of float32, is scaled by less
    exponent = tl.minimum(tl.maximum(exponent, 30), 224)
    up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = 2 * padded
    view = row // padded
    image = row - view * padded
    inside = (row < rows) & (image < images)
    dloss = tl.load(dloss_ptr + source_row(image, view, half), mask=inside, other=0.0) * up
    stored = row < rows
    rate = tl.load(stats_ptr + row, mask=inside, other=0.0) * dloss
    tl.store(rates_ptr + row, rate, mask=stored)
    # finite behind the images too, where a rate of 0 stands beside it
    top = tl.load(stats_ptr + rows + row, mask=inside, other=0.0)
    tl.store(rates_ptr + rows + row, top, mask=stored)
    share = tl.load(stats_ptr + 2 * rows + row, mask=inside, other=0.0) * dloss
    tl.store(rates_ptr + 2 * rows + row, share, mask=stored)
    if tl.program_id(0) == 0:
        tl.store(down_ptr, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def _load_rows(ptr, row, inside, offs_d, D: tl.constexpr):
    mask = inside[:, None] & (offs_d < D)[None, :]
    offs = row.to(tl.int64)[:, None] * D + offs_d[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish_kernel(
    sum_w_ptr,  # (parts, 2 * stride, WIDTH) float32: rows asked for, view by view
    extra_along_ptr,  # (parts, 2 * stride) float32: sum of w s over extra negatives, if EXTRA
    z_ptr,  # (2 * images, D) as given
    unit_ptr,  # (2 * padded, WIDTH) unit rows
    stretch_ptr,  # (2 * padded,) float32
    inv_norm_ptr,  # (2 * padded,) float32
    tau,
    rates_ptr,  # (3, 2 * padded) float32: see Rates
    dloss_ptr,  # () float32
    dz_ptr,  # (2 * count, D) in the dtype of z, out
    dtau_ptr,  # () float32, out, if WITH_DTAU
    sums_ptr,  # (programs,) float32
    arrived_ptr,  # () int32
    parts,
    stride,
    count,
    first_image,
    padded,
    half,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXTRA: tl.constexpr,
    WITH_DTAU: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """Sums the parts, adds the positives, goes back through the normalisation; sums dtau."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    view = row // stride
    image = row - view * stride
    inside = (view < 2) & (image < count)
    mask = inside[:, None] & (offs_d < WIDTH)[None, :]
    sum_w = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    part_ptrs = sum_w_ptr + row.to(tl.int64)[:, None] * WIDTH + offs_d[None, :]
    for _ in range(0, parts):
        sum_w += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += tl.cast(stride, tl.int64) * (2 * WIDTH)
    inv_tau = logits_per_similarity(tau, TAU_ON_DEVICE) * LN2
    scale *= tl.load(dloss_ptr)

    image += first_image
    at = view * padded + image
    inv_norm = tl.load(inv_norm_ptr + at, mask=inside, other=1.0)
    projected = tl.where(inv_norm < 0, 0.0, 1.0)
    inv_norm = tl.abs(inv_norm)
    along = tl.zeros((BLOCK_M,), tl.float32)
    if ROUNDED:
        unit = _load_rows(unit_ptr, at, inside, offs_d, WIDTH)
        stretch = tl.load(stretch_ptr + at, mask=inside, other=1.0)
        along = projected * stretch * tl.sum(sum_w * unit, 1)
        sum_w -= (along * stretch)[:, None] * unit
    shares_ptr = rates_ptr + 4 * padded + image
    weight = tl.load(shares_ptr, mask=inside, other=0.0)
    weight += tl.load(shares_ptr + padded, mask=inside, other=0.0)
    source = source_row(image, view, half)
    own = _load_rows(z_ptr, source, inside, offs_d, D) * inv_norm[:, None]
    other = _load_rows(z_ptr, source_row(image, 1 - view, half), inside, offs_d, D)
    other_at = (1 - view) * padded + image
    other *= tl.abs(tl.load(inv_norm_ptr + other_at, mask=inside, other=1.0))[:, None]
    # the difference keeps the digits of a close pair; what it adds along z^ the projection removes
    sum_w -= weight[:, None] * (other - projected[:, None] * own)
    inner = tl.sum(sum_w * own, 1)
    dz = (sum_w - (projected * inner)[:, None] * own) * (inv_norm * (inv_tau * scale))[:, None]
    mask = inside[:, None] & (offs_d < D)[None, :]
    offs = (source - source_row(first_image, 0, half)).to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if WITH_DTAU:
        along += inner - projected * weight
        if EXTRA:
            # columns without a gradient of their own: nobody else counts their share
            extra_ptrs = extra_along_ptr + row
            for _ in range(0, parts):
                along += tl.load(extra_ptrs, mask=inside, other=0.0)
                extra_ptrs += 2 * stride
        value = tl.sum(tl.where(inside, along, 0.0))
        last, value = _sum_over_programs(value, sums_ptr, arrived_ptr, SUM_BLOCK)
        if last:
            tl.store(dtau_ptr, -0.5 * inv_tau * inv_tau * scale * value)


def launch_combine(
    batch: Batch, top: Tensor | None, partial: Tensor, arrived: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """(loss, stats): of the rows in source order, or reduced; see _combine_kernel.

    Args:
        batch: of all rows.
        top: (2 * padded,) float32, None if the logits are bounded.
        partial: (parts, 2 * padded) float32.
        arrived: () int32 on the device, 0.
        reduction: "mean", "sum" or "none".
    """
    images, padded = batch.rows.images, batch.rows.padded
    loss = partial.new_empty(2 * images if reduction == "none" else ())
    stats = partial.new_empty(3, 2 * padded)
    programs = triton.cdiv(2 * padded, BLOCK)
    _combine_kernel[(programs,)](
        batch.tau,
        batch.pos,
        top,
        partial,
        loss,
        stats,
        partial.new_empty(programs),
        arrived,
        images,
        padded,
        batch.half,
        partial.shape[0],
        0.5 / images if reduction == "mean" else 1.0,
        LOGITS=batch.logits,
        PER_ROW=reduction == "none",
        TAU_ON_DEVICE=batch.tau_on_device,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return loss, stats


class Rates(NamedTuple):
    """The upstream gradient, in two factors."""

    rows: Tensor  # (3, 2 * padded) float32: 1 / total, top and negative share, times dloss of a row
    dloss: Tensor  # () float32
    scale: float


def launch_rates(batch: Batch, stats: Tensor, dloss: Tensor, reduction: str) -> Rates:
    """dloss, () or (2 * images,) float32 in source order, as the sweeps take it."""
    images, padded = batch.rows.images, batch.rows.padded
    if reduction != "none":
        return Rates(stats, dloss, 0.5 / images if reduction == "mean" else 1.0)
    rates = torch.empty_like(stats)
    down = stats.new_empty(())
    _rates_kernel[(triton.cdiv(2 * padded, BLOCK),)](
        dloss,
        torch.linalg.vector_norm(dloss, float("inf")),
        stats,
        rates,
        down,
        images,
        padded,
        batch.half,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return Rates(rates, down, 1.0)


def launch_finish(
    batch: Batch, rates: Rates, sum_w: Tensor, extra_along: Tensor | None, arrived: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(dz, dtau) of the rows asked for; dtau if tau is on the device. See _finish_kernel.

    Args:
        sum_w: (parts, 2 * stride, width) float32, view by view, `stride` rows a view.
        extra_along: (parts, 2 * stride) float32, with negatives.
        arrived: () int32 on the device, 0.
    """
    z = batch.z
    dz = z.new_empty(2 * batch.count, z.shape[1])
    dtau = z.new_empty((), dtype=torch.float32) if batch.tau_on_device else None
    parts, rows, width = sum_w.shape
    block_m, block_d = row_blocks(width)
    programs = triton.cdiv(rows, block_m)
    _finish_kernel[(programs,)](
        sum_w,
        extra_along,
        z,
        batch.rows.unit,
        batch.rows.stretch,
        batch.rows.inv_norm,
        batch.tau,
        rates.rows,
        rates.dloss,
        dz,
        dtau,
        sum_w.new_empty(programs),
        arrived,
        parts,
        rows // 2,
        batch.count,
        batch.first_image,
        batch.rows.padded,
        batch.half,
        rates.scale,
        D=z.shape[1],
        WIDTH=width,
        ROUNDED=batch.rounded,
        EXTRA=extra_along is not None,
        WITH_DTAU=batch.tau_on_device,
        TAU_ON_DEVICE=batch.tau_on_device,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        SUM_BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dz, dtau
