"""The C++ kernels of the loss: each instruction set, ranges of rows, extra negatives, metrics."""

import math
import subprocess
import sys

import pytest
import torch

from simclr_kernels import _C
from simclr_kernels.ntxent_cpu import finish_rows, negative_sums, row_gradients
from simclr_kernels.reference import unit_rows
from simclr_kernels.testing import LOSS_CASES, LossCase, assert_as_accurate_as

INSTRUCTION_SETS = _C.instruction_sets()
# unit rows of one feature have no gradient to hold against anything
CASES = [case for case in LOSS_CASES if case.features > 1]


pytestmark = pytest.mark.usefixtures("fresh_memory_holds_nan")


@pytest.fixture
def instruction_set(request):
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(INSTRUCTION_SETS[0])


def upstream(rows):
    return torch.randn(rows, generator=torch.Generator().manual_seed(1))


def kernels(z, tau, negatives=None, *, span=None, parts=1, normalize=True, with_metrics=False):
    """The loss, the gradients in z and tau, and the metrics, by `parts` ranges of rows."""
    rows = len(z)
    span = span or rows
    tau = torch.tensor(tau, dtype=torch.float64)
    count = rows // parts
    sums = [
        negative_sums(z, tau, negatives, span, first, count, normalize, with_metrics)
        for first in range(0, rows, count)
    ]
    top, mass = (torch.cat([s[k] for s in sums]) for k in (0, 1))
    loss, stats = finish_rows(z, tau, top, mass, span, normalize)
    gradients = [
        row_gradients(upstream(rows), z, tau, negatives, stats, span, first, count, normalize)
        for first in range(0, rows, count)
    ]
    dz = torch.cat([g[0] for g in gradients])
    dtau = sum(g[1] for g in gradients)
    return loss, dz, dtau, torch.cat([s[2] for s in sums], 1)


def formula(z, tau, negatives=None, *, span=None, normalize=True, dtype=torch.float64):
    """The same by the matrix of all logits and autograd, in one range."""
    rows = len(z)
    span = span or rows
    z = z.detach().to(dtype).requires_grad_()
    tau = torch.tensor(tau, dtype=dtype, requires_grad=True)
    extra = z.new_empty(0, z.shape[1]) if negatives is None else negatives.to(dtype)
    columns = torch.cat((z, extra))
    row, column = (unit_rows(z), unit_rows(columns)) if normalize else (z, columns)
    logits = row @ column.T / tau
    i = torch.arange(rows)
    positive = i - i % span + (i % span + span // 2) % span
    pos = logits[i, positive]
    not_negative = torch.zeros(logits.shape, dtype=torch.bool)
    not_negative[i, i] = not_negative[i, positive] = True
    negative = logits.masked_fill(not_negative, -math.inf)
    if rows == 2 and negatives is None:
        loss = 0 * pos
    else:
        loss = torch.nn.functional.softplus(negative.logsumexp(1) - pos)
    (loss * upstream(rows).to(dtype)).sum().backward()
    with torch.no_grad():
        candidates = torch.cat((negative, pos[:, None]), 1)
        entropy = -(candidates.softmax(1) * candidates.log_softmax(1)).nansum(1)
        metrics = torch.stack((pos, negative.amax(1), entropy))
    return loss.detach(), z.grad, tau.grad, metrics


def assert_exact(ours, truth, same_dtype, z, tau):
    assert_as_accurate_as(ours[0], same_dtype[0], truth[0])
    assert_as_accurate_as(ours[1], same_dtype[1], truth[1])
    # a sum that cancels: held against the size of what it sums
    assert (ours[2] - truth[2]).abs() <= 1e-6 * (truth[0].norm() + 1) / tau


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.regime)
def test_every_instruction_set_is_as_accurate_as_the_matrix_of_logits(case, instruction_set):
    z = case.z()
    truth = formula(z, case.tau)
    same_dtype = formula(z, case.tau, dtype=torch.float32)
    assert_exact(kernels(z, case.tau), truth, same_dtype, z, case.tau)


