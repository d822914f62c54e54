"""The C++ kernels of the views: against the reference, each instruction set, threads, layouts."""

import dataclasses
import math
import subprocess
import sys
from itertools import permutations

import pytest
import torch

from simclr_kernels import _C, augment_cpu, reference
from simclr_kernels.augment import augment, two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params, sample_params_in_torch

INSTRUCTION_SETS = _C.instruction_sets()
PRESETS = {
    "simclr": AugmentConfig.simclr,
    "simclr_v1": AugmentConfig.simclr_v1,
    "cifar10": AugmentConfig.cifar10,
    "byol": AugmentConfig.byol,
    "moco_v2": AugmentConfig.moco_v2,
    "torchvision": AugmentConfig.torchvision,
}

pytestmark = pytest.mark.usefixtures("fresh_memory_holds_nan")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(INSTRUCTION_SETS[0])


def images_of(B, height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, height, width, 3), dtype=torch.uint8, generator=generator)


def draw(config, B, size, view=0, first=0):
    sizes = torch.tensor([size]).expand(B, 2)
    index = torch.arange(first, first + B)
    return sample_params(config, sizes, seed=5, epoch=2, index=index, view=view)


def neutral(B, size, **values):
    """Whole images of that size and nothing else, with some values replaced."""
    return dataclasses.replace(AugmentParams.identity(torch.tensor([size]).expand(B, 2)), **values)


def assert_exact(images, params, config):
    """To 1e-5 of white, before the division by std."""
    view = augment(images, params, config)
    truth = reference.augment(images, params, config, torch.float64)
    error = (view - truth).abs().amax((2, 3)) * torch.tensor(config.std or (1.0, 1.0, 1.0))
    worst = error.amax(1).argmax().item()
    assert error.max() < 1e-5, (error.max(), params.describe(worst, config.brightness_mode))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [8, 33, 64])
def test_presets_are_those_of_the_reference(preset, size, instruction_set):
    config = PRESETS[preset](size)
    for view in (0, 1):
        assert_exact(images_of(24, 41, 57), draw(config, 24, (41, 57), view), config)


# a few columns less and more than vectors of 4, 8 and 16, and blurs of radius 0 to 25
@pytest.mark.parametrize("size", [*range(1, 20), 31, 32, 47, 96, 127, 224, 257, 512])
def test_every_size_of_view_works(size, instruction_set):
    config = AugmentConfig(size=size, solarize=(0.5, 0.5), blur=(0.8, 0.8))
    B = 12 if size < 100 else 2
    assert_exact(images_of(B, 23, 19), draw(config, B, (23, 19), first=size), config)


@pytest.mark.parametrize(
    "height, width",
    [(1, 1), (1, 2), (2, 1), (3, 3), (4, 4), (5, 3), (1, 700), (700, 1), (375, 500), (1200, 900)],
)
def test_every_size_of_image_works(height, width, instruction_set):
    config = AugmentConfig(size=40)
    assert_exact(images_of(6, height, width), draw(config, 6, (height, width)), config)
    assert_exact(images_of(1, height, width), neutral(1, (height, width)), config)


def test_an_image_of_20_megapixels_works():
    config = AugmentConfig(size=224)
    images = images_of(1, 16, 16).repeat(1, 320, 250, 1)
    crop = torch.tensor([[7, 11, 5100, 3900]], dtype=torch.int32)
    assert_exact(images, neutral(1, (5120, 4000), crop=crop), config)


def test_crops_of_every_small_size_work_in_every_corner(instruction_set):
    images = images_of(1, 9, 11)
    crops = [
        (y, x, h, w)
        for h in range(1, 6)
        for w in range(1, 8)
        for y, x in ((0, 0), (9 - h, 11 - w), (2, 3))
    ]
    params = neutral(len(crops), (9, 11), crop=torch.tensor(crops, dtype=torch.int32))
    for config in (AugmentConfig(size=16), AugmentConfig(size=3)):
        assert_exact(images.expand(len(crops), -1, -1, -1), params, config)


def test_all_24_orders_are_exact(instruction_set):
    orders = list(permutations(range(4)))
    images = images_of(24, 20, 20)
    for k in range(3):
        params = neutral(
            24,
            (20, 20),
            order=torch.tensor(orders, dtype=torch.int8),
            brightness=torch.linspace(1.7, 0.3, 24),
            contrast=torch.linspace(0.2, 1.8, 24).roll(k * 7),
            saturation=torch.linspace(0.0, 2.0, 24).roll(k * 5),
            hue_turns=torch.linspace(-0.5, 0.5, 24).roll(k * 3),
            grayscale=torch.arange(24) % 5 == k,
        )
        assert_exact(images, params, AugmentConfig(size=30))


def test_each_operation_alone_is_exact(instruction_set):
    images = images_of(30, 13, 13)
    values = torch.linspace(-0.5, 2.4, 30)
    operations = ("brightness", "contrast", "saturation", "hue_turns", "sigma_px", "solarize")
    for name in operations:
        assert_exact(images, neutral(30, (13, 13), **{name: values}), AugmentConfig(size=24))
    added = AugmentConfig(size=24, brightness_mode="add")
    assert_exact(images, neutral(30, (13, 13), brightness=values), added)


