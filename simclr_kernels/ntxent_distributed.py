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
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_kernels.ntxent import (
    DTYPES,
    PAIRS,
    REDUCTIONS,
    check,
    check_tau,
    forward_op,
    kernels_for,
    refuse_second_derivative,
    tau_operand,
    upstream_of_rows,
)
from simclr_kernels.ntxent_tiles import is_bounded, reduced
from simclr_kernels.reference import span_of

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
    tau: float | Tensor,
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
        tau = tau_operand(tau, z)
        loss, metrics, *_ = forward_op(
            z, tau, negatives, pairs, normalize, reduction, precision, with_metrics
        )
        return loss, metrics, z

    def check_operands():
        check(z, negatives, pairs, reduction)
        operand = tau_operand(tau, z)
        if operand.is_cpu:
            check_tau(operand.item())

    values = {
        "dimensions of z": z.dim(),
        "rows of z": z.shape[0] if z.dim() else 0,
        "features of z": z.shape[-1] if z.dim() else 0,
        "dtype of z": z.dtype,
        "tau": _known_number(tau),
        "pairs": pairs,
        "reduction": reduction,
        "normalize": normalize,
    }
    choices = {"dtype of z": DTYPES, "pairs": PAIRS, "reduction": REDUCTIONS}
    refuse_unlike_ranks(group, z.device, check_operands, values, choices)
    return _DistributedNTXent.apply(
        z,
        tau_operand(tau, z),
        negatives,
        group,
        pairs,
        normalize,
        reduction,
        precision,
        with_metrics,
    )


def _known_number(tau):
    """What ranks can compare of tau: -1 where it is refused, or only the device knows it."""
    if not isinstance(tau, Tensor):
        return float(tau) if isinstance(tau, Real) else -1.0
    known = tau.is_cpu and tau.is_floating_point() and tau.numel() == 1
    return tau.item() if known else -1.0


class _DistributedNTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, z, tau, negatives, group, pairs, normalize, reduction, precision, with_metrics
    ):
        kernels = kernels_for(z)
        launch = {"precision": precision} if _has_triton(z) else {}
        count = z.shape[0]
        first = dist.get_rank(group) * count
        span = span_of(count, pairs)
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
        ctx.save_for_backward(z, rows, tau, negatives, stats)
        ctx.mark_non_differentiable(metrics, rows)
        ctx.set_materialize_grads(False)
        if reduction == "none":
            return loss[first : first + count].clone(), metrics, rows
        return reduced(loss, reduction), metrics, rows

    @staticmethod
    def backward(ctx, dloss, *_):
        z, rows, tau, negatives, stats = ctx.saved_tensors
        if dloss is None:
            # what came after the loss has no gradient here: it may have one on other ranks
            dloss = stats.new_zeros(ctx.count if ctx.reduction == "none" else ())
        if ctx.reduction == "none":
            of_rows = gather_rows(dloss, ctx.group)
        else:
            scale = dist.get_world_size(ctx.group)
            scale /= len(rows) if ctx.reduction == "mean" else 1
            of_rows = upstream_of_rows(dloss, len(rows), scale, stats.dtype)
        asked = (ctx.span, ctx.first, ctx.count, ctx.normalize)
        with _launching_on(rows):
            dz, dtau = ctx.kernels.row_gradients(
                of_rows, rows, tau, negatives, stats, *asked, **ctx.launch
            )
        if torch.is_grad_enabled():
            dz, dtau = _Gradients.apply(dz, dtau, dloss, z, tau)
        asked_z, asked_tau, *_ = ctx.needs_input_grad
        return dz if asked_z else None, dtau if asked_tau else None, *(None,) * 7


class _Gradients(torch.autograd.Function):
    """dz and dtau as the functions that they are of dloss, z and tau, without a derivative."""

    @staticmethod
    def forward(ctx, dz, dtau, *operands):
        return dz, dtau

    backward = staticmethod(refuse_second_derivative)


def _has_triton(z):
    return z.is_cuda and z.dtype != torch.float64


def _launching_on(z):
    # triton launches on the current device
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()