@pytest.mark.parametrize("rows", [2, 6, 34, 128, 130, 514, 2178])
@pytest.mark.parametrize("tau", [0.1, 0.005])
def test_instruction_sets_agree_at_every_number_of_rows(rows, tau):
    z = LossCase("", rows, 40, tau, "pairs").z()
    results = []
    for name in INSTRUCTION_SETS:
        _C.use_instruction_set(name)
        results.append(kernels(z, tau))
    _C.use_instruction_set(INSTRUCTION_SETS[0])
    for loss, dz, _, _ in results[1:]:
        assert (loss - results[0][0]).norm() <= 1e-5 * results[0][0].norm()
        assert (dz - results[0][1]).norm() <= 1e-5 * results[0][1].norm()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("features", [1, 2, 31, 130, 300, 2048])
def test_every_number_of_features_works(features, instruction_set):
    z = LossCase("", 70, features, 0.1, "pairs").z() / features**0.5
    truth = formula(z, 0.5, normalize=False)
    same_dtype = formula(z, 0.5, normalize=False, dtype=torch.float32)
    ours = kernels(z, 0.5, normalize=False)
    assert_as_accurate_as(ours[0], same_dtype[0], truth[0])
    assert_as_accurate_as(ours[1], same_dtype[1], truth[1])


# several groups, more than one block in a range, and ranges of several groups
RANGES = [(96, 32, 3), (12, 2, 3), (130, 26, 5), (400, 100, 2), (1200, 300, 4)]


@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("rows, span, parts", RANGES)
def test_ranges_of_rows_give_the_gradient_of_the_whole_batch(rows, span, parts, tau):
    z = LossCase("", rows, 33, tau).z()
    whole = kernels(z, tau, span=span, with_metrics=True)
    ours = kernels(z, tau, span=span, parts=parts, with_metrics=True)
    truth = formula(z, tau, span=span)
    assert_exact(ours, truth, formula(z, tau, span=span, dtype=torch.float32), z, tau)
    assert (ours[0] - whole[0]).norm() <= 1e-6 * whole[0].norm()
    assert (ours[1] - whole[1]).norm() <= 1e-6 * whole[1].norm() / min(1, 20 * tau)
    torch.testing.assert_close(ours[3], whole[3], rtol=1e-5, atol=1e-5)


# fewer than a block, several blocks, and more than are packed at a time
@pytest.mark.parametrize("extra, features", [(1, 33), (5, 33), (300, 33), (600, 2048)])
@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("parts", [1, 3])
def test_extra_negatives_count_in_every_row(extra, features, tau, parts):
    z = LossCase("", 66, features, tau, "pairs").z()
    negatives = 2 * torch.randn(extra, features, generator=torch.Generator().manual_seed(2))
    ours = kernels(z, tau, negatives, span=22, parts=parts)
    truth = formula(z, tau, negatives, span=22)
    same_dtype = formula(z, tau, negatives, span=22, dtype=torch.float32)
    assert_exact(ours, truth, same_dtype, z, tau)


def test_extra_negatives_are_the_only_ones_of_one_image():
    z = LossCase("", 2, 16, 0.1).z()
    negatives = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    for normalize in (True, False):
        ours = kernels(z / 4, 0.5, negatives, normalize=normalize)
        truth = formula(z / 4, 0.5, negatives, normalize=normalize)
        for actual, exact in zip(ours[:3], truth[:3], strict=True):
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["random", "tight", "duplicates", "collapsed"])
@pytest.mark.parametrize(
    "tau, normalize", [(1.0, True), (0.1, True), (0.0129, True), (0.005, True), (0.3, False)]
)
def test_metrics_are_those_of_the_matrix_of_logits(kind, tau, normalize):
    z = LossCase("", 130, 33, tau, kind).z()
    z = z if normalize else z / 4
    negatives = torch.randn(40, 33, generator=torch.Generator().manual_seed(2))
    for extra in (None, negatives):
        ours = kernels(z, tau, extra, span=26, normalize=normalize, with_metrics=True)[3]
        truth = formula(z, tau, extra, span=26, normalize=normalize)[3]
        # float32 logits, of which entropy takes differences
        allowed = 1e-6 * (1 + truth[:2].abs().max())
        assert ((ours - truth).abs() <= allowed).all()


