"""FusedViews: the contract, and the same bits however the pixels come to the kernels."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import shared_path
from pipeline_contract import SIDE, N, PipelineContract, assert_same_batches, folder, threads

from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import (
    ArrayImages,
    DecodeError,
    ImageFolder,
    ParquetImages,
    Subset,
    open_source,
)
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines import epoch_order
from simclr_kernels.pipelines.fused_views import FusedViews, usable_device
from simclr_kernels.pipelines.quarantine import Quarantine

__all__ = ["folder"]  # a fixture

CONFIG = AugmentConfig.cifar10(size=SIDE)


class Listed:
    """A source over a list of arrays; an exception in the list is raised by decode."""

    labels = classes = None

    def __init__(self, items, seconds=0.0):
        self.items, self.seconds = items, seconds
        self.decoded = []

    def __len__(self):
        return len(self.items)

    def decode(self, i):
        time.sleep(self.seconds)
        self.decoded.append(i)
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]

    def name(self, i):
        return f"item {i}"

    def fingerprint(self):
        return f"listed:{len(self)}"


def random_images(n, *sides):
    """n images, their sides taken in turn."""
    rng = np.random.default_rng(n)
    sizes = [sides[i % len(sides)] for i in range(n)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


class TestFusedViews(PipelineContract):
    def make(self, source, batch_size, **options):
        return FusedViews(source, CONFIG, batch_size, **options)


class TestFusedViewsWithoutThreads(PipelineContract):
    def make(self, source, batch_size, **options):
        return FusedViews(source, CONFIG, batch_size, **{"workers": 0, "cache_gib": 0} | options)


def test_epoch_order_is_a_pinned_permutation():
    assert epoch_order(8, seed=0, epoch=0).tolist() == [6, 1, 0, 3, 7, 2, 4, 5]
    assert epoch_order(8, seed=2**40 + 1, epoch=7).tolist() == [1, 5, 7, 2, 0, 3, 6, 4]
    assert epoch_order(10_000, 1, 2).sort().values.tolist() == list(range(10_000))


def test_epoch_order_mixes_epochs_and_seeds():
    orders = [
        epoch_order(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**32, 0))
    ]
    for k, order in enumerate(orders):
        for other in [torch.arange(1000), *orders[:k]]:
            # permutations that do not know each other agree in one place on average
            assert (order == other).sum() < 8


def test_ranks_share_an_epoch_without_overlap(folder):
    shares = []
    for rank in range(2):
        pipeline = FusedViews(folder, CONFIG, 5, seed=1, rank=rank, world_size=2)
        shares.append([i for batch in pipeline for i in batch.index.tolist()])
    assert len(pipeline) == 3
    assert shares == [epoch_order(N, 1, 0)[rank::2].tolist() for rank in range(2)]


@pytest.mark.parametrize(
    "sides", [[(20, 24)], [(20, 24), (17, 40), (33, 9)]], ids=["one size", "ragged"]
)
def test_bits_do_not_depend_on_workers_or_cache(sides):
    source = Listed(random_images(40, *sides))
    expected = []
    for epoch in range(3):
        order = epoch_order(40, 9, epoch)
        for index in order.split(16)[:2]:
            images = PackedImages.from_images([source.items[i] for i in index])
            views = two_views(images, CONFIG, seed=9, epoch=epoch, index=index)
            expected.append((views, index, torch.full((16,), -1)))
    for workers in (0, 1, 4):
        for cache_gib in (0, 20_000 / 2**30, 2):
            pipeline = FusedViews(source, CONFIG, 16, seed=9, workers=workers, cache_gib=cache_gib)
            batches = []
            for epoch in range(3):
                pipeline.set_epoch(epoch)
                batches += pipeline
            assert_same_batches(batches, expected)


def test_arrays_folders_and_subsets_of_them_give_the_same_bits(folder, tmp_path):
    pixels = np.stack([folder.decode(i) for i in range(N)])
    np.save(tmp_path / "pixels.npy", pixels)
    chosen = list(range(0, N, 2))
    expected = list(FusedViews(Subset(folder, chosen), CONFIG, 7))
    for source in (
        Subset(ArrayImages(pixels, folder.labels), chosen),
        ArrayImages(pixels[chosen], folder.labels[chosen]),
    ):
        assert_same_batches(FusedViews(source, CONFIG, 7), expected)
    # memory-mapped: above the limit through the decoding threads, else at once
    mapped = [
        [batch.views for batch in FusedViews(open_source(tmp_path / "pixels.npy"), CONFIG, 7, **o)]
        for o in ({"cache_gib": 0}, {})
    ]
    for few, many in zip(*mapped, strict=True):
        torch.testing.assert_close(few, many, rtol=0, atol=0)


def test_views_have_the_dtype_and_memory_format_asked_for(folder):
    pipeline = FusedViews(folder, CONFIG, 8, dtype=torch.float16, channels_last=True)
    views = next(iter(pipeline)).views
    assert views.dtype == torch.float16
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_a_gpu_without_a_number_is_the_current_one_in_every_thread(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert usable_device("cuda") == torch.device("cuda", 3)
    assert usable_device("cuda:1") == torch.device("cuda", 1)
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
def test_batches_on_a_gpu_are_the_same_by_every_route(folder):
    arrays = ArrayImages(np.stack([folder.decode(i) for i in range(N)]), folder.labels)
    ragged = Listed(random_images(N, (20, 24), (17, 40), (33, 9)))
    for sources in ((folder, arrays), (ragged,)):
        runs = []
        for source in sources:
            for cache_gib in (0, 2):
                pipeline = FusedViews(source, CONFIG, 10, device="cuda", cache_gib=cache_gib)
                list(pipeline)
                runs.append(list(pipeline))  # the second pass finds what the first has kept
                assert (pipeline._resident() is None) == (cache_gib == 0)
        assert {tensor.device.type for tensor in runs[0][0]} == {"cuda"}
        for run in runs[1:]:
            assert_same_batches(run, runs[0])


@pytest.mark.gpu
def test_views_made_beside_the_encoder_are_those_made_alone():
    pipeline = FusedViews(Listed(random_images(64, (40, 30), (30, 50))), CONFIG, 8, device="cuda")
    alone = [batch.views.clone() for batch in pipeline]
    torch.cuda.synchronize()
    work = torch.randn(2048, 2048, device="cuda")
    beside = []
    for batch in pipeline:
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        beside.append(batch.views * 1)
        del batch
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert pipeline.seconds["views"] > 0


def test_names_that_are_not_utf8_are_logged(tmp_path):
    source = Listed(random_images(4, (8, 8)))
    source.name = lambda i: f"\udcff-{i}.jpg"
    log = tmp_path / "quarantine.jsonl"
    Quarantine(source, 1.0, log).add(2, DecodeError("broken"))
    assert json.loads(log.read_text("utf-8"))["name"] == "\udcff-2.jpg"


def test_decoding_runs_ahead_of_the_training_loop():
    source = Listed(random_images(64, (8, 8)))
    pipeline = FusedViews(source, CONFIG, 8, workers=2)
    iteration = iter(pipeline)
    next(iteration)
    deadline = time.monotonic() + 10
    while len(source.decoded) < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 24 <= len(source.decoded) < 64
    assert pipeline.state_dict()["position"] == 1
    pipeline.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_unexpected_exception_of_a_worker_arrives_with_its_traceback(workers):
    items = random_images(32, (8, 8))
    items[epoch_order(32, 0, 0)[20]] = KeyError("broken source")
    before = threads()
    shown = []
    with pytest.raises(KeyError, match="broken source") as raised:
        for batch in FusedViews(Listed(items), CONFIG, 8, workers=workers):
            shown.append(batch.index)
    assert len(shown) == 2
    assert "decode" in [entry.name for entry in raised.traceback]
    assert threads() == before


def test_second_iteration_ends_the_first(folder):
    pipeline = FusedViews(folder, CONFIG, 8, workers=2)
    first = iter(pipeline)
    next(first)
    assert len(list(pipeline)) == 3
    assert next(first, None) is None


def test_interrupt_ends_a_run_that_waits_for_data(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent("""
            import time
            import numpy as np
            from simclr_kernels.augment_config import AugmentConfig
            from simclr_kernels.pipelines.fused_views import FusedViews

            class Slow:
                labels = classes = None
                __len__ = lambda self: 10_000
                name = fingerprint = str
                def decode(self, i):
                    print("decoding", flush=True)
                    time.sleep(0.05)
                    return np.zeros((8, 8, 3), np.uint8)

            next(iter(FusedViews(Slow(), AugmentConfig.cifar10(16), 5_000, workers=2)))
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout.readline().startswith("decoding")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode != 0 and "KeyboardInterrupt" in errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": -1}, r"seed must be at least 0 and below 2\^64, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"cache_gib": -1.0}, "cache_gib must be at least 0, got -1.0"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction must be in \[0, 1\], got 1.5"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\), got 2 of 2"),
        ({"world_size": 4}, "got batch_size 8 and 7 images"),
    ],
)
def test_arguments_are_checked(folder, options, message):
    with pytest.raises(ValueError, match=message):
        FusedViews(folder, CONFIG, 8, **options)


