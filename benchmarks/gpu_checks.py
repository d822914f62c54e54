"""Every path of the loss and of the views on this device, before anything is timed: `checks`.

The answers of the loss are those of `loss_checks.py`, the rest of `device_checks.py`; the views'
are in `view_checks.py`.
`python -m benchmarks.gpu_checks --part K N` runs the K-th of N parts, from 0, and prints a JSON
line for each check; `benchmarks/gpu.py` runs the parts side by side, since most of the time goes
into compiling kernels.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.device_checks import (
    check_autocast,
    check_equal_bits,
    check_graph_capture,
    check_kernel_count,
    check_memory,
    check_no_wait,
    check_operators,
    check_other_stream,
    check_sums_over_programs,
)
from benchmarks.loss_checks import (
    DTYPES,
    check_accuracy,
    check_compiles_whole,
    check_equal_rows,
    check_far_rows,
    check_half_at_size,
    check_negatives_and_metrics,
    check_not_finite,
    check_reductions,
    check_rows_of_ranks,
    check_sampled_rows,
    check_tau_not_positive,
    check_upstream_of_any_size,
    check_zero_and_tiny_rows,
)
from benchmarks.view_checks import view_checks

KINDS = ("random", "pairs", "tight", "duplicates", "collapsed")


def _answers(device: str, arithmetic: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Against float64, in one arithmetic."""
    gpu = device == "cuda"
    accuracy = partial(check_accuracy, device)
    for tau in (0.1, 0.005):
        for features in (1, 16, 33, 64, 128, 130, 256, 512, 2048):
            # the gradient of one feature is nothing but rounding where the temperature is low
            if features > 1 or tau == 0.1:
                kind = "pairs" if tau == 0.1 else "random"
                name = f"D = {features}, tau = {tau}"
                yield name, partial(accuracy, 130, features, arithmetic, tau, kind)
        for features in (64, 130, 512):
            name = f"D = {features}, tau = {tau} as a tensor"
            kind = "pairs" if tau == 0.1 else "random"
            check = partial(accuracy, 130, features, arithmetic, tau, kind, tau_is_tensor=True)
            yield name, check
    for rows in (2, 6, 34, 128, 514, 2050, 4098) if gpu else (2, 6, 34, 258):
        yield f"2N = {rows}", partial(accuracy, rows, 128, arithmetic, 0.1)
    for kind in KINDS:
        for tau in (1.0, 0.5, 0.05, 0.02, 0.0125, 0.005):
            check = partial(accuracy, 258, 64, arithmetic, tau, kind)
            yield f"{kind} rows, tau = {tau}", check
    for pairs, normalize in (("interleaved", True), ("halves", False), ("interleaved", False)):
        for features in (64, 512):
            for tensor in (False, True):
                name = f"{pairs}, normalize={normalize}, D = {features}, {_tau(0.3, tensor)}"
                layout = ("pairs", pairs, normalize, tensor)
                yield name, partial(accuracy, 130, features, arithmetic, 0.3, *layout)
    for tau in (0.1, 0.005):
        for features in (16, 64, 512):
            for tensor in (False, True):
                operands = (device, arithmetic, tau, features, tensor)
                name = f"negatives and metrics, D = {features}, {_tau(tau, tensor)}"
                yield name, partial(check_negatives_and_metrics, *operands)
    for rows in (16384, 16390, 131074) if gpu else (1026,):
        yield f"64 of {rows} rows", partial(check_sampled_rows, device, rows, arithmetic)
    yield "equal rows", partial(check_equal_rows, device, arithmetic)
    for tau, normalize in ((0.1, True), (0.005, True), (1.0, False)):
        name = f"rows far apart, tau = {tau}, normalize={normalize}"
        yield name, partial(check_far_rows, device, arithmetic, tau, normalize)
    for value in (math.nan, math.inf):
        for tau in (0.5, 0.005):
            name = f"{value} in z, tau = {tau}"
            yield name, partial(check_not_finite, device, value, tau, arithmetic)
    for pairs in ("halves", "interleaved"):
        for tau, tensor in ((0.1, False), (0.1, True), (0.005, True)):
            name = f"ranks, {pairs}, {_tau(tau, tensor)}"
            operands = (device, arithmetic, 64, pairs, tau, tensor)
            yield name, partial(check_rows_of_ranks, *operands)
        # no row is padding, and no rank has negatives
        operands = (device, arithmetic, 512, pairs, 0.1, True, 256, 0)
        yield f"ranks of 256 rows, {pairs}", partial(check_rows_of_ranks, *operands)


