"""KorniaViews: the contract, and how near each of Kornia's operators comes to the reference."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import shared_path
from pipeline_contract import SIDE, N, PipelineContract, folder

from simclr_kernels import reference
from simclr_kernels.augment import augment
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import open_source
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import ORDERS, AugmentParams, sample_params
from simclr_kernels.pipelines.kornia_views import KorniaViews, kornia_augment
from simclr_kernels.study_params import StudyParams

__all__ = ["folder"]  # a fixture

CONFIG = AugmentConfig.cifar10(size=SIDE)
S = 32
# every operation happens to some image of a batch
BUSY = AugmentConfig(
    size=S,
    solarize=(0.3, 0.3),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    cutout=0.5,
    rotation=0.6,
    sobel=0.3,
    noise=0.5,
)


def photo_like(B, height=S, width=S, seed=0):
    """(B, height, width, 3) uint8: waves of random direction and colour, with some noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / S
    waves = 0.5 * np.ones((B, height, width, 3))
    for _ in range(4):
        fy, fx = generator.uniform(-12, 12, (2, B, 1, 1, 1))
        phase = generator.uniform(0, 6.3, (B, 1, 1, 3))
        waves += 0.2 * np.sin(fy * y[..., None] + fx * x[..., None] + phase)
    waves += generator.normal(0, 0.03, waves.shape)
    return torch.from_numpy((waves.clip(0, 1) * 255).astype(np.uint8))


def params_of(images, config=BUSY, **counter):
    packed = isinstance(images, PackedImages)
    sizes = images.sizes if packed else torch.tensor([images.shape[1:3]]).expand(len(images), 2)
    counter = dict(seed=3, epoch=0, index=torch.arange(len(images)), view=0) | counter
    return sample_params(config, sizes, **counter)


def whole(params):
    """The same params, the crop being all S x S pixels: nothing is resized."""
    return dataclasses.replace(
        params, crop=torch.tensor([[0, 0, S, S]], dtype=torch.int32).repeat(len(params), 1)
    )


class TestKorniaViews(PipelineContract):
    def make(self, source, batch_size, **options):
        return KorniaViews(source, CONFIG, batch_size, **{"workers": 2} | options)


def test_an_image_gets_the_same_pixels_for_any_batch_size_rank_and_number_of_workers(folder):
    config = dataclasses.replace(BUSY, size=20)

    def shown(**options):
        options = {"workers": 0, "batch_size": N} | options
        world_size = options.get("world_size", 1)
        views = {}
        for rank in range(world_size):
            for batch in KorniaViews(folder, config, rank=rank, **options):
                for k, i in enumerate(batch.index.tolist()):
                    views[i] = batch.views[k :: len(batch.index)]
        return views

    expected = shown()
    assert len(expected) == N
    for options in ({"batch_size": 5}, {"world_size": 3, "batch_size": 10}, {"workers": 3}):
        for i, views in shown(**options).items():
            assert torch.equal(views, expected[i]), (options, i)


def test_views_are_those_of_kornia_augment_in_the_layout_asked_for(folder):
    options = dict(seed=4, dtype=torch.float16, channels_last=True, workers=0)
    pipeline = KorniaViews(folder, BUSY, 8, **options)
    pipeline.set_epoch(2)
    batch = next(iter(pipeline))
    assert batch.views.dtype == torch.float16
    assert batch.views.is_contiguous(memory_format=torch.channels_last)
    images = torch.stack([torch.from_numpy(folder.decode(i)) for i in batch.index.tolist()])
    for view in (0, 1):
        params = params_of(images, seed=4, epoch=2, index=batch.index, view=view)
        expected = kornia_augment(images, params, BUSY, torch.float16)
        assert torch.equal(batch.views[8 * view : 8 * view + 8], expected)


# --- agreement with the reference -----------------------------------------------------------------

B = 24


def spread(low, high):
    return torch.linspace(low, high, B)[
        torch.randperm(B, generator=torch.Generator().manual_seed(0))
    ]


ON = torch.ones(B, dtype=torch.bool)
STUDY = sample_params(
    dataclasses.replace(BUSY, cutout=1, rotation=1, sobel=1, noise=1),
    torch.full((B, 2), S),
    seed=0,
    epoch=0,
    index=torch.arange(B),
    view=0,
).study
# operation: what it is given, and the largest difference allowed; 0 is the same bits
OPERATIONS = {
    "flip": (dict(flip=ON), 0),
    "brightness": (dict(brightness=spread(0.2, 1.8)), 0),
    "contrast": (dict(contrast=spread(0.2, 1.8)), 1e-6),
    "saturation": (dict(saturation=spread(0.2, 1.8)), 1e-6),
    "hue": (dict(hue_turns=spread(-0.2, 0.2)), 2e-6),
    "grayscale": (dict(grayscale=ON), 1e-6),
    "blur": (dict(sigma_px=spread(0.1, 2.0)), 1e-6),
    "solarize": (dict(solarize=torch.full((B,), 0.5)), 0),
    "rotation": (dict(quarter_turns=STUDY.quarter_turns), 0),
    "sobel": (dict(sobel=STUDY.sobel), 1e-6),
    "noise": (dict(noise_sigma=STUDY.noise_sigma, noise_key=STUDY.noise_key), 0),
    "cutout": (dict(cutout=STUDY.cutout), 0),
}


