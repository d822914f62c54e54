"""Batches on a stream of their own: order, errors, and no race in any order of execution."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pipeline_contract import SIDE, PipelineContract, folder

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.pipelines.fused_views import FusedViews
from simclr_kernels.pipelines.side_stream import Stopwatch, on_side_stream, one_ahead

__all__ = ["folder"]  # a fixture


class TestFusedViewsOneAhead(PipelineContract):
    """The contract where batches are made one ahead, on a CPU whose streams do nothing."""

    @pytest.fixture(autouse=True)
    def streams(self, monkeypatch):
        nothing = SimpleNamespace(
            device=None,
            wait_stream=lambda stream: None,
            wait_event=lambda event: None,
            record_event=lambda: None,
        )
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: nothing)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        self.stream = nothing

    def make(self, source, batch_size, **options):
        pipeline = FusedViews(source, AugmentConfig.cifar10(SIDE), batch_size, **options)
        pipeline._stream = self.stream
        return pipeline


def test_items_are_made_one_ahead_and_handed_out_in_order():
    happened = []

    def items():
        for i in range(3):
            happened.append(f"make {i}")
            yield i

    for item in one_ahead(items()):
        happened.append(f"use {item}")
    assert happened == ["make 0", "make 1", "use 0", "make 2", "use 1", "use 2"]
    assert list(one_ahead(i for i in ())) == []


def test_an_error_comes_after_the_items_in_front_of_it():
    def items():
        yield 0
        yield 1
        raise KeyError("third")

    shown = []
    with pytest.raises(KeyError, match="third"):
        for item in one_ahead(items()):
            shown.append(item)
    assert shown == [0, 1]


def test_leaving_early_closes_the_items():
    closed = []

    def items():
        try:
            yield from range(9)
        finally:
            closed.append(True)

    ahead = one_ahead(items())
    next(ahead)
    ahead.close()
    assert closed == [True]


class Device:
    """A GPU in miniature: streams that run what is enqueued later, in any order that is allowed.

    Memory is one version number a tensor; freeing a tensor hands its memory to the side stream's
    next batch behind the work of the streams it was recorded on, as the caching allocator does.
    """

    def __init__(self):
        self.queues, self.current = [], None
        self.training, self.side = self.Stream(self), self.Stream(self)
        self.current = self.training

    class Stream:
        device = "gpu"

        def __init__(self, gpu):
            self.gpu, self.queue = gpu, []
            gpu.queues.append(self.queue)

        def enqueue(self, work=lambda: None, after=None):
            item = SimpleNamespace(work=work, after=after, done=False)
            self.queue.append(item)
            return item

        def record_event(self):
            return self.enqueue()

        def wait_event(self, event):
            self.enqueue(after=event)

        def wait_stream(self, other):
            if other.queue:
                self.wait_event(other.queue[-1])

    def stream(self, stream):
        gpu = self

        class Current:
            def __enter__(self):
                self.before, gpu.current = gpu.current, stream

            def __exit__(self, *_):
                gpu.current = self.before

        return Current()

    def run(self, chance):
        """Run everything; which stream goes on is up to chance."""
        heads = [0] * len(self.queues)
        while True:
            ready = [
                k
                for k, queue in enumerate(self.queues)
                if heads[k] < len(queue)
                and (queue[heads[k]].after is None or queue[heads[k]].after.done)
            ]
            if not ready:
                assert heads == [len(queue) for queue in self.queues], "a stream waits for ever"
                return
            k = chance.choice(ready)
            item = self.queues[k][heads[k]]
            item.work()
            item.done, heads[k] = True, heads[k] + 1


class FakeTensor:
    """Memory that side and training stream touch; None until written."""

    def __init__(self, gpu, number):
        self.gpu, self.number, self.memory, self.users = gpu, number, None, []

    def write(self, stream):
        def work():
            self.memory = self.number

        stream.enqueue(work)

    def read(self, stream, seen):
        stream.enqueue(lambda: seen.append(self.memory))

    def record_stream(self, stream):
        self.users.append(stream)

    def free(self):
        """The side stream overwrites it behind what the recorded streams have to do."""
        for stream in self.users:
            self.gpu.side.wait_stream(stream)

        def work():
            self.memory = "overwritten"

        self.gpu.side.enqueue(work)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Device()
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    return gpu


def train(gpu, count, seen):
    """A loop that enqueues the reading of each batch and frees it, on its own stream."""
    resident = FakeTensor(gpu, "resident")
    resident.write(gpu.training)
    gathered = []

    def batches():
        for number in range(count):
            resident.read(gpu.current, gathered)
            tensor = FakeTensor(gpu, number)
            tensor.write(gpu.current)
            yield (tensor,)

    for (tensor,) in on_side_stream(batches(), gpu.side):
        assert gpu.current is gpu.training
        tensor.read(gpu.training, seen)
        tensor.free()
    return resident, gathered


def test_the_training_stream_reads_each_batch_whole_in_any_order_of_execution(gpu):
    for attempt in range(50):
        gpu.__init__()
        seen = []
        resident, gathered = train(gpu, 5, seen)
        # freed behind the training stream, as its memory belongs to it
        gpu.training.enqueue(lambda resident=resident: setattr(resident, "memory", "freed"))
        gpu.run(random.Random(attempt))
        assert seen == list(range(5))
        assert gathered == ["resident"] * 5


@pytest.mark.parametrize("rule", ["wait_event", "wait_stream", "record_stream"])
def test_that_simulation_notices_when_a_rule_is_missing(gpu, monkeypatch, rule):
    owner = FakeTensor if rule == "record_stream" else Device.Stream
    monkeypatch.setattr(owner, rule, lambda *_: None)
    wrong = 0
    for attempt in range(50):
        gpu.__init__()
        seen = []
        resident, gathered = train(gpu, 5, seen)
        gpu.training.enqueue(lambda resident=resident: setattr(resident, "memory", "freed"))
        gpu.run(random.Random(attempt))
        wrong += seen != list(range(5)) or gathered != ["resident"] * 5
    assert wrong > 10


def test_a_batch_is_enqueued_before_the_one_in_front_is_handed_out(gpu):
    made = []

    def batches():
        for number in range(3):
            made.append((number, gpu.current is gpu.side))
            yield (FakeTensor(gpu, number),)

    ahead = on_side_stream(batches(), gpu.side)
    next(ahead)
    assert made == [(0, True), (1, True)] and gpu.current is gpu.training
    ahead.close()


def test_seconds_on_a_gpu_are_read_from_events_that_have_passed(monkeypatch):
    passed = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return bool(passed)

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seconds = {"views": 0.0}
    stopwatch = Stopwatch(seconds, torch.device("cuda"))
    for expected in (0.0, 0.0):
        with stopwatch.book("views"):
            pass
        assert seconds["views"] == expected
    passed.append(True)
    with stopwatch.book("views"):
        pass
    assert seconds["views"] == 0.75


@pytest.mark.gpu
def test_views_of_a_gpu_run_beside_the_training_stream_and_are_whole():
    stream = torch.cuda.Stream()
    work = torch.randn(2048, 2048, device="cuda")

    def batches():
        for number in range(20):
            tensor = torch.zeros(1 << 20, device="cuda")
            for _ in range(20):
                tensor += number
            yield (tensor,)

    for number, (tensor,) in enumerate(on_side_stream(batches(), stream)):
        for _ in range(10):
            work = (work @ work).clamp(-1, 1)
        assert tensor.sum().item() == 20 * number * (1 << 20)