def test_metrics_of_one_image_are_those_of_a_certain_choice():
    pos, largest, entropy = kernels(torch.ones(2, 5), 0.5, with_metrics=True)[3]
    assert (pos - 2).abs().max() <= 1e-6
    assert (largest == -math.inf).all() and (entropy == 0).all()


@pytest.mark.parametrize("tau", [0.1, 0.005])
def test_asking_for_metrics_changes_no_bit_of_the_loss(tau):
    z = LossCase("", 130, 33, tau).z()
    plain, asked = (kernels(z, tau, with_metrics=metrics) for metrics in (False, True))
    assert all(map(torch.equal, plain[:3], asked[:3]))
    assert plain[3].shape == (3, 0) and asked[3].shape == (3, 130)


@pytest.mark.parametrize("tau", [0.1, 0.005])
def test_nan_in_gives_nan_out(tau):
    z = LossCase("", 130, 33, tau).z()
    z[70, 3] = math.nan
    loss, dz, dtau, metrics = kernels(z, tau, with_metrics=True)
    assert loss.isnan().all() and dz.isnan().all() and dtau.isnan()
    assert metrics[2].isnan().all()


def test_infinite_rows_end_in_nan_and_do_not_hang():
    z = LossCase("", 66, 33, 0.1).z()
    z[5] = math.inf
    for normalize in (True, False):
        loss, dz, _, _ = kernels(z, 0.1, normalize=normalize)
        assert loss[5].isnan() and dz[5].isnan().all()


@pytest.mark.parametrize("rows, extra", [(130, 70), (514, 0), (2178, 0)])
def test_bits_do_not_depend_on_the_number_of_threads(rows, extra):
    z = LossCase("", rows, 33, 0.1, "pairs").z()
    negatives = torch.randn(extra, 33) if extra else None
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(kernels(z, 0.1, negatives, with_metrics=True))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_shapes_that_would_be_read_out_of_bounds_are_refused():
    z, tau = torch.randn(6, 4), torch.tensor(0.1)
    top, mass, _ = negative_sums(z, tau, None, 6, 0, 6, True, False)
    with pytest.raises(ValueError, match=r"top must have shape \(6,\), .* got shape \(4,\)"):
        finish_rows(z, tau, top[:4], mass, 6, True)
    _, stats = finish_rows(z, tau, top, mass, 6, True)
    with pytest.raises(ValueError, match=r"dloss must have shape \(6,\)"):
        row_gradients(torch.ones(4), z, tau, None, stats, 6, 0, 6, True)
    with pytest.raises(ValueError, match=r"stats must have shape \(3, 6\)"):
        row_gradients(torch.ones(6), z, tau, None, stats[:2], 6, 0, 6, True)
    with pytest.raises(ValueError, match=r"negatives must have shape \(K, 4\), got \(3, 5\)"):
        negative_sums(z, tau, torch.randn(3, 5), 6, 0, 6, True, False)


def run(program):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
import os
import signal
import torch
from simclr_kernels.ntxent_cpu import finish_rows, negative_sums, row_gradients

tau = torch.tensor(0.1)

def gradient(rows, features):
    z = torch.ones(rows, features) + torch.arange(rows)[:, None] % 7
    top, mass, _ = negative_sums(z, tau, None, rows, 0, rows, True, False)
    loss, stats = finish_rows(z, tau, top, mass, rows, True)
    return row_gradients(loss, z, tau, None, stats, rows, 0, rows, True)[0]
"""


def test_32768_rows_take_less_than_64_mib_of_memory():
    # the matrix alone would be 4096 MiB; z is 16 MiB and not counted
    extra_kib = run(
        PROGRAM
        + """
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

torch.set_num_threads(2)
gradient(128, 128)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
gradient(32768, 128)
print(status("VmHWM") - before - 32768 * 128 * 4 // 1024)
"""
    )
    assert int(extra_kib) < 64 * 1024


def test_a_child_forked_after_threads_were_used_does_not_hang():
    run(
        PROGRAM
        + """
torch.set_num_threads(2)
expected = gradient(512, 32)
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if torch.equal(gradient(512, 32), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    )
