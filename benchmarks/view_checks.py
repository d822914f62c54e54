"""Every path of the views on this device against the reference in float64: `view_checks`.

And what must hold of them on a GPU beside the answers: at most four kernels for both views, no wait
for the device, capture into a CUDA graph, the same bits in every batch, run and stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations

import torch
from torch import Tensor

from benchmarks.measure import wait
from simclr_kernels import reference
from simclr_kernels.augment import augment, two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import (
    KERNEL_ARRAYS,
    AugmentParams,
    sample_params,
    sample_params_in_torch,
)

MOST_KERNELS = 4
# of float32, and of a rounded result in [0, 1]: half a step of the dtype below 1, and the passes
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1 / 1024, torch.bfloat16: 1 / 512 + 1 / 1024}
PRESETS = ("simclr", "simclr_v1", "byol", "moco_v2", "torchvision")
SIDES = (8, 15, 16, 31, 32, 33, 48, 64, 96, 224, 250, 512)
SOURCES = ((375, 500), (40, 33), (1, 1), (2, 3), (700, 3), (96, 96), (1, 50))
LARGE_SOURCE = (4472, 4473)  # 20 megapixels


def images_of(sizes: tuple[tuple[int, int], ...], device: str) -> PackedImages:
    """Noise of these (height, width): the hardest images to resize."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes
    ]
    return PackedImages.from_images(images).to(device)


def drawn(images: PackedImages, config: AugmentConfig, view: int = 0) -> AugmentParams:
    """By the torch code, on the CPU."""
    index = torch.arange(len(images)) + 1000
    return sample_params_in_torch(config, images.sizes.cpu(), 11, 2, index, view)


