"""What a run leaves behind: its metrics read back, curves and comparisons as PNG, tables as text.

A run folder holds `metrics.jsonl`, one JSON object per line: step records {"kind": "step", "step",
"epoch", "loss", "learning_rate", "images_per_second", "seconds": {stage: seconds}} and evaluations
{"kind": "eval", "step", "epoch", "knn", "linear_probe", "effective_rank"}, accuracies as fractions.
Pictures of views and of features are in `report_pictures.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simclr_kernels.figure_style import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILION,
    figure_style,
    write_png,
)

NUMBER = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?( ?%| \S+)?|nan")


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a run, in the order of their first writing.

    A last line cut short by a crash is left out. Where a resumed run wrote a step again, the later
    record takes the place of the earlier one.

    Args:
        path: a run folder or its `metrics.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with a kind, a step and an epoch (names the line).
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    records = {}
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}): {line[:60]!r}"
            ) from None
        if not isinstance(record, dict) or not {"kind", "step", "epoch"} <= record.keys():
            raise ValueError(
                f"{path}, line {number} must be an object with kind, step and epoch, "
                f"got {line[:60]!r}"
            )
        records[record["kind"], record["step"]] = record
    return list(records.values())


def save_curves(run: str | Path, out_png: str | Path) -> None:
    """Draws loss, learning rate, accuracy and the share of step time over the epochs of one run.

    Steps without a finite loss are marked on the axis and counted. What a run has not recorded
    leaves a panel that says so.

    Args:
        run: a run folder or its `metrics.jsonl`; see read_metrics for the errors.
        out_png: the file to write, 1600 x 1000 pixels.

    Raises:
        ValueError: the run holds neither a step nor an evaluation.
    """
    steps, evals = _steps_and_evals(run)
    with figure_style():
        figure = Figure(figsize=(8, 5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.04)
        (loss, rate), (accuracy, time) = figure.subplots(2, 2)
        _draw_loss(loss, steps)
        _draw_rate(rate, steps)
        _draw_accuracy(accuracy, evals)
        _draw_time(time, steps)
        left, right = _span(steps or evals)
        right = max(right, _span(evals or steps)[1])
        for axes in (loss, rate, accuracy, time):
            _set_epochs(axes, left, right)
        write_png(figure, out_png)


def save_comparison(named_runs: dict[str, str | Path], out_png: str | Path) -> None:
    """Draws the kNN accuracy and the loss of several runs over one another.

    Args:
        named_runs: the name to show -> a run folder or its `metrics.jsonl`, in order of colour.
        out_png: the file to write, 1600 x 640 pixels.

    Raises:
        ValueError: there is no run, or one holds neither a step nor an evaluation.
    """
    if not named_runs:
        raise ValueError("save_comparison needs at least one run, got none")
    runs = {name: _steps_and_evals(run) for name, run in named_runs.items()}
    with figure_style():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04)
        accuracy, loss = figure.subplots(1, 2)
        knn_labels, loss_labels = [], []
        for i, (name, (steps, evals)) in enumerate(runs.items()):
            style = {"color": PALETTE[i % 6], "linestyle": ("-", "--", ":")[i // 6 % 3]}
            epochs, knn = _series(evals, "knn")
            if len(knn):
                accuracy.plot(epochs, 100 * knn, marker="o", markersize=3, clip_on=False, **style)
                knn_labels.append((100 * knn[-1], f"{name}  {100 * knn[-1]:.1f} %", style["color"]))
            epochs, values = _series(steps, "loss")
            if len(values):
                values = _running_mean(values)
                loss.plot(epochs, values, **style)
                loss_labels.append((values[-1], name, style["color"]))
        accuracy.set(title="kNN accuracy (%)", ylim=(0, 100))
        loss.set(title="Loss (NT-Xent)")
        right = max(_span(steps + evals)[1] for steps, evals in runs.values())
        for axes, labels in ((accuracy, knn_labels), (loss, loss_labels)):
            _set_epochs(axes, 0, right)
            _label_ends(axes, labels, gap=0.075)
        write_png(figure, out_png)


def _steps_and_evals(run: str | Path) -> tuple[list[dict], list[dict]]:
    records = read_metrics(run)
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    if not steps and not evals:
        raise ValueError(
            f"{run} must hold a step or an evaluation record, got {len(records)} others"
        )
    return steps, evals


def _series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the records where the value is there and finite."""
    pairs = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
    epochs, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return epochs[finite], values[finite]


