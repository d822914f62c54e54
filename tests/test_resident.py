"""Which images are kept, where, and that nothing is decoded or copied any more once all are."""

import subprocess
import sys

import numpy as np
from pipeline_contract import assert_same_batches
from test_fused_views import CONFIG, Listed, random_images

from simclr_kernels.data import DecodeError
from simclr_kernels.pipelines.decoding import PixelCache
from simclr_kernels.pipelines.fused_views import FusedViews
from simclr_kernels.pipelines.resident import holds_all_but


def test_cached_images_are_decoded_once():
    source = Listed(random_images(32, (8, 8)))
    pipeline = FusedViews(source, CONFIG, 16, workers=2)
    for epoch in range(4):
        pipeline.set_epoch(epoch)
        list(pipeline)
    assert sorted(source.decoded) == list(range(32))


class Watched(FusedViews):
    """Keeps the pixels that the views are made of."""

    def _views(self, pixels, index):
        self.pixels = pixels
        return super()._views(pixels, index)


def test_images_of_different_sizes_become_resident_and_are_not_copied_any_more():
    source = Listed(random_images(32, (8, 8), (5, 12)))
    pipeline = Watched(source, CONFIG, 16, workers=2)
    first = [pipeline.pixels.buffer.data_ptr() for _ in pipeline]
    source.decode = None  # whoever calls it fails
    pipeline.set_epoch(1)
    then = [pipeline.pixels.buffer.data_ptr() for _ in pipeline]
    assert len(set(first)) == 2 and len(set(then)) == 1
    assert pipeline.pixels.buffer.numel() == sum(image.nbytes for image in source.items)


def test_images_above_the_limit_are_decoded_in_every_epoch():
    images = random_images(32, (8, 8), (5, 12))
    source = Listed(images)
    room = sum(image.nbytes for image in images) - 1
    pipeline = FusedViews(source, CONFIG, 16, workers=2, cache_gib=room / 2**30)
    for epoch in range(3):
        pipeline.set_epoch(epoch)
        list(pipeline)
    assert len(source.decoded) == 32 + 2


def test_resident_images_are_decoded_again_where_a_state_knows_fewer_unreadable_ones():
    items = random_images(16, (8, 8), (5, 12))
    readable = items[3]
    items[3] = DecodeError("broken")
    pipeline = FusedViews(Listed(items), CONFIG, 5, workers=0, max_bad_fraction=0.5)
    before = pipeline.state_dict()
    for epoch in range(4):
        pipeline.set_epoch(epoch)
        list(pipeline)
    assert pipeline.quarantined == 1 and pipeline._resident() is not None
    items[3] = readable  # repaired
    pipeline.load_state_dict(before)
    assert_same_batches(pipeline, FusedViews(Listed(items), CONFIG, 5))
    assert pipeline.quarantined == 0


def test_without_cache_an_epoch_decodes_no_more_than_it_needs():
    source = Listed(random_images(32, (8, 8)))
    pipeline = FusedViews(source, CONFIG, 16, workers=2, cache_gib=0)
    for epoch in range(3):
        pipeline.set_epoch(epoch)
        list(pipeline)
    assert len(source.decoded) == 3 * 32


def test_cache_keeps_to_its_limit():
    images = random_images(10, (8, 8), (8, 9))
    cache = PixelCache(10, limit_bytes=1000)
    for i, image in enumerate(images):
        cache.put(i, image)
    kept = [i for i in range(10) if cache.get(i) is not None]
    assert sum(images[i].nbytes for i in kept) == cache.used_bytes <= 1000 and len(kept) == 4
    for i in kept:
        np.testing.assert_array_equal(cache.get(i), images[i])


def test_cache_knows_which_images_it_lacks():
    cache = PixelCache(4, limit_bytes=1e6)
    for i, image in enumerate(random_images(3, (8, 8))):
        cache.put(i, image)
    assert holds_all_but(cache.held, [3]) and holds_all_but(cache.held, [0, 3])
    # as many as are missing, but not those
    assert not holds_all_but(cache.held, [0]) and not holds_all_but(cache.held, [])


def test_cache_of_any_limit_takes_what_it_holds():
    # in a process of its own, whose peak is that of the cache
    code = """
import resource
import numpy as np
from simclr_kernels.pipelines.decoding import PixelCache
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
cache = PixelCache(1000, float("inf"))
for i in range(100):
    cache.put(i, np.full((100 + i, 100, 3), i, np.uint8))
assert all((cache.get(i) == i).all() for i in range(100)) and cache.get(100) is None
print(peak() - before, cache.used_bytes // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown, used = map(int, result.stdout.split())
    assert used > 4000 and grown < used + 16_000
