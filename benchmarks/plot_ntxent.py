"""`python -m benchmarks.plot_ntxent RESULTS.json`: a figure, and the README's tables as text.

Reads what `pytest --benchmark-only --benchmark-json=RESULTS.json` or `benchmarks/gpu.py` wrote. The
figure shows time and memory of forward + backward at D = 128 against 2N, and on a GPU the share of
the roofline; the tables show every size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.tables import digits, line, read_measurements
from simclr_kernels.figure_style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    figure_style,
    write_png,
)

BOTH = "forward + backward"
FEATURES = 128
# colour and marker by name of peers.PEERS
LOOKS = {
    "ours": (BLUE, "o"),
    "eager": (VERMILION, "s"),
    "warm-eager": (ORANGE, "s"),
    "compile": (GREEN, "^"),
    "row-blocks": (SKY, "D"),
    "lightly": (PURPLE, "v"),
    "solo-learn": (MUTED, "P"),
    "pml-supcon": (INK, "X"),
    "inf-cl": ("#882255", "<"),
    "cce": ("#999933", ">"),
}


def save_plot(records: list[dict[str, Any]], out_png: str | Path, device: str) -> None:
    """Draws time, memory and, where it is known, the share of the roofline over 2N.

    Args:
        records: of contenders.measurement. The arithmetic with most of them at D = 128 is shown.
        out_png: the file to write.
        device: named in the title.
    """
    shown = [r for r in records if r["what"] == BOTH and r["features"] == FEATURES]
    shown = [r for r in shown if r["name"] in LOOKS and "seconds" in r]
    dtypes = [r["dtype"] for r in shown]
    if not shown:
        raise ValueError(f"nothing to draw: no {BOTH} at D = {FEATURES}")
    dtype = max(dtypes, key=dtypes.count)
    shown = [r for r in shown if r["dtype"] == dtype]
    roofline = any(r.get("roofline_share") for r in shown)
    panels = 3 if roofline else 2
    with figure_style():
        figure = Figure(figsize=(4 * panels, 4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)
        axes = figure.subplots(1, panels)
        _draw(axes[0], shown, "seconds", 1e3, "milliseconds")
        _draw(axes[1], shown, "peak_mib", 1, "MiB beyond the rows themselves")
        axes[0].set_title(f"Time of {BOTH}, {dtype}, D = {FEATURES}")
        axes[1].set_title("Peak memory")
        if roofline:
            _draw(axes[2], shown, "roofline_share", 1, "of what the published rates allow")
            axes[2].set_yscale("linear")
            axes[2].set_ylim(bottom=0)
            axes[2].yaxis.set_major_formatter(PercentFormatter(1))
            axes[2].set_title("Share of the roofline")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * panels, frameon=False)
        figure.suptitle(device, x=0.01, ha="left", color=MUTED, fontsize=7)
        write_png(figure, out_png)


def _draw(axes: Axes, records: list[dict[str, Any]], key: str, scale: float, unit: str) -> None:
    for name, (color, marker) in LOOKS.items():
        points = sorted(
            (r["rows"], r[key] * scale) for r in records if r["name"] == name and r.get(key)
        )
        if not points:
            continue
        label = next(r["label"] for r in records if r["name"] == name)
        width, order = (2.4, 3) if name == "ours" else (1.2, 2)
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=4,
            linewidth=width,
            zorder=order,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    rows = sorted({r["rows"] for r in records})
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rows, 2N")
    axes.set_ylabel(unit)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: for each arithmetic and D, and forward with and without backward, a table."""
    groups = {}
    for record in records:
        key = (record["dtype"], record["features"], record["what"])
        groups.setdefault(key, []).append(record)
    ranks = {"float32": 1, "tf32": 2}
    keys = sorted(groups, key=lambda k: (k[1] != FEATURES, ranks.get(k[0], 0), k[1], k[2] != BOTH))
    return "\n\n".join(_one_table(*key, groups[key]) for key in keys)


def _one_table(dtype: str, features: int, what: str, records: list[dict[str, Any]]) -> str:
    by_place = {(r["name"], r["rows"]): r for r in records}
    all_rows = sorted({r["rows"] for r in records})
    names = list(dict.fromkeys(r["name"] for r in records if "seconds" in r and r["name"] != "mm"))
    lines = [
        f"**{what}, {dtype}, D = {features}**: milliseconds (times ours); MiB of memory",
        "",
        line(["2N", *map(str, all_rows)]),
        line(["---"] * (len(all_rows) + 1)),
    ]
    for name in names:
        label = next(r["label"] for r in records if r["name"] == name and "seconds" in r)
        cells = [_cell(by_place, name, rows) for rows in all_rows]
        lines.append(line([f"**{label}**" if name == "ours" else label, *cells]))
    shares = [_share_of_mm(by_place, rows) for rows in all_rows]
    if any(shares):
        lines.append(line(["ours: rate, of torch.mm's", *shares]))
    return "\n".join(lines)


def _cell(by_place: dict, name: str, rows: int) -> str:
    record = by_place.get((name, rows))
    if record is None:
        return ""
    if "seconds" not in record:
        return record["missing"] if record["missing"] == "out of memory" else "-"
    text = digits(record["seconds"] * 1e3)
    ours = by_place.get(("ours", rows))
    if name != "ours" and ours and "seconds" in ours:
        text += f" ({digits(record['seconds'] / ours['seconds'], 2)})"
    return f"{text}; {digits(record['peak_mib'], 2)}"


def _share_of_mm(by_place: dict, rows: int) -> str:
    ours = by_place.get(("ours", rows), {})
    rate = by_place.get(("mm", rows), {}).get("gflops_per_second")
    if not (rate and "seconds" in ours):
        return ""
    return f"{ours['gflops_per_second'] / rate:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/ntxent.png"))
    arguments = parser.parse_args()
    records, device = read_measurements(arguments.results, "rows")
    save_plot(records, arguments.out, device)
    print(table(records))
    print(f"\nfigure: {arguments.out}")


if __name__ == "__main__":
    main()
