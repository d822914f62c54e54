"""The meaning of every operation in plain PyTorch: float64-clean, device-free, differentiable.

Tests, benchmarks and devices without a kernel use these functions; the fast backends agree with
them to float rounding. The loss follows SimCLR (arXiv 2002.05709, Eq. 1 and Algorithm 1), the
views google-research/simclr (tf2/data_util.py), whose own outputs the tests compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

SQUARED_NORM_FLOOR = 1e-12


# --- the loss -------------------------------------------------------------------------------------


def positive_index(rows: int, pairs: str = "halves", device: torch.device | None = None) -> Tensor:
    """(M,) int64: for each of M rows the row that holds the other view of the same image."""
    i = torch.arange(rows, device=device)
    if pairs == "halves":
        return (i + rows // 2) % rows
    if pairs == "interleaved":
        return i ^ 1
    raise ValueError(f"pairs must be 'halves' or 'interleaved', got {pairs!r}")


def unit_rows(z: Tensor) -> Tensor:
    """z / |z| by rows, as the original: z * rsqrt(max(|z|^2, 1e-12)); a zero row stays zero."""
    return z * z.square().sum(1, keepdim=True).clamp_min(SQUARED_NORM_FLOOR).rsqrt()


def nt_xent(
    z: Tensor,
    tau: float | Tensor,
    *,
    pairs: str = "halves",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """NT-Xent over M = 2N rows, by the M x M matrix. See fused_nt_xent for the arguments.

    loss_i = softplus(logsumexp of the negatives of i - logit of its positive): equal to the cross
    entropy of the paper, without the difference p - 1 that cancels where positives dominate.
    Computes in z's own dtype.
    """
    rows = z.shape[0]
    i = torch.arange(rows, device=z.device)
    positive = positive_index(rows, pairs, z.device)
    z_hat = unit_rows(z) if normalize else z
    logits = z_hat @ z_hat.T / tau
    pos = logits[i, positive]
    if rows == 2:  # no negatives: 0, and 0 times the logits for a zero gradient and for NaN
        loss = 0.0 * pos
    else:
        not_negative = torch.zeros(rows, rows, dtype=torch.bool, device=z.device)
        not_negative[i, i] = True
        not_negative[i, positive] = True
        lse = logits.masked_fill(not_negative, float("-inf")).logsumexp(1)
        loss = torch.logaddexp(lse - pos, torch.zeros_like(pos))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()
