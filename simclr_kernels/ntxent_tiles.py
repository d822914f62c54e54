"""The loss in blocks of rows, in plain torch: for float64 and for devices without a kernel.

The three functions of every backend; the formulas are in ntxent.py. A sum L over negatives is kept
as mass 2^top, the similarities in base 2, with c = log2(e) / tau: c s. From tau = 0.0128 on unit
rows need no maximum: with the constant top = max(c - 100, 0) no term 2^(c s - top) and no sum of
2^17 of them leaves float32. Otherwise top is the largest term of the row. One block of rows holds
its similarities with all columns, at most TILE_ELEMENTS of them or one row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simclr_kernels.reference import SQUARED_NORM_FLOOR, positive_in_spans, unit_rows

LN2 = math.log(2.0)
LOG2E = 1 / LN2

SMALLEST_BOUNDED_TAU = 0.0128

# 16 MiB in float32
TILE_ELEMENTS = 1 << 22

# torch adds twice as many or more in parts, one for each thread
ROWS_SUMMED_AT_ONCE = 1 << 14


def is_bounded(tau: Tensor, normalize: bool) -> bool:
    """Whether top is one constant for all rows; never where that would wait for a GPU."""
    return normalize and tau.device.type == "cpu" and tau.item() >= SMALLEST_BOUNDED_TAU


def row_dtype(z: Tensor) -> torch.dtype:
    """Of all that is kept for a row."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The "mean" or "sum" of the rows (M,), in the same bits for any number of threads."""
    if loss.numel() <= ROWS_SUMMED_AT_ONCE:
        return loss.sum() if reduction == "sum" else loss.mean()
    total = torch.stack([part.sum() for part in loss.split(ROWS_SUMMED_AT_ONCE)]).sum()
    return total if reduction == "sum" else total / len(loss)


