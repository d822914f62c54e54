"""fused_nt_xent on a CPU: how exact losses and gradients are, and what they do not depend on."""

import functools
import math

import pytest
import torch
from test_reference_loss import assert_equals_golden, golden_case

from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.ntxent_tiles import reduced
from simclr_kernels.reference import nt_xent, positive_index, unit_rows
from simclr_kernels.testing import LOSS_CASES, LossCase, assert_as_accurate_as, size_of_terms

pytestmark = pytest.mark.usefixtures("fresh_memory_holds_nan")


def loss_and_gradients(function, z, tau, **kwargs):
    """The loss, and its gradients in z and in tau."""
    z = z.detach().clone().requires_grad_()
    tau_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    tau = torch.tensor(tau, dtype=tau_dtype, requires_grad=True)
    loss = function(z, tau, **kwargs)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=generator).to(loss)
    loss.backward(upstream)
    return loss.detach(), z.grad, tau.grad


KINDS = ["random", "pairs", "tight", "duplicates", "collapsed", "zeros"]
TEMPERATURES = [1.0, 0.5, 0.1, 0.05, 0.02, 0.0125, 0.005]


def assert_gradient_keeps_its_digits(z, tau):
    bound = 2e-5 if tau >= 0.0125 else 1e-4
    leaf = z.clone().requires_grad_()
    fused_nt_xent(leaf, tau, reduction="sum").backward()
    truth = z.double().requires_grad_()
    nt_xent(truth, tau, reduction="sum").backward()
    terms, size = size_of_terms(z, tau), truth.grad.norm()
    if size <= 1e-5 * terms:
        size = terms
    # close pairs at a low temperature: the whole gradient is too small for float32
    underflow = torch.finfo(torch.float32).smallest_normal * len(z) / tau
    assert (leaf.grad - truth.grad).norm() <= bound * size + underflow


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.regime)
def test_loss_and_gradients_are_as_accurate_as_those_of_the_reference(case):
    z = case.z()
    ours = loss_and_gradients(fused_nt_xent, z, case.tau, reduction="none")
    same_dtype = loss_and_gradients(nt_xent, z, case.tau, reduction="none")
    truth = loss_and_gradients(nt_xent, z.double(), case.tau, reduction="none")
    assert_as_accurate_as(ours[0], same_dtype[0], truth[0])
    if case.features > 1:
        assert_as_accurate_as(ours[1], same_dtype[1], truth[1])
    # a sum that cancels: held against the size of what it sums
    allowed = 1e-6 * (truth[0].norm() + 1) / case.tau
    assert (ours[2] - truth[2]).abs() <= allowed


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_keeps_its_digits_at_every_temperature(kind, tau):
    assert_gradient_keeps_its_digits(LossCase("", 130, 33, tau, kind).z(), tau)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "features"), [(2, 16), (6, 1), (6, 2048), (34, 7), (34, 2048), (130, 1), (130, 512)]
)
def test_gradient_keeps_its_digits_in_every_shape(rows, features, kind):
    for tau in TEMPERATURES:
        assert_gradient_keeps_its_digits(LossCase("", rows, features, tau, kind).z(), tau)


@pytest.mark.parametrize("tau", [0.1, 0.0125, 0.005])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_keeps_its_digits_over_many_blocks_of_rows(kind, tau):
    assert_gradient_keeps_its_digits(LossCase("", 2050, 128, tau, kind).z(), tau)


@pytest.mark.parametrize("k", range(22))
def test_equals_the_original_code(k):
    case = golden_case(k)
    z = case["z"].requires_grad_()
    loss = fused_nt_xent(z, case["tau"], normalize=case["normalize"])
    loss.backward()
    assert_equals_golden(loss, z.grad, case)


