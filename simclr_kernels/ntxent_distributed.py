"""The loss over the rows of every rank of a process group. See fused_nt_xent.

Forward gathers the rows and then one float32 a row, the mass of its negatives (and the exponent top
where that is no constant): from these every rank knows the loss of every row, in the same bits.
Backward computes the whole gradient of the rank's own rows and communicates nothing, except dloss
for reduction "none". Before all that nine numbers of each rank show whether the ranks fit together,
since collectives of different sizes would hang.

The gradient of a rank is that of the sum of what all ranks return, of which DDP takes the mean. For
"mean" and "sum" all ranks return the same: the gradient is world_size times that of the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_kernels.ntxent import (
    DTYPES,
    PAIRS,
    REDUCTIONS,
    check,
    check_tau,
    forward_op,
    kernels_for,
    upstream_of_rows,
)
from simclr_kernels.ntxent_tiles import is_bounded

# the second name is deprecated since torch 2.13, the first unknown before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def check_group(group: Any) -> None:
    """Raises unless group is a process group, as it is for the processes in it only."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group that this process is in "
            f"(torch.distributed.group.WORLD is the default one), got {group!r}"
        )


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(W rows, ...): x (rows, ...) of every rank, in rank order. Shapes and dtypes must agree."""
    out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    # as bytes: not every backend knows every dtype
    _all_gather(
        out.view(-1).view(torch.uint8),
        x.detach().contiguous().view(-1).view(torch.uint8),
        group=group,
    )
    return out


def refuse_unlike_ranks(
    group: dist.ProcessGroup,
    device: torch.device,
    check: Callable[[], None],
    values: dict[str, Any],
    choices: dict[str, tuple] | None = None,
) -> None:
    """Raises on every rank if check raises on one, or if a value differs between ranks.

    values are numbers, or one of the choices of the same name.
    """
    choices = choices or {}
    try:
        check()
        refusal = None
    except (TypeError, ValueError) as error:
        refusal = error
    own = [refusal is not None]
    for name, value in values.items():
        of = choices.get(name)
        own.append(value if of is None else of.index(value) if value in of else -1)
    everyone = gather_rows(torch.tensor([own], dtype=torch.float64, device=device), group)
    refused, *columns = everyone.T.tolist()
    if refusal is not None:
        raise refusal
    if any(refused):
        rank = refused.index(1)
        raise ValueError(f"the arguments must be valid on every rank, rank {rank} refused its own")
    for name, column in zip(values, columns, strict=True):
        if column != column[:1] * len(column):
            of = choices.get(name)
            got = [(int(x) if x.is_integer() else x) if of is None else of[int(x)] for x in column]
            raise ValueError(f"{name} must be the same on every rank, got {got}")


@torch.compiler.disable(reason="fused_nt_xent with a group communicates outside of the graph")
def distributed_nt_xent(
    z: Tensor,
    tau: Tensor,
    negatives: Tensor | None,
    group: dist.ProcessGroup,
    pairs: str,
    normalize: bool,
    reduction: str,
    precision: str,
    with_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, metrics (3, rows) of this rank's rows, and the rows of all ranks, in rank order."""
    check_group(group)
    if dist.get_world_size(group) == 1:
        loss, metrics, *_ = forward_op(
            z, tau, negatives, pairs, normalize, reduction, precision, with_metrics
        )
        return loss, metrics, z
    known_tau = tau.item() if tau.device.type == "cpu" else None

    def check_operands():
        check(z, negatives, pairs, reduction)
        if known_tau is not None:
            check_tau(known_tau)

    values = {
        "dimensions of z": z.dim(),
        "rows of z": z.shape[0] if z.dim() else 0,
        "features of z": z.shape[-1] if z.dim() else 0,
        "dtype of z": z.dtype,
        "tau": -1.0 if known_tau is None else known_tau,
        "pairs": pairs,
        "reduction": reduction,
        "normalize": normalize,
    }
    choices = {"dtype of z": DTYPES, "pairs": PAIRS, "reduction": REDUCTIONS}
    refuse_unlike_ranks(group, z.device, check_operands, values, choices)
    return _DistributedNTXent.apply(
        z, tau, negatives, group, pairs, normalize, reduction, precision, with_metrics
    )


class _DistributedNTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, z, tau, negatives, group, pairs, normalize, reduction, precision, with_metrics
    ):
        kernels = kernels_for(z)
        launch = {"precision": precision} if _has_triton(z) else {}
        count = z.shape[0]
        first = dist.get_rank(group) * count
        span = count if pairs == "halves" else 2
        rows = gather_rows(z, group)
        with _launching_on(z):
            top, mass, metrics = kernels.negative_sums(
                rows, tau, negatives, span, first, count, normalize, with_metrics, **launch
            )
            mass = gather_rows(mass, group)
            bounded = is_bounded(tau, normalize)
            top = top[:1].expand(len(rows)).contiguous() if bounded else gather_rows(top, group)
            loss, stats = kernels.finish_rows(rows, tau, top, mass, span, normalize, **launch)
        ctx.group, ctx.kernels, ctx.launch = group, kernels, launch
        ctx.reduction, ctx.normalize = reduction, normalize
        ctx.first, ctx.count, ctx.span = first, count, span
        ctx.save_for_backward(rows, tau, negatives, stats)
        ctx.mark_non_differentiable(metrics, rows)
        ctx.set_materialize_grads(False)
        if reduction == "none":
            return loss[first : first + count].clone(), metrics, rows
        return loss.sum() if reduction == "sum" else loss.mean(), metrics, rows

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        rows, tau, negatives, stats = ctx.saved_tensors
        dz = dtau = None
        if ctx.reduction == "none":
            # a rank that nobody asks must still take part
            if dloss is None:
                dloss = stats.new_zeros(ctx.count)
            dloss = gather_rows(dloss.to(stats.dtype), ctx.group)
        elif dloss is not None:
            scale = dist.get_world_size(ctx.group)
            scale /= len(rows) if ctx.reduction == "mean" else 1
            dloss = upstream_of_rows(dloss, len(rows), scale, stats.dtype)
        if dloss is not None:
            with _launching_on(rows):
                dz, dtau = ctx.kernels.row_gradients(
                    dloss,
                    rows,
                    tau,
                    negatives,
                    stats,
                    ctx.span,
                    ctx.first,
                    ctx.count,
                    ctx.normalize,
                    **ctx.launch,
                )
        asked = ctx.needs_input_grad
        return dz if asked[0] else None, dtau if asked[1] else None, *(None,) * 7


def _has_triton(z):
    return z.is_cuda and z.dtype != torch.float64


def _launching_on(z):
    # triton launches on the current device
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()
