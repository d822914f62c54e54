"""The GPU kernels of the loss: in Triton's interpreter, compiled for real targets, or on a GPU."""

import math

import pytest
import torch

pytest.importorskip("triton")

from simclr_kernels import ntxent_triton
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.reference import nt_xent
from simclr_kernels.testing import LOSS_CASES, LossCase, assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# numpy's matrix product in the interpreter sets floating-point flags for lanes it does not use
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def upstream_of(rows):
    return torch.randn(rows, generator=torch.Generator().manual_seed(1))


def by_kernels(z, tau, pairs="halves", normalize=True, precision="ieee"):
    """Losses of the rows, and gradients in z and tau, from the kernels themselves."""
    z, tau = z.to(DEVICE), torch.tensor(tau)
    # on a GPU a tensor there would always take the running maximum
    loss, *kept = ntxent_triton.forward(z, tau, pairs, normalize, precision)
    upstream = upstream_of(len(z)).to(DEVICE)
    dz, dtau = ntxent_triton.backward(upstream, z, tau, *kept, pairs, normalize, precision)
    return loss, dz, dtau


def by_reference(z, tau, **kwargs):
    z = z.detach().clone().requires_grad_()
    tau = torch.tensor(tau, dtype=z.dtype if z.dtype == torch.float64 else torch.float32)
    tau.requires_grad_()
    loss = nt_xent(z, tau, reduction="none", **kwargs)
    loss.backward(upstream_of(len(z)).to(loss))
    return loss.detach(), z.grad, tau.grad


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.regime)
def test_loss_and_gradients_are_as_accurate_as_those_of_the_reference(case):
    z = case.z()
    loss, dz, dtau = by_kernels(z, case.tau)
    same_dtype = by_reference(z, case.tau)
    truth = by_reference(z.double(), case.tau)
    # exp2 and log2 of a GPU are approximate: a few roundings more than torch's own
    slack = 4.0 if DEVICE == "cuda" else 2.0
    assert_as_accurate_as(loss, same_dtype[0], truth[0], slack)
    if case.features > 1:
        assert_as_accurate_as(dz, same_dtype[1], truth[1], slack)
    if DEVICE == "cpu":
        # a sum that cancels: held against the size of what it sums
        assert (dtau - truth[2]).abs() <= 3e-6 * (truth[0].norm() + 1) / case.tau


@pytest.mark.parametrize(
    ("kind", "tau"),
    [
        ("random", 1.0),
        ("random", 0.02),
        ("pairs", 0.1),
        ("pairs", 0.0125),
        ("duplicates", 0.5),
        ("duplicates", 0.0125),
        ("pairs", 0.005),
    ],
)
def test_gradient_keeps_its_digits_at_every_temperature(kind, tau):
    z = LossCase("", 66, 33, tau, kind).z()
    dz = by_kernels(z, tau)[1].cpu()
    truth = by_reference(z.double(), tau)[1]
    bound = 2e-5 if tau > 0.01 else 1e-4
    assert (dz - truth).norm() <= bound * truth.norm()


def test_collapsed_rows_have_no_gradient_but_rounding():
    z = LossCase("", 66, 33, 0.1, "collapsed").z()
    dz = by_kernels(z, 0.1)[1].cpu()
    # two terms of size g in each row, over tau and the norm of the row
    terms = upstream_of(66).abs().mean() * 2 / (0.1 * z.norm(dim=1))
    assert dz.norm() <= 2e-5 * terms.norm()


@pytest.mark.parametrize(
    ("pairs", "normalize", "tau"),
    [("interleaved", True, 0.1), ("interleaved", False, 0.5), ("halves", False, 0.05)],
)
def test_other_pairings_and_plain_dot_products(pairs, normalize, tau):
    z = LossCase("", 34, 33, tau).z() / 5
    kwargs = {"pairs": pairs, "normalize": normalize}
    same_dtype = by_reference(z, tau, **kwargs)
    truth = by_reference(z.double(), tau, **kwargs)
    loss, dz, _ = by_kernels(z, tau, **kwargs)
    slack = 4.0 if DEVICE == "cuda" else 2.0
    assert_as_accurate_as(loss, same_dtype[0], truth[0], slack)
    assert_as_accurate_as(dz, same_dtype[1], truth[1], slack)


