"""NT-Xent on a CPU, by the C++ kernels in csrc/. See ntxent.py for the mathematics.

z (M, D) is float32, float16 or bfloat16; everything is computed in float32, sums in double. Rows
come in groups of `span`, whose first half meets its second half as positives. Asked for are the
rows [first, first + count), whole groups, against the columns of all M rows and of `negatives`
(K, D) or None. tau is a 0-d tensor on the CPU. Per-row tensors are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simclr_kernels import _C


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
    """Top and mass (count,): mass 2^top is the sum of exp(logit) over the negatives of a row.

    Also metrics, (3, count) if asked for and else (3, 0): the logit of the positive, the largest
    logit of a negative (-inf without any), and the entropy in nats over all candidates.
    """
    z, operands = _operands(z, tau, span, normalize)
    negatives, asked = _asked(z, negatives, first, count)
    # not of torch's default dtype and device: C++ writes float32 there
    top = z.new_empty(count)
    mass = z.new_empty(count)
    metrics = z.new_empty(3, count if with_metrics else 0)
    _C.ntxent_negative_sums(
        *operands,
        *asked,
        top.data_ptr(),
        mass.data_ptr(),
        metrics.data_ptr() if with_metrics else 0,
    )
    return top, mass, metrics


def finish_rows(
    z: Tensor, tau: Tensor, top: Tensor, mass: Tensor, span: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The loss (M,) and stats (3, M) of all rows from their top and mass.

    stats are top, the total and the share of the negatives in it: total 2^top is the sum of
    exp(logit) over all candidates of a row.
    """
    z, operands = _operands(z, tau, span, normalize)
    rows = z.shape[0]
    top = _per_row("top", top, (rows,))
    mass = _per_row("mass", mass, (rows,))
    loss = z.new_empty(rows)
    stats = z.new_empty(3, rows)
    _C.ntxent_finish_rows(
        *operands, top.data_ptr(), mass.data_ptr(), loss.data_ptr(), stats.data_ptr()
    )
    return loss, stats


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
    """The gradient (count, D) of sum_i dloss_i loss_i over all M rows, and the part in tau.

    dz is in z's dtype, dtau 0-d in tau's; summed over ranges that cover all rows, dtau is whole.
    """
    dtype = z.dtype
    z, operands = _operands(z, tau, span, normalize)
    negatives, asked = _asked(z, negatives, first, count)
    rows, features = z.shape
    dloss = _per_row("dloss", dloss, (rows,))
    stats = _per_row("stats", stats, (3, rows))
    dz = z.new_empty(count, features)
    dtau = _C.ntxent_row_gradients(
        *operands, *asked, stats.data_ptr(), dloss.data_ptr(), dz.data_ptr()
    )
    return dz if dtype == torch.float32 else dz.to(dtype), tau.new_full((), dtau)


def _operands(z: Tensor, tau: Tensor, span: int, normalize: bool) -> tuple[Tensor, tuple]:
    """z as the kernels read it, and the arguments that every one of them takes."""
    z = z.contiguous().float()
    rows, features = z.shape
    threads = torch.get_num_threads()
    return z, (z.data_ptr(), rows, features, span, normalize, tau.item(), threads)


def _asked(
    z: Tensor, negatives: Tensor | None, first: int, count: int
) -> tuple[Tensor | None, tuple]:
    """The negatives as the kernels read them, kept alive by the caller, and their arguments."""
    if negatives is None:
        return None, (first, count, 0, 0)
    if negatives.dim() != 2 or negatives.shape[1] != z.shape[1]:
        raise ValueError(
            f"negatives must have shape (K, {z.shape[1]}), got {tuple(negatives.shape)}"
        )
    negatives = negatives.contiguous().float()
    return negatives, (first, count, negatives.data_ptr(), negatives.shape[0])


def _per_row(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x as the kernels read it: by address."""
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape}, for each of {shape[-1]} rows, "
            f"got shape {tuple(x.shape)}"
        )
    return x.contiguous().float()
