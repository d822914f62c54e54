"""`python -m benchmarks.plot_views RESULTS.json`: a figure, and the README's tables as text.

Reads what `pytest benchmarks --benchmark-only --benchmark-json=RESULTS.json` wrote of the views:
two views of decoded pixels, epochs from JPEG, training steps. On a CPU rates are per core: images
(pairs of views) a second of CPU time, of all threads and worker processes, which other work on the
machine changes little. On a GPU they are images a second by its events.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pipeline_contenders import EPOCH, LOSS, READY, STEP
from benchmarks.tables import digits, line, read_measurements
from benchmarks.view_contenders import TWO_VIEWS
from simclr_kernels.figure_style import BLUE, INK, MUTED, SKY, figure_style, write_png

# what each regime is compared with, and which rows are ours
OURS = {TWO_VIEWS: "ours", EPOCH: "fused", STEP: "fused-cached"}
OWN = ("ours", "ours-all-cores", "reference", "fused", "fused-cached", "dali-fused")
# (side, peer, how many times as fast ours must be on a CPU core)
GOALS = (
    (224, "albumentations", 1.5),
    (224, "dali", 8),
    (224, "kornia", 15),
    (224, "torchvision", 15),
    (32, "albumentations", 10),
)
Records = list[dict[str, Any]]


def cost(record: dict[str, Any], gpu: bool) -> float:
    """Seconds of a call that count: of the device, or of CPU time."""
    return record["seconds" if gpu else "cpu_seconds"]


def rate(record: dict[str, Any], gpu: bool) -> float:
    return record["images_per_second" if gpu else "images_per_core_second"]


def groups(records: Records) -> dict[tuple, Records]:
    """By (what, side, batch, origin), what was raced together; views first, then epochs, steps."""
    found: dict[tuple, Records] = {}
    for record in records:
        key = tuple(record[name] for name in ("what", "side", "batch", "origin"))
        found.setdefault(key, []).append(record)
    order = list(OURS)
    return dict(sorted(found.items(), key=lambda g: (order.index(g[0][0]), -g[0][1], g[0][2])))


def table(records: Records, gpu: bool) -> str:
    """Markdown: one table for each regime, side and batch, and which goals are met."""
    parts = []
    for (what, side, batch, origin), group in groups(records).items():
        title = f"**{what}, 2 x {side}, {origin}, batch {batch}**"
        lines = _steps(group, gpu) if what == STEP else _rates(group, OURS[what], gpu)
        parts.append("\n".join([title, "", *lines]))
    if not gpu:
        parts.append("\n".join(goals(records)))
    return "\n\n".join(parts)


def _timed(group: Records) -> Records:
    return [record for record in group if "seconds" in record]


def _header(*names: str) -> list[str]:
    return [line(["", *names]), line(["---"] * (len(names) + 1))]


def _label(record: dict[str, Any], ours: str) -> str:
    label = record["label"]
    return f"**{label}**" if record["name"] == ours else label


def _rates(group: Records, name: str, gpu: bool) -> list[str]:
    ours = next((record for record in _timed(group) if record["name"] == name), None)
    where = "images/s" if gpu else "images/s per core"
    lines = _header(where, "ours is faster by", "CPU ms", "images/s by the clock", "MiB")
    for record in _timed(group):
        times = digits(cost(record, gpu) / cost(ours, gpu), 2) if ours else ""
        cells = [
            digits(rate(record, gpu)),
            "" if record is ours else times,
            digits(record["cpu_ms_per_image"]),
            digits(record["images_per_second"] * record["seconds"] / record["wall_seconds"]),
            digits(record["peak_mib"]),
        ]
        lines.append(line([_label(record, name), *cells]))
    return lines


def _steps(group: Records, gpu: bool) -> list[str]:
    """A step's cost with each pipeline; what it is more than with ready-made views; the loss."""
    by_name = {record["name"]: record for record in _timed(group)}
    unit = "ms a step" if gpu else "CPU ms a step"
    lines = _header(unit, "views, share of the step", "loss, share of the step")
    for name, record in by_name.items():
        cells = [digits(cost(record, gpu) / record["steps"] * 1e3), "", ""]
        whole = cost(record, gpu)
        if name != LOSS and READY in by_name:
            views = max(0.0, 1 - cost(by_name[READY], gpu) / whole)
            cells[1] = "" if name == READY else f"{views:.1%}"
        if name != LOSS and LOSS in by_name:
            cells[2] = f"{cost(by_name[LOSS], gpu) / whole:.1%}"
        lines.append(line([_label(record, OURS[STEP]), *cells]))
    return lines


