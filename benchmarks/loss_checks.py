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
from simclr_kernels.ntxent import fused_nt_xent, kernels_for
from simclr_kernels.reference import nt_xent, nt_xent_metrics, positive_index, unit_rows
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
    # the length of a unit row is 1 but for rounding, and so are logits of 1 / tau
    if not (ours[0] - truth[0]).abs().max() <= 4 * torch.finfo(torch.float32).eps / tau:
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
        # one feature in float16 has no gradient but NaN from torch
        own_error = (torch_own[1].double() - truth[1]).norm().nan_to_num(0.0)
        rounding = torch.finfo(torch.bfloat16 if arithmetic == "tf32" else dtype).eps
        allowed = 2 * max(own_error, rounding * scale)
    assert error <= allowed, f"gradient: error {error:.3g}, allowed {allowed:.3g}"
    if tau_is_tensor:
        off = (ours[2].double() - truth[2]).abs()
        digits = 3e-6 if arithmetic == "float32" else 1e-2
        allowed = digits * (truth[0].norm() + 1) * upstream.norm() / tau
        assert off <= allowed, f"gradient in tau: error {off:.3g}, allowed {allowed:.3g}"


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


def check_reductions(
    device: str, features: int = 33, tau: float = 0.1, tau_is_tensor: bool = False
) -> None:
    """mean and sum are those of the rows, and so are their gradients."""
    z = LossCase("", 66, features, tau).z().to(device).requires_grad_()
    given = torch.tensor(tau, device=device, requires_grad=True) if tau_is_tensor else tau
    asked = (z, given) if tau_is_tensor else (z,)
    with matmul_precision("float32"):
        rows = fused_nt_xent(z, given, reduction="none")
        for reduction, scale in (("sum", 1.0), ("mean", 1 / 66)):
            loss = fused_nt_xent(z, given, reduction=reduction)
            torch.testing.assert_close(loss, rows.sum() * scale)
            found = torch.autograd.grad(loss, asked)
            expected = torch.autograd.grad(rows.sum() * scale, asked, retain_graph=True)
            for actual, exact in zip(found, expected, strict=True):
                assert (actual - exact).norm() <= 1e-5 * exact.norm(), reduction


def check_upstream_of_any_size(device: str) -> None:
    z = LossCase("", 34, 16, 0.1).z().to(device)
    upstream = upstream_of(34, device)
    plain = rows_and_gradients(fused_nt_xent, z, 0.1, upstream)[1].double()
    for size in (0.0, 1e-30, 1e30):
        dz = rows_and_gradients(fused_nt_xent, z, 0.1, upstream * size)[1].double()
        assert (dz - plain * size).norm() <= 1e-6 * plain.norm() * size, f"at {size:g}"


def check_negatives_and_metrics(
    device: str, arithmetic: str, tau: float, features: int = 64, tau_is_tensor: bool = False
) -> None:
    """Extra negatives count in value and gradients, and the metrics are those of the reference."""
    # pairs have no gradient left at a low temperature
    kind = "pairs" if tau > 0.05 else "random"
    z = LossCase("", 66, features, tau, kind).z().to(DTYPES[arithmetic]).to(device)
    negatives = LossCase("", 40, features, tau).z(seed=1).to(z)
    upstream = upstream_of(66, device)
    given = torch.tensor(tau, device=device) if tau_is_tensor else tau
    exact_tau = torch.tensor(tau, dtype=torch.float64, device=device)
    exact = {"negatives": negatives.double()}
    with matmul_precision("float32"):
        truth = rows_and_gradients(nt_xent, z.double(), exact_tau, upstream, **exact)
        exact_metrics = nt_xent_metrics(z.double(), tau, **exact)
    with matmul_precision(arithmetic):
        ours = rows_and_gradients(fused_nt_xent, z, given, upstream, negatives=negatives)
        _, metrics = fused_nt_xent(z, given, negatives=negatives, return_metrics=True)
    bound = (2e-5 if tau > 0.05 else 1e-4) if arithmetic == "float32" else 3e-2
    for name, actual, expected in zip(("losses", "gradient"), ours, truth, strict=False):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= bound, f"{name}: error {error:.3g}"
    if tau_is_tensor:
        off = (ours[2].double() - truth[2]).abs()
        allowed = bound * (truth[0].norm() + 1) * upstream.norm() / tau
        assert off <= allowed, f"gradient in tau: error {off:.3g}, allowed {allowed:.3g}"
    for name, actual, expected in zip(metrics._fields, metrics, exact_metrics, strict=True):
        off = (actual - expected).abs()
        assert off <= bound * (expected.abs() + 0.1), f"{name} {actual}, not {expected}"


