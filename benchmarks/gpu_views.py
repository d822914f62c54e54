"""Views on a GPU: rates beside the peers', the goals, and a search around the shipped tiles.

Parts of `python -m benchmarks.gpu`. Images are decoded and on the device; one image is two views.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.measure import race, timed
from benchmarks.view_checks import PRESETS, TOLERANCES, check_orders, check_preset
from benchmarks.view_contenders import ViewSize, view_contenders, view_measurement
from simclr_kernels.augment import two_views
from simclr_kernels.augment_triton import TILES, Tiles

# images/s with two views each, in float16: issue 4
GOALS = {224: 200_000, 32: 1_000_000}
GPU_SIZES = (
    *(ViewSize(224, batch) for batch in (256, 1024)),
    *(ViewSize(32, batch) for batch in (512, 4096)),
)
DRY_SIZES = (ViewSize(32, 4),)
PEERS = ("ours", "reference", "kornia", "dali", "torchvision")
# faster by less than this is noise
GAIN = 0.98
WARPS = (2, 4, 8)


def measure_views(
    sizes: tuple[ViewSize, ...], device: str, deadline: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Races ours against the peers that are installed, size by size."""
    records = []
    for size in sizes:
        if time.monotonic() > deadline:
            say(f"  {size}: no time left")
            continue
        contenders = view_contenders(PEERS if device == "cuda" else PEERS[:2], size, device)
        parts = []
        for name, result in race(contenders, device, seconds_each=0.3).items():
            record = view_measurement(name, result, size)
            records.append(record)
            if "missing" not in record:
                parts.append(f"{record['label']} {record['images_per_second']:,.0f} images/s")
            elif result.wrong:
                parts.append(f"{record['label']} WRONG ({result.wrong})")
        say(f"  {size}: {', '.join(parts)}")
    return records


def view_goals(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each goal, the best batch of ours, and whether it is met.

    That both views take four kernels, do not wait and can be captured is checked, not measured.
    """
    found = []
    for side, least in GOALS.items():
        rates = [
            (record["images_per_second"], record["batch"])
            for record in records
            if (record["name"], record["side"]) == ("ours", side) and "missing" not in record
        ]
        rate, batch = max(rates, default=(0.0, 0))
        found.append(
            {
                "goal": f"2 x {side}, float16: at least {least:,} images/s",
                "measured": f"{rate:,.0f} images/s, batch {batch}" if rates else "",
                "state": ("met" if rate >= least else "NOT MET") if rates else "not measured",
            }
        )
    return found


@contextmanager
def in_place(place: int, tiles: Tiles):
    """Within the block `tiles` stand at this place of the table."""
    before = TILES[place]
    TILES[place] = tiles
    try:
        yield
    finally:
        TILES[place] = before


def neighbours(tiles: Tiles, field: str) -> Iterator[Tiles]:
    """With half and double of the field's value, or other warps; a whole view stays one."""
    value = getattr(tiles, field)
    if field == "size" or field == "WHOLE":
        return
    if tiles.WHOLE and field in ("STRIP", "ROWS", "COLUMNS"):
        return
    for other in WARPS if field.endswith("warps") else (value // 2, 2 * value):
        changed = tiles._replace(**{field: other})
        # the last step of the crop pass may not reach into the next strip
        if other != value and changed.ROWS <= changed.STRIP and other >= (field[0] != "c"):
            yield changed


def view_seconds(side: int, batch: int, device: str) -> float:
    """Of both views of a batch, the best of three turns."""
    size = ViewSize(side, batch)
    images, config = size.images().pixels.to(device), size.config()
    index, epochs = torch.arange(len(images), device=device), itertools.count()

    def call():
        two_views(images, config, seed=0, epoch=next(epochs), index=index, dtype=torch.float16)

    call()
    return min(timed(call, device, 10)[0] for _ in range(3))


def check_views(side: int, batch: int, device: str) -> None:
    """Raises unless views are right with the tiles that stand in the table."""
    for dtype in TOLERANCES:
        check_preset(device, PRESETS[0], side, dtype, dtype == torch.float16)
    check_orders(device, side)


def search_view_tiles(
    sizes: tuple[ViewSize, ...],
    device: str,
    deadline: float,
    say: Callable[[str], None],
    seconds_of: Callable[[int, int, str], float] = view_seconds,
    check: Callable[[int, int, str], None] = check_views,
) -> list[dict[str, Any]]:
    """Times the shipped tiles and their neighbours, one field at a time, until the deadline.

    Returns:
        For the largest batch of each side: shipped tiles and seconds, the best and theirs, and
        every trial; with a reason those that cannot be compiled or give a wrong answer.
    """
    report = []
    largest = {size.side: size for size in sorted(sizes, key=lambda size: size.batch)}
    for side, batch in largest.values():
        place = next(k for k, tiles in enumerate(TILES) if side <= tiles.size)
        shipped = best = TILES[place]
        if time.monotonic() > deadline:
            say(f"  tiles of views at {side}: no time left")
            continue
        shipped_seconds = best_seconds = seconds_of(side, batch, device)
        trials = []
        for field in Tiles._fields:
            for tiles in neighbours(best, field):
                if time.monotonic() > deadline:
                    break
                trial: dict[str, Any] = {"tiles": tiles._asdict()}
                trials.append(trial)
                try:
                    with in_place(place, tiles):
                        trial["seconds"] = seconds_of(side, batch, device)
                        if trial["seconds"] < GAIN * best_seconds:
                            check(side, batch, device)
                            best, best_seconds = tiles, trial["seconds"]
                except Exception as error:  # too large for this GPU, or a wrong answer
                    trial["failure"] = f"{type(error).__name__}: {error}"[:200]
        say(
            f"  views at {side}, batch {batch}: shipped {tuple(shipped)} "
            f"{shipped_seconds * 1e3:.3f} ms, best of {len(trials) + 1} {tuple(best)} "
            f"{best_seconds * 1e3:.3f} ms"
        )
        report.append(
            {
                "entry": f"views at {side}",
                "batch": batch,
                "shipped": shipped._asdict(),
                "shipped_seconds": shipped_seconds,
                "best": best._asdict(),
                "best_seconds": best_seconds,
                "trials": trials,
            }
        )
    return report