def negative_sums(
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    span: int,
    first: int,
    count: int,
    normalize: bool,
    with_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over the negatives of rows [first, first + count).

    Args:
        z: (M, D). Rows come in groups of span: view 0 of span / 2 images, then their view 1.
        tau: 0-d, on the CPU or on the device of z.
        negatives: (K, D) further columns, or None.
        span: even; divides M, first and count.
        first: of the rows asked.
        count: of the rows asked.
        normalize: whether to divide rows and negatives by their norm.
        with_metrics: whether to fill metrics.

    Returns:
        top (count,), mass (count,), and metrics (3, count): the logits of the positive and of the
        largest negative (-inf if there is none), and the entropy in nats of the softmax over all
        candidates; (3, 0) without with_metrics.
    """
    with torch.autocast(z.device.type, enabled=False):
        tau_beside = _tau_beside(z, tau)
        unit, columns = _unit_columns(z, negatives, normalize)
        tops, masses, weighted = [], [], []
        for _, logits in _tiles(unit, columns, tau_beside, span, first, count):
            top = _constant_top(tau_beside) if is_bounded(tau, normalize) else logits.amax(1)
            # a row without negatives: any finite top does
            top = top.expand(len(logits)).clamp_min(torch.finfo(logits.dtype).min)
            e = (logits - top[:, None]).exp2_()
            tops.append(top)
            masses.append(e.sum(1))
            if with_metrics:
                # 0 where e is 0, also at a logit of -inf
                product = (e * logits.clamp_min(torch.finfo(logits.dtype).min)).sum(1)
                weighted.append(torch.stack((logits.amax(1), product)))
        top, mass = torch.cat(tops), torch.cat(masses)
        if not with_metrics:
            return top, mass, top.new_empty(3, 0)
        pos = _positive_logits(unit, tau_beside, span)[first : first + count]
        largest, product = torch.cat(weighted, 1)
        return top, mass, torch.stack((pos * LN2, largest * LN2, _entropy(pos, top, mass, product)))


def finish_rows(
    z: Tensor, tau: Tensor, top: Tensor, mass: Tensor, span: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The loss (M,) of all rows, and stats (3, M): top, total, negative_share.

    total 2^top is the sum over all candidates, of which negative_share belongs to the negatives.
    """
    with torch.autocast(z.device.type, enabled=False):
        tau_beside = _tau_beside(z, tau)
        unit, _ = _unit_columns(z, None, normalize)
        pos = _positive_logits(unit, tau_beside, span)
        if not is_bounded(tau, normalize):
            mass = mass * (top - torch.maximum(top, pos)).exp2()
            top = torch.maximum(top, pos)
        excess = mass.log() + LN2 * (top - pos)
        loss = torch.logaddexp(excess, torch.zeros_like(excess))
        total = mass + (pos - top).exp2()
        return loss, torch.stack((top, total, excess.sigmoid()))


def row_gradients(
    dloss: Tensor,
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    stats: Tensor,
    span: int,
    first: int,
    count: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """dz (count, D) in the dtype of z: the gradient of sum_i dloss_i loss_i over all M rows.

    And the share of the same rows in the gradient in tau, 0-d: summed over disjoint rows that are
    all rows it is the whole. dloss is (M,), stats what finish_rows returned.
    """
    with torch.autocast(z.device.type, enabled=False):
        tau_beside = _tau_beside(z, tau)
        unit, columns = _unit_columns(z, negatives, normalize)
        rows = len(unit)
        top, total, negative_share = stats
        rate = dloss / total
        positive = positive_in_spans(rows, span, z.device)
        asked = slice(first, first + count)
        shared = dloss * negative_share
        sum_w = -((shared + shared[positive])[:, None] * unit[positive])[asked]
        from_negatives = torch.zeros_like(sum_w)
        for block, logits in _tiles(unit, columns, tau_beside, span, first, count):
            w = (logits - top[block, None]).exp2() * rate[block, None]
            w[:, :rows] += (logits[:, :rows] - top).exp2_() * rate
            here = slice(block.start - first, block.stop - first)
            from_negatives[here] = w[:, rows:] @ columns[rows:]
            sum_w[here] += w[:, :rows] @ unit
        sum_w += from_negatives
        unit = unit[asked]
        inner = (sum_w * unit).sum(1, keepdim=True)
        # an extra negative is a column, not also a row
        dtau = -0.5 * (inner.sum() + (from_negatives * unit).sum()) / tau_beside.square()
        dz = sum_w
        if normalize:
            square = z.detach()[asked].to(unit.dtype).square().sum(1, keepdim=True)
            dz = sum_w - torch.where(square < SQUARED_NORM_FLOOR, 0.0, inner) * unit
            dz = dz * square.clamp_min(SQUARED_NORM_FLOOR).rsqrt()
        if tau.device != z.device:
            # tau came as a number: nobody asks, and to answer would wait for the device
            dtau = torch.full_like(tau, math.nan)
        return (dz / tau_beside).to(z.dtype), dtau.to(tau.dtype)


def _tau_beside(z, tau):
    """tau in the dtype and on the device of the rows, without waiting for it; NaN unless > 0."""
    if tau.device != z.device:
        return torch.full((), tau.item(), dtype=row_dtype(z), device=z.device)
    return torch.where(tau.detach() > 0, tau.detach(), math.nan).to(row_dtype(z))


def _constant_top(tau):
    return (LOG2E / tau - 100).clamp_min(0)


def _unit_columns(z, negatives, normalize):
    """The M rows that are multiplied, and these with the negatives below them."""
    unit = z.detach().to(row_dtype(z))
    unit = unit_rows(unit) if normalize else unit
    if negatives is None:
        return unit, unit
    extra = negatives.detach().to(unit.dtype)
    return unit, torch.cat((unit, unit_rows(extra) if normalize else extra))


def _positive_logits(unit, tau, span):
    return (unit * unit[positive_in_spans(len(unit), span, unit.device)]).sum(1) * (LOG2E / tau)


def _tiles(unit, columns, tau, span, first, count):
    """(rows of a block, their logits in base 2 with all columns, -inf where no negative)."""
    positive = positive_in_spans(len(unit), span, unit.device)
    height = max(1, TILE_ELEMENTS // len(columns))
    for start in range(first, first + count, height):
        block = slice(start, min(start + height, first + count))
        r = torch.arange(block.stop - start, device=unit.device)
        logits = (unit[block] @ columns.T).mul_(LOG2E / tau)
        logits[r, start + r] = -math.inf
        logits[r, positive[block]] = -math.inf
        yield block, logits


def _entropy(pos, top, mass, product):
    """log T - sum_j p_j log_j in nats, of logits in base 2: product is the sum of e_j logit_j."""
    shift = torch.maximum(top, pos)
    mass, product = (x * (top - shift).exp2() for x in (mass, product))
    e_positive = (pos - shift).exp2()
    total = mass + e_positive
    return LN2 * (shift + total.log2() - (product + e_positive * pos) / total)
