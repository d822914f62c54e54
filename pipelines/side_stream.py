"""Batches made on a GPU stream of their own, one ahead of the training loop.

    side stream       views 1 | views 2        | views 3        | ...
    training stream             encoder, loss 1 | encoder, loss 2 | ...

Batch k + 1 is enqueued before batch k is handed out, so its kernels run beside the encoder. Three
rules make that safe, and nothing waits on the host:
- the side stream starts behind what the training stream has enqueued (resident images, labels);
- the training stream waits for the event behind a batch before that batch is handed out;
- the memory of a batch is marked as used by the training stream (record_stream), so freeing the
  batch does not give it to the side stream while the encoder still reads it. At the end the
  training stream waits for the side stream, so what both read may be freed as well.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch


def on_side_stream(batches: Generator, stream: torch.cuda.Stream) -> Generator:
    """The same batches (tuples of tensors), each made by `next(batches)` on that stream.

    Args:
        batches: enqueues a batch on the current stream.
        stream: the same in every epoch, since the allocator keeps memory for each.
    """
    device = stream.device
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with closing(one_ahead(_made_on(stream, batches))) as ahead:
            for batch, made in ahead:
                training = torch.cuda.current_stream(device)
                training.wait_event(made)
                for tensor in batch:
                    tensor.record_stream(training)
                yield batch
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def _made_on(stream: Any, batches: Generator) -> Generator:
    """Each batch with the event behind it. The stream is current only while a batch is made."""
    with closing(batches):
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                if batch is None:
                    return
                made = stream.record_event()
            yield batch, made


def one_ahead(items: Generator) -> Generator:
    """The same items, each made before the one in front of it is handed out.

    An exception keeps its place: the item in front of it is handed out first.
    """
    with closing(items):
        end = object()
        waiting = next(items, end)
        while waiting is not end:
            try:
                following = next(items, end)
            except Exception:
                yield waiting
                raise
            yield waiting
            waiting = following


class Stopwatch:
    """Adds up the seconds of a device's work under a name.

    On a GPU by its own clock: events around the work, read when they have passed, so the host
    never waits and the sum lags by a batch or two. Work beside other work counts in full.
    """

    def __init__(self, seconds: dict[str, float], device: torch.device):
        self.seconds = seconds
        self.on_gpu = device.type == "cuda"
        self.pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def book(self, name: str) -> Iterator[None]:
        """Books what happens inside under `name`."""
        if not self.on_gpu:
            start = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.pending.append((name, start, end))
        while self.pending and self.pending[0][2].query():
            booked, start, end = self.pending.pop(0)
            self.seconds[booked] += start.elapsed_time(end) / 1000
