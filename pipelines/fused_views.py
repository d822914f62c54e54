"""FusedViews: our own kernels over any image source, on a CPU or a GPU.

Images are decoded once, by threads that run ahead of the training loop, and kept as uint8 pixels as
far as cache_gib allows, whatever their sizes. Once all of them are kept (at once for a source of
arrays) they are resident in the memory of the device: a batch is then a choice among them, and
nothing is decoded, copied or prefetched any more. What does not fit is decoded anew in every epoch
and, on a GPU, copied there from page-locked memory.

On a GPU both views come from kernels on a stream of their own, one batch ahead of the training
loop, so that they run beside the encoder (side_stream.py); never beyond the end of an epoch. On a
CPU they are made in the training thread when asked for, on torch's own threads.

Memory. Decoded pixels: at most cache_gib on a CPU, in each process where there are several. On a
GPU at most cache_gib and half of what is free there; the host keeps its copy only until all of
them are on the GPU. Not resident: besides the cache, up to four batches of whole decoded images on
the host, and one on the GPU. Views: besides the batch of the loop, one on a CPU and two on a GPU,
the next and the one being made.

Same bits for any number of workers, any cache and any resume point.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ImageSource
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines import Batch, Pipeline
from simclr_kernels.pipelines.decoding import DecodedBatches, PixelCache
from simclr_kernels.pipelines.resident import ResidentImages, fits_on, holds_all_but
from simclr_kernels.pipelines.side_stream import Stopwatch, on_side_stream

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
        cache_gib: limit in GiB on decoded pixels that are kept; see the module.
        max_bad_fraction: share of the source that may be unreadable before the run stops.
        quarantine: path of a JSON-lines file that names each unreadable image, or None.
        rank: number of this process.
        world_size: number of processes that share the source.

    Raises:
        ValueError: batch_size exceeds the number of images, or an argument is out of range.
        RuntimeError: device is a GPU, and there is none.
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
        self.device = usable_device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._cache_bytes = cache_gib * 2**30
        images = getattr(source, "images", None)
        in_memory = images is not None and not isinstance(images, np.memmap)
        self._decoder = DecodedBatches(
            source,
            self.quarantine,
            workers,
            # what is in memory already is not kept twice
            0 if in_memory else self._cache_bytes,
            pin_for=None if self._stream is None else self.device,
        )
        labels = np.full(len(source), -1) if source.labels is None else source.labels
        self._labels = torch.tensor(labels, dtype=torch.int64, device=self.device)
        self._kept: ResidentImages | None = None
        self._stopwatch = Stopwatch(self.seconds, self.device)

    def _batches(self, order: np.ndarray, count: int) -> Iterator[Batch]:
        batches = self._made(order, count)
        return batches if self._stream is None else on_side_stream(batches, self._stream)

    def _made(self, order: np.ndarray, count: int) -> Iterator[Batch]:
        started = time.perf_counter()
        with closing(self._pixels(order, count)) as batches:
            for index, pixels in batches:
                self.seconds["data"] += time.perf_counter() - started
                with self._stopwatch.book("views"):
                    views = self._views(pixels, index)
                yield Batch(views, index, self._labels[index])
                # neither waits for the batch after it
                del views, index, pixels
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
        resident = self._resident()
        if resident is not None:
            # on the device once an epoch; the order starts again where it ends
            chosen = torch.from_numpy(np.resize(order, (count, self.batch_size))).to(self.device)
            for index in chosen:
                yield index, resident.pixels.take(index)
            return
        with closing(self._decoder.batches(order, self.batch_size, count)) as batches:
            for index, pixels in batches:
                yield (
                    index.to(self.device, non_blocking=True),
                    pixels.to(self.device, non_blocking=True),
                )

    def _resident(self) -> ResidentImages | None:
        """All readable images on the device, if they are in memory and fit there."""
        missing = self.quarantine.items()
        if self._kept is not None and not holds_all_but(self._kept.held, missing):
            self._kept = None  # a restored state knows of fewer unreadable images
        if self._kept is None:
            self._kept = self._newly_resident(missing)
        return self._kept

    def _newly_resident(self, missing: list[int]) -> ResidentImages | None:
        images, cache = getattr(self.source, "images", None), self._decoder.cache
        on_cpu = self.device.type == "cpu"
        if images is not None and (on_cpu and not isinstance(images, np.memmap)):
            return ResidentImages.of_array(images, self.device)
        if images is not None and images.nbytes <= self._cache_bytes:
            if fits_on(self.device, images.nbytes):
                return ResidentImages.of_array(images, self.device)
        if not holds_all_but(cache.held, missing) or not fits_on(self.device, cache.used_bytes):
            return None
        kept = ResidentImages.of_cache(cache, self.device)
        if not on_cpu:
            # the host's memory is free again
            self._decoder.cache = PixelCache(len(self.source), self._cache_bytes)
        return kept


def usable_device(device: torch.device | str) -> torch.device:
    """The device; a GPU by its number, since another thread has a current one of its own.

    Raises:
        RuntimeError: it is a GPU, and there is none.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RuntimeError(f"device must be one that torch can use, got {device} without a GPU")
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", number)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
