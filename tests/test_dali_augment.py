"""dali_augment beside the reference: what DALI's operators honour, and by how much they do not."""

from dataclasses import replace

import pytest
import torch
from conftest import shared_path

from simclr_kernels import reference
from simclr_kernels.augment import augment
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ImageFolder
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, the extra [dali]")

from simclr_kernels.pipelines.dali_views import dali_augment  # noqa: E402

WITH_BLUR = AugmentConfig.byol(size=24)


@pytest.fixture(scope="module")
def photos():
    return ImageFolder(shared_path("data/imagenet_samples"))


def noise(B, side):
    generator = torch.Generator().manual_seed(B)
    return torch.randint(0, 256, (B, side, side, 3), dtype=torch.uint8, generator=generator)


def plain(images, brightness_mode="multiply"):
    """Params that crop to 24 pixels, the size of WITH_BLUR's views, and do nothing else."""
    params = AugmentParams.identity(torch.tensor([[24, 24]] * len(images)), brightness_mode)
    return replace(params, crop=params.crop + torch.tensor([3, 5, 0, 0], dtype=torch.int32))


def assert_close(views, images, params, config, atol):
    expected = reference.augment(images, params, config, torch.float64)
    torch.testing.assert_close(views.double(), expected, rtol=0, atol=atol)


def test_crop_flip_brightness_solarize_mean_and_std_are_exact():
    images = noise(4, 40)
    for changes in (
        {"flip": torch.tensor([True, False, True, False])},
        {"brightness": torch.tensor([-0.3, 0.0, 0.2, 0.4])},
        {"solarize": torch.tensor([0.5, 1.0, 0.5, 1.0])},
    ):
        params = replace(plain(images, "add"), **changes)
        assert_close(dali_augment(images, params, WITH_BLUR), images, params, WITH_BLUR, 2e-5)
    params = replace(plain(images), brightness=torch.tensor([0.0, 0.5, 1.0, 1.8]))
    config = AugmentConfig(size=24)
    assert_close(dali_augment(images, params, config), images, params, config, 2e-6)


def test_images_with_gaps_are_taken():
    images = noise(5, 40)
    params = plain(images)
    for strided in (images.transpose(1, 2), images[:, 4:, 6:]):
        views = dali_augment(strided, params, WITH_BLUR)
        assert torch.equal(views, dali_augment(strided.contiguous(), params, WITH_BLUR))


def test_images_packed_or_in_one_tensor_give_the_same_view():
    images = noise(5, 40)
    params = plain(images)
    views = dali_augment(images, params, WITH_BLUR)
    packed = PackedImages.from_images(list(images))
    assert torch.equal(dali_augment(packed, params, WITH_BLUR), views)
    assert dali_augment(images[:0], params[:0], WITH_BLUR).shape == (0, 3, 24, 24)


def test_blur_is_exact_inside_and_reflects_the_border():
    images = noise(3, 40)
    config = AugmentConfig(size=40)
    params = AugmentParams.identity(torch.tensor([[40, 40]] * 3))
    params = replace(params, sigma_px=torch.tensor([0.7, 0.0, 2.0]))
    views = dali_augment(images, params, config)
    expected = reference.augment(images, params, config)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(views[inside], expected[inside], rtol=0, atol=3e-6)
    torch.testing.assert_close(views[1], expected[1], rtol=0, atol=3e-6)
    assert (views - expected).abs()[2].max() > 0.1


def test_hue_is_turned_by_the_angle_meant():
    red = torch.zeros(2, 40, 40, 3, dtype=torch.uint8)
    red[..., 0] = 200
    params = replace(plain(red), hue_turns=torch.tensor([1 / 3, -1 / 3]))
    views = dali_augment(red, params, AugmentConfig(size=24))
    # with turns taken for degrees red would stay red
    assert views.mean((2, 3)).argmax(1).tolist() == [1, 2]


MEANS = {  # mean deviation in levels of 255 of one operation on 16 photos at 224 pixels
    "crop": 0.00784,
    "brightness": 0.00520,
    "contrast": 12.57,
    "saturation": 6.167,
    "hue_turns": 8.513,
    "grayscale": 0.1224,
    "sigma_px": 0.6836,
    "brightness contrast saturation hue_turns order": 15.41,
}


@pytest.mark.parametrize("fields", MEANS)
def test_deviations_on_photos_are_as_documented(photos, fields):
    index = torch.arange(0, 192, 12)
    images = PackedImages.from_images([photos.decode(int(i)) for i in index])
    config = AugmentConfig(size=224, jitter=1.0, grayscale=1.0, blur=(1.0, 1.0))
    params = sample_params(config, images.sizes, seed=1, epoch=0, index=index, view=0)
    changes = {field: getattr(params, field) for field in {"crop", *fields.split()}}
    params = replace(AugmentParams.identity(images.sizes), **changes)
    off = (dali_augment(images, params, config) - augment(images, params, config)).abs() * 255
    assert off.mean().item() == pytest.approx(MEANS[fields], rel=0.02)


def test_arguments_are_checked():
    images = noise(2, 40)
    with pytest.raises(ValueError, match="of as many images as there are: 2, got 1"):
        dali_augment(images, plain(images)[:1], WITH_BLUR)
    outside = replace(plain(images), crop=torch.tensor([[0, 0, 41, 9]] * 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="the crop of image 0 must lie inside its 40x40 pixels"):
        dali_augment(images, outside, WITH_BLUR)
    with pytest.raises(TypeError, match="images must be uint8, got torch.float32"):
        dali_augment(images.float(), plain(images), WITH_BLUR)
    study = AugmentConfig(size=24, sobel=0.5)
    sizes = torch.tensor([[40, 40]] * 2)
    params = sample_params(study, sizes, seed=0, epoch=0, index=torch.arange(2), view=0)
    with pytest.raises(ValueError, match="DALI has no study operations"):
        dali_augment(images, params, study)
