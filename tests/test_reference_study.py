"""Cutout, rotation, Sobel filter and noise of the reference, against loops over single pixels."""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from simclr_kernels import reference, reference_study
from simclr_kernels.augment import augment, two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params
from simclr_kernels.study_params import StudyParams

S = 12
# every operation happens to some image of a batch
BUSY = AugmentConfig(
    size=S,
    solarize=(0.3, 0.3),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    cutout=0.5,
    rotation=0.6,
    sobel=0.4,
    noise=0.5,
)


def planes_of(B=4, dtype=torch.float64, seed=0):
    return torch.rand(B, 3, S, S, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def images_of(B=24, height=20, width=17):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (B, height, width, 3), dtype=torch.uint8, generator=generator)


def params_of(images, config=BUSY, **counter):
    sizes = torch.tensor([images.shape[1:3]]).expand(len(images), 2)
    counter = dict(seed=3, epoch=0, index=torch.arange(len(images)), view=0) | counter
    return sample_params(config, sizes, **counter)


def only(B, **values):
    """AugmentParams of B views of S x S images to which only these study operations happen."""
    study = dataclasses.replace(StudyParams.identity(B), **values)
    identity = AugmentParams.identity(torch.full((B, 2), S))
    return dataclasses.replace(identity, study=study)


# --- single operations ----------------------------------------------------------------------------


def test_rotation_moves_every_pixel_counter_clockwise():
    planes = planes_of()
    turned = reference_study.rotate(planes, torch.tensor([0, 1, 2, 3], dtype=torch.int8)).numpy()
    source, last = planes.numpy(), S - 1
    for y in range(S):
        for x in range(S):
            assert (turned[0, :, y, x] == source[0, :, y, x]).all()
            # the right edge becomes the upper one
            assert (turned[1, :, last - x, y] == source[1, :, y, x]).all()
            assert (turned[2, :, last - y, last - x] == source[2, :, y, x]).all()
            assert (turned[3, :, x, last - y] == source[3, :, y, x]).all()


def sobel_by_loops(plane):
    """(H, W) array: the size of the gradient, pixel by pixel, not clipped."""
    kernel = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))
    H, W = plane.shape
    size = np.zeros((H, W))
    for y in range(H):
        for x in range(W):
            dx = dy = 0.0
            for i in range(3):
                for j in range(3):
                    value = plane[min(max(y + i - 1, 0), H - 1), min(max(x + j - 1, 0), W - 1)]
                    dx += kernel[i][j] * value / 4
                    dy += kernel[j][i] * value / 4
            size[y, x] = math.hypot(dx, dy)
    return size


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_sobel_is_the_size_of_the_gradient_by_channel(dtype, tolerance):
    planes = planes_of(2)
    filtered = reference_study.sobel(planes.to(dtype), torch.tensor([False, True]))
    assert filtered.dtype == dtype
    assert torch.equal(filtered[0], planes[0].to(dtype))
    for channel in range(3):
        expected = sobel_by_loops(planes[1, channel].numpy()).clip(0, 1)
        assert np.abs(filtered[1, channel].double().numpy() - expected).max() < tolerance


def test_sobel_of_a_black_and_white_edge_is_one_and_of_a_flat_image_zero():
    planes = torch.zeros(3, 3, S, S)
    planes[0, :, :, 6:] = 1
    planes[1, :, 6:] = 1
    planes[2] = 0.7
    filtered = reference_study.sobel(planes, torch.ones(3, dtype=torch.bool))
    edge = (torch.arange(S) == 5) | (torch.arange(S) == 6)
    assert torch.equal(filtered[0, 1], edge.float().expand(S, S))
    assert torch.equal(filtered[1, 1], edge.float()[:, None].expand(S, S))
    assert filtered[2].max() < 1e-6


