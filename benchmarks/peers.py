"""NT-Xent as others compute it: `PEERS`, each imported only when it is asked for.

A peer is a function without arguments that returns `Peer(loss, label, exact)` or raises PeerMissing
with the reason. `loss(z, tau)` takes (2N, D) rows in "halves" order, not normalised, and returns
the mean over the rows. Where a package cannot be imported beside this torch, or is too heavy to
install, its published formula stands in, and the label says so.

Inf-CL and Cut Cross-Entropy cannot leave the similarity of a row to itself out of its softmax: they
are timed on the softmax over all 2N rows, of the same shapes, labelled and checked as what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import warm_heap
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.reference import nt_xent, positive_index, unit_rows

BLOCK_ROWS = 1024


class PeerMissing(Exception):
    """A peer that cannot run here; the message is the reason."""


class Peer(NamedTuple):
    """A loss to time: loss(z, tau) and what to call it.

    It is NT-Xent, or with `self_included` the softmax over all rows. `around` and `reheat`: see
    measure.Contender.
    """

    loss: Callable[[Tensor, float], Tensor]
    label: str
    self_included: bool = False
    around: Callable[[], AbstractContextManager] = nullcontext
    reheat: bool = False


def row_blocks(z: Tensor, tau: float, self_included: bool = False) -> Tensor:
    """NT-Xent by blocks of 1024 rows, each recomputed in backward: O(M) memory in plain torch."""
    z_hat = unit_rows(z)
    positive = positive_index(len(z), device=z.device)

    def block_loss(z_hat, start):
        logits = z_hat[start : start + BLOCK_ROWS] @ z_hat.T / tau
        if not self_included:
            r = torch.arange(len(logits), device=z.device)
            itself = torch.zeros_like(logits, dtype=torch.bool)
            itself[r, start + r] = True
            logits = logits.masked_fill(itself, float("-inf"))
        return F.cross_entropy(logits, positive[start : start + BLOCK_ROWS], reduction="sum")

    total = sum(
        checkpoint(block_loss, z_hat, start, use_reentrant=False)
        for start in range(0, len(z), BLOCK_ROWS)
    )
    return total / len(z)


def lightly_formula(z: Tensor, tau: float) -> Tensor:
    """What lightly 1.6 computes: four products of the views, the diagonals of two cut out."""
    a, b = F.normalize(z, dim=1).chunk(2)
    images = len(a)
    others = ~torch.eye(images, dtype=torch.bool, device=z.device)
    aa, ab, ba, bb = (
        torch.einsum("nc,mc->nm", x, y) / tau for x, y in ((a, a), (a, b), (b, a), (b, b))
    )
    aa, bb = (same[others].view(images, -1) for same in (aa, bb))
    logits = torch.cat((torch.cat((ab, aa), 1), torch.cat((ba, bb), 1)))
    return F.cross_entropy(logits, torch.arange(images, device=z.device).repeat(2))


def solo_learn_formula(z: Tensor, tau: float) -> Tensor:
    """What solo-learn 1.0 computes: masked sums of exponentials, without a maximum."""
    z_hat = F.normalize(z, dim=-1)
    e = (z_hat @ z_hat.T / tau).exp()
    image = torch.arange(len(z) // 2, device=z.device).repeat(2)
    same_image = image[:, None] == image[None, :]
    pos = (e * same_image.clone().fill_diagonal_(0)).sum(1)
    neg = (e * ~same_image).sum(1)
    return -torch.log(pos / (pos + neg)).mean()


def _ours() -> Peer:
    return Peer(fused_nt_xent, "ours")


def _eager() -> Peer:
    return Peer(nt_xent, "eager")


def _eager_with_a_warm_heap() -> Peer:
    if torch.cuda.is_available():
        raise PeerMissing("on a GPU torch keeps freed memory by itself")
    return Peer(nt_xent, "eager, warm heap", around=warm_heap, reheat=True)


def _compiled() -> Peer:
    # else the shapes before this one count against the limit of recompilations
    torch.compiler.reset()
    return Peer(torch.compile(nt_xent, dynamic=False), "torch.compile(eager)")


def _row_blocks() -> Peer:
    return Peer(row_blocks, "row blocks, checkpointed")


@cache
def _lightly() -> Peer:
    try:
        from lightly.loss import NTXentLoss
    except Exception:  # its torchvision raises what it likes where it was built for another torch
        return Peer(lightly_formula, "lightly (its formula)")
    return Peer(lambda z, tau: NTXentLoss(tau)(*z.chunk(2)), "lightly")


def _metric_learning(name: str, label: str) -> Peer:
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise PeerMissing(f"pytorch-metric-learning is not installed: {error}") from error

    def loss(z, tau):
        image = torch.arange(len(z) // 2, device=z.device).repeat(2)
        return getattr(losses, name)(temperature=tau)(z, image)

    return Peer(loss, label)


def _metric_learning_supcon() -> Peer:
    return _metric_learning("SupConLoss", "pytorch-metric-learning SupCon")


def _metric_learning_ntxent() -> Peer:
    return _metric_learning("NTXentLoss", "pytorch-metric-learning NTXent")


def _solo_learn() -> Peer:
    return Peer(solo_learn_formula, "solo-learn (its formula)")


def _inf_cl() -> Peer:
    if not torch.cuda.is_available():
        raise PeerMissing("Inf-CL needs a GPU")
    try:
        from inf_cl import cal_flash_loss
    except ImportError as error:
        raise PeerMissing(f"inf-cl is not installed: {error}") from error

    def loss(z, tau):
        z_hat = unit_rows(z)
        heads = min(z.shape[1], 256)
        return cal_flash_loss(z_hat, z_hat, positive_index(len(z), device=z.device), 1 / tau, heads)

    return Peer(lambda z, tau: loss(z, tau).mean(), "Inf-CL (self not left out)", True)


def _cut_cross_entropy() -> Peer:
    if not torch.cuda.is_available():
        raise PeerMissing("cut-cross-entropy needs a GPU")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except Exception as error:  # it compiles torch functions at import
        raise PeerMissing(f"cut-cross-entropy cannot be imported: {error}") from error

    def loss(z, tau):
        z_hat = unit_rows(z)
        targets = positive_index(len(z), device=z.device)
        # without a threshold no gradient is dropped
        rows, columns = (z_hat / tau).to(z.dtype), z_hat.to(z.dtype)
        return linear_cross_entropy(rows, columns, targets, filter_eps=None)

    return Peer(loss, "CCE, exact (self not left out)", True)


PEERS: dict[str, Callable[[], Peer]] = {
    "ours": _ours,
    "eager": _eager,
    "warm-eager": _eager_with_a_warm_heap,
    "compile": _compiled,
    "row-blocks": _row_blocks,
    "lightly": _lightly,
    "solo-learn": _solo_learn,
    "pml-supcon": _metric_learning_supcon,
    "pml-ntxent": _metric_learning_ntxent,
    "inf-cl": _inf_cl,
    "cce": _cut_cross_entropy,
}
