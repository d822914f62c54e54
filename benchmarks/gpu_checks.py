"""Every path of the loss on this device, before anything is timed: `checks`.

Beside the answers (`loss_checks.py`): memory, the number of kernels, capture into a CUDA graph.
`python -m benchmarks.gpu_checks --part K N` runs every N-th check from the K-th and prints a JSON
line for each; `benchmarks/gpu.py` runs the parts side by side, since most of the time goes into
compiling kernels.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.contenders import matmul_precision
from benchmarks.loss_checks import (
    DTYPES,
    check_accuracy,
    check_autocast,
    check_compiles_whole,
    check_equal_bits,
    check_equal_rows,
    check_half_at_size,
    check_negatives_and_metrics,
    check_not_finite,
    check_reductions,
    check_sampled_rows,
    check_tau_not_positive,
    check_upstream_of_any_size,
    check_zero_and_tiny_rows,
)
from benchmarks.measure import peak_memory, wait
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.testing import LossCase

MOST_KERNELS = 6
KINDS = ("random", "pairs", "tight", "duplicates", "collapsed")


def check_memory(device: str, rows: int, features: int, arithmetic: str) -> None:
    """Forward and backward hold O(M D) memory: see memory_bound."""
    z = LossCase("", rows, features, 0.1, "pairs").z().to(DTYPES[arithmetic]).to(device)
    z.requires_grad_()
    with matmul_precision(arithmetic):
        torch.autograd.grad(fused_nt_xent(z[:66], 0.1), z)
        with peak_memory(device) as peak:
            torch.autograd.grad(fused_nt_xent(z, 0.1), z)
    bound = memory_bound(rows, features)
    assert peak.extra_bytes <= bound, f"{peak.extra_bytes / 2**20:.0f} MiB, allowed {bound >> 20}"


def memory_bound(rows: int, features: int) -> int:
    """Bytes: six times the rows in float32, 64 float32 a row for partial sums, and 64 MiB."""
    return 4 * rows * (6 * features + 64) + (64 << 20)


def check_graph_capture(device: str) -> None:
    """A captured step with tau on the device replays to the same bits, with other rows as well."""
    z = LossCase("", 130, 128, 0.1, "pairs").z().to(device).requires_grad_()
    tau = torch.tensor(0.1, device=device, requires_grad=True)

    def step():
        loss = fused_nt_xent(z, tau)
        return loss, *torch.autograd.grad(loss, (z, tau))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            z.copy_(LossCase("", 130, 128, 0.1, "pairs").z(seed))
        graph.replay()
        assert all(map(torch.equal, captured, step())), "replay differs from a plain call"


def check_kernel_count(device: str, features: int, arithmetic: str) -> None:
    """At most 6 device kernels, memsets included, in forward and backward."""
    z = LossCase("", 1024, features, 0.1, "pairs").z().to(DTYPES[arithmetic]).to(device)
    z.requires_grad_()

    def step():
        torch.autograd.grad(fused_nt_xent(z, 0.1), z)

    with matmul_precision(arithmetic):
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
    assert 0 < len(names) <= MOST_KERNELS, f"{len(names)} kernels: {', '.join(names)}"


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) pairs; a check raises where its claim does not hold."""
    gpu = device == "cuda"
    accuracy = partial(check_accuracy, device)
    for arithmetic in DTYPES:
        for features in (1, 16, 33, 64, 128, 129, 256, 257, 512, 1024, 2048):
            yield f"D = {features}, {arithmetic}", partial(accuracy, 130, features, arithmetic, 0.1)
        for rows in (2, 6, 34, 128, 514, 2050, 4098) if gpu else (2, 6, 34, 258):
            yield f"2N = {rows}, {arithmetic}", partial(accuracy, rows, 128, arithmetic, 0.1)
        for kind in KINDS:
            for tau in (1.0, 0.5, 0.05, 0.02, 0.0125, 0.005):
                name = f"{kind} rows, tau = {tau}, {arithmetic}"
                yield name, partial(accuracy, 258, 64, arithmetic, tau, kind)
        for pairs, normalize in (("interleaved", True), ("halves", False), ("interleaved", False)):
            name = f"{pairs}, normalize={normalize}, {arithmetic}"
            yield name, partial(accuracy, 130, 64, arithmetic, 0.3, "pairs", pairs, normalize)
        for tau in (0.5, 0.05, 0.005):
            name = f"tau = {tau} as a tensor, {arithmetic}"
            yield name, partial(accuracy, 130, 64, arithmetic, tau, tau_is_tensor=True)
        yield (
            f"equal bits, {arithmetic}",
            partial(check_equal_bits, device, 2050, arithmetic),
        )
        yield f"equal rows, {arithmetic}", partial(check_equal_rows, device, arithmetic)
        for value in (math.nan, math.inf):
            for tau in (0.5, 0.005):
                name = f"{value} in z, tau = {tau}, {arithmetic}"
                yield name, partial(check_not_finite, device, value, tau, arithmetic)
        if "negatives" in inspect.signature(fused_nt_xent).parameters:
            for tau in (0.1, 0.005):
                name = f"negatives and metrics, tau = {tau}, {arithmetic}"
                yield (
                    name,
                    partial(check_negatives_and_metrics, device, arithmetic, tau),
                )
        name = f"64 of many rows, {arithmetic}"
        yield (
            name,
            partial(check_sampled_rows, device, 131074 if gpu else 1026, arithmetic),
        )
        rows = 65536 if gpu else 1026
        yield f"memory, {arithmetic}", partial(check_memory, device, rows, 128, arithmetic)
        if gpu:
            for features in (64, 128, 256):
                name = f"kernels, D = {features}, {arithmetic}"
                yield name, partial(check_kernel_count, device, features, arithmetic)
    yield "zero and tiny rows", partial(check_zero_and_tiny_rows, device)
    yield "reductions", partial(check_reductions, device)
    yield (
        "upstream gradients from 0 to 1e30",
        partial(check_upstream_of_any_size, device),
    )
    yield "autocast", partial(check_autocast, device)
    yield "float16 at size", partial(check_half_at_size, device, 16384 if gpu else 1024)
    yield (
        "torch.compile",
        partial(check_compiles_whole, device, "inductor" if gpu else "aot_eager"),
    )
    if gpu:
        yield "tau = 0 on the device", partial(check_tau_not_positive, device, 0.0)
        yield "tau < 0 on the device", partial(check_tau_not_positive, device, -0.1)
        yield "graph capture", partial(check_graph_capture, device)


def run_check(check: Callable[[], None]) -> str | None:
    """None, or what went wrong."""
    try:
        check()
    except Exception as error:  # one path that fails must not hide the others
        return f"{type(error).__name__}: {error}"[:600]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    start, step = arguments.part
    # on a CPU the rows are too few for threads to gain anything
    torch.set_num_threads(1)
    for name, check in list(checks(arguments.device))[start::step]:
        print(json.dumps({"check": name, "failure": run_check(check)}), flush=True)


if __name__ == "__main__":
    main()
