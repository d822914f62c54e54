"""NT-Xent, the loss of SimCLR (arXiv 2002.05709, Eq. 1), without the 2N x 2N matrix.

With unit rows z^ = n z, n = rsqrt(max(|z|^2, 1e-12)), s_ij = z^_i . z^_j, p(i) the positive of i,
g_i the upstream gradient of row i, and sums over negatives (neither i nor p(i)) only:

    L_i    = sum_j exp(s_ij / tau)                 loss_i = softplus(log L_i - s_ip / tau)
    T_i    = L_i + exp(s_ip / tau)                 q_i    = L_i / T_i = 1 - p(positive)
    w_ij   = exp(s_ij / tau) (g_i / T_i + g_j / T_j)
    w_ip   = -(g_i q_i + g_p q_p)
    dz^_i  = (1/tau) sum_j w_ij z^_j               dz_i   = n_i (dz^_i - (dz^_i . z^_i) z^_i)
    dtau   = -(1 / (2 tau)) sum_i dz^_i . z^_i

Keeping the positive out of the sum avoids p - 1, which in float32 loses every digit of the gradient
once positives dominate. w is symmetric: one product per tile gives the complete gradient of a row.
Forward keeps T, as mass 2^top, and q: three floats a row, which keep the digits that a logarithm of
T would round away. Tiles of s are made, used and dropped, twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simclr_kernels import ntxent_cpu
from simclr_kernels.reference import SQUARED_NORM_FLOOR, positive_index, unit_rows

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = ("halves", "interleaved")
REDUCTIONS = ("mean", "sum", "none")

LN2 = math.log(2.0)

# elements of a tile of similarities where there is no kernel: 16 MiB in float32
TILE_ELEMENTS = 1 << 22


def fused_nt_xent(
    z: Tensor,
    tau: float | Tensor,
    *,
    pairs: str = "halves",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Normalised temperature-scaled cross entropy over 2N views (SimCLR, arXiv 2002.05709, Eq. 1).

    With z_hat the unit rows of z and s = z_hat @ z_hat.T / tau, row i loses
    logsumexp(s[i, k != i]) - s[i, positive(i)]. The mean over all M = 2N rows is the paper's scale,
    half that of the authors' TensorFlow code.

    float32 products follow torch.get_float32_matmul_precision() on an NVIDIA GPU ("highest" is
    IEEE, "high" and "medium" are TF32; torch.compile takes what is set when it compiles) and are
    IEEE elsewhere. 16-bit rows are multiplied in their own type on a GPU, in float32 on a CPU; sums
    are float32 or better.

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

    Returns:
        Scalar, or (M,) for "none"; float32, float64 for float64 z. Differentiable once in z and
        tau. O(M D) memory; the same bits in every run on one machine and, in the kernels, whatever
        the thread count.

    Raises:
        ValueError: z is not 2-D, M is odd or under 2, D is 0, tau is not positive and finite,
            or no scalar tensor on the device of z, pairs or reduction is unknown.
        TypeError: z or tau is not of a supported dtype.
        RuntimeError: on the second derivative.
    """
    _check(z, pairs, reduction)
    tau = _tau_operand(tau, z)
    loss, *_ = torch.ops.simclr_kernels.ntxent(z, tau, pairs, normalize, _dot_precision(z))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


