"""The metrics of a contrastive batch, from what the kernels of the loss find in passing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simclr_kernels.reference import is_nearest, unit_rows


class NTXentMetrics(NamedTuple):
    """What a batch shows besides its loss: means over its rows, 0-d float32 without gradient.

    Over all candidates of a row, its positive and its negatives. Of the original's metrics, over
    fewer candidates, see reference.nt_xent_metrics.
    """

    accuracy: Tensor  # how often no negative is nearer than the positive; ties count as right
    entropy: Tensor  # of the softmax over the candidates, in nats
    positive_similarity: Tensor  # s, not divided by tau
    negative_similarity: Tensor  # NaN where there are no negatives


@torch.no_grad()
def means_over_rows(
    metrics: Tensor,
    z: Tensor,
    columns: Tensor,
    negatives: Tensor | None,
    tau: Tensor,
    normalize: bool,
) -> NTXentMetrics:
    """The means over the M rows of z.

    Args:
        metrics: (3, M) of the kernels: the logits of the positive and of the largest negative, and
            the entropy.
        z: (M, D).
        columns: (all rows, D), of which z is a part: the candidates of each row.
        negatives: (K, D) more candidates, or None.
        tau: 0-d, on the CPU or on the device of z.
        normalize: as of fused_nt_xent.

    Cost: O((M + K) D) for the mean similarity: that of a row is its product with a sum of rows.
    """
    pos, largest, entropy = metrics
    accuracy = is_nearest(pos, largest, tau, normalize)

    def multiplied(x: Tensor) -> Tensor:
        x = x.to(metrics.dtype)
        return unit_rows(x) if normalize else x

    unit = multiplied(z)
    total = (unit if columns is z else multiplied(columns)).sum(0)
    candidates = len(columns) - 2
    if negatives is not None:
        total = total + multiplied(negatives).sum(0)
        candidates += len(negatives)
    positive = pos * tau
    # no matrix product: autocast would round it
    negative = ((unit * total).sum(1) - unit.square().sum(1) - positive) / candidates
    return NTXentMetrics(*(x.float().mean() for x in (accuracy, entropy, positive, negative)))
