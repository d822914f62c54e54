"""Time of the loss against the reference: `pytest benchmarks/bench_ntxent.py --benchmark-only`.

Rows: ours and eager torch, forward and forward plus backward, at 2N rows of 128 features, tau 0.1,
float32, on the GPU if there is one. Each answer is checked before it is timed. The reference at
16384 rows takes 4 GiB of memory and more.
"""

import pytest
import torch

from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.reference import nt_xent
from simclr_kernels.testing import LossCase

FEATURES = 128
TAU = 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = {"ours": fused_nt_xent, "reference": nt_xent}
# products of (2N, D) by (D, 2N) size that the formulas need; a kernel may recompute some
PRODUCTS = {"forward": 1, "forward+backward": 3}


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def answers():
    """The gradient by the reference, once for each number of rows: what ours must equal."""
    known = {}

    def answer(z):
        if len(z) not in known:
            loss = nt_xent(z, TAU)
            known[len(z)] = loss.item(), *torch.autograd.grad(loss, z)
        return known[len(z)]

    return answer


@pytest.mark.parametrize("rows", [1024, 4096, 16384])
@pytest.mark.parametrize("what", PRODUCTS)
@pytest.mark.parametrize("name", LOSSES)
def test_time_of_the_loss(benchmark, answers, name, what, rows):
    z = LossCase("", rows, FEATURES, TAU, "pairs").z().to(DEVICE).requires_grad_()
    loss = LOSSES[name]
    expected, expected_dz = answers(z)
    actual = loss(z, TAU)
    (dz,) = torch.autograd.grad(actual, z)
    assert abs(actual.item() - expected) <= 1e-5 * expected
    assert (dz - expected_dz).norm() <= 2e-5 * expected_dz.norm()

    def forward():
        with torch.no_grad():
            loss(z, TAU)
        wait()

    def forward_and_backward():
        torch.autograd.grad(loss(z, TAU), z)
        wait()

    benchmark.group = f"{what}, {rows} rows"
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flop": PRODUCTS[what] * 2 * rows * rows * FEATURES,
    }
    target = forward if what == "forward" else forward_and_backward
    benchmark.pedantic(target, rounds=3 if rows > 10000 else 10, warmup_rounds=1)