def _on_the_gpu(device: str, arithmetic: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for rows in (130, 2050, 16390):
        yield (
            f"200 runs of {rows} rows",
            partial(check_sums_over_programs, device, rows, arithmetic, 200),
        )
    for features, tensor in ((128, False), (128, True), (512, False)):
        name = f"memory, D = {features}, {_tau(0.1, tensor)}"
        yield name, partial(check_memory, device, 65536, features, arithmetic, tensor)
    for features in (64, 128, 256):
        for tensor in (False, True):
            name = f"kernels, D = {features}, {_tau(0.1, tensor)}"
            yield name, partial(check_kernel_count, device, features, arithmetic, tensor)
    for features in (128, 512):
        for tau, tensor in ((0.1, False), (0.005, False), (0.1, True)):
            name = f"no wait, D = {features}, {_tau(tau, tensor)}"
            yield name, partial(check_no_wait, device, features, arithmetic, tau, tensor)
        for negatives in (0, 40):
            name = f"graph capture, D = {features}, {negatives} negatives"
            yield name, partial(check_graph_capture, device, features, arithmetic, negatives)
    yield "streams and devices", partial(check_other_stream, device, arithmetic)


def _tau(tau: float, tensor: bool) -> str:
    return f"tau = {tau} as a tensor" if tensor else f"tau = {tau}"


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) pairs; a check raises where its claim does not hold."""
    gpu = device == "cuda"
    for arithmetic in DTYPES:
        found = list(_answers(device, arithmetic))
        for tau in (0.1, 0.005):
            rows, runs = (2050, 20) if gpu else (258, 3)
            check = partial(check_equal_bits, device, rows, arithmetic, tau, runs)
            found.append((f"equal bits, tau = {tau}", check))
        for reduction in ("none", "mean"):
            for tensor in (False, True):
                name = f"opcheck, {reduction}, {_tau(0.3, tensor)}"
                check = partial(check_operators, device, arithmetic, reduction, tensor)
                found.append((name, check))
        if gpu:
            found += _on_the_gpu(device, arithmetic)
        for name, check in found:
            yield f"{name}, {arithmetic}", check
    yield "zero and tiny rows", partial(check_zero_and_tiny_rows, device)
    for features in (33, 512):
        for tau in (0.1, 0.005):
            for tensor in (False, True):
                name = f"reductions, D = {features}, {_tau(tau, tensor)}"
                yield name, partial(check_reductions, device, features, tau, tensor)
        yield f"autocast, D = {features}", partial(check_autocast, device, features)
    yield "upstream gradients from 0 to 1e30", partial(check_upstream_of_any_size, device)
    yield "float16 at size", partial(check_half_at_size, device, 16384 if gpu else 1024)
    backend = "inductor" if gpu else "aot_eager"
    for tensor in (False, True):
        check = partial(check_compiles_whole, device, backend, tensor)
        yield f"torch.compile, {_tau(0.1, tensor)}", check
    yield from view_checks(device)
    if gpu:
        yield "tau = 0 on the device", partial(check_tau_not_positive, device, 0.0)
        yield "tau < 0 on the device", partial(check_tau_not_positive, device, -0.1)


def part_of(found: list, part: int, parts: int) -> list:
    """Neighbours stay together: they share kernels, which are then compiled once."""
    return found[part * len(found) // parts : (part + 1) * len(found) // parts]


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
    # on a CPU the rows are too few for threads to gain anything
    torch.set_num_threads(1)
    for name, check in part_of(list(checks(arguments.device)), *arguments.part):
        print(json.dumps({"check": name, "failure": run_check(check)}), flush=True)


if __name__ == "__main__":
    main()
