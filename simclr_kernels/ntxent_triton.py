"""NT-Xent on a GPU: which kernels run, in which order. The formulas are in ntxent.py.

    forward     unit rows -> sums of the negatives -> losses of the rows and their sum
    backward    sums of weighted rows -> gradients in z and tau

Similarities exist as tiles only. Besides its results forward allocates the unit rows, which
backward needs, and up to 32 floats a row; backward (M, D) float32, a few times where there are so
few rows that the columns are split, and 64 MiB for rows too wide for registers. Nothing waits for
the device. A temperature on the device is not known when kernels are launched: forward launches the
triangle and the running maximum, and the device lets one of them run; backward has a loop for
either. In all these are 5 kernels, or 6.

The three functions at the end serve several ranks: the rows of one against the columns of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_kernels.ntxent_backward_triton import launch_backward
from simclr_kernels.ntxent_finish_triton import launch_combine, launch_rates
from simclr_kernels.ntxent_rows_triton import (
    BOUNDED,
    RUNNING,
    UNKNOWN,
    Batch,
    UnitRows,
    is_rounded,
    launch_unit_rows,
    padded_images,
    padded_width,
)
from simclr_kernels.ntxent_sums_triton import launch_rows
from simclr_kernels.ntxent_tile_table import PADDING
from simclr_kernels.ntxent_tiles import is_bounded
from simclr_kernels.ntxent_triangle_triton import launch_triangle
from simclr_kernels.reference import span_of


def kept_shapes(rows: int, features: int) -> tuple[tuple[int, int], ...]:
    """Shapes of stats, unit and lengths, which forward keeps for backward."""
    padded = 2 * padded_images(rows // 2)
    return (3, padded), (padded + PADDING, padded_width(features)), (2, padded + PADDING)


def _known(tau: Tensor) -> float | None:
    """tau, or None if it is on the device: to read it there would wait."""
    return tau.item() if tau.device.type == "cpu" else None


def _batch(
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    half: int,
    images: range,
    normalize: bool,
    precision: str,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Batch, Tensor]:
    """The operands of all launchers, and a counter of programs, 0 if the rows are not kept ones."""
    known_tau = _known(tau)
    if known_tau is None:
        tau = tau.detach()
        logits = UNKNOWN.value if normalize else RUNNING.value
    else:
        logits = BOUNDED.value if is_bounded(tau, normalize) else RUNNING.value
        tau = known_tau
    z = z.detach().contiguous()
    rounded = is_rounded(z.dtype, precision)
    arrived = torch.empty((), dtype=torch.int32, device=z.device)
    if kept is None:
        rows, pos = launch_unit_rows(z, tau, 2, half, normalize, rounded, arrived)
    else:
        rows, pos = UnitRows(*kept, z.shape[0] // 2, padded_images(z.shape[0] // 2)), None
    extra = None
    if negatives is not None:
        negatives = negatives.detach().contiguous()
        extra, _ = launch_unit_rows(negatives, tau, 1, len(negatives), normalize, rounded)
    batch = Batch(
        z, tau, logits, half, images.start, len(images), normalize, precision, rows, pos, extra
    )
    return batch, arrived


def forward(
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    pairs: str,
    normalize: bool,
    reduction: str,
    precision: str,
    with_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, stats, unit, lengths): the operator `ntxent`. See fused_nt_xent."""
    images = range(len(z) // 2)
    half = span_of(len(z), pairs) // 2
    batch, arrived = _batch(z, tau, negatives, half, images, normalize, precision)
    if batch.logits == RUNNING.value or negatives is not None or with_metrics:
        partial = batch.pos.new_empty(1, 2 * batch.rows.padded)
        top, metrics = launch_rows(batch, with_metrics, partial[0])
    else:
        partial = launch_triangle(batch)
        top, metrics = None, partial.new_empty(3, 0)
        if batch.logits == UNKNOWN.value:
            top, _ = launch_rows(batch, False, partial[0], alone=False)
    loss, stats = launch_combine(batch, top, partial, arrived, reduction)
    return loss, metrics, stats, batch.rows.unit, batch.rows.lengths


def backward(
    dloss: Tensor,
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    stats: Tensor,
    unit: Tensor,
    lengths: Tensor,
    pairs: str,
    normalize: bool,
    reduction: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(dz, dtau): the operator `ntxent_backward`. See fused_nt_xent."""
    images = range(len(z) // 2)
    half = span_of(len(z), pairs) // 2
    stats, *kept = (x.contiguous() for x in (stats, unit, lengths))
    batch, _ = _batch(z, tau, negatives, half, images, normalize, precision, kept)
    dloss = dloss.detach().float().contiguous()
    dz, dtau = launch_backward(batch, launch_rates(batch, stats, dloss, reduction))
    return dz, _dtau(dtau, tau)


def _dtau(dtau: Tensor | None, tau: Tensor) -> Tensor:
    if dtau is None:
        # tau came as a number: nobody asks, and to answer would wait for the device
        return torch.full_like(tau, float("nan"))
    return dtau.to(tau.dtype)


def negative_sums(
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    span: int,
    first: int,
    count: int,
    normalize: bool,
    with_metrics: bool,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(top (count,), mass (count,), metrics (3, count)) of rows [first, first + count).

    mass 2^top sums exp(logit) over the negatives of a row; see ntxent_distributed.py.
    """
    images = range(first // 2, (first + count) // 2)
    batch, _ = _batch(z, tau, negatives, span // 2, images, normalize, precision)
    mass = batch.pos.new_empty(2 * batch.rows.padded)
    top, metrics = launch_rows(batch, with_metrics, mass)
    top, mass = (
        x.view(2, -1, 1)[:, images.start : images.stop]
        .reshape(2, -1, span // 2)
        .transpose(0, 1)
        .reshape(count)
        for x in (top, mass)
    )
    return top, mass, metrics


def finish_rows(
    z: Tensor, tau: Tensor, top: Tensor, mass: Tensor, span: int, normalize: bool, *, precision: str
) -> tuple[Tensor, Tensor]:
    """(loss (M,), stats) of all M rows, from what negative_sums gave of each."""
    images = range(len(z) // 2)
    batch, arrived = _batch(z, tau, None, span // 2, images, normalize, precision)
    behind = batch.rows.padded - len(images)
    top, mass = (
        F.pad(x.view(-1, 2, span // 2).transpose(0, 1).reshape(2, -1), (0, behind)).reshape(1, -1)
        for x in (top, mass)
    )
    return launch_combine(batch, top, mass, arrived, "none")


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
    *,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(dz, dtau) of rows [first, first + count), for dloss (M,) of all rows."""
    images = range(first // 2, (first + count) // 2)
    batch, _ = _batch(z, tau, negatives, span // 2, images, normalize, precision)
    dz, dtau = launch_backward(batch, launch_rates(batch, stats, dloss, "none"))
    return dz, _dtau(dtau, tau)