def test_hues_of_saturated_grey_and_black_pixels_are_exact(instruction_set):
    corners = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    pixels = torch.cartesian_prod(corners, corners, corners).view(1, 25, 5, 3)
    turns = torch.linspace(-1, 1, 49)
    params = neutral(49, (25, 5), hue_turns=turns)
    assert_exact(pixels.expand(49, -1, -1, -1), params, AugmentConfig(size=25))


def test_grey_is_made_before_the_clip():
    # a bright edge overshoots white in one channel only
    images = torch.zeros(1, 2, 8, 3, dtype=torch.uint8)
    images[..., 4:, 0] = 255
    gray = neutral(1, (2, 8), grayscale=torch.tensor([True]))
    config = AugmentConfig(size=32)
    assert reference.crop_resize(images, gray.crop, 32).max() > 1.05
    assert_exact(images, gray, config)
    assert_exact(images, dataclasses.replace(gray, sigma_px=torch.tensor([0.7])), config)


def test_wide_blurs_are_exact(instruction_set):
    sigma = torch.tensor([1e-30, 0.05, 0.3, 1.0, 2.0, 4.0, 30.0, math.inf])
    images = images_of(8, 50, 50)
    assert_exact(images, neutral(8, (50, 50), sigma_px=sigma), AugmentConfig(size=120))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [24, 35])
def test_16_bit_views_are_float32_views_rounded_once(dtype, memory_format, size, instruction_set):
    # a tiny std gives infinities, a large one subnormal halves
    for std in (0.2, 1e-6, 1e6):
        config = AugmentConfig(size=size, mean=(0.4, 0.5, 0.6), std=(std,) * 3)
        images, params = images_of(16, 30, 30), draw(config, 16, (30, 30))
        single = augment(images, params, config)
        view = augment(images, params, config, dtype, memory_format)
        assert view.is_contiguous(memory_format=memory_format)
        assert torch.equal(view, single.to(dtype))


@pytest.mark.parametrize("size", [1, 7, 24, 35])
def test_channels_last_changes_no_bit(size, instruction_set):
    config = AugmentConfig(size=size, solarize=(0.5, 0.5))
    images, params = images_of(16, 30, 30), draw(config, 16, (30, 30))
    view = augment(images, params, config, memory_format=torch.channels_last)
    assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(view, augment(images, params, config))


def test_bits_depend_neither_on_threads_nor_on_the_batch():
    images = images_of(70, 40, 50)
    config = AugmentConfig(size=64)
    index = torch.arange(70)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(two_views(images, config, seed=0, epoch=0, index=index))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    shuffled = two_views(images[order], config, seed=0, epoch=0, index=order)
    assert torch.equal(shuffled[:70], results[0][:70][order])
    alone = two_views(images[9:10], config, seed=0, epoch=0, index=index[9:10])
    assert torch.equal(alone[1], results[0][79])


def test_images_with_gaps_are_read_where_they_are():
    wide = images_of(6, 40, 60)
    params = draw(AugmentConfig(size=24), 6, (20, 30))
    for images in (
        wide[:, 10:30, 20:50],
        wide[:, ::2, :30],
        wide[:, :20, ::2],
        wide.flip(3)[:, :20, :30],
        wide[:1, :20, :30].expand(6, -1, -1, -1),
        wide.permute(0, 2, 1, 3)[:, :20, :30],
    ):
        view = augment(images, params, AugmentConfig(size=24))
        assert torch.equal(view, augment(images.clone(), params, AugmentConfig(size=24)))


def test_params_with_gaps_are_read_where_they_are():
    config = AugmentConfig(size=24)
    images, params = images_of(12, 30, 30), draw(config, 12, (30, 30))
    every_other = params[torch.arange(0, 12, 2)]
    strided = params._map(lambda value: value[::2])
    assert not strided.contrast.is_contiguous()
    assert torch.equal(
        augment(images[::2], strided, config), augment(images[::2], every_other, config)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_two_views_are_augment_of_sampled_params(preset, packed):
    config = PRESETS[preset](24)
    images = images_of(20, 30, 40)
    given = PackedImages.from_images(list(images)) if packed else images
    views = two_views(given, config, seed=5, epoch=2, index=torch.arange(100, 120))
    for view in (0, 1):
        params = draw(config, 20, (30, 40), view, first=100)
        assert torch.equal(views[20 * view : 20 * view + 20], augment(images, params, config))


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (2, 3), (17, 9), (32, 32), (375, 500), (1200, 60), (60, 1200), (4000, 5000)],
)
@pytest.mark.parametrize("preset", ["simclr", "simclr_v1", "cifar10", "byol"])
def test_params_drawn_in_cpp_are_those_of_torch_bit_for_bit(preset, size):
    config = PRESETS[preset]()
    sizes, index = torch.tensor([size]).repeat(1000, 1), torch.arange(1000) * 4000037 % (1 << 32)
    seed = (7 << 40) + 3
    for view in (0, 1):
        ours = sample_params(config, sizes, seed=seed, epoch=9, index=index, view=view)
        theirs = sample_params_in_torch(config, sizes, seed, 9, index, view)
        for name, value in vars(theirs).items():
            assert name == "study" or torch.equal(getattr(ours, name), value), name


