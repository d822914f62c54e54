"""The reference loss and metrics: against Algorithm 1, the original's outputs and autograd."""

import math

import numpy as np
import pytest
import torch
from conftest import shared_path

from simclr_kernels.reference import (
    is_nearest,
    nt_xent,
    nt_xent_metrics,
    original_metrics,
    positive_in_spans,
    positive_index,
    unit_rows,
)


def similarities(z):
    """s of the paper's Algorithm 1, loop by loop."""
    return [[float(a @ b / (a.norm() * b.norm())) for b in z] for a in z]


def algorithm_1(z, tau, negatives=()):
    """The paper's Algorithm 1; rows 2k - 1 and 2k of the paper are 2k and 2k + 1."""
    rows = len(z)
    s = similarities([*z, *negatives])

    def ell(i, j):
        candidates = (k for k in range(rows + len(negatives)) if k != i)
        return -math.log(math.exp(s[i][j] / tau) / sum(math.exp(s[i][k] / tau) for k in candidates))

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(rows // 2)) / rows


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_equals_algorithm_1_of_the_paper(tau):
    z = torch.randn(10, 7, dtype=torch.float64)
    expected = algorithm_1(z, tau)
    assert nt_xent(z, tau, pairs="interleaved").item() == pytest.approx(expected, rel=1e-13)
    halves = torch.cat((z[::2], z[1::2]))
    assert nt_xent(halves, tau).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("rows", [2, 10])
def test_negatives_are_further_candidates_of_algorithm_1(rows):
    z, negatives = torch.randn(rows, 7).double(), torch.randn(3, 7).double()
    expected = algorithm_1(z, 0.1, negatives)
    loss = nt_xent(z, 0.1, pairs="interleaved", negatives=negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("extra", [0, 3])
def test_metrics_are_those_of_loops_over_the_candidates(extra):
    z, negatives = torch.randn(10, 7).double(), torch.randn(extra, 7).double()
    s, tau = similarities([*z, *negatives]), 0.3
    right, entropy, positive, negative = [], [], [], []
    for i in range(10):
        pos = s[i][i ^ 1]
        others = [s[i][k] for k in range(10 + extra) if k not in (i, i ^ 1)]
        e = [math.exp(x / tau) for x in (pos, *others)]
        right.append(pos >= max(others))
        entropy.append(-sum(x / sum(e) * math.log(x / sum(e)) for x in e))
        positive.append(pos)
        negative += others
    found = nt_xent_metrics(z, tau, pairs="interleaved", negatives=negatives if extra else None)
    for ours, values in zip(found, (right, entropy, positive, negative), strict=True):
        assert ours.item() == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_nearest_counts_ties_to_rounding_as_right():
    pos = torch.tensor([1.0, 1.0, 1.0, 0.0])
    largest = torch.tensor([1.0, 1 + 2.0**-21, 1 + 2.0**-18, 1e-6])
    assert is_nearest(pos, largest, 1.0, False).tolist() == [True, True, False, False]
    # similarities of unit rows round like 1: logits like 1 / tau
    assert is_nearest(pos, largest, 0.1, True).tolist() == [True, True, True, True]


@pytest.mark.parametrize(
    ("size", "gap", "right"),
    [
        (1e4, 0.0, True),
        (1e4, 1e-3, True),
        (1e4, 1.0, False),
        (1e4, -1.0, True),
        (1e-4, 0.0, True),
        (1e-4, 1e-11, True),
        (1e-4, 1e-8, False),
        (1e-4, -1e-8, True),
    ],
)
def test_nearest_of_dot_products_rounds_like_their_size(size, gap, right):
    tau = 0.5
    pos, largest = (torch.tensor([x / tau], dtype=torch.float64) for x in (size, size + gap))
    assert is_nearest(pos, largest, tau, normalize=False).tolist() == [right]


@pytest.mark.parametrize(("gap", "right"), [(9e-7, True), (1e-6, False), (-1e-6, True)])
@pytest.mark.parametrize("tau", [2.0, 0.1, 0.005])
@pytest.mark.parametrize("similarity", [1e-4, 0.9])
def test_nearest_of_unit_rows_rounds_like_one_at_any_similarity(similarity, tau, gap, right):
    pos, largest = (
        torch.tensor([x / tau], dtype=torch.float64) for x in (similarity, similarity + gap)
    )
    assert is_nearest(pos, largest, tau, normalize=True).tolist() == [right]


def golden_case(k):
    golden = np.load(shared_path("golden/nt_xent.npz"))
    return {
        "z": torch.from_numpy(golden[f"hidden_{k:02d}"]),
        "tau": float(golden["case_tau"][k]),
        "normalize": bool(golden["case_hidden_norm"][k]),
        "loss": float(golden["loss"][k]),
        "grad": torch.from_numpy(golden[f"grad_{k:02d}"]),
    }


def assert_equals_golden(loss, grad, case):
    """With the tolerances of golden/README.md, for the original's loss, twice the mean."""
    z, expected = case["z"], case["grad"]
    assert abs(2 * loss.item() - case["loss"]) <= 2e-6 + 1e-6 * case["loss"]
    allowed = 1e-5 * expected.abs().max().expand(len(z), 1)
    if case["normalize"]:
        norms = z.norm(dim=1, keepdim=True).clamp_min(1e-6)
        allowed = allowed + 5e-7 / (len(z) / 2 * case["tau"] * norms)
    assert ((2 * grad - expected).abs() <= allowed).all()


@pytest.mark.parametrize("k", range(22))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_original_code(k, dtype):
    case = golden_case(k)
    z = case["z"].to(dtype).requires_grad_()
    loss = nt_xent(z, case["tau"], normalize=case["normalize"])
    loss.backward()
    assert_equals_golden(loss, z.grad, case)


@pytest.mark.parametrize("k", range(22))
def test_metrics_of_the_original_are_those_it_logged(k):
    golden = np.load(shared_path("golden/nt_xent.npz"))
    case = golden_case(k)
    accuracy, entropy = original_metrics(case["z"].double(), case["tau"], case["normalize"])
    assert accuracy.item() == pytest.approx(golden["contrast_acc"][k], rel=1e-6)
    assert abs(entropy.item() - golden["contrast_entropy"][k]) <= 1e-6


@pytest.mark.parametrize("size", ["2x5x16", "4x8x32", "2x32x64"])
def test_the_gradient_of_the_whole_batch_is_what_the_replicas_of_the_original_applied(size):
    golden = np.load(shared_path("golden/nt_xent.npz"))
    hidden = torch.from_numpy(golden[f"rep_hidden_{size}"]).double()
    replicas, rows, features = hidden.shape
    whole = hidden.reshape(replicas, 2, rows // 2, features).transpose(0, 1).reshape(-1, features)
    whole.requires_grad_()
    loss = 2 * nt_xent(whole, float(golden[f"rep_tau_{size}"]))
    loss.backward()
    local = whole.grad.reshape(2, replicas, rows // 2, features).transpose(0, 1).reshape_as(hidden)
    expected = torch.from_numpy(golden[f"rep_grad_{size}"]).double()
    assert loss.item() == pytest.approx(golden[f"rep_loss_{size}"].mean(), rel=2e-6)
    assert (local - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("normalize", [True, False])
def test_autograd_of_the_reference_passes_gradcheck(normalize):
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def rows(z, tau):
        return nt_xent(z, tau, normalize=normalize, reduction="none")

    assert torch.autograd.gradcheck(rows, (z, tau))


def test_identical_rows_lose_the_log_of_the_number_of_candidates():
    z = torch.ones(12, 5, dtype=torch.float64)
    assert nt_xent(z, 0.2).item() == pytest.approx(math.log(11), rel=1e-13)


def test_one_image_has_no_loss_and_no_gradient():
    z = torch.randn(2, 5, requires_grad=True)
    loss = nt_xent(z, 0.1)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


def test_reductions_agree():
    z = torch.randn(8, 5, dtype=torch.float64)
    rows = nt_xent(z, 0.5, reduction="none")
    assert rows.shape == (8,)
    torch.testing.assert_close(nt_xent(z, 0.5, reduction="sum"), rows.sum())
    torch.testing.assert_close(nt_xent(z, 0.5), rows.mean())


def test_positive_index_pairs_rows_as_its_name_says():
    assert positive_index(6).tolist() == [3, 4, 5, 0, 1, 2]
    assert positive_index(6, "interleaved").tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(ValueError, match="pairs must be 'halves' or 'interleaved', got 'rows'"):
        positive_index(6, "rows")


def test_positives_in_spans_are_in_the_other_half_of_their_group():
    assert positive_in_spans(8, 4).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert torch.equal(positive_in_spans(8, 8), positive_index(8))
    assert torch.equal(positive_in_spans(8, 2), positive_index(8, "interleaved"))


def test_unit_rows_multiplies_the_smallest_rows_by_a_million_and_keeps_zero():
    z = torch.tensor([[3.0, 4.0], [1e-7, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(unit_rows(z), torch.tensor([[0.6, 0.8], [0.1, 0.0], [0.0, 0.0]]))
