"""Which tiles of the Triton kernels are fastest on this GPU: a search around the shipped table.

One entry of `ntxent_tile_table` at a time, what matters most first; one field at a time, the
neighbours of its value are put in its place and the loss is timed in the arithmetic, and at the
width, that take this entry. What is faster, and still right, stays for the fields after it. Nothing
is written to the package: the answer goes into the table by hand, with the device it was measured
on. Whole rows stay whole: how many features a chunk has is tried only where there are chunks.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.contenders import WHAT, Size, matmul_precision
from benchmarks.loss_checks import check_accuracy
from benchmarks.measure import timed
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.ntxent_tile_table import (
    PADDING,
    TABLES,
    WHOLE,
    Table,
    Tiles,
    architecture_of,
)

# what tl.dot multiplies, and the arithmetic to time it in
KINDS = {"half": "bfloat16", "tf32": "tf32", "ieee": "float32"}
KERNELS = ("triangle", "backward", "rows", "weights")
FEATURES = (128, 64, 256, 512)
NEIGHBOURS = {"num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
# faster by less than this is noise
GAIN = 0.98
# more than one tile of 128 rows in each of the blocks of the triangle, and a ragged last one
CHECKED_ROWS = 8194


class Entry(NamedTuple):
    """One set of tiles, and rows that take it."""

    kernel: str
    kind: str
    place: int
    features: int

    def __str__(self) -> str:
        return f"{self.kernel}, {self.kind}, D = {self.features}"

    def choices(self, table: Table) -> list[tuple[int, Tiles]]:
        return getattr(table, self.kernel)[self.kind]

    def tiles(self, table: Table) -> Tiles:
        return self.choices(table)[self.place][1]

    @property
    def tau(self) -> float:
        """With a running maximum where the rows kernel is asked for: it has no use of its own."""
        return 0.005 if self.kernel == "rows" else 0.1

    @property
    def what(self) -> str:
        return WHAT[self.kernel in ("backward", "weights")]


def entries(table: Table) -> Iterator[Entry]:
    """Every set of tiles that some rows take, what matters most first."""
    seen = set()
    for features in FEATURES:
        for kind in table.triangle:
            for kernel in KERNELS:
                if kernel == "weights" and _place(table.backward[kind], features) is not None:
                    continue
                place = _place(getattr(table, kernel)[kind], features)
                if place is not None and (kernel, kind, place) not in seen:
                    seen.add((kernel, kind, place))
                    yield Entry(kernel, kind, place, features)


def _place(choices: list[tuple[int, Tiles]], features: int) -> int | None:
    return next((k for k, (widest, _) in enumerate(choices) if features <= widest), None)


@contextmanager
def in_place(table: Table, entry: Entry, tiles: Tiles):
    """Within the block `tiles` stand where `entry` stands."""
    choices = entry.choices(table)
    before = choices[entry.place]
    choices[entry.place] = (before[0], tiles)
    try:
        yield
    finally:
        choices[entry.place] = before


def neighbours(tiles: Tiles, field: str, features: int) -> Iterator[Tiles]:
    """With half and double of the field's value, or with what is in NEIGHBOURS."""
    value = getattr(tiles, field)
    if value == WHOLE:
        return
    most = min(features, PADDING) if field == "BLOCK_D" else PADDING
    for other in NEIGHBOURS.get(field, (value // 2, 2 * value)):
        if other != value and (field in NEIGHBOURS or 16 <= other <= most):
            yield tiles._replace(**{field: other})


def loss_seconds(entry: Entry, rows: int, device: str) -> float:
    """Of what the entry is for, the best of three turns."""
    z = Size(rows, entry.features, KINDS[entry.kind]).z(device)
    z.requires_grad_(entry.what == WHAT[1])

    def call():
        loss = fused_nt_xent(z, entry.tau)
        if z.requires_grad:
            torch.autograd.grad(loss, z)

    with matmul_precision(KINDS[entry.kind]):
        call()
        return min(timed(call, device, 10).device for _ in range(3))


def check_answer(entry: Entry, rows: int, device: str) -> None:
    """Raises unless loss and gradient are right with the tiles that stand in the table."""
    kind = "random" if entry.tau < 0.05 else "pairs"
    for few in (34, rows):
        check_accuracy(device, few, entry.features, KINDS[entry.kind], entry.tau, kind)


def _compile(entry: Entry, tiles: Tiles, rows: int, device: str) -> None:
    with in_place(TABLES[architecture_of(torch.device(device))], entry, tiles):
        loss_seconds(entry, rows, device)


def compile_ahead(table: Table, rows: int, device: str, seconds: float, workers: int) -> None:
    """Fills Triton's cache with the neighbours of all shipped tiles, in processes side by side.

    What fails here fails again, and is reported, when it is timed.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    work = [
        pool.submit(_compile, entry, tiles, rows, device)
        for entry in entries(table)
        for field in Tiles._fields
        for tiles in neighbours(entry.tiles(table), field, entry.features)
    ]
    wait(work, seconds)
    pool.shutdown(cancel_futures=True)


def search(
    table: Table,
    rows: int,
    device: str,
    deadline: float,
    checked_rows: int = CHECKED_ROWS,
    seconds_of: Callable[[Entry, int, str], float] = loss_seconds,
    check: Callable[[Entry, int, str], None] = check_answer,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times the shipped tiles and their neighbours, entry by entry, until the deadline.

    Returns:
        For each entry begun: its name, shipped tiles and seconds, the best and theirs, and every
        trial; with a reason those that cannot be compiled or give a wrong answer. Tiles are best
        only if the answer with them was checked.
    """
    report = []
    for entry in entries(table):
        if time.monotonic() > deadline:
            say(f"  {entry}: no time left")
            continue
        shipped = best = entry.tiles(table)
        shipped_seconds = best_seconds = seconds_of(entry, rows, device)
        trials = []
        for field in Tiles._fields:
            for tiles in neighbours(best, field, entry.features):
                if time.monotonic() > deadline:
                    break
                trial: dict[str, Any] = {"tiles": tiles._asdict()}
                trials.append(trial)
                try:
                    with in_place(table, entry, tiles):
                        trial["seconds"] = seconds_of(entry, rows, device)
                        if trial["seconds"] < GAIN * best_seconds:
                            check(entry, checked_rows, device)
                            best, best_seconds = tiles, trial["seconds"]
                except Exception as error:  # too large for this GPU, or not what kernels expect
                    trial["failure"] = f"{type(error).__name__}: {error}"[:200]
        say(
            f"  {entry} ({entry.what}, 2N = {rows}, tau = {entry.tau}): "
            f"shipped {tuple(shipped)} {shipped_seconds * 1e3:.3f} ms, "
            f"best of {len(trials) + 1} {tuple(best)} {best_seconds * 1e3:.3f} ms"
        )
        report.append(
            {
                "entry": str(entry),
                "what": entry.what,
                "rows": rows,
                "shipped": shipped._asdict(),
                "shipped_seconds": shipped_seconds,
                "best": best._asdict(),
                "best_seconds": best_seconds,
                "trials": trials,
            }
        )
    return report