def params_with(values):
    identity = AugmentParams.identity(torch.full((B, 2), S))
    if set(values) <= set(vars(identity)):
        return dataclasses.replace(identity, **values)
    study = dataclasses.replace(StudyParams.identity(B), **values)
    return dataclasses.replace(identity, study=study)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_the_reference(name):
    values, tolerance = OPERATIONS[name]
    images, params, config = photo_like(B), params_with(values), AugmentConfig(size=S)
    expected = reference.augment(images, params, config)
    view = kornia_augment(images, params, config)
    assert (view - expected).abs().max() <= tolerance
    plain = reference.augment(images, AugmentParams.identity(torch.full((B, 2), S)), config)
    assert (expected - plain).abs().amax((1, 2, 3)).gt(0.01).sum() > B // 2


def test_added_brightness_is_that_of_the_reference():
    config = AugmentConfig(size=S, brightness_mode="add")
    params = params_with(dict(brightness=spread(-0.8, 0.8)))
    images = photo_like(B)
    expected = reference.augment(images, params, config)
    assert torch.equal(kornia_augment(images, params, config), expected)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_every_order_of_the_colour_operations_is_honoured(order):
    images = photo_like(B)
    params = params_with(OPERATIONS["brightness"][0])
    params = dataclasses.replace(
        params,
        order=torch.tensor([order], dtype=torch.int8).repeat(B, 1),
        **OPERATIONS["contrast"][0] | OPERATIONS["saturation"][0] | OPERATIONS["hue"][0],
    )
    config = AugmentConfig(size=S)
    difference = kornia_augment(images, params, config) - reference.augment(images, params, config)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["multiply", "add"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 2e-6)], ids=["float32", "float64"]
)
def test_whole_views_without_a_resize_are_those_of_the_reference(mode, dtype, tolerance):
    images = photo_like(64)
    config = dataclasses.replace(BUSY, brightness_mode=mode)
    params = whole(params_of(images, config))
    assert len(params.order.unique(dim=0)) > 12
    view = kornia_augment(images, params, config, dtype)
    assert view.dtype == dtype
    assert (view - reference.augment(images, params, config, dtype)).abs().max() < tolerance


