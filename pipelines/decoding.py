"""Batches of decoded pixels in a given order: threads that decode ahead, and a cache of pixels.

    order -> chunks -> decoding threads -> in order again, without the unreadable -> batches

Threads suffice: Pillow decodes without the interpreter lock. Results are taken in the order of
submission and everything else happens in one thread, so the number of workers changes nothing but
the time.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.data import DecodeError, ImageSource
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines.quarantine import Quarantine

CHUNK = 8  # images per task of a decoding thread
# pages that nobody has written count for nothing, however many there are; Linux's MAP_NORESERVE
UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
BATCHES_AHEAD = 2  # finished batches waiting, besides those being decoded


class PixelCache:
    """Decoded images of any sizes, one behind the other in one buffer, up to a number of bytes.

    The buffer is as long as the limit (at most the machine's memory) from the first image on, but
    the system provides its pages only as they are written: what is used is `used_bytes`.
    """

    def __init__(self, n: int, limit_bytes: float):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.limit_bytes = min(limit_bytes, memory)
        self.used_bytes = 0
        self.offsets = np.zeros(n, np.int64)
        self.sizes = np.zeros((n, 2), np.int64)  # 0 x 0: not kept
        self._buffer = np.empty(0, np.uint8)

    def get(self, i: int) -> np.ndarray | None:
        """(H, W, 3) uint8, a view into the buffer."""
        height, width = self.sizes[i].tolist()
        if not height:
            return None
        start = int(self.offsets[i])
        return self._buffer[start : start + 3 * height * width].reshape(height, width, 3)

    def put(self, i: int, image: np.ndarray) -> None:
        """Keep image i, if there is room and it is not kept yet."""
        end = self.used_bytes + image.nbytes
        if end > self.limit_bytes or self.sizes[i, 0]:
            return
        if not len(self._buffer):
            self._buffer = np.frombuffer(
                mmap.mmap(-1, int(self.limit_bytes), flags=UNRESERVED), np.uint8
            )
        self._buffer[self.used_bytes : end] = image.reshape(-1)
        self.offsets[i], self.sizes[i] = self.used_bytes, image.shape[:2]
        self.used_bytes = end

    @property
    def held(self) -> np.ndarray:
        """(n,) bool: which images are kept."""
        return self.sizes[:, 0] > 0

    def packed(self) -> PackedImages:
        """The buffer itself as images 0 .. n - 1, of which those not kept must not be taken."""
        tensors = (self._buffer[: self.used_bytes], self.offsets, self.sizes)
        return PackedImages(*map(torch.from_numpy, tensors), checked=True)


class DecodedBatches:
    """Decodes items of a source in a given order and hands them out in batches.

    Args:
        source: see ImageSource.
        quarantine: takes the unreadable items.
        workers: decoding threads; 0 decodes in the calling thread, without prefetching.
        cache_bytes: limit on decoded pixels kept in memory.
        pin_for: a GPU for whose copies batches lie in page-locked memory, or None.
    """

    def __init__(
        self,
        source: ImageSource,
        quarantine: Quarantine,
        workers: int,
        cache_bytes: float,
        pin_for: torch.device | None = None,
    ):
        self.source, self.quarantine, self.workers = source, quarantine, workers
        self.pin_for = pin_for
        self.chunk = CHUNK
        self.cache = PixelCache(len(source), cache_bytes)

    def batches(
        self, order: np.ndarray, batch_size: int, count: int
    ) -> Iterator[tuple[Tensor, Tensor | PackedImages]]:
        """`count` batches of the readable items of order, which is repeated where it ends.

        Yields:
            index (B,) int64 and pixels on the CPU: (B, H, W, 3) uint8 if all images of the batch
            have one size, else PackedImages.

        Raises:
            RuntimeError: too many items are unreadable, see Quarantine.
        """
        if not self.workers:
            return self._assembled(self._decoded_here(order), batch_size, count)
        stop = threading.Event()
        items = self._decoded_ahead(order, batch_size, count * batch_size, stop)
        return prefetched(self._assembled(items, batch_size, count), BATCHES_AHEAD, stop)

    def _assembled(self, items: Iterator[tuple[int, np.ndarray]], batch_size: int, count: int):
        with closing(items):
            for _ in range(count):
                batch = list(islice(items, batch_size))
                if len(batch) < batch_size:
                    return  # stopped
                yield self._collated(*zip(*batch, strict=True))

    def _collated(
        self, index: tuple[int, ...], images: tuple[np.ndarray, ...]
    ) -> tuple[Tensor, Tensor | PackedImages]:
        pin = self.pin_for is not None
        # a thread begins on GPU 0, and locking pages would open that one
        with torch.cuda.device(self.pin_for) if pin else nullcontext():
            numbers = torch.tensor(index, pin_memory=pin)
            if len({image.shape for image in images}) > 1:
                return numbers, PackedImages.from_images(images, pin_memory=pin)
            shape = (len(images), *images[0].shape)
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
            np.stack(images, out=pixels.numpy())
            return numbers, pixels

    def _decoded_here(self, order: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The readable items of order, without end, with their pixels."""
        for chunk in self._chunks(order, 1):
            yield from self._accepted(chunk, self._decode(chunk))

    def _decoded_ahead(
        self, order: np.ndarray, ahead: int, total: int, stop: threading.Event
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The same, at least `total` items if not stopped, while about `ahead` are in work."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            chunks = self._chunks(order, self.chunk)
            waiting, in_work = deque(), 0
            while total > 0 and not stop.is_set():
                while in_work < min(total, ahead + self.workers * self.chunk):
                    chunk = next(chunks)
                    waiting.append((chunk, pool.submit(self._decode, chunk)))
                    in_work += len(chunk)
                chunk, decoded = waiting.popleft()
                in_work -= len(chunk)
                for item in self._accepted(chunk, decoded.result()):
                    total -= 1
                    yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _chunks(self, order: np.ndarray, size: int) -> Iterator[list[int]]:
        while True:
            order = self.quarantine.readable(order)
            for start in range(0, len(order), size):
                yield order[start : start + size].tolist()

    def _decode(self, items: list[int]) -> list[np.ndarray | DecodeError]:
        return [self._decode_one(i) for i in items]

    def _decode_one(self, i: int) -> np.ndarray | DecodeError:
        image = self.cache.get(i)
        if image is not None:
            return image
        try:
            return self.source.decode(i)
        except DecodeError as error:
            return error

    def _accepted(self, items: list[int], decoded: list) -> Iterator[tuple[int, np.ndarray]]:
        for i, image in zip(items, decoded, strict=True):
            if isinstance(image, DecodeError):
                self.quarantine.add(i, image)
            else:
                self.cache.put(i, image)
                yield i, image


def prefetched(items: Generator, ahead: int, stop: threading.Event) -> Iterator:
    """The same items, made in a thread of their own, at most `ahead` waiting.

    An exception of the thread is raised here, with its traceback. Closing this generator sets
    stop, upon which items should end soon, ends the thread and closes items.
    """
    ready = queue.Queue(ahead)
    end = object()

    def work() -> None:
        last = end
        try:
            with closing(items):
                for item in items:
                    ready.put((item, None))
                    if stop.is_set():
                        return
        except BaseException as error:
            last = error
        if not stop.is_set():
            ready.put((end, last))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if item is end:
                if error is not end:
                    raise error
                return
            yield item
    finally:
        stop.set()
        # makes room for the one item that may still be on its way
        while not ready.empty():
            ready.get_nowait()
        thread.join()
