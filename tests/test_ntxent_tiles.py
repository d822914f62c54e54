"""The row blocks of the loss in plain torch, for float64 and for devices without a kernel."""

import contextlib
import math

import pytest
import torch
from test_ntxent import loss_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_kernels import fused_nt_xent, ntxent_cpu, ntxent_tiles
from simclr_kernels.reference import nt_xent, nt_xent_metrics
from simclr_kernels.testing import LossCase


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize(("tau", "normalize"), [(0.3, True), (0.005, True), (0.3, False)])
def test_float64_goes_through_row_blocks_to_float64_rounding(
    tau, normalize, pairs, extra, monkeypatch
):
    monkeypatch.setattr(ntxent_tiles, "TILE_ELEMENTS", 100)
    z = LossCase("", 34, 16, 0.3).z().double() / 5
    negatives = LossCase("", extra, 16, 0.3).z(seed=1).double() / 5 if extra else None
    kwargs = {"pairs": pairs, "normalize": normalize, "reduction": "none", "negatives": negatives}
    ours = loss_and_gradients(fused_nt_xent, z, tau, **kwargs)
    truth = loss_and_gradients(nt_xent, z, tau, **kwargs)
    for actual, exact in zip(ours, truth, strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-12)


def by_tiles(z, tau, dloss, first=0, count=None, span=None, negatives=None):
    """All that the three functions return, for rows [first, first + count)."""
    span = span or len(z)
    asked = (span, first, len(z) if count is None else count)
    sums = ntxent_tiles.negative_sums(z, tau, negatives, span, 0, len(z), True, True)
    loss, stats = ntxent_tiles.finish_rows(z, tau, *sums[:2], span, True)
    return (
        *sums,
        loss,
        stats,
        *ntxent_tiles.row_gradients(dloss, z, tau, negatives, stats, *asked, True),
    )


@pytest.mark.parametrize("tau", [0.3, 0.005])
@pytest.mark.parametrize("span", [4, 2])
def test_parts_of_the_rows_are_parts_of_the_whole(span, tau):
    z = torch.randn(12, 5, dtype=torch.float64)
    negatives = torch.randn(3, 5, dtype=torch.float64)
    dloss, tau = torch.randn(12, dtype=torch.float64), torch.tensor(tau, dtype=torch.float64)
    *_, dz, dtau = by_tiles(z, tau, dloss, span=span, negatives=negatives)
    parts = [by_tiles(z, tau, dloss, first, 4, span, negatives)[-2:] for first in (0, 4, 8)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), dz, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(part[1] for part in parts), dtau, rtol=1e-12, atol=1e-12)
    for first in (0, 4, 8):
        part = ntxent_tiles.negative_sums(z, tau, negatives, span, first, 4, True, True)
        whole = ntxent_tiles.negative_sums(z, tau, negatives, span, 0, 12, True, True)
        for some, all_rows in zip(part, whole, strict=True):
            torch.testing.assert_close(some, all_rows[..., first : first + 4])


def test_row_blocks_hold_no_tensor_larger_than_a_tile():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    rows = 4096
    z = torch.randn(rows, 2, dtype=torch.float64)
    with Largest() as largest:
        by_tiles(z, torch.tensor(0.5), torch.ones(rows, dtype=torch.float64))
    assert largest.elements <= ntxent_tiles.TILE_ELEMENTS < rows * rows


def test_autocast_does_not_reach_the_products_of_devices_without_a_kernel():
    z, tau, dloss = torch.randn(34, 16), torch.tensor(0.1), torch.ones(34)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = by_tiles(z, tau, dloss)
    assert all(map(torch.equal, inside, by_tiles(z, tau, dloss)))


def test_row_blocks_do_not_wait_for_a_device_to_derive_a_temperature_that_came_as_a_number(
    monkeypatch,
):
    # meta stands for such a device, which autocast does not know
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    z, stats, dloss = (torch.ones(*shape, device="meta") for shape in ((6, 4), (3, 6), (6,)))
    tau = torch.tensor(0.1)
    dz, dtau = ntxent_tiles.row_gradients(dloss, z, tau, None, stats, 6, 0, 6, True)
    assert dz.shape == (6, 4) and dtau.device.type == "cpu" and dtau.isnan()


def test_row_blocks_give_nan_where_the_temperature_is_not_positive():
    for tau in (0.0, -0.1):
        *_, loss, _, dz, dtau = by_tiles(torch.randn(6, 4), torch.tensor(tau), torch.ones(6))
        assert loss.isnan().all() and dz.isnan().all() and dtau.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.1, 0.0127])
def test_what_a_row_keeps_is_the_sum_over_its_candidates(tau, dtype):
    z = LossCase("", 34, 16, tau).z().to(dtype)
    top, _, _, _, (kept_top, total, share), *_ = by_tiles(
        z, torch.tensor(tau, dtype=torch.float64), torch.ones(34, dtype=dtype)
    )
    constant = max(1 / (tau * math.log(2)) - 100, 0)
    bounded = tau >= ntxent_tiles.SMALLEST_BOUNDED_TAU
    assert bounded == bool((top == torch.tensor(constant, dtype=dtype)).all())
    truth = nt_xent(z.double(), tau, reduction="none")
    pos, *_ = ntxent_tiles.negative_sums(z, torch.tensor(tau), None, 34, 0, 34, True, True)[2]
    lse = math.log(2) * (kept_top.double() + total.double().log2())
    torch.testing.assert_close(lse - pos.double(), truth, rtol=1e-4, atol=1e-4)
    expected_share = -torch.expm1(-truth)
    torch.testing.assert_close(share.double(), expected_share, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", [ntxent_tiles, ntxent_cpu], ids=lambda m: m.__name__)
def test_every_backend_has_one_constant_top_from_the_same_temperature_on(kernels):
    z = LossCase("", 34, 16, 0.0128).z()
    smallest = ntxent_tiles.SMALLEST_BOUNDED_TAU
    for tau, normalize in ((smallest, True), (math.nextafter(smallest, 0), True), (0.5, False)):
        tau = torch.tensor(tau, dtype=torch.float64)
        top, *_ = kernels.negative_sums(z, tau, None, 34, 0, 34, normalize, False)
        assert (len(top.unique()) == 1) == ntxent_tiles.is_bounded(tau, normalize)


def test_metrics_of_tiles_are_those_of_the_reference():
    z, negatives = LossCase("", 34, 16, 0.1, "pairs").z().double(), torch.randn(5, 16).double()
    sums = ntxent_tiles.negative_sums(z, torch.tensor(0.1), negatives, 34, 0, 34, True, True)
    pos, largest, entropy = sums[2]
    accuracy, expected, similarity, _ = nt_xent_metrics(z, 0.1, negatives=negatives)
    torch.testing.assert_close(entropy.mean(), expected)
    torch.testing.assert_close((pos >= largest).double().mean(), accuracy)
    torch.testing.assert_close(pos.mean() * 0.1, similarity, rtol=1e-6, atol=0)