def test_neutral_values_are_skipped_with_their_clip():
    # bicubic overshoot survives to the grayscale only where no colour operation clips it
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    images[:, :, 4:] = 255
    params = AugmentParams.identity(torch.tensor([[8, 8]]))
    config = AugmentConfig(size=S, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert kornia_augment(images, params, config).max() == 1
    clipped = dataclasses.replace(params, brightness=torch.tensor([0.5]))
    darker = kornia_augment(images, clipped, config)
    # clipped after, not before: the overshoot of a half is above 0.5
    assert 0.5 < darker.max() < 0.6 and darker.min() == 0


def test_views_under_twenty_pixels_are_not_blurred():
    config = AugmentConfig(size=16)
    images = photo_like(B, 16, 16)
    params = AugmentParams.identity(torch.full((B, 2), 16))
    blurred = dataclasses.replace(params, sigma_px=torch.full((B,), 2.0))
    views = [kornia_augment(images, p, config) for p in (params, blurred)]
    assert torch.equal(*views)


@pytest.mark.parametrize(
    "height, width, mean, largest", [(20, 25, 0.004, 0.05), (90, 70, 0.004, 0.06)]
)
def test_the_gap_of_the_resize_is_there_and_small(height, width, mean, largest):
    images = photo_like(B, height, width)
    params = AugmentParams.identity(torch.tensor([[height, width]]).expand(B, 2))
    config = AugmentConfig(size=S)
    gap = (kornia_augment(images, params, config) - augment(images, params, config)).abs()
    assert mean / 8 < gap.mean() < mean and largest / 8 < gap.max() < largest


def test_on_photos_only_the_resize_differs_by_more_than_rounding():
    source = open_source(shared_path("data/imagenet_samples"))
    images = PackedImages.from_images([source.decode(i) for i in range(0, len(source), 12)])
    config = AugmentConfig(size=96)
    params = params_of(images, config)
    resized = dataclasses.replace(
        AugmentParams.identity(images.sizes), crop=params.crop, flip=params.flip
    )
    for drawn, mean, percentile in ((resized, 0.8, 7.0), (params, 0.6, 7.0)):
        gap = 255 * (kornia_augment(images, drawn, config) - augment(images, drawn, config)).abs()
        assert mean / 3 < gap.mean() < mean
        assert gap.flatten().sort().values[int(0.99 * gap.numel())] < percentile
    planes = kornia_augment(images, resized, config).permute(0, 2, 3, 1)
    pixels = (planes * 255).round().to(torch.uint8)
    same = dataclasses.replace(
        params,
        flip=torch.zeros_like(params.flip),
        crop=torch.tensor([[0, 0, 96, 96]], dtype=torch.int32).repeat(len(images), 1),
    )
    gap = kornia_augment(pixels, same, config) - reference.augment(pixels, same, config)
    assert gap.abs().max() < 5e-6


# --- images, gradients, refusals ------------------------------------------------------------------


def test_images_of_different_sizes_equal_single_images():
    sizes = [(1, 1), (30, 26), (7, 50), (64, 3), (32, 32), (2, 1)] * 3
    images = [photo_like(1, *size, seed=k)[0] for k, size in enumerate(sizes)]
    packed = PackedImages.from_images(images)
    params = params_of(packed)
    views = kornia_augment(packed, params, BUSY)
    for i, image in enumerate(images):
        assert torch.equal(views[i], kornia_augment(image[None], params[i], BUSY)[0])


def test_floating_images_are_those_of_their_bytes():
    images = photo_like(B, 40, 30)
    params = params_of(images)
    floating = images.to(torch.float32) * (1 / 255)
    expected = kornia_augment(images, params, BUSY)
    assert torch.equal(kornia_augment(floating, params, BUSY), expected)
    half = kornia_augment(images, params, BUSY, torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half, expected.half())


@pytest.mark.parametrize("name", [*OPERATIONS, "all"])
def test_the_gradient_of_an_operation_is_that_of_the_reference(name):
    torch.manual_seed(0)
    # no two channels of a pixel are equal, no neighbours are: there the largest has many gradients
    images = 0.9 * photo_like(B).double() + 20 * torch.rand(B, S, S, 3, dtype=torch.float64)
    config = BUSY if name == "all" else AugmentConfig(size=S)
    params = whole(params_of(images)) if name == "all" else params_with(OPERATIONS[name][0])
    upstream = torch.randn(B, 3, S, S, dtype=torch.float64)
    images.requires_grad_()
    # the reference itself divides by 255
    for_kornia = images * (1 / 255)
    gradient, expected = (
        torch.autograd.grad(
            function(pixels, params, config, torch.float64), images, upstream, retain_graph=True
        )[0]
        for function, pixels in ((kornia_augment, for_kornia), (reference.augment, images))
    )
    assert expected.abs().amax((1, 2, 3)).gt(0).all()
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_the_gradient_of_a_resized_crop_is_that_of_differences():
    params = AugmentParams.identity(torch.tensor([[9, 7]]).expand(2, 2))
    params = dataclasses.replace(
        params,
        crop=torch.tensor([[1, 2, 7, 4], [0, 0, 9, 7]]),
        contrast=torch.tensor([0.8, 1.1]),
        sigma_px=torch.tensor([0.7, 0.0]),
    )
    images = 0.3 + 0.4 * photo_like(2, 9, 7).double() / 255
    config = AugmentConfig(size=20)
    assert torch.autograd.gradcheck(
        lambda x: kornia_augment(x, params, config, torch.float64),
        images.requires_grad_(),
        fast_mode=True,
    )


def test_an_empty_batch_gives_no_views():
    images = photo_like(B)[:0]
    assert kornia_augment(images, params_of(images), BUSY).shape == (0, 3, S, S)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (photo_like(B).int(), TypeError, r"images must be uint8 or floating, got torch.int32"),
        (photo_like(B).permute(0, 3, 1, 2), ValueError, r"got \(24, 3, 32, 32\)"),
        (photo_like(B - 1), ValueError, r"as many images as there are: 23, got 24"),
        ([photo_like(1)[0]], TypeError, r"must be a tensor or PackedImages, got list"),
        (photo_like(B).to("meta"), ValueError, r"must be on one device, got meta and cpu"),
        (photo_like(B, 31), ValueError, r"the crop of image 0 must lie inside its 31x32 pixels"),
    ],
    ids=["integers", "planes first", "another count", "a list", "another device", "smaller images"],
)
def test_images_that_do_not_fit_are_refused(images, error, message):
    params = AugmentParams.identity(torch.full((B, 2), S))
    with pytest.raises(error, match=message):
        kornia_augment(images, params, BUSY)


def test_a_dtype_that_is_not_floating_is_refused():
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch.uint8"):
        kornia_augment(photo_like(B), params_of(photo_like(B)), BUSY, torch.uint8)


def test_without_kornia_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    for name in [name for name in sys.modules if name.startswith("kornia.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "simclr_kernels.pipelines.kornia_views")
    with pytest.raises(ImportError, match=r"pip install simclr-kernels\[kornia\]"):
        importlib.import_module("simclr_kernels.pipelines.kornia_views")


@pytest.mark.gpu
def test_a_gpu_gives_the_views_of_the_cpu():
    images = PackedImages.from_images(list(photo_like(B, 40, 30)))
    params = params_of(images)
    view = kornia_augment(images.to("cuda"), params.to("cuda"), BUSY)
    assert view.is_cuda
    assert (view.cpu() - kornia_augment(images, params, BUSY)).abs().max() < 1e-4
