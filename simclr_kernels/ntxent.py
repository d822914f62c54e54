"""NT-Xent, the loss of SimCLR (arXiv 2002.05709, Eq. 1), without the 2N x 2N matrix.

With unit rows z^ = n z, n = rsqrt(max(|z|^2, 1e-12)), s_ij = z^_i . z^_j, p(i) the positive of i,
g_i the upstream gradient of row i, and sums over negatives (neither i nor p(i)) only:

    L_i    = sum_j exp(s_ij / tau)                 loss_i = softplus(log L_i - s_ip / tau)
    T_i    = L_i + exp(s_ip / tau)                 q_i    = L_i / T_i = 1 - p(positive)
    w_ij   = exp(s_ij / tau) (g_i / T_i + g_j / T_j)
    w_ip   = -(g_i q_i + g_p q_p)
    dz^_i  = (1/tau) sum_j w_ij z^_j               dz_i   = n_i (dz^_i - (dz^_i . z^_i) z^_i)
    dtau   = -(1 / (2 tau)) sum_i dz^_i . z^_i

A column of `negatives` counts in L_i of every row, has no gradient, and counts twice in dtau.
Keeping the positive out of the sum avoids p - 1, which in float32 loses every digit of the gradient
once positives dominate. w is symmetric: one product per tile gives the complete gradient of a row.
Forward keeps T, as total 2^top, and q: three floats a row, which keep the digits that a logarithm
of T would round away. Tiles of s are made, used and dropped, twice.

Here are the checks, the two operators and their dispatch: C++ on a CPU, Triton on a GPU, torch in
row blocks for float64 and elsewhere.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simclr_kernels import ntxent_cpu, ntxent_tiles
from simclr_kernels.ntxent_metrics import NTXentMetrics, means_over_rows
from simclr_kernels.ntxent_tiles import reduced, row_dtype
from simclr_kernels.reference import span_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PAIRS = ("halves", "interleaved")
REDUCTIONS = ("mean", "sum", "none")
# what float32 holds with all its digits
SMALLEST_TAU, LARGEST_TAU = 2.0**-126, 2.0**127


def fused_nt_xent(
    z: Tensor,
    tau: float | Tensor,
    *,
    pairs: str = "halves",
    normalize: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, NTXentMetrics]:
    """Normalised temperature-scaled cross entropy over 2N views (SimCLR, arXiv 2002.05709, Eq. 1).

    With z_hat the unit rows of z and s = z_hat @ z_hat.T / tau, row i loses
    logsumexp(s[i, k != i]) - s[i, positive(i)]. The mean over all M = 2N rows is the paper's scale,
    half that of the authors' TensorFlow code.

    float32 products follow torch.get_float32_matmul_precision() on an NVIDIA GPU ("highest" is
    IEEE, "high" and "medium" are TF32; torch.compile takes what is set when it compiles) and are
    IEEE elsewhere. 16-bit rows are multiplied in their own type on a GPU, in float32 on a CPU; sums
    are float32 or better.

    With a group the rows of all its ranks are negatives of each other, at the cost of one
    all-gather of z and one of a float32 a row (two for tau < 0.0128, a tau on a GPU, or
    normalize=False), and none in backward. Every rank keeps its own row order and returns the same
    mean or sum over the rows of all ranks, in the same bits; the gradient it returns is
    world_size times its share, so that DistributedDataParallel, which takes the mean over ranks,
    arrives at exactly the gradient of one process with the whole batch. "none" returns the loss of
    the rank's own rows; its backward gathers their upstream gradients, all ranks have to call it,
    and the gradient is that of the sum of what all ranks derive from them. Whether the ranks
    fit together is compared first, which waits for the GPU; torch.compile breaks its graph here.

    Args:
        z: (M, D) float32, float16, bfloat16 or float64, not normalised; any device.
        tau: temperature > 0, dimensionless. A scalar tensor, on the device of z, may require a
            gradient. On a GPU its sign is not checked, which would wait for the device: tau <= 0
            gives NaN there.
        pairs: which rows are views of one image: "halves", i and i + M/2 (view-major), or
            "interleaved", 2k and 2k + 1.
        normalize: divide each row by its norm first; a row of norm under 1e-6 is multiplied by 1e6
            and a zero row stays zero, as in the original. False takes plain dot products.
        reduction: "mean" or "sum" over the M rows, or "none".
        negatives: (K, D) more negatives of every row, in the dtype and on the device of z, without
            gradient: of a NegativeQueue, for example. Normalised like z. With a group they count
            for the rows of their own rank.
        group: a torch.distributed process group (torch.distributed.group.WORLD is the default
            one), or None for this process alone.
        return_metrics: whether to return (loss, NTXentMetrics), with the means over the rows of
            this rank.

    Returns:
        Scalar, or (M,) for "none"; float32, float64 for float64 z. Differentiable once in z and
        tau. O((M + K) D) memory; the same bits in every run on one machine and, in the kernels,
        whatever the thread count.

    Raises:
        ValueError: z is not 2-D, M is odd or under 2, D is 0, tau is not positive and finite (in
            float32: 2^-126 to 2^127), or no scalar tensor on the device of z, pairs or reduction is
            unknown, negatives do not fit z or require a gradient, or the ranks of the group differ
            in any of these but negatives. What one rank refuses is an error on all.
        TypeError: z or negatives is no dense tensor, z, tau or negatives is not of a supported
            dtype, or group no process group.
        RuntimeError: on the second derivative.
    """
    _check_dense("z", z)
    if negatives is not None:
        _check_dense("negatives", negatives)
    precision = _dot_precision(z)
    if group is None:
        tau = tau_operand(tau, z)
        loss, metrics, *_ = forward_op(
            z, tau, negatives, pairs, normalize, reduction, precision, return_metrics
        )
        columns = z
    else:
        from simclr_kernels.ntxent_distributed import distributed_nt_xent

        loss, metrics, columns = distributed_nt_xent(
            z, tau, negatives, group, pairs, normalize, reduction, precision, return_metrics
        )
    if not return_metrics:
        return loss
    tau = tau_operand(tau, z)
    return loss, means_over_rows(metrics, z, columns, negatives, tau, normalize)


def check(z: Tensor, negatives: Tensor | None, pairs: str, reduction: str) -> None:
    """Raises unless the kernels may read these operands."""
    if z.dtype not in DTYPES:
        raise TypeError(f"z must be float32, float16, bfloat16 or float64, got {z.dtype}")
    if z.dim() != 2:
        raise ValueError(f"z must be 2-D (rows, features), got shape {tuple(z.shape)}")
    rows, features = z.shape
    if rows < 2:
        raise ValueError(f"z must have at least 2 rows (two views of one image), got {rows}")
    if rows % 2:
        raise ValueError(f"z must have an even number of rows (two views per image), got {rows}")
    if features < 1:
        raise ValueError(f"z must have at least 1 feature, got {features}")
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be 'halves' or 'interleaved', got {pairs!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if negatives is not None:
        _check_negatives(z, negatives)


def _check_dense(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        got = x.layout if isinstance(x, Tensor) else type(x)
        raise TypeError(f"{name} must be a dense torch.Tensor, got {got}")


def _check_negatives(z: Tensor, negatives: Tensor) -> None:
    if negatives.dtype != z.dtype:
        raise TypeError(f"negatives must have the dtype of z, {z.dtype}, got {negatives.dtype}")
    if negatives.device != z.device:
        raise ValueError(
            f"negatives must be on the device of z, {z.device}, got {negatives.device}"
        )
    if negatives.dim() != 2 or negatives.shape[1] != z.shape[1] or negatives.shape[0] < 1:
        raise ValueError(
            f"negatives must be 2-D with at least 1 row and the {z.shape[1]} features of z, "
            f"got shape {tuple(negatives.shape)}; None stands for no negatives"
        )
    if negatives.requires_grad:
        raise ValueError(
            "negatives must not require a gradient, none flows into them; got some that do: detach"
        )


def check_tau(tau: float) -> None:
    """Raises unless tau is a temperature."""
    if not SMALLEST_TAU <= tau <= LARGEST_TAU:
        raise ValueError(f"tau must be a positive finite number, 2^-126 to 2^127, got {tau}")


def tau_operand(tau: float | Tensor, z: Tensor) -> Tensor:
    """tau as the 0-d tensor of the operator: on the CPU if it came as a number."""
    if not isinstance(tau, Tensor):
        check_tau(tau)
        if torch.compiler.is_compiling():
            # scalar_tensor of another number is another graph
            return torch.ones((), dtype=torch.float64, device="cpu") * tau
        return torch.scalar_tensor(tau, dtype=torch.float64, device="cpu")
    if tau.numel() != 1:
        raise ValueError(f"tau must be a scalar tensor, got shape {tuple(tau.shape)}")
    if not tau.is_floating_point():
        raise TypeError(f"tau must be a floating-point tensor or a number, got {tau.dtype}")
    if tau.device != z.device:
        raise ValueError(f"tau must be on the device of z, {z.device}, got {tau.device}")
    return tau.reshape(())


def _dot_precision(z: Tensor) -> str:
    """How a GPU multiplies the rows: Triton's name for what torch is set to."""
    # not every AMD GPU has TF32
    if z.dtype != torch.float32 or not z.is_cuda or torch.version.hip:
        return "ieee"
    return _float32_precision()