class NTXentLoss(nn.Module):
    """NT-Xent of two (N, D) batches of views, row k of each from one image. See fused_nt_xent.

    With learnable=True the parameter is log_temperature, float32, so that no step can make the
    temperature negative.
    """

    def __init__(self, temperature: float = 0.5, learnable: bool = False) -> None:
        super().__init__()
        _check_tau(temperature)
        if learnable:
            log_temperature = torch.tensor(math.log(temperature), dtype=torch.float32)
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.fixed_temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a float, or a scalar tensor with a gradient if learnable."""
        if "log_temperature" in self._parameters:
            return self.log_temperature.exp()
        return self.fixed_temperature

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The mean loss over the 2N rows of z0 and z1, each (N, D)."""
        if z0.shape != z1.shape:
            raise ValueError(
                "z0 and z1 must have the same shape (N, D), "
                f"got {tuple(z0.shape)} and {tuple(z1.shape)}"
            )
        return fused_nt_xent(torch.cat((z0, z1)), self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={torch.as_tensor(self.temperature).item():g}"


def _check(z: Tensor, pairs: str, reduction: str) -> None:
    if z.dtype not in KERNEL_DTYPES and z.dtype != torch.float64:
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


def _check_tau(tau: float) -> None:
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be a positive finite number, got {tau}")


def _tau_operand(tau: float | Tensor, z: Tensor) -> Tensor:
    """tau as the 0-d tensor of the operator: on the CPU if it came as a number."""
    if not isinstance(tau, Tensor):
        _check_tau(tau)
        return torch.tensor(tau, dtype=torch.float64, device="cpu")
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
    if z.dtype != torch.float32 or z.device.type != "cuda" or torch.version.hip:
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
    "ntxent(Tensor z, Tensor tau, str pairs, bool normalize, str precision)"
    " -> (Tensor loss, Tensor top, Tensor mass, Tensor negative_share)"
)
_library.define(
    "ntxent_backward(Tensor dloss, Tensor z, Tensor tau, Tensor top, Tensor mass,"
    " Tensor negative_share, str pairs, bool normalize, str precision) -> (Tensor dz, Tensor dtau)"
)


def _row_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _by_row(z, *values):
    """dloss and what forward kept of each row, as the kernels read them: by address."""
    for x in values:
        if x.shape != z.shape[:1]:
            raise ValueError(
                "dloss, top, mass and negative_share must have one element for each of "
                f"{len(z)} rows, got shape {tuple(x.shape)}"
            )
    return [x.detach().to(z.device, _row_dtype(z)).contiguous() for x in values]


def _forward_cpu(z, tau, pairs, normalize, precision):
    # the operator may be called without the public function
    _check(z, pairs, "none")
    _check_tau(tau.item())
    if z.dtype == torch.float64:
        return _forward_tiles(z, tau, pairs, normalize, precision)
    span = len(z) if pairs == "halves" else 2
    top, mass, _ = ntxent_cpu.negative_sums(z, tau, None, span, 0, len(z), normalize, False)
    loss, stats = ntxent_cpu.finish_rows(z, tau, top, mass, span, normalize)
    return loss, *(row.clone() for row in stats)  # outputs of an operator share no memory


def _backward_cpu(dloss, z, tau, top, mass, negative_share, pairs, normalize, precision):
    _check(z, pairs, "none")
    if z.dtype == torch.float64:
        kept = (top, mass, negative_share)
        return _backward_tiles(dloss, z, tau, *kept, pairs, normalize, precision)
    span = len(z) if pairs == "halves" else 2
    stats = torch.stack(_by_row(z, top, mass, negative_share))
    return ntxent_cpu.row_gradients(dloss, z, tau, None, stats, span, 0, len(z), normalize)


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


def _forward_cuda(z, tau, pairs, *rest):
    _check(z, pairs, "none")
    if z.dtype == torch.float64:
        return _forward_tiles(z, tau, pairs, *rest)
    # triton launches on the current device
    with torch.cuda.device(z.device):
        return _triton_kernels().forward(z, tau, pairs, *rest)


def _backward_cuda(dloss, z, tau, top, mass, negative_share, pairs, *rest):
    _check(z, pairs, "none")
    dloss, *kept = _by_row(z, dloss, top, mass, negative_share)
    if z.dtype == torch.float64:
        return _backward_tiles(dloss, z, tau, *kept, pairs, *rest)
    with torch.cuda.device(z.device):
        return _triton_kernels().backward(dloss, z, tau, *kept, pairs, *rest)


def _tau_beside(z, tau):
    """tau in the dtype and on the device of the rows, without waiting for it; NaN unless > 0."""
    if tau.device != z.device:
        return torch.full((), tau.item(), dtype=_row_dtype(z), device=z.device)
    return torch.where(tau > 0, tau, math.nan).to(_row_dtype(z))


