"""The metrics that fused_nt_xent returns beside the loss."""

import math

import pytest
import torch

from simclr_kernels import NTXentMetrics, fused_nt_xent
from simclr_kernels.reference import nt_xent_metrics
from simclr_kernels.testing import LossCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extra", [0, 9])
@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize(("tau", "normalize"), [(0.3, True), (0.005, True), (0.5, False)])
@pytest.mark.parametrize("kind", ["random", "pairs", "duplicates", "collapsed", "zeros"])
def test_metrics_are_those_of_the_reference(kind, tau, normalize, pairs, extra, dtype):
    z = (LossCase("", 66, 33, tau, kind).z() / (1 if normalize else 5)).to(dtype)
    negatives = LossCase("", extra, 33, tau).z(seed=1).to(dtype) / 5 if extra else None
    kwargs = {"pairs": pairs, "normalize": normalize}
    loss, metrics = fused_nt_xent(z, tau, negatives=negatives, return_metrics=True, **kwargs)
    assert torch.equal(loss, fused_nt_xent(z, tau, negatives=negatives, **kwargs))
    negatives = None if negatives is None else negatives.double()
    expected = nt_xent_metrics(z.double(), tau, negatives=negatives, **kwargs)
    for name, actual, exact in zip(NTXentMetrics._fields, metrics, expected, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == () and not actual.requires_grad
        # logits, of which the entropy is made, round in proportion to their size
        allowed = 1e-6 + (1e-6 / tau if name == "entropy" else 1e-6 * abs(exact.item()))
        assert abs(actual.item() - exact.item()) <= allowed, name


def test_metrics_of_a_learnable_temperature_on_the_graph_have_no_gradient():
    z = torch.randn(8, 5, requires_grad=True)
    tau = torch.tensor(0.2, requires_grad=True)
    loss, metrics = fused_nt_xent(z, tau, return_metrics=True)
    loss.backward()
    assert z.grad is not None and tau.grad is not None
    assert not any(metric.requires_grad for metric in metrics)


def test_ties_count_as_right_and_the_nearest_negative_as_wrong():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    _, tied = fused_nt_xent(image[:1].repeat(4, 1), 0.1, return_metrics=True)
    assert tied.accuracy == 1 and tied.entropy.item() == pytest.approx(math.log(3))
    # every row equals a row of the other image, and not its own other view
    _, wrong = fused_nt_xent(torch.cat((image, image.flip(0))), 0.1, return_metrics=True)
    assert wrong.accuracy == 0


@pytest.mark.parametrize("length", [100.0, 0.01])
def test_accuracy_of_dot_products_is_that_of_their_own_size(length):
    z = torch.tensor([[length, 0.0]]).repeat(2, 1)
    for further, accuracy in ((0.0, 1), (1e-7, 1), (1e-5, 0), (-1e-5, 1)):
        negatives = z[:1] * (1 + further)
        _, metrics = fused_nt_xent(
            z, 0.5, normalize=False, negatives=negatives, return_metrics=True
        )
        assert metrics.accuracy == accuracy


def test_a_negative_of_the_queue_can_make_a_row_wrong():
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    negatives = torch.tensor([[1.0, 0.1]])
    _, without = fused_nt_xent(z, 0.5, return_metrics=True)
    _, metrics = fused_nt_xent(z, 0.5, negatives=negatives, return_metrics=True)
    assert without.accuracy == 1 and without.entropy == 0 and without.negative_similarity.isnan()
    # row 1 has similarity 0.6 with its positive and 0.68 with the negative
    assert metrics.accuracy == 0
    assert metrics.positive_similarity.item() == pytest.approx(0.6)


def test_mean_similarity_takes_no_matrix_of_similarities():
    z = torch.randn(40, 6, dtype=torch.float64)
    z[7] = 0
    unit = torch.nn.functional.normalize(z)
    s = unit @ unit.T
    i = torch.arange(40)
    negative = s.clone()
    negative[i, i] = negative[i, (i + 20) % 40] = 0
    _, metrics = fused_nt_xent(z, 0.3, return_metrics=True)
    assert metrics.negative_similarity.item() == pytest.approx(
        negative.sum().item() / (40 * 38), abs=1e-7
    )
