"""What times the views: contenders make views, wrong ones are not timed, results are drawn."""

import itertools
import json
import multiprocessing
import os
import re
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import pipeline_peers, view_images
from benchmarks.bench_augment import CPU_CASES, GPU_CASES
from benchmarks.bench_pipelines import OF_A_STEP
from benchmarks.measure import Result, cpu_seconds, race, timed
from benchmarks.peers import PeerMissing
from benchmarks.pipeline_contenders import (
    EPOCH,
    LOSS,
    READY,
    STEP,
    Load,
    epoch_contenders,
    pipeline_measurement,
    step_contenders,
)
from benchmarks.pipeline_peers import PIPELINES, PipelinePeer
from benchmarks.plot_views import goals, save_plot, table
from benchmarks.tables import read_measurements
from benchmarks.view_contenders import (
    TWO_VIEWS,
    ViewSize,
    check_alike,
    view_contenders,
    view_measurement,
)
from benchmarks.view_images import photo_source, photos, synthetic, thumbnails
from benchmarks.view_peers import VIEW_PEERS
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ArrayImages
from simclr_kernels.figure_style import BLUE

SMALL = ViewSize(32, 8)


@pytest.fixture(autouse=True)
def no_shared_images(monkeypatch, tmp_path):
    """The benchmarks run anywhere: here as where the real images are absent."""
    monkeypatch.setattr(view_images, "DATA", tmp_path / "absent")
    for cached in (photos, thumbnails):
        cached.cache_clear()
    yield
    for cached in (photos, thumbnails):
        cached.cache_clear()


def is_rightly_missing(name, contender):
    """Whether it is one of those that only the extra [bench] installs, and says so."""
    if isinstance(contender, str):
        assert name.startswith(("albumentations", "torchvision")), contender
        assert re.match(r"\w+ (is not installed|cannot be imported): ", contender)
    return isinstance(contender, str)


@pytest.mark.parametrize("name", VIEW_PEERS)
def test_every_contender_makes_two_views_or_says_why_not(name):
    contender = view_contenders([name], SMALL, "cpu")[name]
    if is_rightly_missing(name, contender):
        return
    before = torch.get_num_threads()
    result = race({name: contender}, "cpu", seconds_each=0)[name]
    assert result.wrong is None and result.missing is None
    assert torch.get_num_threads() == before
    if name in ("ours", "ours-all-cores", "reference"):
        assert result.error <= 1e-5
    else:
        assert result.error is None
    info = view_measurement(name, result, SMALL)
    assert info["images_per_core_second"] == pytest.approx(1e3 / info["cpu_ms_per_image"])
    assert info["what"] == TWO_VIEWS and info["origin"] == "synthetic 32 x 32"


def test_views_that_are_a_little_off_are_not_timed(monkeypatch):
    ours = VIEW_PEERS["ours"]

    def off(images, config):
        peer = ours(images, config)

        def call():
            epoch, views = peer.call()
            views[len(images), 0, 3, 3] += 2e-5
            return epoch, views

        return peer._replace(call=call)

    monkeypatch.setitem(VIEW_PEERS, "off", off)
    results = race(view_contenders(["off", "ours"], SMALL, "cpu"), "cpu", 0)
    assert "error of a pixel is 2e-05" in results["off"].wrong and not results["off"].seconds
    assert results["ours"].seconds
    assert view_measurement("off", results["off"], SMALL)["missing"] == results["off"].wrong


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda views: views[1:], "shape is"),
        (lambda views: views * 2, "values are in"),
        (lambda views: views * 0 + 0.9, "blank"),
        (lambda views: views[:8].repeat(2, 1, 1, 1), "both views are one"),
        (lambda views: views * torch.nan, "values are in"),
    ],
)
def test_what_does_not_look_like_views_is_refused(spoil, message):
    config = SMALL.config()
    views = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check_alike(views, 8, config)
    check_alike((views * 255).byte(), 8, config)
    with pytest.raises(AssertionError, match=message):
        check_alike(spoil(views), 8, config)