def philox_by_integers(key, counter):
    """Philox4x32-10 of Python integers."""
    c, k, word = list(counter), list(key), 2**32
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 // word ^ c[1] ^ k[0], p1 % word, p0 // word ^ c[3] ^ k[1], p0 % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 3e-6)])
def test_noise_is_box_muller_of_philox_with_the_key_of_the_image(dtype, tolerance):
    size = 5  # 75 values: the last block is not full
    keys = [(7, 0xFFFFFFFF), (0x12345678, 9)]
    numbers = reference_study.normal_pixels(torch.tensor(keys), size, dtype)
    assert numbers.shape == (2, 3, size, size) and numbers.dtype == dtype
    for key, image in zip(keys, numbers.double().flatten(1).tolist(), strict=True):
        for v, number in enumerate(image):
            words = philox_by_integers(key, (v // 4, 0, 0, 0))
            u0, u1 = [(word >> 8) / 2**24 for word in words[v % 4 // 2 * 2 :][:2]]
            wave = (math.cos, math.sin)[v % 2](2 * math.pi * u1)
            assert abs(number - math.sqrt(-2 * math.log(1 - u0)) * wave) < tolerance


def test_noise_is_normally_distributed_and_without_correlation():
    keys = torch.tensor([[i, 1] for i in range(20)])
    numbers = reference_study.normal_pixels(keys, 64, torch.float64)
    n = numbers.numel()
    # Kolmogorov-Smirnov at the 0.1 % level
    values = numbers.flatten().sort().values.numpy()
    ideal = np.array([NormalDist().cdf(v) for v in values[:: n // 2000]])
    rank = np.arange(n)[:: n // 2000] / n
    assert np.abs(ideal - rank).max() < 1.95 / math.sqrt(n)
    bound = 4 / math.sqrt(n)
    for shift in (1, 2, 3, 4, 64, 64 * 64):
        flat = numbers.flatten(1)
        assert abs((flat[:, shift:] * flat[:, :-shift]).mean()) < bound
    assert abs((numbers[1:] * numbers[:-1]).mean()) < bound


def test_noise_is_scaled_added_and_clipped():
    planes = planes_of(3)
    sigma = torch.tensor([0.0, 0.25, 2.0])
    key = torch.tensor([[1, 2], [3, 4], [5, 6]])
    noisy = reference_study.gaussian_noise(planes, sigma, key)
    assert torch.equal(noisy[0], planes[0])
    for i in (1, 2):
        normal = reference_study.normal_pixels(key[i : i + 1], S, torch.float64)[0]
        expected = (planes[i] + sigma[i].double() * normal).clamp(0, 1)
        assert torch.allclose(noisy[i], expected, atol=1e-15)
    assert (noisy[2] == 0).any() and (noisy[2] == 1).any()


def test_cutout_zeroes_exactly_its_box():
    planes = planes_of(3) + 0.01
    box = torch.tensor([[0, 0, 0, 0], [2, 3, 4, 5], [0, 11, 12, 1]], dtype=torch.int32)
    cut = reference_study.cutout(planes, box)
    for i, (y0, x0, height, width) in enumerate(box.tolist()):
        for y in range(S):
            for x in range(S):
                masked = y0 <= y < y0 + height and x0 <= x < x0 + width
                expected = torch.zeros(3).double() if masked else planes[i, :, y, x]
                assert torch.equal(cut[i, :, y, x], expected)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: reference_study.rotate(x, torch.tensor([1, 3])),
        lambda x: reference_study.sobel(x, torch.tensor([True, True])),
        lambda x: reference_study.gaussian_noise(
            x, torch.tensor([0.01, 0.02]), torch.tensor([[1, 2], [3, 4]])
        ),
        lambda x: reference_study.cutout(x, torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2]])),
    ],
    ids=["rotate", "sobel", "gaussian_noise", "cutout"],
)
def test_study_operations_are_differentiable_in_the_image(operation):
    generator = torch.Generator().manual_seed(2)
    planes = 0.3 + 0.2 * torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(operation, planes.requires_grad_())


def test_sobel_has_a_finite_gradient_on_flat_images():
    planes = torch.full((1, 3, S, S), 0.5, requires_grad=True)
    reference_study.sobel(planes, torch.tensor([True])).sum().backward()
    assert torch.equal(planes.grad, torch.zeros_like(planes))


def test_study_operations_leave_their_input_alone():
    planes = planes_of(1)
    before = planes.clone()
    reference_study.rotate(planes, torch.tensor([1]))
    reference_study.sobel(planes, torch.tensor([True]))
    reference_study.gaussian_noise(planes, torch.tensor([1.0]), torch.tensor([[1, 2]]))
    reference_study.cutout(planes, torch.tensor([[0, 0, 5, 5]]))
    assert torch.equal(planes, before)


# --- in a view ------------------------------------------------------------------------------------


def test_rotation_comes_right_after_the_flip():
    images = images_of(1, S, S)
    params = dataclasses.replace(
        only(1, quarter_turns=torch.tensor([1])),
        flip=torch.tensor([True]),
        crop=torch.tensor([[1, 2, 6, 9]]),
        contrast=torch.tensor([1.5]),
        sigma_px=torch.tensor([1.0]),
    )
    config = AugmentConfig(size=20)
    view = reference.augment(images, params, config, torch.float64)
    planes = reference.crop_resize(images, params.crop, 20, params.flip, torch.float64)
    planes = reference.color_jitter(planes.rot90(1, (2, 3)), params).clamp(0, 1)
    expected = reference.gaussian_blur(planes, params.sigma_px).clamp(0, 1)
    assert torch.allclose(view, expected, atol=1e-14)


def test_sobel_noise_and_cutout_end_a_view_in_this_order():
    images = images_of(1, S, S)
    study = dict(
        sobel=torch.tensor([True]),
        noise_sigma=torch.tensor([0.2]),
        noise_key=torch.tensor([[8, 9]]),
        cutout=torch.tensor([[2, 2, 6, 6]]),
    )
    params = dataclasses.replace(only(1, **study), solarize=torch.tensor([0.5]))
    config = AugmentConfig(size=S, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    recipe = reference.augment(
        images,
        dataclasses.replace(params, study=None),
        dataclasses.replace(config, mean=None, std=None),
    )
    planes = reference_study.sobel(recipe, study["sobel"])
    planes = reference_study.gaussian_noise(planes, study["noise_sigma"], study["noise_key"])
    planes = reference.normalize(planes, config.mean, config.std)
    expected = reference_study.cutout(planes, study["cutout"])
    view = reference.augment(images, params, config)
    assert torch.equal(view, expected)
    # zero for the encoder, not black, also where the config normalises
    assert (view[:, :, 2:8, 2:8] == 0).all() and (view[:, :, :2] != 0).any()


def test_neutral_study_params_change_no_bit_of_a_view():
    images = images_of()
    config = dataclasses.replace(BUSY, cutout=0, rotation=0, sobel=0, noise=0)
    params = params_of(images, config)
    assert params.study is None
    neutral = dataclasses.replace(params, study=StudyParams.identity(len(images)))
    views = [reference.augment(images, p, BUSY) for p in (neutral, params)]
    assert torch.equal(*views)


def test_a_view_is_the_same_alone_in_any_batch_and_from_any_container():
    images = images_of()
    params = params_of(images)
    views = augment(images, params, BUSY)
    truth = augment(images, params, BUSY, torch.float64)
    # noise and mean/std (divided by 0.2) are the steps that enlarge rounding
    assert (views - truth).abs().max() < 1e-4
    order = torch.randperm(len(images))
    assert torch.equal(augment(images[order], params[order], BUSY), views[order])
    packed = PackedImages.from_images(list(images))
    assert torch.equal(augment(packed, params, BUSY), views)
    for i in (0, 5, 23):
        assert torch.equal(augment(images[i : i + 1], params[i], BUSY)[0], views[i])


def test_two_views_make_study_operations_and_differ():
    images = images_of()
    views = two_views(images, BUSY, seed=3, epoch=0, index=torch.arange(24))
    assert torch.equal(views[:24], augment(images, params_of(images), BUSY))
    assert torch.equal(views[24:], augment(images, params_of(images, view=1), BUSY))
