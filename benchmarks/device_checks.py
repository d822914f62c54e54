"""What must hold of the loss on a GPU beside its answers: each check raises where it does not.

Memory, the number of kernels, no wait for the device, the same bits in every run, capture into a
CUDA graph, streams, and what PyTorch asks of an operator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.contenders import matmul_precision
from benchmarks.loss_checks import DTYPES, rows_and_gradients, upstream_of
from benchmarks.measure import peak_memory, wait
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.ntxent_tile_table import PADDING, TABLES, architecture_of, choose
from simclr_kernels.testing import LossCase

MOST_KERNELS = 6
# where the last step of backward is made of matrix products: one block of rows, and cuBLAS may sum
# parts in a kernel of its own
MOST_KERNELS_WITH_PRODUCTS = 10


class Step:
    """Forward and backward of one case on a device: called, it returns (loss, dz, [dtau])."""

    def __init__(
        self,
        device: str,
        rows: int,
        features: int,
        arithmetic: str,
        tau: float = 0.1,
        tau_is_tensor: bool = False,
        negatives: int = 0,
    ):
        self.arithmetic = arithmetic
        self.case = LossCase("", rows, features, tau, "pairs")
        self.z = self._rows(0).to(device).requires_grad_()
        self.tau = torch.tensor(tau, device=device, requires_grad=True) if tau_is_tensor else tau
        self.negatives = self._rows(7)[:negatives].to(device) if negatives else None
        # made beforehand: to fill it is a kernel, which is not the loss's
        self.dloss = torch.ones((), device=device)

    def _rows(self, seed: int) -> Tensor:
        return self.case.z(seed).to(DTYPES[self.arithmetic])

    def change(self, seed: int, tau: float) -> None:
        """Other numbers in the same tensors."""
        with torch.no_grad():
            self.z.copy_(self._rows(seed))
            self.tau.fill_(tau)

    def __call__(self) -> tuple[Tensor, ...]:
        with matmul_precision(self.arithmetic):
            loss = fused_nt_xent(self.z, self.tau, negatives=self.negatives)
            asked = [self.z, *([self.tau] if isinstance(self.tau, Tensor) else [])]
            return loss.detach(), *torch.autograd.grad(loss, asked, self.dloss)


def _products(features: int, arithmetic: str, device: str) -> bool:
    """Whether backward takes rows of this width through matrix products."""
    from simclr_kernels.ntxent_rows_triton import padded_width

    precision = "tf32" if arithmetic == "tf32" else "ieee"
    choices = TABLES[architecture_of(torch.device(device))].backward
    return choose(choices, DTYPES[arithmetic], precision, padded_width(features)) is None


def memory_bound(rows: int, features: int, arithmetic: str, device: str = "cuda") -> int:
    """Bytes that forward and backward of "mean" hold at most beside z: O(M D), and 64 MiB.

    What the launchers allocate: see ntxent_triton.py.
    """
    from simclr_kernels import ntxent_backward_triton, ntxent_products_triton
    from simclr_kernels.ntxent_rows_triton import padded_width
    from simclr_kernels.ntxent_triangle_triton import BLOCKS_OF_A_VIEW
    from simclr_kernels.ntxent_triton import kept_shapes

    of_z = DTYPES[arithmetic].itemsize
    stats, unit, lengths = (math.prod(shape) for shape in kept_shapes(rows, features))
    kept = of_z * unit + 4 * (stats + lengths)
    padded, width = stats // 3, padded_width(features)
    # sums of the negatives, positives, and a maximum if tau is on the device
    forward = 4 * padded * (2 * BLOCKS_OF_A_VIEW + 2)
    if _products(features, arithmetic, device):
        weights = max(ntxent_products_triton.WEIGHTS_BYTES, PADDING * padded * of_z)
        product = 4 * width * min(padded, weights // (padded * of_z))
        backward = 4 * padded * width + weights + product
    else:
        # few rows come in parts
        backward = 4 * width * max(padded, ntxent_backward_triton.PROGRAMS * PADDING)
    backward += of_z * rows * features
    return kept + max(forward, backward) + (1 << 20)


def check_memory(
    device: str, rows: int, features: int, arithmetic: str, tau_is_tensor: bool = False
) -> None:
    """Forward and backward hold O(M D) memory: see memory_bound."""
    # what the libraries keep once they were used is not of one call
    Step(device, 66, features, arithmetic, tau_is_tensor=tau_is_tensor)()
    step = Step(device, rows, features, arithmetic, tau_is_tensor=tau_is_tensor)
    with peak_memory(device) as peak:
        step()
    bound = memory_bound(rows, features, arithmetic, device)
    assert peak.extra_bytes <= bound, (
        f"{peak.extra_bytes / 2**20:.1f} MiB, allowed {bound / 2**20:.1f}"
    )


def check_kernel_count(device: str, features: int, arithmetic: str, tau_is_tensor: bool) -> None:
    """At most 6 device kernels, memsets included, in forward and backward."""
    step = Step(device, 1024, features, arithmetic, tau_is_tensor=tau_is_tensor)
    step()
    wait(device)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        wait(device)
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    most = MOST_KERNELS_WITH_PRODUCTS if _products(features, arithmetic, device) else MOST_KERNELS
    assert 0 < len(names) <= most, f"{len(names)} kernels: {', '.join(names)}"


def check_no_wait(
    device: str, features: int, arithmetic: str, tau: float, tau_is_tensor: bool
) -> None:
    """Neither forward nor backward waits for the device."""
    step = Step(device, 130, features, arithmetic, tau, tau_is_tensor, negatives=40)
    step()
    wait(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_equal_bits(device: str, rows: int, arithmetic: str, tau: float, runs: int = 20) -> None:
    """All runs give the same bits: losses of the rows, and both gradients."""
    z = LossCase("", rows, 128, tau, "pairs").z().to(DTYPES[arithmetic]).to(device)
    upstream, given = upstream_of(rows, device), torch.tensor(tau, device=device)
    with matmul_precision(arithmetic):
        first = rows_and_gradients(fused_nt_xent, z, given, upstream)
        for run in range(1, runs):
            again = rows_and_gradients(fused_nt_xent, z, given, upstream)
            assert all(map(torch.equal, first, again)), f"run {run} differs from the first"


def check_sums_over_programs(device: str, rows: int, arithmetic: str, runs: int) -> None:
    """The loss and the gradient in tau, which the last program to finish sums, never change.

    Several steps are under way at once: the device is not waited for between them.
    """
    step = Step(device, rows, 128, arithmetic, tau_is_tensor=True)
    sums = [torch.stack([x for x in step() if x.dim() == 0]) for _ in range(runs)]
    different = (torch.stack(sums) != sums[0]).any(1).sum()
    assert torch.stack(sums).isfinite().all(), "not finite"
    assert not different, f"{different} of {runs} runs differ from the first"


def check_graph_capture(device: str, features: int, arithmetic: str, negatives: int) -> None:
    """A captured step replays to the bits of a plain call, with other rows and another tau."""
    step = Step(device, 130, features, arithmetic, 0.1, True, negatives)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # either side of the temperature from which on a constant maximum will do
    for seed, tau in ((0, 0.1), (1, 0.5), (2, 0.005), (3, 0.1)):
        step.change(seed, tau)
        graph.replay()
        assert all(map(torch.equal, captured, step())), f"replay differs at tau = {tau}"


def check_other_stream(device: str, arithmetic: str) -> None:
    """On another stream, and on another device than the current one, the bits are the same."""
    step = Step(device, 2050, 128, arithmetic, tau_is_tensor=True)
    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, expected, found)), "another stream, other bits"
    if torch.cuda.device_count() > 1:
        found = Step("cuda:1", 2050, 128, arithmetic, tau_is_tensor=True)()
        same = (torch.equal(a, b.to(a.device)) for a, b in zip(expected, found, strict=True))
        assert all(same), "another device, other bits"


def check_operators(device: str, arithmetic: str, reduction: str, tau_is_tensor: bool) -> None:
    """torch.library.opcheck accepts both operators, with negatives and metrics."""
    ops = torch.ops.simclr_kernels
    z = LossCase("", 34, 16, 0.3).z().to(DTYPES[arithmetic]).to(device)
    negatives = LossCase("", 6, 16, 0.3).z(seed=7).to(z)
    tau = torch.tensor(0.3, device=device if tau_is_tensor else "cpu")
    flags = ("interleaved", True, reduction, "tf32" if arithmetic == "tf32" else "ieee")
    asked = z.clone().requires_grad_(), tau.clone().requires_grad_(tau_is_tensor)
    torch.library.opcheck(ops.ntxent.default, (*asked, negatives, *flags, True))
    loss, _, *kept = ops.ntxent(z, tau, negatives, *flags, True)
    torch.library.opcheck(ops.ntxent_backward.default, (loss, z, tau, negatives, *kept, *flags))


def check_autocast(device: str, features: int) -> None:
    """Within autocast float32 rows have the loss and the gradients that they have outside of it."""
    step = Step(device, 66, features, "float32", tau_is_tensor=True)
    expected = step()
    with torch.autocast(device, torch.bfloat16):
        found = step()
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert all(map(torch.equal, expected, found)), "other bits than outside"