@pytest.mark.parametrize("rows", [2, 6, 34, 130, 2050, 4226])
def test_every_number_of_rows_works(rows):
    z = LossCase("", rows, 16, 0.1, "pairs").z()
    ours = loss_and_gradients(fused_nt_xent, z, 0.1, reduction="none")
    same_dtype = loss_and_gradients(nt_xent, z, 0.1, reduction="none")
    truth = loss_and_gradients(nt_xent, z.double(), 0.1, reduction="none")
    assert_as_accurate_as(ours[0], same_dtype[0], truth[0])
    assert_as_accurate_as(ours[1], same_dtype[1], truth[1])


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_plain_dot_products_are_as_accurate_as_those_of_the_reference(tau):
    z = LossCase("", 130, 33, tau, "random").z() / 5
    ours = loss_and_gradients(fused_nt_xent, z, tau, normalize=False, reduction="none")
    same_dtype = loss_and_gradients(nt_xent, z, tau, normalize=False, reduction="none")
    truth = loss_and_gradients(nt_xent, z.double(), tau, normalize=False, reduction="none")
    assert_as_accurate_as(ours[0], same_dtype[0], truth[0])
    assert_as_accurate_as(ours[1], same_dtype[1], truth[1])
    # a sum that cancels: held against the size of what it sums
    terms = (truth[1] * z).sum(1) / (2 * tau)
    assert (ours[2] - truth[2]).abs() <= 1e-6 * terms.norm()


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize(("tau", "normalize"), [(0.1, True), (0.005, True), (1.0, False)])
@pytest.mark.parametrize(("rows", "extra"), [(2, 1), (34, 5), (66, 700)])
def test_negatives_count_in_every_row_and_have_no_gradient(rows, extra, tau, normalize, pairs):
    z = LossCase("", rows, 33, tau).z() / (1 if normalize else 5)
    negatives = LossCase("", extra, 33, tau).z(seed=1) / 5
    kwargs = {"pairs": pairs, "normalize": normalize, "reduction": "none"}
    ours = loss_and_gradients(fused_nt_xent, z, tau, negatives=negatives, **kwargs)
    exact = {"negatives": negatives.double(), **kwargs}
    truth = loss_and_gradients(nt_xent, z.double(), tau, **exact)
    bound = 2e-5 if tau > 0.01 else 1e-4
    assert (ours[0] - truth[0]).norm() <= bound * truth[0].norm()
    assert (ours[1] - truth[1]).norm() <= bound * truth[1].norm()
    # a sum that cancels: held against the size of what it sums
    assert (ours[2] - truth[2]).abs() <= 2e-6 * (truth[0].norm() + 1) / tau


def test_negatives_equal_rows_that_nobody_pairs():
    z, negatives = torch.randn(6, 5).double(), torch.randn(3, 5).double()
    loss = fused_nt_xent(z, 0.2, negatives=negatives, reduction="none")
    unit = unit_rows(torch.cat((z, negatives)))
    logits = (unit[:6] @ unit.T / 0.2).masked_fill(torch.eye(6, 9, dtype=torch.bool), -math.inf)
    expected = torch.nn.functional.cross_entropy(logits, positive_index(6), reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows_give_a_float32_loss_and_a_gradient_in_their_dtype(dtype):
    z = LossCase("", 66, 33, 0.1, "pairs").z().to(dtype)
    ours = loss_and_gradients(fused_nt_xent, z, 0.1)
    truth = loss_and_gradients(nt_xent, z.double(), 0.1)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert abs(ours[0] - truth[0]) <= 1e-6 * truth[0].abs()
    # one rounding of each element
    rounding = torch.finfo(dtype).eps / 2 * truth[1].abs() + torch.finfo(dtype).smallest_normal
    assert ((ours[1] - truth[1]).abs() <= 1.01 * rounding + 1e-6 * truth[1].norm()).all()


def test_gradcheck_in_z_and_tau():
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rows = functools.partial(fused_nt_xent, reduction="none")
    assert torch.autograd.gradcheck(rows, (z, tau))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-8, 1e8, 1e30, 1e38])
def test_upstream_gradient_of_any_size_keeps_its_digits(size):
    z = LossCase("", 34, 33, 0.1).z()
    gradients = []
    for factor in (1.0, size):
        leaf = z.clone().requires_grad_()
        fused_nt_xent(leaf, 0.1, reduction="sum").backward(torch.tensor(factor))
        gradients.append(leaf.grad.double() / factor)
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_identical_rows_lose_the_log_of_the_number_of_candidates():
    loss = fused_nt_xent(torch.ones(130, 33), 0.2)
    assert loss.item() == pytest.approx(math.log(129), rel=1e-6)


def test_gradient_is_orthogonal_to_z():
    z = LossCase("", 130, 33, 0.1, "pairs").z()
    dz = loss_and_gradients(fused_nt_xent, z, 0.1)[1]
    inner = (dz.double() * z).sum(1).abs()
    assert (inner <= 1e-6 * dz.norm(dim=1) * z.norm(dim=1)).all()


def test_scaling_a_row_by_a_power_of_two_changes_nothing():
    z = LossCase("", 34, 33, 0.1).z()
    scaled = z.clone()
    scaled[3] *= 1024
    assert torch.equal(*(fused_nt_xent(x, 0.1, reduction="none") for x in (z, scaled)))


