"""What the ranks of test_ntxent_distributed.py do: one process of a gloo group, a file of results.

Run as a program: `python ntxent_on_ranks.py RANK WORLD STORE RESULTS GOLDEN`. Every group of the
first W ranks, W = 1 ... WORLD, runs all cases; RESULTS is a dict saved by torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_kernels import NegativeQueue, NTXentLoss, fused_nt_xent
from simclr_kernels.ntxent_distributed import gather_rows

ROWS, INPUTS, FEATURES, NEGATIVES = 8, 12, 6, 5
GOLDEN_SIZES = ("2x5x16", "4x8x32", "2x32x64")


@dataclass(frozen=True)
class Case:
    """How the loss is called on every rank."""

    name: str
    dtype: torch.dtype = torch.float32
    tau: float = 0.5
    learnable: bool = True
    pairs: str = "halves"
    normalize: bool = True
    reduction: str = "mean"
    negatives: str = "none"  # or "same" or "own" on each rank


CASES = (
    Case("halves"),
    Case("interleaved", pairs="interleaved"),
    Case("fixed temperature", learnable=False),
    Case("sum", reduction="sum"),
    Case("none", reduction="none"),
    Case("running maximum", tau=0.005),
    Case("float64 running maximum", torch.float64, tau=0.005),
    Case("dot products", normalize=False, pairs="interleaved"),
    Case("same negatives", negatives="same"),
    Case("own negatives", negatives="own"),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float64", dtype=torch.float64, tau=0.1),
    Case("float64 interleaved sum", torch.float64, 0.1, True, "interleaved", reduction="sum"),
    Case("float64 none, own negatives", torch.float64, reduction="none", negatives="own"),
    Case("float64 dot products", torch.float64, normalize=False, negatives="same"),
)


def draw(rank: int, *shape: int) -> torch.Tensor:
    """The same float64 numbers in every process."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs_of(rank: int) -> torch.Tensor:
    return draw(rank, ROWS, INPUTS)


def upstream_of(rank: int) -> torch.Tensor:
    """For reduction "none"."""
    return draw(100 + rank, ROWS)


def negatives_of(rank: int, case: Case) -> torch.Tensor | None:
    if case.negatives == "none":
        return None
    return draw(200 + (rank if case.negatives == "own" else 0), NEGATIVES, FEATURES).to(case.dtype)


class Encoder(torch.nn.Module):
    """One layer, and the temperature that learns."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(draw(300, FEATURES, INPUTS).to(case.dtype) / 2)
        self.tau = torch.nn.Parameter(
            torch.tensor(case.tau, dtype=case.dtype), requires_grad=case.learnable
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.to(self.weight.dtype) @ self.weight.T, self.tau


class Traffic(TorchDispatchMode):
    """Records (collective, bytes this rank sends) of everything inside, and shapes of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.zeros = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.sent.append((function._opname, args[1].nbytes))
        out = function(*args, **(kwargs or {}))
        if "zeros" in function._opname:
            self.zeros.append(tuple(out.shape))
        return out


