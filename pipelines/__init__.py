"""The contract every pipeline keeps, and the bookkeeping they share.

A pipeline turns an image source into augmented batches. It is an iterable of Batch:

- One pass over it is one epoch: `len(pipeline)` batches of exactly batch_size images, in the order
  `epoch_order(len(source), seed, epoch)`; what is left over at the end of the order is dropped.
- `set_epoch(e)` selects the epoch, which changes the order and the views. Selecting the epoch that
  is current changes nothing, so a resumed loop may call it.
  An iterator that has not given a batch yet follows the selection; one that has is ended by it.
- Every iteration starts at the epoch's beginning, except the first one after `load_state_dict`,
  which continues where the saved one stood (and yields nothing if that epoch was finished).
- `state_dict()` is plain Python data: seed, epoch, position (batches *handed out* in the epoch, not
  batches decoded ahead), batch_size, world_size, fingerprint of the source, quarantined items.
  `load_state_dict` refuses a state of another source, seed or, inside an epoch, batch size.
- An image that cannot be decoded is left out of the epoch's order; the next readable one takes its
  place, so batches stay full and `Batch.index` names what is shown. If too few images remain for
  the last batches, the order starts again from its beginning. See Quarantine.
- The same source, seed, epoch and batch size give the same indices and labels, however many
  workers there are and whether the run was resumed. A pipeline of our kernels also gives the same
  bits; what another backend cannot promise is written in its module.
- `seconds` holds the cumulative time in "data" (waiting for decoded pixels) and "views" (making
  views; on a GPU by its own clock where the module of the pipeline says so).
- `pairs()` adapts to trainers that expect ((view0, view1), label), or that and the index.
- `sampler` is the pipeline itself: Lightning calls `sampler.set_epoch` before each epoch.
- `close()` stops background work; so does leaving an iteration early, and starting another.

With several ranks, rank r takes every world_size-th item of the order, from the r-th on.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from inspect import GEN_CREATED
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.data import ImageSource
from simclr_kernels.params import philox
from simclr_kernels.pipelines.quarantine import Quarantine

# in place of a view's number in the counter: no view draws these words
ORDER_STREAM = 2**32 - 1


class Batch(NamedTuple):
    """What a pipeline hands out, on its device."""

    views: Tensor  # (2B, 3, S, S), view-major: rows i and i + B are one image
    index: Tensor  # (B,) int64, number in the source
    label: Tensor  # (B,) int64, -1 without labels


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """(n,) int64: the permutation of n items in one epoch, the same on every platform.

    Item i is sorted by 63 bits of Philox4x32-10 at the counter (epoch, i, 2^32 - 1, 0), ties by i.
    """
    i = torch.arange(n)
    counter = torch.zeros(n, 4, dtype=torch.int64)
    counter[:, 0], counter[:, 1], counter[:, 2] = epoch, i, ORDER_STREAM
    words = philox((seed & 0xFFFFFFFF, seed >> 32), counter)
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)


class Pipeline:
    """Order, position, state and quarantine of a pipeline; a subclass yields the batches.

    A subclass implements `_batches(order, count)`: yield `count` batches of the readable items of
    order (int64 array), in that order, starting again from its beginning where it ends.

    Args:
        source: see ImageSource.
        batch_size: images per batch and rank.
        seed: of the order and the views, 0 <= seed < 2^64.
        max_bad_fraction: share of the source that may be unreadable before the run stops.
        quarantine: path of a JSON-lines file that names each unreadable image, or None.
        rank: number of this process.
        world_size: number of processes that share the source.

    Raises:
        ValueError: batch_size is under 1 or above the number of images of a rank, seed, rank or
            max_bad_fraction is out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        seed: int,
        max_bad_fraction: float,
        quarantine: str | Path | None,
        rank: int,
        world_size: int,
    ):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
        per_rank = len(source) // world_size
        if not 1 <= batch_size <= per_rank:
            raise ValueError(
                "batch_size must be at least 1 and at most the number of images of a rank, "
                f"got batch_size {batch_size} and {per_rank} images"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.quarantine = Quarantine(source, max_bad_fraction, quarantine)
        self.seconds = {"data": 0.0, "views": 0.0}
        self._per_rank = per_rank
        self._epoch = 0
        self._position = 0  # batches handed out in this epoch
        self._start = 0  # where the next iteration starts
        self._running = None

    def __len__(self) -> int:
        return self._per_rank // self.batch_size

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def quarantined(self) -> int:
        """Number of images found unreadable so far."""
        return len(self.quarantine)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration; see the module for the current one."""
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be at least 0 and below 2^32, got {epoch}")
        if epoch != self._epoch:
            iteration = self._running and self._running()
            # Lightning makes its iterator before it says which epoch a continued run is in
            if iteration is not None and inspect.getgeneratorstate(iteration) != GEN_CREATED:
                self._end_iteration()
            self._epoch, self._position, self._start = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        self._end_iteration()
        iteration = self._iterate()
        # not a strong reference: an abandoned iteration must end
        self._running = weakref.ref(iteration)
        return iteration

    def _iterate(self) -> Iterator[Batch]:
        self._position, self._start = self._start, 0
        order = epoch_order(len(self.source), self.seed, self._epoch).numpy()
        order = order[self.rank :: self.world_size][: self._per_rank]
        order = self.quarantine.readable(order)
        order = np.roll(order, -self._position * self.batch_size)
        with closing(self._batches(order, len(self) - self._position)) as batches:
            for batch in batches:
                self._position += 1
                yield batch

    def _batches(self, order: np.ndarray, count: int) -> Iterator[Batch]:
        raise NotImplementedError

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()

    def state_dict(self) -> dict:
        """Plain Python data from which a pipeline with the same arguments continues."""
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "fingerprint": self._fingerprint,
            "quarantined": self.quarantine.items(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where state was saved.

        Raises:
            ValueError: state comes from another source or seed, or its position lies inside an
                epoch of another batch_size or world_size.
        """
        own = self.state_dict()
        fixed = ["fingerprint", "seed"] + ["batch_size", "world_size"] * (state["position"] > 0)
        for key in fixed:
            if state[key] != own[key]:
                raise ValueError(
                    f"a resumed pipeline must have the {key} of the saved state, "
                    f"got {own[key]!r} where the state has {state[key]!r}"
                )
        self._end_iteration()
        self.quarantine.restore(state["quarantined"])
        self._epoch = state["epoch"]
        self._position = self._start = state["position"]

    @property
    def sampler(self) -> Pipeline:
        """Itself; see the module."""
        return self

    def pairs(self, with_index: bool = False) -> Pairs:
        """The same batches for trainers that take pairs of views. See Pairs."""
        return Pairs(self, with_index)

    def close(self) -> None:
        """Stop the iteration in progress, if any, and its background work."""
        self._end_iteration()

    def _end_iteration(self) -> None:
        iteration = self._running and self._running()
        if iteration is not None:
            iteration.close()
        self._running = None


class Pairs:
    """Iterable of ((view0, view1), label), the usual shape of a batch; with_index adds the index.

    Views (B, 3, S, S) each, label and index (B,) int64; with_index is the triple of lightly, with
    numbers in place of file names. Epoch and state are those of the pipeline.
    """

    def __init__(self, pipeline: Pipeline, with_index: bool = False):
        self.pipeline, self.with_index = pipeline, with_index
        self.sampler = pipeline
        self.set_epoch = pipeline.set_epoch
        self.state_dict, self.load_state_dict = pipeline.state_dict, pipeline.load_state_dict

    def __len__(self) -> int:
        return len(self.pipeline)

    def __iter__(self) -> Iterator[tuple]:
        for batch in self.pipeline:
            pair = tuple(batch.views.chunk(2))
            yield (pair, batch.label, batch.index) if self.with_index else (pair, batch.label)
