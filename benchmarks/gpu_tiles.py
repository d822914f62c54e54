"""Which tiles of the Triton kernels are fastest on this GPU: a search around the shipped tables.

Every constant of `ntxent_triton` that is a NamedTuple with `num_warps`, or a dict or tuple of such,
is a table entry. One entry at a time, one field at a time, the neighbours of its value are put in
its place and the loss is timed; what is faster stays for the fields after it. Nothing is written to
the package: the answer goes into the constant by hand, with the device it was measured on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.contenders import WHAT, Size, loss_contenders
from benchmarks.measure import timed

NEIGHBOURS = {"num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
# a table's name says what it is for; others are timed in bfloat16
ARITHMETIC_BY_NAME = {"IEEE": "float32", "TF32": "tf32", "HALF": "bfloat16"}
# faster by less than this is noise
GAIN = 0.98


class Entry(NamedTuple):
    """One set of tiles: the constant it is in, and its key there, None if it is the constant."""

    constant: str
    key: Any
    tiles: Any

    def __str__(self) -> str:
        return self.constant if self.key is None else f"{self.constant}[{self.key!r}]"

    @property
    def arithmetic(self) -> str:
        """What to time it in."""
        for part, arithmetic in ARITHMETIC_BY_NAME.items():
            if part in str(self).upper():
                return arithmetic
        return "bfloat16"

    @property
    def what(self) -> str:
        """What to time: forward alone where the name says so, else with backward."""
        names = str(self).upper()
        return WHAT[0] if "FORWARD" in names or "FWD" in names else WHAT[1]


def entries(module) -> list[Entry]:
    """Every set of tiles among the constants of a module."""
    found = []
    for name, value in vars(module).items():
        if _is_tiles(value):
            found.append(Entry(name, None, value))
        elif isinstance(value, dict):
            found += [Entry(name, key, v) for key, v in value.items() if _is_tiles(v)]
        elif isinstance(value, tuple):
            found += [Entry(name, key, v) for key, v in enumerate(value) if _is_tiles(v)]
    return found


def _is_tiles(value) -> bool:
    return isinstance(value, tuple) and "num_warps" in getattr(value, "_fields", ())


@contextmanager
def in_place(module, entry: Entry, tiles):
    """Within the block `tiles` stand where `entry` stands."""
    before = getattr(module, entry.constant)
    if entry.key is None:
        after = tiles
    elif isinstance(before, dict):
        after = before | {entry.key: tiles}
    else:
        after = before[: entry.key] + (tiles,) + before[entry.key + 1 :]
    setattr(module, entry.constant, after)
    try:
        yield
    finally:
        setattr(module, entry.constant, before)


def neighbours(tiles) -> Iterator[tuple[str, int]]:
    """(field, value) for each field that is a number: half and double, or what is in NEIGHBOURS."""
    for field, value in tiles._asdict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        for other in NEIGHBOURS.get(field, (value // 2, 2 * value)):
            if other not in (0, value) and (field in NEIGHBOURS or other >= 16):
                yield field, other


def loss_seconds(size: Size, what: str, device: str) -> float:
    """Of the loss, the best of three turns."""
    contender = loss_contenders(("ours",), size, what, device)["ours"]
    with contender.around():
        contender.call()
        return min(timed(contender.call, device, 3)[0] for _ in range(3))


def search(
    module,
    rows: int,
    features: int,
    device: str,
    deadline: float,
    seconds_of: Callable[[Size, str, str], float] = loss_seconds,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times the shipped tiles and their neighbours, entry by entry, until the deadline.

    Returns:
        For each entry begun: its name, shipped tiles and seconds, the best and theirs, and every
        trial (those that cannot be compiled, or give another answer than a number, with a reason).
    """
    report = []
    for entry in entries(module):
        if time.monotonic() > deadline:
            say(f"  {entry}: no time left")
            continue
        size = Size(rows, features, entry.arithmetic)
        best, best_seconds = entry.tiles, seconds_of(size, entry.what, device)
        shipped_seconds = best_seconds
        trials = []
        for field, value in neighbours(entry.tiles):
            if time.monotonic() > deadline:
                break
            tiles = best._replace(**{field: value})
            trial = {"tiles": tiles._asdict()}
            trials.append(trial)
            try:
                with in_place(module, entry, tiles):
                    trial["seconds"] = seconds_of(size, entry.what, device)
            except Exception as error:  # too large for this GPU, or not what the kernel expects
                trial["failure"] = f"{type(error).__name__}: {error}"[:200]
                continue
            if trial["seconds"] < GAIN * best_seconds:
                best, best_seconds = tiles, trial["seconds"]
        say(
            f"  {entry} ({entry.what}, {size}): "
            f"shipped {tuple(entry.tiles)} {shipped_seconds * 1e3:.3f} ms, "
            f"best of {len(trials) + 1} {tuple(best)} {best_seconds * 1e3:.3f} ms"
        )
        report.append(
            {
                "entry": str(entry),
                "what": entry.what,
                "size": size._asdict(),
                "shipped": entry.tiles._asdict(),
                "shipped_seconds": shipped_seconds,
                "best": best._asdict(),
                "best_seconds": best_seconds,
                "trials": trials,
            }
        )
    return report