def _float32_precision() -> str:
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # once the newer fp32_precision settings were used
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# what torch.compiler.assume_constant_result sets, without importing all of torch.compile for it
_float32_precision._dynamo_marked_constant = True


_library = torch.library.Library("simclr_kernels", "DEF")
_library.define(
    "ntxent(Tensor z, Tensor tau, Tensor? negatives, str pairs, bool normalize, str reduction,"
    " str precision, bool with_metrics)"
    " -> (Tensor loss, Tensor metrics, Tensor stats, Tensor unit, Tensor lengths)"
)
_library.define(
    "ntxent_backward(Tensor dloss, Tensor z, Tensor tau, Tensor? negatives, Tensor stats,"
    " Tensor unit, Tensor lengths, str pairs, bool normalize, str reduction, str precision)"
    " -> (Tensor dz, Tensor dtau)"
)
forward_op = torch.ops.simclr_kernels.ntxent.default
# of torch, but what its own torch.library.register_autograd calls (torch/_library/autograd.py)
_below_autograd = torch._C._AutoDispatchBelowAutograd
_backward_op = torch.ops.simclr_kernels.ntxent_backward.default


def kernels_for(z: Tensor) -> ModuleType:
    """The module whose negative_sums, finish_rows and row_gradients compute z."""
    if z.dtype != torch.float64:
        if z.is_cpu:
            return ntxent_cpu
        if z.is_cuda:
            return _triton_kernels()
    return ntxent_tiles