def test_a_missing_peer_says_why(monkeypatch):
    def gone(images, config):
        raise PeerMissing("it is not installed")

    monkeypatch.setitem(VIEW_PEERS, "gone", gone)
    results = race(view_contenders(["gone", "ours"], SMALL, "cpu"), "cpu", 0)
    assert results["gone"].missing == "it is not installed" and results["ours"].seconds
    monkeypatch.setitem(sys.modules, "albumentations", None)
    found = view_contenders(["albumentations"], SMALL, "cpu")
    assert found["albumentations"].startswith("albumentations is not installed: import of albu")


def test_the_synthetic_photos_are_like_photos_and_the_same_in_every_run(tmp_path, monkeypatch):
    batch = photos(3)
    assert batch.pixels.shape == (3, 375, 500, 3) and batch.origin == "synthetic photos"
    assert np.array_equal(batch.pixels[2], synthetic(2))
    assert not np.array_equal(synthetic(1), synthetic(2))
    source, origin = photo_source(3, tmp_path)
    assert len(source) == 3 and origin == "synthetic JPEG"
    sizes = [len(source.encoded(i)) for i in range(3)]
    # ImageNet's at 375 x 500 are of 40 to 200 kB
    assert all(40_000 < size < 200_000 for size in sizes), sizes
    # two more than there are: again from the first
    monkeypatch.setattr(view_images, "SYNTHETIC", 3)
    source, _ = photo_source(5, tmp_path)
    assert [source.name(i) for i in (3, 4)] == [source.name(i) for i in (0, 1)]


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_is_that_of_worker_processes_too():
    def in_worker():
        worker = multiprocessing.Process(target=burn, args=(0.1,))
        worker.start()
        worker.join()

    assert 0.09 < timed(in_worker, "cpu").cpu < 0.5
    asleep = timed(lambda: time.sleep(0.05), "cpu")
    assert asleep.wall >= 0.05 and asleep.cpu < 0.04
    started, waiting = multiprocessing.Event(), multiprocessing.Event()

    def burn_and_wait():
        burn(0.1)
        started.set()
        waiting.wait(10)

    before = cpu_seconds()
    worker = multiprocessing.Process(target=burn_and_wait)
    worker.start()
    assert started.wait(10)
    at_work = cpu_seconds()
    waiting.set()
    worker.join()
    # counted while it runs, and once, not twice, when it has ended
    assert 0.08 < at_work - before and cpu_seconds() - before < 0.5
    assert os.getpid() not in [child.pid for child in multiprocessing.active_children()]


@pytest.fixture
def load():
    pixels = np.stack([synthetic(i, 32, 32) for i in range(16)])
    return Load(ArrayImages(pixels), "synthetic", AugmentConfig.cifar10(), 8, "small")


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_yields_epochs_of_views_or_says_why_not(name, load, tmp_path):
    source, origin = photo_source(4, tmp_path)
    jpegs = Load(source, origin, AugmentConfig.simclr(32), 2)
    contender = epoch_contenders([name], jpegs, "cpu")[name]
    if is_rightly_missing(name, contender):
        return
    result = race({name: contender}, "cpu", seconds_each=0)[name]
    assert result.wrong is None
    assert (result.error is not None) == name.startswith("fused")
    info = pipeline_measurement(name, result, jpegs, EPOCH)
    assert info["images_per_second"] == pytest.approx(4 / info["seconds"])


def test_a_pipeline_of_wrong_views_or_none_is_noticed(load, monkeypatch):
    fused = PIPELINES["fused"]

    def off(*arguments):
        peer = fused(*arguments)

        def epoch():
            number, batches = peer.epoch()
            return number + 1, batches

        return PipelinePeer("off", epoch, exact=True)

    monkeypatch.setitem(PIPELINES, "off", off)
    monkeypatch.setattr(pipeline_peers.importlib, "import_module", missing_module)
    results = race(epoch_contenders(["off", "kornia"], load, "cpu"), "cpu", 0)
    assert "error of a pixel" in results["off"].wrong
    assert results["kornia"].missing == "KorniaViews: pip install simclr-kernels[kornia]"


def missing_module(name):
    raise ImportError("pip install simclr-kernels[kornia]")