def goals(records: Records) -> list[str]:
    """Each goal of views on one core, what was measured, and whether it is met."""
    lines = []
    for side, peer, least in GOALS:
        ratios = []
        for (what, at, batch, _), group in groups(records).items():
            by_name = {record["name"]: record for record in _timed(group)}
            if what == TWO_VIEWS and at == side and {"ours", peer} <= by_name.keys():
                times = cost(by_name[peer], gpu=False) / cost(by_name["ours"], gpu=False)
                ratios.append((times, batch))
        goal = f"2 x {side}: at least {least:g} times as fast a core as {peer}"
        if not ratios:
            lines.append(f"not measured  {goal}")
            continue
        state = "met" if min(ratios)[0] >= least else "NOT MET"
        measured = ", ".join(f"{times:.2f} at batch {batch}" for times, batch in ratios)
        lines.append(f"{state:>12}  {goal}: {measured}")
    return lines


def save_plot(records: Records, out_png: str | Path, device: str, gpu: bool) -> None:
    """Draws the rates of every library, a panel for each side and one from JPEG.

    Args:
        records: of view_measurement and pipeline_measurement; of several batches the one that most
            contenders ran is shown.
        out_png: the file to write.
        device: named in the title.
        gpu: see cost.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels: dict[tuple, tuple[tuple, Records]] = {}
    for key, group in groups(records).items():
        what, side, *_ = key
        if what != STEP and len(_timed(group)) > len(panels.get((what, side), (key, []))[1]):
            panels[what, side] = (key, _timed(group))
    if not panels:
        raise ValueError("nothing to draw: no rates of views")
    with figure_style():
        figure = Figure(figsize=(8, 1.6 + 0.2 * _bars(panels)), layout="constrained")
        heights = [len(group) for _, group in panels.values()]
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (key, group) in zip(axes, panels.values(), strict=True):
            _draw(ax, key, group, gpu)
        unit = "images (pairs of views) a second" + ("" if gpu else " of one core")
        axes[-1].set_xlabel(unit)
        figure.suptitle(device, x=0.01, ha="left", color=MUTED, fontsize=7)
        write_png(figure, out_png)


def _bars(panels: dict) -> int:
    return sum(len(group) + 2 for _, group in panels.values())


def _draw(ax: Axes, key: tuple, group: Records, gpu: bool) -> None:
    what, side, batch, origin = key
    # the same work on all cores has the same rate a core
    shown = [record for record in group if record["name"] != "ours-all-cores"]
    shown.sort(key=lambda record: rate(record, gpu))
    values = [rate(record, gpu) for record in shown]
    ours = next((rate(r, gpu) for r in shown if r["name"] == OURS[what]), None)
    colors = [
        BLUE if r["name"] == OURS[what] else SKY if r["name"] in OWN else MUTED for r in shown
    ]
    ax.barh([record["label"] for record in shown], values, color=colors, height=0.65)
    for place, (record, value) in enumerate(zip(shown, values, strict=True)):
        text = f"  {digits(value)}"
        if ours and record["name"] != OURS[what]:
            text += f"   ours {digits(ours / value, 2)} x"
        ax.text(value, place, text, va="center", fontsize=7, color=INK)
    ax.set_xlim(0, max(values) * 1.15)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    ax.set_title(
        f"2 x {side} {'from JPEG' if what == EPOCH else 'from pixels'}: {origin}, batch {batch}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/views_throughput.png"))
    arguments = parser.parse_args()
    records, device = read_measurements(arguments.results, "side")
    gpu = any(record.get("cuda") for record in records)
    save_plot(records, arguments.out, device, gpu)
    print(table(records, gpu))
    print(f"\nfigure: {arguments.out}")


if __name__ == "__main__":
    main()