def _triton_kernels():
    try:
        from simclr_kernels import ntxent_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "the loss on a GPU needs triton, which comes with torch for CUDA and ROCm: "
            "pip install triton"
        ) from error
    return ntxent_triton


def upstream_of_rows(dloss: Tensor, rows: int, scale: float, dtype: torch.dtype) -> Tensor:
    """(rows,) contiguous: scale times dloss, which is 0-d or (rows,)."""
    if dloss.dim() == 0 and dloss.is_cpu:
        # one small operation in place of four
        return dloss.new_full((rows,), dloss.item() * scale, dtype=dtype)
    return (dloss.detach().to(dtype) * scale).expand(rows).contiguous()


def _check_kept(dloss, z, reduction, kept, shapes):
    expected = [(z.shape[0],) if reduction == "none" else (), *shapes]
    got = [x.shape for x in (dloss, *kept)]
    if got != expected:
        raise ValueError(
            f"dloss must have the shape of the loss, and what forward kept its own, {expected}, "
            f"got {[tuple(shape) for shape in got]}"
        )


def _forward_rows(z, tau, negatives, pairs, normalize, reduction, precision, with_metrics):
    # the operator may be called without the public function
    check(z, negatives, pairs, reduction)
    if tau.is_cpu:
        check_tau(tau.item())
    kernels, rows = kernels_for(z), z.shape[0]
    span = span_of(rows, pairs)
    top, mass, metrics = kernels.negative_sums(
        z, tau, negatives, span, 0, rows, normalize, with_metrics
    )
    loss, stats = kernels.finish_rows(z, tau, top, mass, span, normalize)
    if reduction != "none":
        loss = reduced(loss, reduction)
    return loss, metrics, stats, z.new_empty(0), stats.new_empty(0)


