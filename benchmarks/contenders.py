"""The loss at one size, ours and the peers', as contenders of a `measure.race`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Contender, Result, counted_flops
from benchmarks.peers import PEERS, PeerMissing, row_blocks
from simclr_kernels.reference import nt_xent
from simclr_kernels.testing import LossCase

TAU = 0.1
WHAT = ("forward", "forward + backward")
# errors allowed in the value, of 1 + value, and in the gradient, of its norm; under autocast the
# peers round logits of up to 10 to bfloat16
TOLERANCES = {"float32": (1e-5, 2e-5), "tf32": (2e-3, 2e-2), "bfloat16": (2e-2, 0.15)}
# in float64 or by the whole matrix the truth would take minutes, or gigabytes, beyond these rows
FLOAT64_ROWS = {"cpu": 4096, "cuda": 1 << 20}
MATRIX_ROWS = 16384


class Size(NamedTuple):
    """Rows (2N), features, and the arithmetic: "float32", "tf32" or "bfloat16"."""

    rows: int
    features: int
    dtype: str

    def __str__(self) -> str:
        return f"2N = {self.rows}, D = {self.features}, {self.dtype}"

    def z(self, device: str) -> Tensor:
        """The rows: pairs of views, the same in every run."""
        z = LossCase("", self.rows, self.features, TAU, "pairs").z().to(device)
        return z.bfloat16() if self.dtype == "bfloat16" else z


@contextmanager
def matmul_precision(dtype: str):
    """torch's float32 products in TF32 within the block for dtype "tf32", else IEEE."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def loss_contenders(
    names: Iterable[str], size: Size, what: str, device: str
) -> dict[str, Contender | str]:
    """By name of PEERS the contenders at one size, or the reason why one is missing.

    "mm" is not a loss: one product of [M, D] by [D, M] with torch.mm, U FLOPs, the yardstick.

    Args:
        names: keys of PEERS, or "mm".
        size: rows, features, arithmetic.
        what: "forward" or "forward + backward".
        device: "cpu" or "cuda".
    """
    z = size.z(device)
    if what != "forward":
        z.requires_grad_()
    truth = cache(lambda self_included: _truth(z, self_included))
    contenders = {}
    for name in names:
        if name == "mm":
            contenders[name] = _product(z, size)
            continue
        try:
            peer = PEERS[name]()
        except PeerMissing as reason:
            contenders[name] = str(reason)
            continue
        contenders[name] = Contender(
            peer.label,
            _call(peer.loss, z, what),
            lambda answer, peer=peer: _error(answer, truth(peer.self_included), size.dtype),
            _within(name, peer.around, size.dtype, device),
            peer.reheat,
        )
    return contenders


def _call(loss: Callable[[Tensor, float], Tensor], z: Tensor, what: str):
    def forward():
        with torch.no_grad():
            return (loss(z, TAU),)

    def forward_and_backward():
        value = loss(z, TAU)
        return value.detach(), *torch.autograd.grad(value, z)

    return forward if what == "forward" else forward_and_backward


def _within(
    name: str, around: Callable[[], AbstractContextManager], dtype: str, device: str
) -> Callable[[], AbstractContextManager]:
    @contextmanager
    def within():
        with ExitStack() as stack:
            stack.enter_context(around())
            stack.enter_context(matmul_precision(dtype))
            if dtype == "bfloat16" and name != "ours":
                # what a training step in bfloat16 does with a loss that knows nothing of it
                stack.enter_context(torch.autocast(device, torch.bfloat16))
            yield

    return within


def _product(z: Tensor, size: Size) -> Contender:
    z = z.detach()
    out = z.new_empty(len(z), len(z))
    return Contender(
        "torch.mm",
        lambda: torch.mm(z, z.T, out=out),
        lambda _: 0.0,
        lambda: matmul_precision(size.dtype),
    )


def _truth(z: Tensor, self_included: bool) -> tuple[Tensor, ...]:
    """The value and, if z requires it, the gradient."""
    exact = z.detach()
    exact = exact.double() if len(z) <= FLOAT64_ROWS[z.device.type] else exact.float()
    exact.requires_grad_(z.requires_grad)
    by_matrix = len(z) <= MATRIX_ROWS and not self_included
    # a peer's autocast is not for the truth
    with torch.autocast(z.device.type, enabled=False), matmul_precision("float32"):
        value = nt_xent(exact, TAU) if by_matrix else row_blocks(exact, TAU, self_included)
        gradient = torch.autograd.grad(value, exact) if z.requires_grad else ()
    return value.detach(), *gradient


def _error(answer: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: str) -> float:
    """The larger error of value and gradient, see TOLERANCES; AssertionError if not allowed."""
    errors = [
        ((actual.double() - exact).norm() / (exact.norm() + (exact.dim() == 0))).item()
        for actual, exact in zip(answer, truth, strict=True)
    ]
    named = zip(("value", "gradient"), errors, TOLERANCES[dtype], strict=False)
    for part, error, allowed in named:
        # not error > allowed: NaN is wrong
        assert error <= allowed, f"error of the {part} is {error:.2g}, allowed {allowed:g}"
    return max(errors)


def measurement(name: str, result: Result, size: Size, what: str, device: str) -> dict[str, Any]:
    """One result as it stands in the JSON files: all a table or a plot needs."""
    record = {
        "name": name,
        "label": result.label,
        "rows": size.rows,
        "features": size.features,
        "dtype": size.dtype,
        "what": what,
    }
    if reason := result.wrong or result.missing:
        return record | {"missing": reason}
    flops = counted_flops(size.rows, size.features, what, device)
    if name == "mm":
        flops = 2.0 * size.rows**2 * size.features
    return record | {
        "seconds": result.median,
        "wall_seconds": statistics.median(result.wall_seconds),
        "turns": len(result.seconds),
        "peak_mib": round(result.peak_bytes / 2**20, 2),
        "error": result.error,
        "flops": flops,
        "gflops_per_second": flops / result.median / 1e9,
    }
