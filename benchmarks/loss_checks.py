"""What every path of the loss must compute, on any device: each check raises where it does not.

Rows, gradients in z and in tau are held to: 2e-5 of the gradient's norm in float32 (1e-4 below tau
0.0125), and twice torch's own error in TF32 and 16 bits. Where the true gradient vanishes its norm
is that of the sizes of its terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.contenders import matmul_precision
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.reference import nt_xent, positive_index, unit_rows
from simclr_kernels.testing import LossCase, assert_as_accurate_as, size_of_terms

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def upstream_of(rows: int, device: str) -> Tensor:
    """A gradient for each row's loss, the same in every run."""
    return torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(device)


def rows_and_gradients(loss, z: Tensor, tau, upstream: Tensor, **options):
    """Losses of the rows, gradient in z, and in tau if tau is a tensor."""
    z = z.detach().clone().requires_grad_()
    wanted = [z]
    if isinstance(tau, Tensor):
        tau = tau.detach().clone().requires_grad_()
        wanted.append(tau)
    rows = loss(z, tau, reduction="none", **options)
    gradients = torch.autograd.grad(rows, wanted, upstream.to(rows.dtype))
    return rows.detach(), *gradients


def check_accuracy(
    device: str,
    rows: int,
    features: int,
    arithmetic: str,
    tau: float,
    kind: str = "pairs",
    pairs: str = "halves",
    normalize: bool = True,
    tau_is_tensor: bool = False,
) -> None:
    """One case against float64; see the module."""
    dtype = DTYPES[arithmetic]
    z = LossCase("", rows, features, tau, kind).z()
    z = (z if normalize else z / z.norm(dim=1).mean()).to(dtype).to(device)
    upstream = upstream_of(rows, device)
    options = {"pairs": pairs, "normalize": normalize}
    given = torch.tensor(tau, device=device) if tau_is_tensor else tau
    exact_tau = torch.tensor(tau, dtype=torch.float64, device=device)
    with matmul_precision("float32"):
        truth = rows_and_gradients(nt_xent, z.double(), exact_tau, upstream, **options)
    with matmul_precision(arithmetic):
        ours = rows_and_gradients(fused_nt_xent, z, given, upstream, **options)
        torch_own = rows_and_gradients(nt_xent, z, tau, upstream, **options)
    assert ours[1].dtype == dtype and ours[0].dtype == torch.float32
    # with approximate exp2 and log2 a GPU needs a few roundings more
    assert_as_accurate_as(ours[0], torch_own[0], truth[0], 4.0)
    error = (ours[1].double() - truth[1]).norm()
    terms = size_of_terms(z, tau, upstream, pairs, normalize)
    scale = truth[1].norm() if truth[1].norm() > 1e-5 * terms else terms
    if arithmetic == "float32":
        # where positives dominate the gradient itself reaches the end of float32
        smallest = torch.finfo(dtype).tiny * math.sqrt(z.numel())
        allowed = (2e-5 if tau >= 0.0125 else 1e-4) * scale + smallest
    else:
        own_error = (torch_own[1].double() - truth[1]).norm()
        rounding = torch.finfo(torch.bfloat16 if arithmetic == "tf32" else dtype).eps
        allowed = 2 * max(own_error, rounding * scale)
    assert error <= allowed, f"gradient: error {error:.3g}, allowed {allowed:.3g}"
    if tau_is_tensor:
        off = (ours[2].double() - truth[2]).abs()
        digits = 3e-6 if arithmetic == "float32" else 1e-2
        allowed = digits * (truth[0].norm() + 1) * upstream.norm() / tau
        assert off <= allowed, f"gradient in tau: error {off:.3g}, allowed {allowed:.3g}"


def check_equal_bits(device: str, rows: int, arithmetic: str) -> None:
    """Two runs give the same bits."""
    z = LossCase("", rows, 128, 0.1, "pairs").z().to(DTYPES[arithmetic]).to(device)
    upstream = upstream_of(rows, device)
    with matmul_precision(arithmetic):
        first, second = (rows_and_gradients(fused_nt_xent, z, 0.1, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second)), "two runs differ"