def _backward_rows(
    dloss, z, tau, negatives, stats, unit, lengths, pairs, normalize, reduction, precision
):
    check(z, negatives, pairs, reduction)
    rows = z.shape[0]
    _check_kept(dloss, z, reduction, (stats,), [(3, rows)])
    dloss = upstream_of_rows(dloss, rows, 1 / rows if reduction == "mean" else 1.0, row_dtype(z))
    span = span_of(rows, pairs)
    dz, dtau = kernels_for(z).row_gradients(
        dloss, z, tau, negatives, stats, span, 0, rows, normalize
    )
    return dz, dtau.to(tau.dtype)


def _forward_cuda(z, tau, negatives, pairs, normalize, reduction, *rest):
    if z.dtype == torch.float64:
        return _forward_rows(z, tau, negatives, pairs, normalize, reduction, *rest)
    check(z, negatives, pairs, reduction)
    if tau.is_cpu:
        check_tau(tau.item())
    # triton launches on the current device
    with torch.cuda.device(z.device):
        return _triton_kernels().forward(z, tau, negatives, pairs, normalize, reduction, *rest)


def _backward_cuda(
    dloss, z, tau, negatives, stats, unit, lengths, pairs, normalize, reduction, precision
):
    operands = z, tau, negatives, stats, unit, lengths, pairs, normalize, reduction, precision
    if z.dtype == torch.float64:
        return _backward_rows(dloss, *operands)
    check(z, negatives, pairs, reduction)
    kernels = _triton_kernels()
    _check_kept(dloss, z, reduction, (stats, unit, lengths), kernels.kept_shapes(*z.shape))
    with torch.cuda.device(z.device):
        return kernels.backward(dloss, *operands)


for _key, _forward, _backward in (
    ("CompositeExplicitAutograd", _forward_rows, _backward_rows),
    ("CUDA", _forward_cuda, _backward_cuda),
):
    _library.impl("ntxent", _forward, _key)
    _library.impl("ntxent_backward", _backward, _key)


@torch.library.register_fake("simclr_kernels::ntxent", lib=_library)
def _fake_forward(z, tau, negatives, pairs, normalize, reduction, precision, with_metrics):
    check(z, negatives, pairs, reduction)
    rows, features = z.shape
    stats, unit, lengths = (3, rows), (0,), (0,)
    if z.is_cuda and z.dtype != torch.float64:
        stats, unit, lengths = _triton_kernels().kept_shapes(rows, features)
    kept = z.new_empty(stats, dtype=row_dtype(z))
    loss = kept.new_empty(rows if reduction == "none" else ())
    metrics = kept.new_empty(3, rows if with_metrics else 0)
    return loss, metrics, kept, z.new_empty(unit), kept.new_empty(lengths)


@torch.library.register_fake("simclr_kernels::ntxent_backward", lib=_library)
def _fake_backward(dloss, z, tau, *_):
    return z.new_empty(z.shape), tau.new_empty(())


class _NTXent(torch.autograd.Function):
    """What torch.library.register_autograd would make of this, in two thirds of its time."""

    @staticmethod
    def forward(ctx, z, tau, negatives, pairs, normalize, reduction, precision, with_metrics):
        with _below_autograd():
            outputs = forward_op(
                z, tau, negatives, pairs, normalize, reduction, precision, with_metrics
            )
        _, metrics, *kept = outputs
        ctx.settings = pairs, normalize, reduction, precision
        ctx.mark_non_differentiable(metrics, *kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, tau, negatives, *kept)
        return outputs

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 8
        # only a graph of the gradient needs the autograd of the second operator
        below = contextlib.nullcontext if torch.is_grad_enabled() else _below_autograd
        # activation checkpointing computes forward again for them, with autograd
        kept = ctx.saved_tensors
        with below():
            dz, dtau = _backward_op(dloss, *kept, *ctx.settings)
        # None where nobody asks: the anomaly detection of torch looks for NaN in what is returned
        asked_z, asked_tau, *_ = ctx.needs_input_grad
        return dz if asked_z else None, dtau if asked_tau else None, *(None,) * 6


def refuse_second_derivative(ctx, *_):
    raise RuntimeError("fused_nt_xent has no second derivative; use reference.nt_xent for it")


_library.impl("ntxent", _NTXent.apply, "Autograd")
torch.library.register_autograd(
    "simclr_kernels::ntxent_backward", refuse_second_derivative, lib=_library
)