class Dropped(torch.autograd.Function):
    """x, with no gradient at all rather than one of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return None


def run_case(case: Case, rank: int, group: dist.ProcessGroup) -> dict:
    model = DistributedDataParallel(Encoder(case), process_group=group)
    z, tau = model(inputs_of(rank))
    forward = Traffic()
    with forward:
        loss, metrics = fused_nt_xent(
            z,
            tau,
            pairs=case.pairs,
            normalize=case.normalize,
            reduction=case.reduction,
            negatives=negatives_of(rank, case),
            group=group,
            return_metrics=True,
        )
    objective = (loss * upstream_of(rank)).sum() if case.reduction == "none" else loss
    backward = Traffic()
    with backward:
        # of z alone: what DDP sends for the weight is not ours
        torch.autograd.grad(objective, z, retain_graph=True)
    objective.backward()
    return {
        "loss": loss.detach(),
        "weight": model.module.weight.grad,
        "tau": model.module.tau.grad,
        "metrics": metrics,
        "z": z.detach(),
        "forward": forward.sent,
        "backward": backward.sent,
        "zeros": backward.zeros,
    }


def refusal(group: dist.ProcessGroup, *args, of=fused_nt_xent, **kwargs) -> str:
    try:
        of(*args, group=group, **kwargs)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def run_refusals(rank: int, group: dist.ProcessGroup) -> dict:
    z = torch.randn(ROWS, FEATURES)
    odd_one = rank == dist.get_world_size(group) - 1
    learnt = torch.randn(NEGATIVES, FEATURES).requires_grad_(odd_one)
    return {
        "rows": refusal(group, z[: ROWS - 2 * odd_one], 0.1),
        "odd rows": refusal(group, z[: ROWS - odd_one], 0.1),
        "features": refusal(group, z[:, : FEATURES - odd_one], 0.1),
        "dimensions": refusal(group, z[:, 0] if odd_one else z, 0.1),
        "dtype": refusal(group, z.double() if odd_one else z, 0.1),
        "tau": refusal(group, z, 0.2 if odd_one else 0.1),
        "pairs": refusal(group, z, 0.1, pairs="interleaved" if odd_one else "halves"),
        "reduction": refusal(group, z, 0.1, reduction="sum" if odd_one else "mean"),
        "normalize": refusal(group, z, 0.1, normalize=not odd_one),
        "negatives": refusal(group, z, 0.1, negatives=learnt),
        "negative tau": refusal(group, z, -1.0 if odd_one else 0.1),
        "negative tensor": refusal(group, z, torch.tensor(-1.0 if odd_one else 0.1)),
        "integer tau": refusal(group, z, torch.tensor(1) if odd_one else 0.1),
        "two temperatures": refusal(group, z, torch.ones(2) if odd_one else 0.1),
    }


def run_derivatives(rank: int, group: dist.ProcessGroup) -> dict:
    found = {}
    for reduction in ("mean", "none"):
        z = draw(rank, ROWS, FEATURES).requires_grad_()
        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        loss = fused_nt_xent(z, tau, reduction=reduction, group=group).sum()
        for derivative in torch.autograd.grad(loss, (z, tau), create_graph=True):
            for operand in (z, tau):
                try:
                    torch.autograd.grad(derivative.sum(), operand, retain_graph=True)
                    message = "accepted"
                except RuntimeError as error:
                    message = str(error)
                found.setdefault("second", []).append(message)
    last = rank == dist.get_world_size(group) - 1
    loss = fused_nt_xent(z, 0.5, reduction="none", group=group)
    objective = Dropped.apply(loss) if last else loss
    found["dropped"] = torch.autograd.grad(objective.sum(), z)[0]
    return found


def run_modules(rank: int, group: dist.ProcessGroup) -> dict:
    queue = NegativeQueue(3 * ROWS, FEATURES)
    queue.push(draw(rank, ROWS, FEATURES), group)
    z = draw(rank, ROWS, FEATURES).float().requires_grad_()
    loss = NTXentLoss(0.2, gather_distributed=True)(*z.chunk(2))
    loss.backward()
    features = FEATURES * 2 if rank else FEATURES
    wider = NegativeQueue(9, features)
    finer = NegativeQueue(9, FEATURES, dtype=torch.float64 if rank else torch.float32)
    strided = torch.stack((z.detach(), z.detach()), 2)[:, :, 0]
    with torch.no_grad():
        without_gradient = fused_nt_xent(strided, 0.2, group=group)
    return {
        "negatives": queue.negatives,
        "loss": loss.detach(),
        "dz": z.grad,
        "without_gradient": without_gradient,
        "wider": refusal(group, torch.zeros(12 * FEATURES // features, features), of=wider.push),
        "finer": refusal(group, torch.zeros(4, FEATURES), of=finer.push),
        "bfloat16": gather_rows(z.detach().bfloat16(), group),
    }


def run_golden(path: str, size: str, rank: int, group: dist.ProcessGroup) -> dict:
    golden = np.load(path)
    z = torch.from_numpy(golden[f"rep_hidden_{size}"][rank]).requires_grad_()
    loss = fused_nt_xent(z, float(golden[f"rep_tau_{size}"]), group=group)
    loss.backward()
    return {"loss": loss.detach(), "dz": z.grad}


def run_compiled(group: dist.ProcessGroup) -> dict:
    z = torch.randn(ROWS, FEATURES)

    def doubled(z):
        return 2 * fused_nt_xent(z + 1, 0.1, group=group)

    try:
        torch.compile(doubled, fullgraph=True, backend="eager")(z)
        error = ""
    except RuntimeError as unsupported:
        error = str(unsupported)
    return {
        "error": error,
        "broken": torch.compile(doubled, backend="eager")(z),
        "eager": doubled(z),
    }


def main(rank: int, world: int, store: str, results: str, golden: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    found = {}
    for size in range(1, world + 1):
        group = dist.new_group(range(size))
        if rank >= size:
            continue
        for case in CASES:
            found[size, case.name] = run_case(case, rank, group)
        if size > 1:
            found[size, "refusals"] = run_refusals(rank, group)
            found[size, "derivatives"] = run_derivatives(rank, group)
        for shape in GOLDEN_SIZES if golden else ():
            if shape.startswith(f"{size}x"):
                found[size, shape] = run_golden(golden, shape, rank, group)
    found["modules"] = run_modules(rank, dist.group.WORLD)
    pair = dist.new_group([0, 1])
    if rank < 2:
        found["compiled"] = run_compiled(pair)
    else:
        found["outsider"] = refusal(pair, torch.randn(ROWS, FEATURES), 0.1)
    torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