def _tiles(z, tau, pairs, normalize):
    """The rows multiplied, and an iterator over (rows, their logits, -inf where no negative)."""
    rows = z.shape[0]
    z = z.detach().to(_row_dtype(z))
    unit = unit_rows(z) if normalize else z
    positive = positive_index(rows, pairs, z.device)
    height = max(1, TILE_ELEMENTS // rows)

    def tiles():
        for start in range(0, rows, height):
            block = slice(start, min(start + height, rows))
            r = torch.arange(block.stop - block.start, device=z.device)
            logits = unit[block] @ unit.T / tau
            logits[r, start + r] = -math.inf
            logits[r, positive[block]] = -math.inf
            yield block, logits

    return unit, positive, tiles()


def _forward_tiles(z, tau, pairs, normalize, precision):
    """The formulas in blocks of rows: for float64 and for devices without a kernel."""
    tau = _tau_beside(z, tau)
    with torch.autocast(z.device.type, enabled=False):
        unit, positive, tiles = _tiles(z, tau, pairs, normalize)
        pos = (unit * unit[positive]).sum(1) / tau
        excess = torch.cat([logits.logsumexp(1) for _, logits in tiles]) - pos
        loss = torch.logaddexp(excess, torch.zeros_like(excess))
        return loss, (pos + loss) / LN2, torch.ones_like(loss), excess.sigmoid()


def _backward_tiles(dloss, z, tau, top, mass, negative_share, pairs, normalize, precision):
    tau_operand, tau = tau, _tau_beside(z, tau)
    with torch.autocast(z.device.type, enabled=False):
        unit, positive, tiles = _tiles(z, tau, pairs, normalize)
        lse = top * LN2 + mass.log()
        shared = dloss * negative_share
        sum_w = -(shared + shared[positive])[:, None] * unit[positive]
        for block, logits in tiles:
            w = (logits - lse[block, None]).exp() * dloss[block, None]
            w += (logits - lse).exp() * dloss
            sum_w[block] += w @ unit
        inner = (sum_w * unit).sum(1, keepdim=True)
        dz = sum_w
        if normalize:
            square = z.detach().to(unit.dtype).square().sum(1, keepdim=True)
            dz = sum_w - torch.where(square < SQUARED_NORM_FLOOR, 0.0, inner) * unit
            dz = dz * square.clamp_min(SQUARED_NORM_FLOOR).rsqrt()
        dtau = -0.5 * inner.sum() / tau.square()
        if tau_operand.device != z.device:
            # tau came as a number: nobody asks, and to answer would wait for the device
            dtau = torch.full_like(tau_operand, math.nan)
        return (dz / tau).to(z.dtype), dtau.to(tau_operand.dtype)


for _key, _forward, _backward in (
    ("CompositeExplicitAutograd", _forward_tiles, _backward_tiles),
    ("CPU", _forward_cpu, _backward_cpu),
    ("CUDA", _forward_cuda, _backward_cuda),
):
    _library.impl("ntxent", _forward, _key)
    _library.impl("ntxent_backward", _backward, _key)


@torch.library.register_fake("simclr_kernels::ntxent", lib=_library)
def _fake_forward(z, tau, pairs, normalize, precision):
    return tuple(z.new_empty(z.shape[0], dtype=_row_dtype(z)) for _ in range(4))


@torch.library.register_fake("simclr_kernels::ntxent_backward", lib=_library)
def _fake_backward(dloss, z, tau, top, mass, negative_share, pairs, normalize, precision):
    return z.new_empty(z.shape), tau.new_empty(())


def _setup_context(ctx, inputs, output):
    z, tau, ctx.pairs, ctx.normalize, ctx.precision = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, tau, *kept)


def _differentiate(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 5
    dz, dtau = torch.ops.simclr_kernels.ntxent_backward(
        dloss, *ctx.saved_tensors, ctx.pairs, ctx.normalize, ctx.precision
    )
    # None where nobody asks: the anomaly detection of torch looks for NaN in all that is returned
    dz, dtau = (
        d if asked else None for d, asked in zip((dz, dtau), ctx.needs_input_grad, strict=False)
    )
    return dz, dtau, None, None, None


def _refuse_second_derivative(ctx, ddz, ddtau):
    raise RuntimeError("fused_nt_xent has no second derivative; use reference.nt_xent for it")


torch.library.register_autograd(
    "simclr_kernels::ntxent", _differentiate, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "simclr_kernels::ntxent_backward", _refuse_second_derivative, lib=_library
)