HALF_DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    ("kind", "tau"),
    [
        ("random", 0.1),
        ("pairs", 0.1),
        ("pairs", 0.005),
        ("tight", 0.5),
        ("duplicates", 0.1),
        ("near", 0.1),
    ],
)
def test_16_bit_rows_are_as_accurate_as_the_reference_in_16_bits(dtype, kind, tau):
    if kind == "near":
        # all within a tenth of one direction: of the gradient's terms little is left
        z = torch.randn(33, generator=torch.Generator().manual_seed(2))
        z = (z + 0.1 * LossCase("", 130, 33, tau, "pairs").z()).to(dtype)
    else:
        z = LossCase("", 130, 33, tau, kind).z().to(dtype)
    loss, dz, _ = by_kernels(z, tau)
    same_dtype = by_reference(z, tau)
    truth = by_reference(z.double(), tau)
    assert loss.dtype == torch.float32 and dz.dtype == dtype
    assert_as_accurate_as(loss, same_dtype[0], truth[0])
    assert_as_accurate_as(dz, same_dtype[1], truth[1])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    ("kind", "tau"), [("pairs", 0.1), ("tight", 0.1), ("tight", 0.5), ("duplicates", 0.1)]
)
def test_gradient_of_16_bit_rows_is_good_to_two_roundings(dtype, kind, tau):
    # the rounded rows of a close pair differ by little but rounding
    z = LossCase("", 256, 128, tau, kind).z().to(dtype)
    dz = by_kernels(z, tau)[1].cpu()
    truth = by_reference(z.double(), tau)[1]
    assert (dz - truth).norm() <= torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float16, "ieee"),
        pytest.param(torch.bfloat16, "ieee", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_identical_rows_lose_the_log_of_the_number_of_candidates(dtype, precision, normalize):
    z = torch.randn(33, generator=torch.Generator().manual_seed(0)) / 6
    z = z.to(dtype).repeat(130, 1)
    loss, dz, _ = by_kernels(z, 0.1, normalize=normalize, precision=precision)
    torch.testing.assert_close(loss.cpu(), torch.full((130,), math.log(129)), rtol=2e-5, atol=0)
    if normalize:
        terms = upstream_of(130).abs().mean() * 2 / (0.1 * z.float().norm(dim=1))
        assert dz.cpu().norm() <= 1e-5 * terms.norm()


@pytest.mark.parametrize("size", [1e-35, 1e-8, 1e30])
def test_upstream_gradient_of_any_size_keeps_its_digits(size):
    z = LossCase("", 34, 16, 0.1).z().to(DEVICE)
    tau = torch.tensor(0.1)
    loss, *kept = ntxent_triton.forward(z, tau, "halves", True, "ieee")
    plain, scaled = (
        ntxent_triton.backward(loss * k, z, tau, *kept, "halves", True, "ieee")[0].double() / k
        for k in (1.0, size)
    )
    assert (plain - scaled).norm() <= 1e-6 * plain.norm()


def test_an_upstream_gradient_of_zero_gives_zero():
    z = LossCase("", 34, 16, 0.1).z().to(DEVICE)
    tau = torch.tensor(0.1)
    loss, *kept = ntxent_triton.forward(z, tau, "halves", True, "ieee")
    dz, dtau = ntxent_triton.backward(0 * loss, z, tau, *kept, "halves", True, "ieee")
    assert (dz == 0).all() and (DEVICE == "cuda" or dtau == 0)


@pytest.mark.parametrize(("tau", "precision"), [(0.5, "ieee"), (0.005, "ieee"), (0.5, "tf32")])
def test_nan_in_gives_nan_out(tau, precision):
    z = LossCase("", 34, 16, tau).z()
    # the NaN of a GPU, every bit but the sign
    z[4, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    loss, dz, _ = by_kernels(z, tau, precision=precision)
    assert loss.isnan().all() and dz.isnan().all()


@pytest.mark.parametrize(("precision", "bound"), [("ieee", 2e-6), ("tf32", 2e-3)])
def test_zero_and_tiny_rows_have_the_gradient_of_the_reference(precision, bound):
    z = LossCase("", 34, 16, 0.1).z()
    z[3] = 0
    z[5] *= 1e-8
    z[20] *= 1e-8
    dz = by_kernels(z, 0.1, precision=precision)[1].cpu()
    truth = by_reference(z.double(), 0.1)[1]
    assert ((dz - truth).norm(dim=1) <= bound * truth.norm(dim=1)).all()


def test_a_temperature_that_is_not_positive_gives_nan():
    z = LossCase("", 6, 16, 0.1).z().to(DEVICE)
    for tau in (-0.1, 0.0):
        loss, *_ = ntxent_triton.forward(z, torch.tensor(tau), "halves", True, "ieee")
        assert loss.isnan().all()


@pytest.mark.gpu
def test_public_function_on_a_gpu_follows_the_matmul_precision_and_captures_into_a_graph():
    z = LossCase("", 130, 128, 0.1, "pairs").z().cuda().requires_grad_()
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    exact_z = z.detach().cpu().double().requires_grad_()
    exact_tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    truth = nt_xent(exact_z, exact_tau)
    truth.backward()
    precision_before = torch.get_float32_matmul_precision()
    try:
        for precision, bound in (("highest", 1e-5), ("high", 1e-2)):
            torch.set_float32_matmul_precision(precision)
            z.grad = tau.grad = None
            loss = fused_nt_xent(z, tau)
            loss.backward()
            assert abs(loss.item() - truth) <= bound * truth
            assert (z.grad.cpu() - exact_z.grad).norm() <= bound * exact_z.grad.norm()
            assert abs(tau.grad.cpu() - exact_tau.grad) <= bound * (truth + 1) / 0.1
    finally:
        torch.set_float32_matmul_precision(precision_before)

    def step():
        z.grad = tau.grad = None
        loss = fused_nt_xent(z, tau)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step().item()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert captured.item() == expected