def test_params_of_odd_recipes_are_those_of_torch_bit_for_bit():
    sizes = torch.randint(1, 3000, (3000, 2), generator=torch.Generator().manual_seed(0))
    index = torch.arange(3000)
    for config in (
        AugmentConfig(area=(0.5, 0.6), aspect=(0.2, 7.0), min_covered=0.55),
        AugmentConfig(area=(1e-6, 1e-5), min_covered=0.0),
        AugmentConfig(brightness=3.0, hue=0.5, contrast=1.0, sigma_px=(1e-3, 40.0)),
        AugmentConfig(sampler="torchvision", crop=False),
    ):
        ours = sample_params(config, sizes, seed=1, epoch=0, index=index, view=1)
        theirs = sample_params_in_torch(config, sizes, 1, 0, index, 1)
        for name, value in vars(theirs).items():
            assert name == "study" or torch.equal(getattr(ours, name), value), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -3.0])
@pytest.mark.parametrize("field", ["brightness", "contrast", "saturation", "hue_turns"])
def test_factors_that_are_no_numbers_end_in_nan_or_in_range(field, value, instruction_set):
    params = neutral(1, (9, 9), **{field: torch.tensor([value])})
    view = augment(images_of(1, 9, 9), params, AugmentConfig(size=24))
    assert (view.isnan() | ((view >= 0) & (view <= 1))).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"order": torch.tensor([[0, 1, 2, 4]]).char()}, ValueError, "image 0 must be a perm.* 4$"),
        ({"order": torch.tensor([[0, 1, 1, 3]]).char()}, ValueError, "got 0, 1, 1, 3"),
        ({"order": torch.tensor([[0, 1, -1, 3]]).char()}, ValueError, "got 0, 1, -1, 3"),
        ({"order": torch.tensor([[0, 1, 2, 3]])}, TypeError, "order must be torch.int8, got torc"),
        ({"order": torch.zeros(1, 3).char()}, ValueError, r"order must have shape \(1, 4\), got"),
        ({"crop": torch.tensor([[0, 0, 2, 2]])}, TypeError, "crop must be torch.int32, got torch"),
        ({"flip": torch.zeros(1)}, TypeError, "flip must be torch.bool, got torch.float32"),
        (
            {"hue_turns": torch.zeros(2)},
            ValueError,
            r"hue_turns must have shape \(1,\)",
        ),
        ({"sigma_px": torch.zeros(1).double()}, TypeError, "sigma_px must be torch.float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_params_that_would_be_misread_are_refused(change, error, message):
    params = neutral(1, (9, 9), **change)
    with pytest.raises(error, match=message):
        augment(images_of(1, 9, 9), params, AugmentConfig(size=24))


def test_counters_out_of_range_are_refused_by_two_views():
    images, config = images_of(2, 9, 9), AugmentConfig(size=24)

    def views(index, **counter):
        return two_views(images, config, **({"seed": 0, "epoch": 0} | counter), index=index)

    with pytest.raises(ValueError, match=r"index must be in \[0, 2\^32\), got -1 \.\. 0"):
        views(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"index must be in .* got 0 \.\. 4294967296"):
        views(torch.tensor([0, 1 << 32]))
    with pytest.raises(ValueError, match=r"as many images as there are: 2, got 3"):
        views(torch.arange(3))
    with pytest.raises(TypeError, match=r"index must be int64, got torch.int32"):
        views(torch.arange(2).int())
    with pytest.raises(ValueError, match=r"epoch must be in \[0, 2\^32\), got -1"):
        views(torch.arange(2), epoch=-1)


def test_images_with_more_rows_than_the_kernels_count_are_refused():
    images = torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(1, 2**31, 1, 3)
    for config in (AugmentConfig(size=8), AugmentConfig(size=8, crop=False)):
        with pytest.raises(ValueError, match=r"at most 2\^31 - 1 pixels high, got 2147483648"):
            two_views(images, config, seed=0, epoch=0, index=torch.arange(1))


def test_the_kernels_write_every_element():
    config = AugmentConfig(size=35)
    for dtype in augment_cpu.DTYPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            views = two_views(
                images_of(9, 30, 30),
                config,
                seed=0,
                epoch=0,
                index=torch.arange(9),
                dtype=dtype,
                memory_format=memory_format,
            )
            assert views.isfinite().all()


def test_a_child_forked_after_threads_were_used_does_not_hang():
    program = """
import os
import signal
import torch
from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig

torch.set_num_threads(2)
images = torch.arange(64 * 40 * 40 * 3).view(64, 40, 40, 3).to(torch.uint8)

def views():
    return two_views(images, AugmentConfig(size=64), seed=0, epoch=0, index=torch.arange(64))

expected = views().numpy()
child = os.fork()
if child == 0:
    signal.alarm(30)
    # not by torch, whose own threads are gone
    os._exit(0 if (views().numpy() == expected).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