def test_a_training_step_is_timed_with_ready_views_and_with_a_pipeline(load):
    names = [READY, LOSS, "fused-cached"]
    results = race(step_contenders(names, load, "cpu"), "cpu", seconds_each=0)
    records = [pipeline_measurement(name, results[name], load, STEP) for name in names]
    assert [record["steps"] for record in records] == [2, 2, 2]
    assert not any("missing" in record for record in records)
    assert results[LOSS].median < results[READY].median


def record(what, name, milliseconds, side=224, batch=64, **more):
    result = Result(name, [milliseconds / 1e3], [milliseconds / 1e3], 3 << 20, None)
    result.cpu_seconds = [milliseconds / 1e3]
    if what == TWO_VIEWS:
        return view_measurement(name, result, ViewSize(side, batch))
    config = AugmentConfig.simclr(side)
    load = Load(ArrayImages(np.zeros((2 * batch, 1, 1, 3), np.uint8)), "arrays", config, batch)
    return pipeline_measurement(name, result, load, what) | more


@pytest.fixture
def records():
    return [
        record(TWO_VIEWS, "ours", 64),
        record(TWO_VIEWS, "albumentations", 128),
        record(TWO_VIEWS, "dali", 320),
        record(TWO_VIEWS, "ours", 4, 32),
        record(EPOCH, "fused", 256),
        record(EPOCH, "torchvision", 2560),
        record(STEP, READY, 90),
        record(STEP, "fused-cached", 100),
        record(STEP, LOSS, 2),
    ]


def test_the_tables_hold_rates_ratios_and_shares(records):
    text, _, met = table(records, gpu=False).rpartition("\n\n")
    views, small, epoch, step = text.split("\n\n**")
    assert views.splitlines() == [
        "**two views of decoded pixels, 2 x 224, synthetic photos, batch 64**",
        "",
        "|  | images/s per core | ours is faster by | CPU ms | images/s by the clock | MiB |",
        "| --- | --- | --- | --- | --- | --- |",
        "| **ours** | 1000 |  | 1 | 1000 | 3 |",
        "| albumentations | 500 | 2 | 2 | 500 | 3 |",
        "| dali | 200 | 5 | 5 | 200 | 3 |",
    ]
    assert small.startswith("two views of decoded pixels, 2 x 32,")
    # 128 images an epoch
    assert "| **fused** | 500 |  | 2 | 500 | 3 |" in epoch
    assert "| torchvision | 50 | 10 | 20 | 50 | 3 |" in epoch
    assert "| ready-made | 45 |  | 2.2% |" in step
    assert "| **fused-cached** | 50 | 10.0% | 2.0% |" in step
    assert met.splitlines() == goals(records)


def test_goals_are_met_not_met_or_not_measured(records):
    first, second, *others = (line.split("  2 x ")[0].strip() for line in goals(records))
    assert (first, second) == ("met", "NOT MET")
    assert others == ["not measured"] * 3
    assert goals(records)[0].endswith("as fast a core as albumentations: 2.00 at batch 64")


def test_the_figure_is_drawn_from_what_pytest_wrote(records, tmp_path):
    path = tmp_path / "results.json"
    about = {"device": "a cpu", "cuda": None}
    benchmarks = [{"extra_info": r | about} for r in records]
    path.write_text(json.dumps({"benchmarks": benchmarks + [{"extra_info": {"what": "forward"}}]}))
    found, device = read_measurements(path, "side")
    assert device == "a cpu" and len(found) == len(records)
    save_plot(found, tmp_path / "a.png", device, gpu=False)
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.width == 1600
    blue = tuple(bytes.fromhex(BLUE[1:]))
    assert blue in {color for _, color in picture.getcolors(1 << 20)}
    with pytest.raises(ValueError, match="nothing to draw"):
        save_plot([records[-1]], tmp_path / "none.png", device, gpu=False)


def test_every_size_is_listed_once_and_every_contender_exists():
    for cases in (CPU_CASES, GPU_CASES):
        for one, other in itertools.combinations(cases, 2):
            assert one.size != other.size
        assert {name for case in cases for name in case.names} <= set(VIEW_PEERS)
    assert set(OF_A_STEP) <= set(PIPELINES)
