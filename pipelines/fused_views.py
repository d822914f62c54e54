"""FusedViews: our own kernels over any image source, on a CPU or a GPU.

Images are decoded once by threads that run ahead of the training loop, and kept as uint8 pixels as
far as cache_gib allows. Once all of them are kept and have one size (at once for a source of
arrays), they lie in one dense array, on the device itself: a batch is then one gather, and
nothing is decoded, copied to the device or prefetched any more. Both views come from two_views,
in the training thread, since they run on the device's stream or on torch's own threads.

Besides the cache, up to four batches of whole decoded images are in memory while threads decode.

Same bits for any number of workers, any cache and any resume point.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ImageSource
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines import Batch, Pipeline
from simclr_kernels.pipelines.decoding import DecodedBatches

MAX_DEFAULT_WORKERS = 16


class FusedViews(Pipeline):
    """Two views of every image by two_views. See simclr_kernels.pipelines for the contract.

    Args:
        source: see ImageSource.
        config: what the views look like.
        batch_size: images per batch (and rank); a batch has twice as many views.
        seed: of the order and the views, 0 <= seed < 2^64.
        device: where the views are made.
        workers: decoding threads. 0 decodes in the training thread; None takes the CPU cores
            this process may use, at most 16.
        dtype: of the views.
        channels_last: memory format of the views.
        cache_gib: limit in GiB on decoded pixels that are kept, and on those kept on a GPU.
        max_bad_fraction: share of the source that may be unreadable before the run stops.
        quarantine: path of a JSON-lines file that names each unreadable image, or None.
        rank: number of this process.
        world_size: number of processes that share the source.

    Raises:
        ValueError: batch_size exceeds the number of images, or an argument is out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        config: AugmentConfig,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        cache_gib: float = 2.0,
        max_bad_fraction: float = 0.001,
        quarantine: str | Path | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(
            source,
            batch_size,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            quarantine=quarantine,
            rank=rank,
            world_size=world_size,
        )
        if workers is None:
            workers = min(_usable_cores(), MAX_DEFAULT_WORKERS)
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        if cache_gib < 0:
            raise ValueError(f"cache_gib must be at least 0, got {cache_gib}")
        self.config, self.dtype = config, dtype
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._cache_bytes = cache_gib * 2**30
        self._decoder = DecodedBatches(
            source, self.quarantine, workers, self._cache_bytes, pin=self.device.type == "cuda"
        )
        labels = np.full(len(source), -1) if source.labels is None else source.labels
        self._labels = torch.tensor(labels, dtype=torch.int64, device=self.device)
        self._resident: Tensor | None = None  # (n, H, W, 3), on a device other than the CPU

    def _batches(self, order: np.ndarray, count: int) -> Iterator[Batch]:
        started = time.perf_counter()
        for index, pixels in self._pixels(order, count):
            fetched = time.perf_counter()
            self.seconds["data"] += fetched - started
            views = self._views(pixels, index)
            self.seconds["views"] += time.perf_counter() - fetched
            yield Batch(views, index, self._labels[index])
            started = time.perf_counter()

    def _views(self, pixels: Tensor | PackedImages, index: Tensor) -> Tensor:
        """(2B, 3, S, S) views of pixels, both on the device; index (B,) int64."""
        return two_views(
            pixels,
            self.config,
            seed=self.seed,
            epoch=self.epoch,
            index=index,
            dtype=self.dtype,
            memory_format=self.memory_format,
        )

    def _pixels(
        self, order: np.ndarray, count: int
    ) -> Iterator[tuple[Tensor, Tensor | PackedImages]]:
        """Index and pixels of each batch, on the device."""
        dense = self._dense()
        if dense is None:
            for index, pixels in self._decoder.batches(order, self.batch_size, count):
                yield self._uploaded(index), self._uploaded(pixels)
            return
        for start in range(0, count * self.batch_size, self.batch_size):
            chosen = order.take(range(start, start + self.batch_size), mode="wrap")
            index = torch.from_numpy(chosen).to(self.device)
            if self._resident is None:
                yield index, self._uploaded(torch.from_numpy(dense.take(chosen, axis=0)))
            else:
                yield index, self._resident[index]

    def _dense(self) -> np.ndarray | None:
        """(n, H, W, 3) uint8 pixels of the whole source if they are in memory, else None."""
        dense = getattr(self.source, "images", None)
        fits = dense is not None and dense.nbytes <= self._cache_bytes
        if isinstance(dense, np.memmap) and not fits:
            dense = None  # page faults belong into the decoding threads
        if dense is None and self._decoder.cache.holds_all_but(self.quarantine.items()):
            dense, fits = self._decoder.cache.dense, True
        if fits and self._resident is None and self.device.type != "cpu":
            self._resident = torch.tensor(dense, device=self.device)
        return dense

    def _uploaded(self, pixels: Tensor | PackedImages) -> Tensor | PackedImages:
        if isinstance(pixels, Tensor):
            return pixels.to(self.device, non_blocking=True)
        tensors = (pixels.buffer, pixels.offsets, pixels.sizes)
        return PackedImages(
            *(tensor.to(self.device, non_blocking=True) for tensor in tensors), checked=True
        )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