def check_far_rows(device: str, arithmetic: str, tau: float, normalize: bool = True) -> None:
    """Rows with all logits far below 0 keep their gradients: padding must not outweigh them."""
    simplex = torch.eye(4) - 0.25
    for z in (simplex, simplex[:1] * torch.tensor([[1.0], [-1.0]])):
        z = (z if normalize else 30 * z).to(DTYPES[arithmetic]).to(device)
        upstream = upstream_of(len(z), device)
        options = {"normalize": normalize}
        with matmul_precision("float32"):
            truth = rows_and_gradients(nt_xent, z.double(), tau, upstream, **options)
        with matmul_precision(arithmetic):
            ours = rows_and_gradients(fused_nt_xent, z, tau, upstream, **options)
        bound = 1e-4 if arithmetic == "float32" else 3e-2
        terms = size_of_terms(z, tau, upstream, "halves", normalize)
        error = (ours[1].double() - truth[1]).norm()
        assert error <= bound * terms + 1e-6, f"{len(z)} rows: {ours[1]}, not {truth[1]}"


def check_rows_of_ranks(
    device: str,
    arithmetic: str,
    features: int,
    pairs: str,
    tau: float,
    tau_is_tensor: bool,
    count: int = 386,
    extras: int = 40,
) -> None:
    """What three ranks compute of their own rows is what one process computes of them."""
    z = LossCase("", 3 * count, features, tau).z().to(DTYPES[arithmetic]).to(device)
    negatives = LossCase("", extras, features, tau).z(seed=7).to(z) if extras else None
    upstream = upstream_of(len(z), device)
    given = torch.tensor(tau, device=device if tau_is_tensor else "cpu")
    span = count if pairs == "halves" else 2
    # the whole: all views 0, then all views 1
    image = torch.arange(len(z), device=device).view(-1, 2, span // 2).transpose(0, 1).flatten()
    with matmul_precision(arithmetic):
        whole = rows_and_gradients(
            fused_nt_xent, z[image], given.to(device), upstream[image], negatives=negatives
        )
        loss, dz, dtau = _by_ranks(z, given, negatives, upstream, span, count, arithmetic)
    smallest = 2e-5 if tau > 0.05 else 1e-4
    bounds = {"float32": smallest, "tf32": 2e-3, "float16": 4e-3, "bfloat16": 2e-2}
    for name, actual, expected in (("losses", loss, whole[0]), ("gradient", dz, whole[1])):
        error = (actual[image].double() - expected.double()).norm() / expected.double().norm()
        assert error <= bounds[arithmetic], f"{name}: {error:.3g} from those of the whole"
    # on the GPU only a temperature there is asked for its gradient
    if tau_is_tensor:
        off = (dtau - whole[2]).abs()
        allowed = bounds[arithmetic] * (loss.norm() + 1) * upstream.norm() / tau
        assert off <= allowed, f"gradient in tau: error {off:.3g}, allowed {allowed:.3g}"


def _by_ranks(z, tau, negatives, upstream, span, count, arithmetic):
    kernels = kernels_for(z)
    launch = {"precision": "tf32" if arithmetic == "tf32" else "ieee"} if z.is_cuda else {}
    ranks = range(0, len(z), count)
    sums = [
        kernels.negative_sums(z, tau, negatives, span, first, count, True, False, **launch)
        for first in ranks
    ]
    top, mass = (torch.cat([of_rank[k] for of_rank in sums]) for k in (0, 1))
    loss, stats = kernels.finish_rows(z, tau, top, mass, span, True, **launch)
    parts = [
        kernels.row_gradients(
            upstream, z, tau, negatives, stats, span, first, count, True, **launch
        )
        for first in ranks
    ]
    return loss, torch.cat([part[0] for part in parts]), sum(part[1] for part in parts)


def check_compiles_whole(device: str, backend: str, tau_is_tensor: bool = False) -> None:
    """torch.compile(fullgraph=True) with a changing number of rows gives the same answers."""
    tau = torch.tensor(0.1, device=device, requires_grad=True) if tau_is_tensor else 0.1

    def loss(z):
        return fused_nt_xent(2 * z, tau)

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (34, 66):
        z = LossCase("", rows, 16, 0.1, "pairs").z().to(device).requires_grad_()
        asked = (z, tau) if tau_is_tensor else (z,)
        found, expected = (torch.autograd.grad(f(z), asked) for f in (step, loss))
        for actual, exact in zip(found, expected, strict=True):
            assert (actual - exact).norm() <= 1e-6 * exact.norm()


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
