"""Quarantine: the images of a source that turned out to be unreadable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from simclr_kernels.data import DecodeError, ImageSource

LISTED = 10


class TooManyUnreadable(RuntimeError):
    """More images of a source are unreadable than the run allows."""


class Quarantine:
    """Unreadable items by number: counted, logged, and limited.

    The log has one JSON object per item: {"index": 17, "name": path, "reason": message}. A run that
    was killed and resumed may log an item again.

    Args:
        source: the source the items belong to.
        max_bad_fraction: share of the source above which `add` stops the run.
        log: path of the JSON-lines file, appended to, or None.

    Raises:
        ValueError: max_bad_fraction is not in [0, 1].
    """

    def __init__(self, source: ImageSource, max_bad_fraction: float, log: str | Path | None):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_bad_fraction}")
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.log = None if log is None else Path(log)
        self._items: dict[int, None] = {}  # a set that keeps its order

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> list[int]:
        """Numbers of the unreadable items, sorted."""
        return sorted(list(self._items))

    def restore(self, items: list[int]) -> None:
        """Take over the items of an earlier run, which has logged them."""
        self._items = dict.fromkeys(items)

    def readable(self, order: np.ndarray) -> np.ndarray:
        """The items of order that are not in quarantine, in order.

        Raises:
            TooManyUnreadable: there is none.
        """
        if self._items:
            order = order[~np.isin(order, self.items())]
        if not len(order):
            raise TooManyUnreadable(f"no image in the order is readable: {self._listing()}")
        return order

    def add(self, item: int, error: DecodeError) -> None:
        """Put one item into quarantine; nothing happens if it is there.

        Raises:
            TooManyUnreadable: more than max_bad_fraction of the source are unreadable.
        """
        if item in self._items:
            return
        self._items[item] = None
        if self.log is not None:
            entry = {"index": item, "name": self.source.name(item), "reason": str(error)}
            self.log.parent.mkdir(parents=True, exist_ok=True)
            # a byte of a file name that is not UTF-8 becomes a JSON escape
            with open(self.log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if len(self) > self.max_bad_fraction * len(self.source):
            raise TooManyUnreadable(
                f"at most {self.max_bad_fraction:.4g} of the images may be unreadable, got "
                f"{len(self)} of {len(self.source)}: {self._listing()}; remove or repair them, or "
                "raise max_bad_fraction"
            ) from error

    def _listing(self) -> str:
        names = [self.source.name(item) for item in list(self._items)[:LISTED]]
        return ", ".join(names) + (", ..." if len(self) > LISTED else "")