def check_equal_rows(device: str, arithmetic: str) -> None:
    """2N equal rows lose log(2N - 1) each, and get no gradient but rounding."""
    z = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(130, 1)
    z = z.to(DTYPES[arithmetic]).to(device)
    with matmul_precision(arithmetic):
        rows, dz = rows_and_gradients(fused_nt_xent, z, 0.1, upstream_of(130, device))
    assert (rows - math.log(129)).abs().max() <= 1e-4, rows
    assert dz.double().norm() <= 1e-5 * size_of_terms(z, 0.1, upstream_of(130, device))


def check_zero_and_tiny_rows(device: str) -> None:
    z = LossCase("", 34, 16, 0.1).z().to(device)
    z[3] = 0
    z[5] *= 1e-8
    upstream = upstream_of(34, device)
    with matmul_precision("float32"):
        dz = rows_and_gradients(fused_nt_xent, z, 0.1, upstream)[1]
        truth = rows_and_gradients(nt_xent, z.double(), 0.1, upstream)[1]
    error = (dz - truth).norm(dim=1) / truth.norm(dim=1)
    assert (error <= 1e-5).all(), f"largest error of a row {error.max():.3g}"


def check_not_finite(device: str, value: float, tau: float, arithmetic: str) -> None:
    """A NaN or Inf in z comes out as NaN, and the call ends."""
    z = LossCase("", 34, 16, tau).z().to(DTYPES[arithmetic]).to(device)
    z[4, 2] = value
    rows, dz = rows_and_gradients(fused_nt_xent, z, tau, upstream_of(34, device))
    assert rows.isnan().all() and dz.isnan().all(), "finite losses or gradients"


def check_tau_not_positive(device: str, tau: float) -> None:
    z = LossCase("", 34, 16, 0.1).z().to(device)
    assert fused_nt_xent(z, torch.tensor(tau, device=device)).isnan(), "not NaN"


def check_reductions(device: str) -> None:
    """mean and sum are those of the rows, and so are their gradients."""
    z = LossCase("", 66, 33, 0.1, "pairs").z().to(device).requires_grad_()
    rows = fused_nt_xent(z, 0.1, reduction="none")
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 66)):
        loss = fused_nt_xent(z, 0.1, reduction=reduction)
        torch.testing.assert_close(loss, rows.sum() * scale)
        (dz,) = torch.autograd.grad(loss, z)
        (expected,) = torch.autograd.grad(rows.sum() * scale, z, retain_graph=True)
        assert (dz - expected).norm() <= 1e-6 * expected.norm()


def check_upstream_of_any_size(device: str) -> None:
    z = LossCase("", 34, 16, 0.1).z().to(device)
    upstream = upstream_of(34, device)
    plain = rows_and_gradients(fused_nt_xent, z, 0.1, upstream)[1].double()
    for size in (0.0, 1e-30, 1e30):
        dz = rows_and_gradients(fused_nt_xent, z, 0.1, upstream * size)[1].double()
        assert (dz - plain * size).norm() <= 1e-6 * plain.norm() * size, f"at {size:g}"


def _exact_with_negatives(z: Tensor, tau: float, negatives: Tensor) -> tuple[Tensor, ...]:
    """Losses of the rows, whether the positive is the largest candidate, and the entropy."""
    unit, rows = unit_rows(z), len(z)
    i = torch.arange(rows, device=z.device)
    logits = torch.cat((unit @ unit.T, unit @ unit_rows(negatives).T), 1) / tau
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[i, i] = True
    logits = logits.masked_fill(itself, -math.inf)
    log_p = logits.log_softmax(1)
    positive = positive_index(rows, device=z.device)
    entropy = -(log_p.exp() * log_p.masked_fill(itself, 0.0)).sum(1)
    return -log_p[i, positive], logits[i, positive] >= logits.max(1).values, entropy