def test_epoch_must_fit_the_counter(folder):
    with pytest.raises(ValueError, match=r"epoch must be at least 0 and below 2\^32, got -1"):
        FusedViews(folder, CONFIG, 8).set_epoch(-1)


def test_photos_pass_through_whole():
    source = ImageFolder(shared_path("data/imagenet_samples"))
    config = AugmentConfig.simclr(size=32)
    pipeline = FusedViews(source, config, 64)
    batches = list(pipeline)
    assert len(batches) == 3 and pipeline.quarantined == 0
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(192))
    images = PackedImages.from_images([source.decode(i) for i in batches[1].index])
    views = two_views(images, config, seed=0, epoch=0, index=batches[1].index)
    torch.testing.assert_close(batches[1].views, views, rtol=0, atol=0)


def test_cifar10_passes_through():
    source = ParquetImages(shared_path("data/cifar10/test.parquet"))
    config = AugmentConfig.cifar10()
    pipeline = FusedViews(Subset(source, range(1000)), config, 256, seed=4)
    for _ in range(2):
        batches = list(pipeline)
        assert len(batches) == 3
        for batch in batches:
            assert batch.label.tolist() == source.labels[batch.index].tolist()
            pixels = torch.from_numpy(np.stack([source.decode(int(i)) for i in batch.index]))
            views = two_views(pixels, config, seed=4, epoch=0, index=batch.index)
            torch.testing.assert_close(batch.views, views, rtol=0, atol=0)
