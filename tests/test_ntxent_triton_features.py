"""The GPU kernels of the loss with negatives, metrics, ranks, and in fused_nt_xent."""

import pytest
import torch

pytest.importorskip("triton")

from triton_loss import DEVICE, assert_close_to_the_reference, size_of_dtau_terms, upstream_of

from simclr_kernels import ntxent_tiles, ntxent_triton
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.reference import nt_xent, nt_xent_metrics, span_of
from simclr_kernels.testing import LossCase

# numpy in the interpreter sets floating-point flags for lanes it does not use
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("fresh_memory_holds_nan"),
]


@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("extras", [1, 32, 70])
def test_negatives_count_in_every_row_and_twice_in_dtau(tau, normalize, extras, tau_on_device):
    scale = 1.0 if normalize else 0.2 * tau**0.5
    z = LossCase("", 34, 33, tau, "pairs").z() * scale
    negatives = LossCase("", extras, 33, tau).z(seed=7) * scale if extras > 1 else z[:1] + 1
    assert_close_to_the_reference(z, tau, negatives=negatives, normalize=normalize)
    assert_close_to_the_reference(
        z, tau, negatives=negatives, normalize=normalize, pairs="interleaved", reduction="mean"
    )


@pytest.mark.parametrize("tau", [0.5, 0.005])
@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("extras", [0, 40])
def test_metrics_equal_those_of_row_blocks(tau, pairs, extras):
    z = LossCase("", 70, 33, tau, "pairs").z()
    negatives = LossCase("", extras, 33, tau).z(seed=7) if extras else None
    layout = (pairs, True, "mean", "ieee")
    on_device = [None if x is None else x.to(DEVICE) for x in (z, negatives)]
    loss, metrics, *_ = ntxent_triton.forward(
        on_device[0], torch.tensor(tau), on_device[1], *layout, True
    )
    exact = [None if x is None else x.double() for x in (z, negatives)]
    span = span_of(70, pairs)
    *_, expected = ntxent_tiles.negative_sums(
        exact[0], torch.tensor(tau), exact[1], span, 0, 70, True, True
    )
    torch.testing.assert_close(metrics.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    plain = ntxent_triton.forward(on_device[0], torch.tensor(tau), on_device[1], *layout, False)[0]
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    entropy = nt_xent_metrics(exact[0], tau, pairs=pairs, negatives=exact[1])[1]
    assert metrics[2].mean().item() == pytest.approx(entropy.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("tau", [0.1, 0.005])
def test_the_rows_of_ranks_have_the_gradients_of_the_whole(ranks, pairs, tau, tau_on_device):
    count = 26
    local = [LossCase("", count, 33, tau, "pairs").z(seed=rank) for rank in range(ranks)]
    z = torch.cat(local).to(DEVICE)
    span = span_of(count, pairs)
    tau_tensor = torch.tensor(tau)
    asked = [(rank * count, count) for rank in range(ranks)]
    sums = [
        ntxent_triton.negative_sums(z, tau_tensor, None, span, *rows, True, False, precision="ieee")
        for rows in asked
    ]
    top, mass = (torch.cat([part[k] for part in sums]) for k in (0, 1))
    loss, stats = ntxent_triton.finish_rows(z, tau_tensor, top, mass, span, True, precision="ieee")
    dloss = upstream_of(len(z))
    parts = [
        ntxent_triton.row_gradients(
            dloss.to(DEVICE), z, tau_tensor, None, stats, span, *rows, True, precision="ieee"
        )
        for rows in asked
    ]
    # the whole: all views 0, then all views 1
    image = torch.arange(len(z)).view(-1, 2, span // 2).transpose(0, 1).reshape(-1)
    exact = z.cpu().double()[image].requires_grad_()
    exact_tau = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    truth = nt_xent(exact, exact_tau, reduction="none")
    truth.backward(dloss.double()[image])
    torch.testing.assert_close(loss.cpu().double()[image], truth.detach(), rtol=2e-5, atol=1e-6)
    dz = torch.cat([part[0] for part in parts]).cpu().double()[image]
    bound = 2e-5 if tau > 0.01 else 1e-4
    assert (dz - exact.grad).norm() <= bound * exact.grad.norm()
    dtau = sum(part[1].cpu().double() for part in parts)
    allowed = 2e-6 * size_of_dtau_terms(truth.detach(), dloss[image], tau)
    assert (dtau - exact_tau.grad).abs() <= allowed


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