def check_against_reference(
    images: PackedImages,
    params: AugmentParams,
    config: AugmentConfig,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> None:
    """Each view within the tolerance of its dtype, finite, in the memory format asked for."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    params = params.to(images.device)
    views = augment(images, params, config, dtype, layout)
    assert views.dtype == dtype and views.is_contiguous(memory_format=layout)
    scale = 1.0 if config.std is None else min(config.std)
    for i in range(len(images)):
        truth = reference.augment(images[i][None], params[i], config, torch.float64)
        error = scale * (views[i].double() - truth[0]).abs().max().item()
        # not error > allowed: NaN is wrong
        assert error <= TOLERANCES[dtype], f"image {i}: error {error:.3g}"


def check_preset(
    device: str, preset: str, side: int, dtype: torch.dtype, channels_last: bool
) -> None:
    config = getattr(AugmentConfig, preset)(side)
    images = images_of(SOURCES, device)
    for view in range(2):
        check_against_reference(images, drawn(images, config, view), config, dtype, channels_last)


def check_orders(device: str, side: int) -> None:
    """All 24 orders of the colour operations, every one of them on."""
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.int8)
    config = AugmentConfig(size=side, jitter=1.0)
    images = images_of(((40, 50),) * len(orders), device)
    params = replace(drawn(images, config), order=orders)
    check_against_reference(images, params, config)


def check_blurs(device: str, side: int) -> None:
    sigma = torch.tensor([0.0, 1e-30, 0.1, 0.5, 1.0, 2.0, 7.0])
    config = AugmentConfig(size=side)
    images = images_of(((60, 50),) * len(sigma), device)
    for dtype in TOLERANCES:
        params = replace(drawn(images, config), sigma_px=sigma)
        check_against_reference(images, params, config, dtype)


def check_large_source(device: str) -> None:
    config, images = AugmentConfig.simclr(224), images_of((LARGE_SOURCE,), device)
    check_against_reference(images, drawn(images, config), config)


def check_params(device: str, preset: str, count: int) -> None:
    """The bits of the torch code, for sizes from thumbnails to panoramas."""
    config = replace(getattr(AugmentConfig, preset)(), solarize=(0.3, 0.1))
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 4000, (count, 2), generator=generator)
    index = torch.randint(0, 1 << 32, (count,), generator=generator)
    for view in range(2):
        truth = sample_params_in_torch(config, sizes, (7 << 32) + 5, 3, index, view)
        counters = {"seed": (7 << 32) + 5, "epoch": 3, "index": index.to(device), "view": view}
        found = sample_params(config, sizes.to(device), **counters)
        for name in KERNEL_ARRAYS:
            assert torch.equal(getattr(found, name).cpu(), getattr(truth, name)), name


def check_bits(device: str, side: int, runs: int) -> None:
    """Of a view in any batch, order and run: those it has alone."""
    config, images = AugmentConfig.simclr(side), images_of(SOURCES, device)
    step = partial(two_views, config=config, seed=1, epoch=0, dtype=torch.float16)
    index = torch.arange(len(images), device=device)
    views = step(images, index=index)
    for run in range(runs):
        assert torch.equal(step(images, index=index), views), f"run {run} differs"
    turned = index.flip(0)
    pairs = views.unflatten(0, (2, -1))
    found = step(images.take(turned), index=turned).unflatten(0, (2, -1))
    assert torch.equal(found, pairs[:, turned]), "another order, other bits"
    alone = step(images.take(index[:1]), index=index[:1])
    assert torch.equal(alone, pairs[:, 0]), "alone, other bits"


class ViewStep:
    """Both views of one batch: called, it returns them."""

    def __init__(self, device: str, config: AugmentConfig, packed: bool, batch: int = 64):
        self.config = config
        self.images = images_of(((120, 90),) * batch, device)
        if not packed:
            self.images = self.images.buffer.view(batch, 120, 90, 3)
        self.index = torch.arange(batch, device=device)
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self) -> Tensor:
        counters = {"seed": 3, "epoch": self.epoch, "index": self.index}
        return two_views(self.images, self.config, dtype=torch.float16, **counters)


def check_view_kernels(device: str, config: AugmentConfig, packed: bool) -> None:
    """At most 4 device kernels, copies and memsets included, for both views."""
    step = ViewStep(device, config, packed)
    step()
    wait(device)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        wait(device)
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert 0 < len(names) <= MOST_KERNELS, f"{len(names)} kernels: {', '.join(names)}"


def check_views_do_not_wait(device: str, config: AugmentConfig, packed: bool) -> None:
    step = ViewStep(device, config, packed)
    step()
    wait(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_view_graph(device: str, config: AugmentConfig, packed: bool) -> None:
    """A captured step replays to the bits of a plain one, with other images and epochs."""
    step = ViewStep(device, config, packed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(step(), expected), "another stream, other bits"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    pixels = step.images.buffer if packed else step.images
    for epoch in range(3):
        step.epoch.fill_(epoch)
        pixels.random_(0, 256)
        graph.replay()
        assert torch.equal(captured, step()), f"replay differs in epoch {epoch}"


def view_checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) pairs; a check raises where its claim does not hold."""
    gpu = device == "cuda"
    for side in SIDES if gpu else (8, 33):
        for dtype in TOLERANCES:
            for preset in PRESETS if side in (32, 96, 224) else PRESETS[:1]:
                name = str(dtype).removeprefix("torch.")
                for last in (False, True):
                    words = f"{preset} at {side}, {name}{', channels last' * last}"
                    yield (
                        f"views, {words}",
                        partial(check_preset, device, preset, side, dtype, last),
                    )
    for side in (16, 32, 48, 224) if gpu else (8, 33):
        yield f"views, every order at {side}", partial(check_orders, device, side)
        yield f"views, every sigma at {side}", partial(check_blurs, device, side)
        yield f"views, equal bits at {side}", partial(check_bits, device, side, 20 if gpu else 2)
    yield "views, a source of 20 megapixels", partial(check_large_source, device)
    for preset in PRESETS:
        yield f"params of {preset}", partial(check_params, device, preset, 20000 if gpu else 200)
    if gpu:
        for config in (AugmentConfig.simclr(), AugmentConfig.byol(96), AugmentConfig.cifar10()):
            for packed in (False, True):
                words = f"{config.size} {'packed' if packed else 'dense'}"
                operands = (device, config, packed)
                yield f"views, kernels at {words}", partial(check_view_kernels, *operands)
                yield f"views, no wait at {words}", partial(check_views_do_not_wait, *operands)
                yield f"views, graph at {words}", partial(check_view_graph, *operands)