def _span(records: list[dict]) -> tuple[float, float]:
    """The epochs a list of records covers: from one step before the first, to the last."""
    first, last = records[0]["epoch"], max(record["epoch"] for record in records)
    step = (last - first) / (len(records) - 1) if len(records) > 1 else last
    left = max(0.0, first - step)
    return left, last if last > left else left + 1.0


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fiftieth of the run, shorter at both ends."""
    i, half = np.arange(len(values)), len(values) // 100
    first, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[end] - total[first]) / (end - first)


def _draw_loss(axes: Axes, steps: list[dict]) -> None:
    epochs, values = _series(steps, "loss")
    bad = [r["epoch"] for r in steps if r.get("loss") is None or not math.isfinite(r["loss"])]
    axes.set_title("Loss (NT-Xent)")
    if len(values) == 1:
        axes.plot(epochs, values, "o", color=BLUE, markersize=3, clip_on=False)
    if len(values) >= 100:
        axes.plot(epochs, values, color=BLUE, alpha=0.25, linewidth=0.7)
    if len(values):
        mean = _running_mean(values)
        axes.plot(epochs, mean, color=BLUE)
        _label_ends(axes, [(mean[-1], f"{mean[-1]:.2f}", BLUE)])
    else:
        _say(axes, "no finite loss")
    if bad:
        count = f"{len(bad)} step{'s' * (len(bad) > 1)} without a finite loss"
        bottom = axes.get_xaxis_transform()
        axes.plot(bad, [0.02] * len(bad), "x", color=VERMILION, markersize=4, transform=bottom)
        axes.set_title(count, loc="right", color=VERMILION, fontsize=8)


def _draw_rate(axes: Axes, steps: list[dict]) -> None:
    epochs, values = _series(steps, "learning_rate")
    axes.set_title("Learning rate")
    if not len(values):
        return _say(axes, "none recorded")
    marker = "o" if len(values) == 1 else None
    axes.plot(epochs, values, color=VERMILION, marker=marker, markersize=3, clip_on=False)
    axes.set_ylim(0, 1.08 * values.max() or 1)
    axes.set_title(f"peak {values.max():.3g}", loc="right", color=MUTED, fontsize=8)


def _draw_accuracy(axes: Axes, evals: list[dict]) -> None:
    labels = []
    for key, name, color in (("knn", "kNN", GREEN), ("linear_probe", "probe", PURPLE)):
        epochs, values = _series(evals, key)
        if len(values):
            axes.plot(epochs, 100 * values, color=color, marker="o", markersize=3, clip_on=False)
            labels.append((100 * values[-1], f"{name} {100 * values[-1]:.1f} %", color))
    axes.set(title="Accuracy (%)", ylim=(0, 100))
    _label_ends(axes, labels)


def _draw_time(axes: Axes, steps: list[dict]) -> None:
    timed = [record for record in steps if record.get("seconds")]
    axes.set_title("Share of step time (%)")
    axes.grid(False)
    axes.set_ylim(0, 100)
    if not timed:
        return _say(axes, "none recorded")
    stages = list(dict.fromkeys(stage for record in timed for stage in record["seconds"]))
    groups = np.array_split(np.arange(len(timed)), min(60, len(timed)))
    edges = [_span(timed)[0]] + [timed[group[-1]]["epoch"] for group in groups]
    edges[-1] = max(edges[-1], _span(timed)[1])
    seconds = np.array([[r["seconds"].get(stage) or 0.0 for stage in stages] for r in timed])
    seconds = np.stack([seconds[group].sum(0) for group in groups], axis=1)  # [stages, groups]
    top = 100 * seconds.cumsum(0) / np.maximum(seconds.sum(0), 1e-12)
    total = 100 * seconds.sum(1) / max(seconds.sum(), 1e-12)
    labels = []
    for i, stage in enumerate(stages):
        bottom = top[i - 1] if i else np.zeros(len(groups))
        color = (ORANGE, GREEN, BLUE, VERMILION, PURPLE, SKY)[i % 6]
        axes.stairs(top[i], edges, baseline=bottom, fill=True, color=color, alpha=0.75, linewidth=0)
        labels.append(((top[i, -1] + bottom[-1]) / 2, f"{stage} {total[i]:.0f} %", color))
    _label_ends(axes, labels)
    speed = _series(steps, "images_per_second")[1]
    if len(speed):
        text = f"{np.median(speed):,.0f} images/s"
        axes.set_title(text, loc="right", color=MUTED, fontsize=8)


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]], gap: float = 0.09) -> None:
    """Writes (value, text, color) beside the right edge at its value, `gap` axes heights apart."""
    if not labels:
        return _say(axes, "none recorded")
    low, high = axes.get_ylim()
    heights = np.array([(value - low) / (high - low) for value, _, _ in labels])
    order = np.argsort(heights, kind="stable")
    ladder = gap * np.arange(len(labels))
    # pushed up only, and pushed down only: both keep the gap, and so does their mean
    up = np.maximum.accumulate(heights[order] - ladder) + ladder
    down = np.minimum.accumulate((heights[order] - ladder)[::-1])[::-1] + ladder
    for i, height in zip(order, (up + down) / 2, strict=True):
        _, text, color = labels[i]
        axes.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )


def _set_epochs(axes: Axes, left: float, right: float) -> None:
    axes.set_xlim(left, right)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=right - left >= 3))


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_yticks([])


def table(rows: Iterable[Sequence], header: Sequence[str], *, markdown: bool = False) -> str:
    """Rows under a header in aligned plain text, or as a Markdown table.

    Cells are written by str(), None as "-". A column of nothing but numbers (a sign, digits, a
    unit after a space or %) is flush right.

    Raises:
        ValueError: a row has not as many cells as the header.
    """
    lines = [[str(cell) for cell in header]]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row must have {len(header)} cells, got {len(row)}: {row}")
        lines.append(["-" if cell is None else str(cell) for cell in row])
    if markdown:
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    justify = [
        str.rjust if all(map(NUMBER.fullmatch, column[1:])) else str.ljust for column in columns
    ]
    text = [
        [just(cell, width) for just, cell, width in zip(justify, line, widths, strict=True)]
        for line in lines
    ]
    if markdown:
        rule = [
            "-" * (w - 1) + (":" if j is str.rjust else "-")
            for j, w in zip(justify, widths, strict=True)
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in [text[0], rule, *text[1:]])
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in [text[0], rule, *text[1:]])
