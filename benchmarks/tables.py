"""What the figures and tables of the benchmarks share: reading a file of results, Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_measurements(path: str | Path, key: str) -> tuple[list[dict[str, Any]], str]:
    """The measurements in a file that have a key, and the device they are from.

    Args:
        path: what `pytest --benchmark-only --benchmark-json=` or `benchmarks/gpu.py` wrote.
        key: "rows" for those of the loss, "side" for those of the views.

    Raises:
        ValueError: the file is neither of the two kinds, or holds no such measurement.
    """
    content = json.loads(Path(path).read_text())
    if "measurements" in content:
        return content["measurements"], content["machine"]["device"]
    records = [bench["extra_info"] for bench in content.get("benchmarks", ())]
    records = [record for record in records if "what" in record and key in record]
    if not records:
        raise ValueError(f"{path} must hold measurements with {key!r}, got {list(content)[:8]}")
    return records, records[0]["device"]


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def digits(value: float, count: int = 3) -> str:
    """A number with so many digits that count, without an exponent."""
    if value <= 0:
        return "0"
    text = f"{value:.{count}g}"
    return text if "e" not in text else f"{float(text):.0f}"