def check_negatives_and_metrics(device: str, arithmetic: str, tau: float) -> None:
    """Extra negatives count in value and gradient; accuracy and entropy come with it."""
    # pairs have no gradient left at a low temperature
    kind = "pairs" if tau > 0.05 else "random"
    z = LossCase("", 66, 64, tau, kind).z().to(DTYPES[arithmetic]).to(device)
    negatives = LossCase("", 40, 64, tau).z(seed=1).to(DTYPES[arithmetic]).to(device)
    exact_z = z.double().requires_grad_()
    exact, right, entropy = _exact_with_negatives(exact_z, tau, negatives.double())
    (truth,) = torch.autograd.grad(exact.mean(), exact_z)
    z.requires_grad_()
    with matmul_precision(arithmetic):
        loss, metrics = fused_nt_xent(z, tau, negatives=negatives, return_metrics=True)
    (dz,) = torch.autograd.grad(loss, z)
    bound = 2e-5 if arithmetic == "float32" else 3e-2
    assert abs(loss - exact.mean()) <= bound * exact.mean() + 1e-6, (
        f"loss {loss}, not {exact.mean()}"
    )
    error = (dz.double() - truth).norm() / truth.norm()
    assert error <= bound, f"gradient: error {error:.3g}"
    for name, expected in (("accuracy", right.double().mean()), ("entropy", entropy.mean())):
        actual = getattr(metrics, name)
        assert abs(actual - expected) <= bound * expected + 1e-6, f"{name} {actual}, not {expected}"


def check_compiles_whole(device: str, backend: str) -> None:
    """torch.compile(fullgraph=True) with a changing number of rows gives the same answers."""
    step = torch.compile(
        lambda z: fused_nt_xent(2 * z, 0.1), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (34, 66):
        z = LossCase("", rows, 16, 0.1, "pairs").z().to(device).requires_grad_()
        (dz,) = torch.autograd.grad(step(z), z)
        (expected,) = torch.autograd.grad(fused_nt_xent(2 * z, 0.1), z)
        assert (dz - expected).norm() <= 1e-6 * expected.norm()


def check_autocast(device: str) -> None:
    z = LossCase("", 66, 64, 0.1, "pairs").z().to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = fused_nt_xent(z, 0.1)
    assert loss.dtype == torch.float32
    assert abs(loss - nt_xent(z.double(), 0.1)) <= 1e-2 * loss


def check_sampled_rows(device: str, rows: int, arithmetic: str) -> None:
    """Of more rows than fit a matrix, the losses and gradients of 64 against float64.

    The sums of the other rows, which these gradients need, are taken from the losses.
    """
    tau = 0.1
    z = LossCase("", rows, 128, tau, "pairs").z().to(DTYPES[arithmetic]).to(device)
    with matmul_precision(arithmetic):
        losses, dz = rows_and_gradients(fused_nt_xent, z, tau, torch.ones(rows, device=device))
    z = z.double()
    unit, positive = unit_rows(z), positive_index(rows, device=device)
    sample = torch.arange(0, rows, max(1, rows // 64), device=device)
    k = torch.arange(len(sample), device=device)
    logits = unit[sample] @ unit.T / tau  # [sample, rows]
    logits[k, sample] = -math.inf
    lse = logits.logsumexp(1)
    exact = lse - logits[k, positive[sample]]
    bound = 2e-5 if arithmetic == "float32" else 3e-2
    assert ((losses[sample] - exact).abs() <= bound * exact + 1e-6).all(), "losses"
    lse_of_all = losses.double() + (unit * unit[positive]).sum(1) / tau
    w = (logits - lse[:, None]).exp() + (logits - lse_of_all).exp()
    w[k, positive[sample]] -= 2
    truth = w @ unit / tau
    truth -= (truth * unit[sample]).sum(1, keepdim=True) * unit[sample]
    truth /= z[sample].norm(dim=1, keepdim=True)
    error = (dz[sample] - truth).norm() / truth.norm()
    assert error <= bound, f"gradient: error {error:.3g}"


def check_half_at_size(device: str, rows: int) -> None:
    """float16 at tau = 0.5 keeps the small weights of many negatives: 1e-2 of the gradient."""
    z = LossCase("", rows, 128, 0.5, "pairs").z().half().to(device)
    ones = torch.ones(rows, device=device)
    dz = rows_and_gradients(fused_nt_xent, z, 0.5, ones / rows)[1]
    truth = rows_and_gradients(nt_xent, z.double(), 0.5, ones / rows)[1]
    error = (dz.double() - truth).norm() / truth.norm()
    assert error <= 1e-2, f"gradient: error {error:.3g}"
