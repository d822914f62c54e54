"""The GPU kernels of the loss: in Triton's interpreter, or on a GPU.

Negatives, metrics and ranks: test_ntxent_triton_features.py; their machine code for real GPUs:
test_codegen.py.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from triton_loss import (
    DEVICE,
    assert_close_to_the_reference,
    by_kernels,
    by_reference,
    upstream_of,
)

from simclr_kernels import (
    ntxent_backward_triton,
    ntxent_products_triton,
    ntxent_triangle_triton,
    ntxent_triton,
)
from simclr_kernels.testing import LOSS_CASES, LossCase, assert_as_accurate_as

# numpy in the interpreter sets floating-point flags for lanes it does not use
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("fresh_memory_holds_nan"),
]


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.regime)
def test_loss_and_gradients_are_as_accurate_as_those_of_the_reference(case):
    assert_close_to_the_reference(case.z(), case.tau)


@pytest.mark.parametrize("rows", [2, 130])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_over_rows_is_taken_by_the_kernels(rows, reduction):
    z = LossCase("", rows, 33, 0.1, "pairs").z()
    assert_close_to_the_reference(z, 0.1, reduction=reduction)


@pytest.mark.parametrize("tau", [0.1, 0.0129, 0.012, 0.005])
@pytest.mark.parametrize("rows", [2, 34, 130])
def test_a_temperature_on_the_device_takes_the_path_that_it_needs(rows, tau, tau_on_device):
    z = LossCase("", rows, 33, tau, "pairs").z()
    for reduction in ("none", "sum"):
        assert_close_to_the_reference(z, tau, reduction=reduction)
    loss, dz, dtau = by_kernels(z, tau)
    assert not dtau.isnan()


def test_paths_of_a_temperature_on_the_device_give_the_bits_of_a_known_one(tau_on_device):
    for tau in (0.1, 0.005):
        z = LossCase("", 130, 33, tau, "pairs").z()
        loss, dz, _ = by_kernels(z, tau)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ntxent_triton, "_known", lambda tau: tau.item())
            known = by_kernels(z, tau)
        assert torch.equal(loss, known[0]) and torch.equal(dz, known[1])


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
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_other_pairings_and_plain_dot_products(pairs, normalize, tau, reduction, tau_on_device):
    z = LossCase("", 34, 33, tau).z() / 5
    assert_close_to_the_reference(z, tau, pairs=pairs, normalize=normalize, reduction=reduction)


@pytest.mark.parametrize("rows", [6, 130])
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_of_many_tiles_sum_their_rows_over_sweeps(rows, blocks, monkeypatch):
    # each block then holds several tiles both ways
    monkeypatch.setattr(ntxent_triangle_triton, "BLOCKS_OF_A_VIEW", blocks)
    assert_close_to_the_reference(LossCase("", rows, 33, 0.1, "pairs").z(), 0.1)


@pytest.mark.parametrize("features", [33, 130])
def test_more_rows_than_one_padded_view(features):
    assert_close_to_the_reference(LossCase("", 286, features, 0.1, "pairs").z(), 0.1)


@pytest.mark.parametrize("programs", [1, 1000])
def test_parts_of_the_columns_change_nothing_but_rounding(programs, monkeypatch, tau_on_device):
    monkeypatch.setattr(ntxent_backward_triton, "PROGRAMS", programs)
    monkeypatch.setattr(ntxent_backward_triton, "FEWEST_TILES", 1)
    negatives = LossCase("", 40, 33, 0.1).z(seed=7)
    assert_close_to_the_reference(LossCase("", 70, 33, 0.1, "pairs").z(), 0.1, negatives=negatives)


@pytest.mark.parametrize("weights_bytes", [1, 1 << 14])
@pytest.mark.parametrize("negatives", [None, 40])
def test_products_take_rows_in_blocks(weights_bytes, negatives, monkeypatch, tau_on_device):
    monkeypatch.setattr(ntxent_products_triton, "WEIGHTS_BYTES", weights_bytes)
    extra = None if negatives is None else LossCase("", negatives, 150, 0.1).z(seed=7)
    for pairs in ("halves", "interleaved"):
        z = LossCase("", 70, 150, 0.1, "pairs").z()
        assert_close_to_the_reference(z, 0.1, negatives=extra, pairs=pairs)


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
@pytest.mark.parametrize("features", [128, 150])
def test_gradient_of_16_bit_rows_is_good_to_two_roundings(dtype, kind, tau, features):
    # the rounded rows of a close pair differ by little but rounding; 150 go through products
    z = LossCase("", 256, features, tau, kind).z().to(dtype)
    dz = by_kernels(z, tau)[1].cpu()
    truth = by_reference(z.double(), tau)[1]
    assert (dz - truth).norm() <= torch.finfo(dtype).eps * truth.norm()


def test_weights_of_16384_rows_do_not_vanish_in_float16():
    # a weight there is 2^-13 of those here, where the upstream gradient makes up for it
    z = LossCase("", 66, 33, 0.5).z().half()
    dloss = upstream_of(66) * 2.0**-13
    layout = ("halves", True, "none", "ieee")
    loss, _, *kept = ntxent_triton.forward(z.to(DEVICE), torch.tensor(0.5), None, *layout, False)
    small, plain = (
        ntxent_triton.backward(g.to(DEVICE), z.to(DEVICE), torch.tensor(0.5), None, *kept, *layout)
        for g in (dloss, dloss * 2.0**13)
    )
    # what rounds to zero in the gradient itself is below half of float16's smallest number
    gap = (small[0].float() - plain[0].float() * 2.0**-13).abs()
    assert gap.max() <= 2.0**-25


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
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_upstream_gradient_of_any_size_keeps_its_digits(size, reduction):
    z = LossCase("", 34, 16, 0.1).z().to(DEVICE)
    tau = torch.tensor(0.1)
    layout = ("halves", True, reduction, "ieee")
    loss, _, *kept = ntxent_triton.forward(z, tau, None, *layout, False)
    plain, scaled = (
        ntxent_triton.backward(loss * k, z, tau, None, *kept, *layout)[0].double() / k
        for k in (1.0, size)
    )
    assert (plain - scaled).norm() <= 1e-6 * plain.norm()


def test_an_upstream_gradient_of_zero_gives_zero(tau_on_device):
    z = LossCase("", 34, 16, 0.1).z().to(DEVICE)
    tau = torch.tensor(0.1, device=DEVICE)
    for reduction in ("none", "mean"):
        layout = ("halves", True, reduction, "ieee")
        loss, _, *kept = ntxent_triton.forward(z, tau, None, *layout, False)
        dz, dtau = ntxent_triton.backward(0 * loss, z, tau, None, *kept, *layout)
        assert (dz == 0).all() and dtau == 0


@pytest.mark.parametrize(("tau", "precision"), [(0.5, "ieee"), (0.005, "ieee"), (0.5, "tf32")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_in_give_nan_out(tau, precision, value):
    z = LossCase("", 34, 16, tau).z()
    z[4, 2] = value
    if math.isnan(value):
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


def test_a_temperature_that_is_not_positive_gives_nan(tau_on_device):
    z = LossCase("", 6, 16, 0.1).z().to(DEVICE)
    for tau in (-0.1, 0.0):
        loss, *_ = ntxent_triton.forward(
            z, torch.tensor(tau, device=DEVICE), None, "halves", True, "none", "ieee", False
        )
        assert loss.isnan().all()


def test_what_is_kept_has_the_shapes_that_are_promised():
    for rows, features in ((2, 1), (130, 33), (258, 300)):
        z = torch.zeros(rows, features, device=DEVICE)
        kept = ntxent_triton.forward(
            z, torch.tensor(0.5), None, "halves", True, "mean", "ieee", False
        )[2:]
        shapes = ntxent_triton.kept_shapes(rows, features)
        assert [tuple(x.shape) for x in kept] == list(shapes)