def test_swapping_views_and_permuting_images_permutes_the_rows_of_the_loss():
    z = LossCase("", 34, 33, 0.1, "pairs").z().double()
    rows = fused_nt_xent(z, 0.1, reduction="none")
    swapped = torch.cat((z[17:], z[:17]))
    order = torch.randperm(17)
    order = torch.cat((order, order + 17))
    torch.testing.assert_close(fused_nt_xent(swapped, 0.1, reduction="none"), rows.roll(17))
    torch.testing.assert_close(fused_nt_xent(z[order], 0.1, reduction="none"), rows[order])


def test_interleaved_rows_are_permuted_halves():
    z = LossCase("", 130, 33, 0.1, "pairs").z()
    interleaved = torch.stack((z[:65], z[65:]), 1).reshape(130, 33)
    halves = loss_and_gradients(fused_nt_xent, z, 0.1)
    ours = loss_and_gradients(fused_nt_xent, interleaved, 0.1, pairs="interleaved")
    truth = loss_and_gradients(nt_xent, interleaved.double(), 0.1, pairs="interleaved")
    torch.testing.assert_close(ours[0], halves[0], rtol=1e-6, atol=0)
    assert (ours[1] - truth[1]).norm() <= 1e-6 * truth[1].norm()


@pytest.mark.parametrize("size", [1.0, 1e-38, 1e38])
def test_one_image_has_no_gradient_at_an_upstream_gradient_of_any_size(size):
    z = torch.randn(2, 5, requires_grad=True)
    fused_nt_xent(z, 0.1).backward(torch.tensor(size))
    assert (z.grad == 0).all()


def test_the_smallest_temperature_gives_a_number():
    assert fused_nt_xent(torch.eye(4), 2.0**-126).isfinite()


def test_one_image_has_no_loss_and_no_gradient():
    for dtype in (torch.float32, torch.float64):
        loss, dz, dtau = loss_and_gradients(fused_nt_xent, torch.randn(2, 5, dtype=dtype), 0.005)
        assert loss == 0 and (dz == 0).all() and dtau == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_tiny_rows_have_the_gradient_of_the_reference(dtype):
    z = LossCase("", 34, 16, 0.1).z().to(dtype)
    z[3] = 0
    z[5] *= 1e-8
    z[20] *= 1e-8
    dz = loss_and_gradients(fused_nt_xent, z, 0.1)[1]
    truth = loss_and_gradients(nt_xent, z.double(), 0.1)[1]
    assert torch.isfinite(dz).all()
    assert ((dz - truth).norm(dim=1) <= 2e-6 * truth.norm(dim=1)).all()


@pytest.mark.parametrize("tau", [0.5, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_gives_nan_out(tau, dtype, normalize):
    z = LossCase("", 34, 16, tau).z().to(dtype)
    z[4, 2] = math.nan
    rows, dz, dtau = loss_and_gradients(
        fused_nt_xent, z, tau, normalize=normalize, reduction="none"
    )
    assert rows.isnan().all() and dz.isnan().all() and dtau.isnan()
    assert fused_nt_xent(torch.full((2, 3), math.nan, dtype=dtype), tau).isnan()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("tau", [0.5, 0.005])
@pytest.mark.parametrize("normalize", [True, False])
def test_infinity_in_terminates_with_nan_or_a_number_out(tau, normalize, value):
    z = LossCase("", 34, 16, tau).z()
    z[4, 2] = value
    negatives = LossCase("", 3, 16, tau).z()
    negatives[1] = value
    rows, dz, dtau = loss_and_gradients(
        fused_nt_xent, z, tau, normalize=normalize, reduction="none", negatives=negatives
    )
    assert not torch.isfinite(rows[4]) and not torch.isfinite(dz[4]).all()


@pytest.mark.parametrize("rows", [514, 4226])
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(rows):
    z = LossCase("", rows, 33, 0.1, "pairs").z()
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(loss_and_gradients(fused_nt_xent, z, 0.1, reduction="none"))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_over_many_rows_has_the_same_bits_for_any_number_of_threads(reduction):
    rows = torch.randn(32770, generator=torch.Generator().manual_seed(0))
    losses = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        losses.append(reduced(rows, reduction))
    torch.set_num_threads(1)
    assert losses[0] == losses[1] == losses[2]
    exact = getattr(rows.double(), reduction)()
    assert abs(losses[0] - exact) <= 1e-6 * abs(rows).double().sum()
    assert abs(reduced(rows[:9], reduction) - getattr(rows[:9], reduction)()) <= 1e-6


def test_the_mean_of_32770_rows_has_the_same_bits_for_any_number_of_threads():
    z = LossCase("", 32770, 1, 0.3).z()
    losses = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        losses.append(fused_nt_xent(z, 0.3))
    torch.set_num_threads(1)
    assert losses[0] == losses[1]
