"""Parameters of views: random numbers, distributions, independence, bookkeeping."""

import dataclasses
from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import shared_path

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.params import AugmentParams, philox, sample_params


def draw(config, B=1000, size=(40, 60), *, seed=0, epoch=0, view=0, first=0):
    sizes = torch.tensor([size]).expand(B, 2)
    index = torch.arange(first, first + B)
    return sample_params(config, sizes, seed=seed, epoch=epoch, index=index, view=view)


def assert_equal(a, b):
    assert type(a) is type(b)
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "study" and x is not None:
            assert_equal(x, y)
        elif field.name == "study":
            assert y is None
        else:
            assert x.dtype == y.dtype and torch.equal(x, y), field.name


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = ([int(w, 16) for w in text.split()] for text in (counter, key, words))
    assert philox(tuple(key), torch.tensor([counter])).tolist() == [words]


def kolmogorov_smirnov(a, b):
    """The two-sample statistic over its critical value at the 0.1 % level."""
    grid = np.concatenate([a, b])
    difference = np.searchsorted(np.sort(a), grid, "right") / len(a)
    difference -= np.searchsorted(np.sort(b), grid, "right") / len(b)
    critical = 1.949 * np.sqrt((len(a) + len(b)) / (len(a) * len(b)))
    return np.abs(difference).max() / critical


@pytest.mark.parametrize(
    "size, name",
    [
        ((375, 500), "375x500"),
        ((500, 375), "500x375"),
        ((32, 32), "32x32"),
        ((1200, 400), "1200x400"),
        ((400, 1200), "400x1200"),
        ((96, 97), "96x97"),
        ((2, 5), "2x5"),
        ((3, 3), "3x3"),
        ((7, 5), "7x5"),
        ((300, 400), "aspect1p4_300x400"),
    ],
)
def test_crops_are_distributed_as_tensorflows(size, name):
    with np.load(shared_path("golden/crop_sampler.npz")) as arrays:
        original = arrays[f"box_{name}"].astype(np.int64)
    # the original multiplies the range of aspects by that of the output
    stretch = 1.4 if "aspect" in name else 1.0
    config = AugmentConfig(aspect=(3 / 4 * stretch, 4 / 3 * stretch))
    ours = draw(config, 20000, size).crop.numpy().astype(np.int64)

    def statistics(box):
        y, x, h, w = box.T
        return {
            "y": y,
            "x": x,
            "height": h,
            "width": w,
            "area": h * w,
            "aspect": w / h,
            "centre": y + h / 2,
        }

    theirs = statistics(original)
    for statistic, values in statistics(ours).items():
        assert kolmogorov_smirnov(values, theirs[statistic]) < 1, statistic


@pytest.mark.parametrize("size", [(375, 500), (32, 32), (1200, 400), (7, 5), (2, 5)])
def test_crops_keep_the_hard_rules_of_the_original(size):
    H, W = size
    y, x, h, w = draw(AugmentConfig(), 20000, size).crop.long().unbind(1)
    assert (y >= 0).all() and (x >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (h * w * 10 >= H * W).all()
    assert ((y + h < H) | (h == H)).all() and ((x + w < W) | (w == W)).all()


@pytest.mark.parametrize("size", [(60, 1200), (1200, 60), (1, 1)])
def test_an_image_that_no_crop_fits_is_taken_whole(size):
    crop = draw(AugmentConfig(), 50, size).crop
    assert (crop == torch.tensor([0, 0, *size])).all()


def test_crop_false_takes_the_whole_image():
    assert (draw(AugmentConfig(crop=False), 9).crop == torch.tensor([0, 0, 40, 60])).all()


def test_torchvision_crops_have_the_distribution_measured_there():
    y, x, h, w = draw(AugmentConfig.torchvision(), 20000, (375, 500)).crop.long().unbind(1)
    area = (h * w) / (375 * 500)
    assert abs(area.mean() - 0.432) < 0.006 and abs(area.median() - 0.420) < 0.01
    assert abs((area < 0.25).float().mean() - 0.250) < 0.01
    assert abs((area > 0.75).float().mean() - 0.088) < 0.006
    assert abs((w / h).mean() - 1.045) < 0.005
    # the last offset is drawn here, unlike in TensorFlow
    assert ((y + h == 375) & (h < 375)).any() and ((x + w == 500) & (w < 500)).any()


@pytest.mark.parametrize(
    "size, box", [((30, 1000), (0, 480, 30, 40)), ((1000, 30), (480, 0, 40, 30))]
)
def test_torchvision_falls_back_to_the_centre_of_an_allowed_aspect(size, box):
    config = AugmentConfig(sampler="torchvision", area=(0.9, 1.0))
    assert (draw(config, 20, size).crop == torch.tensor(box)).all()


def test_torchvision_fallback_of_one_pixel_is_not_empty():
    config = AugmentConfig(sampler="torchvision", aspect=(3.0, 4.0))
    assert (draw(config, 20, (1, 1)).crop == torch.tensor([0, 0, 1, 1])).all()


def test_probabilities_and_ranges_are_those_of_the_config():
    params = draw(AugmentConfig.byol(), 20000, view=1)

    def near(events, probability):
        return abs(events.float().mean() - probability) < 0.015

    jitter = params.contrast != 1
    assert near(params.flip, 0.5) and near(params.grayscale, 0.2) and near(jitter, 0.8)
    assert near(params.sigma_px > 0, 0.1) and near(params.solarize == 0.5, 0.2)
    assert ((params.solarize == 0.5) | (params.solarize == 1)).all()
    for value, low, high in (
        (params.brightness[jitter], -0.4, 0.4),
        (params.contrast[jitter], 0.6, 1.4),
        (params.saturation[jitter], 0.8, 1.2),
        (params.hue_turns[jitter], -0.1, 0.1),
        (params.sigma_px[params.sigma_px > 0], 0.1, 2.0),
    ):
        spread = high - low
        assert low - 1e-6 <= value.min() < low + 0.01 * spread
        assert high - 0.01 * spread < value.max() <= high + 1e-6
        assert abs(value.mean() - (low + high) / 2) < 0.02 * spread


def test_off_is_a_neutral_value():
    quiet = AugmentConfig(flip=0, jitter=0, grayscale=0, blur=(0, 0), crop=False)
    params, sizes = draw(quiet, 50), torch.tensor([[40, 60]]).expand(50, 2)
    identity = AugmentParams.identity(sizes)
    assert_equal(dataclasses.replace(params, order=identity.order), identity)
    added = draw(dataclasses.replace(quiet, brightness_mode="add"), 50)
    assert torch.equal(added.brightness, AugmentParams.identity(sizes, "add").brightness)


def test_events_of_probability_one_always_happen():
    params = draw(AugmentConfig(flip=1, jitter=1, grayscale=1, blur=(1, 0), solarize=(1, 0)), 5000)
    assert params.flip.all() and params.grayscale.all() and (params.sigma_px >= 0.1).all()
    assert (params.solarize == 0.5).all()


def test_all_24_orders_are_equally_likely_and_independent_of_jitter():
    for jitter in (0.0, 1.0):
        orders = draw(AugmentConfig(jitter=jitter), 24000).order
        codes, counts = np.unique(orders.numpy(), axis=0, return_counts=True)
        assert [tuple(code) for code in codes.tolist()] == list(permutations(range(4)))
        assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # chi square, 23 degrees, 0.1 %


@pytest.mark.parametrize("sampler", ["tensorflow", "torchvision"])
def test_an_image_gets_the_same_values_in_every_batch(sampler):
    config = AugmentConfig(sampler=sampler)
    sizes = torch.randint(1, 300, (64, 2))
    index = torch.randperm(1 << 20)[:64] + (1 << 31)
    counter = dict(seed=(1 << 63) + 5, epoch=3, view=1)
    whole = sample_params(config, sizes, index=index, **counter)
    order = torch.randperm(64)
    shuffled = sample_params(config, sizes[order], index=index[order], **counter)
    assert_equal(shuffled, whole[order])
    alone = [
        sample_params(config, sizes[i : i + 1], index=index[i : i + 1], **counter)
        for i in range(64)
    ]
    assert_equal(AugmentParams.concatenate(alone), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["tensorflow", "torchvision"])
def test_an_image_gets_the_same_values_on_a_gpu(sampler):
    sizes, index = torch.randint(1, 600, (500, 2)), torch.arange(500)
    args = dict(seed=7, epoch=1, view=0)
    config = AugmentConfig(sampler=sampler)
    on_gpu = sample_params(config, sizes.cuda(), index=index.cuda(), **args)
    assert on_gpu.crop.is_cuda
    assert_equal(on_gpu.to("cpu"), sample_params(config, sizes, index=index, **args))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seed": 1 << 32}, {"epoch": 1}, {"view": 1}, {"first": 1000}]
)
def test_seed_epoch_view_and_index_each_change_the_draw(change):
    config = AugmentConfig()
    a, b = draw(config), draw(config, **change)
    assert (a.contrast != b.contrast).float().mean() > 0.7
    assert (a.crop != b.crop).any(1).float().mean() > 0.9


def test_values_are_pinned():
    params = draw(AugmentConfig(), 2, (375, 500), seed=42, epoch=1, first=7)
    assert params.crop.tolist() == [[59, 236, 157, 197], [42, 146, 296, 348]]
    assert params.flip.tolist() == [False, True]
    assert params.brightness.tolist() == [1.0, 0.8855870962142944]
    assert params.hue_turns.tolist() == [0.0, 0.15314994752407074]
    assert params.order.tolist() == [[1, 3, 2, 0]] * 2
    assert params.sigma_px.tolist() == [1.5833505392074585, 0.7903017997741699]


def test_words_are_used_as_the_table_of_the_module_says():
    config = AugmentConfig(jitter=1, blur=(1, 1), solarize=(0.5, 0.5), crop=False)
    params = draw(config, 1, seed=(5 << 32) + 9, epoch=4, view=3, first=6)
    counters = torch.tensor([[4, 6, 3, (1 << 16) + block] for block in range(3)])
    words = philox((9, 5), counters).tolist()
    u = [[np.float32(word >> 8) * np.float32(2**-24) for word in block] for block in words]

    def between(u, low, high):
        low, high = np.float32(low), np.float32(high)
        return u * (high - low) + low

    assert params.flip.item() == (u[0][0] < 0.5)
    assert params.order[0].tolist() == list(list(permutations(range(4)))[words[0][2] * 24 >> 32])
    assert params.grayscale.item() == (u[0][3] < np.float32(0.2))
    assert params.brightness.item() == between(u[1][0], 1 - 0.8, 1.8)
    assert params.contrast.item() == between(u[1][1], 1 - 0.8, 1.8)
    assert params.saturation.item() == between(u[1][2], 1 - 0.8, 1.8)
    assert params.hue_turns.item() == between(u[1][3], -0.2, 0.2)
    assert params.sigma_px.item() == between(u[2][1], 0.1, 2.0)
    assert params.solarize.item() == (0.5 if u[2][2] < 0.5 else 1.0)


def test_types_are_those_every_backend_expects():
    params = draw(AugmentConfig(), 3)
    assert params.study is None
    types = {name: value.dtype for name, value in vars(params).items() if name != "study"}
    assert types.pop("crop") == torch.int32 and types.pop("order") == torch.int8
    assert types.pop("flip") == types.pop("grayscale") == torch.bool
    assert set(types.values()) == {torch.float32}
    assert params.crop.shape == params.order.shape == (3, 4)
    assert_equal(
        AugmentParams.identity(torch.tensor([[1, 2]])).to("cpu")[0:0], draw(AugmentConfig(), 0)
    )


def test_the_default_dtype_of_torch_does_not_matter():
    expected = draw(AugmentConfig.byol(), 20)
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(draw(AugmentConfig.byol(), 20), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_params_are_cut_and_joined_like_a_sequence():
    params = draw(AugmentConfig(), 5)
    assert len(params) == 5 and len(params[3]) == 1 and len(params[1:4]) == 3
    assert_equal(AugmentParams.concatenate([params[:2], params[2:]]), params)
    assert_equal(params[-1], params[4:])
    with pytest.raises(IndexError):
        params[5]


def test_describe_names_what_happens_in_its_order():
    params = AugmentParams.identity(torch.tensor([[40, 60]]))
    assert params.describe(0) == "crop 40x60 at (0, 0)"
    busy = dataclasses.replace(
        params,
        crop=torch.tensor([[1, 2, 30, 50]]),
        flip=torch.tensor([True]),
        brightness=torch.tensor([0.75]),
        contrast=torch.tensor([1.5]),
        hue_turns=torch.tensor([0.1]),
        order=torch.tensor([[3, 2, 1, 0]]),
        grayscale=torch.tensor([True]),
        sigma_px=torch.tensor([1.25]),
        solarize=torch.tensor([0.5]),
    )
    start, end = (
        "crop 30x50 at (1, 2), flip, hue +36 deg, contrast x1.50, ",
        ("grayscale, blur 1.25 px, solarize above 0.50"),
    )
    assert busy.describe(0) == start + "brightness x0.75, " + end
    assert busy.describe(0, "add") == start + "brightness +0.75, " + end


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ({"seed": 1 << 64}, ValueError, r"seed must be in"),
        ({"epoch": 1 << 32}, ValueError, r"epoch must be in \[0, 2\^32\), got 4294967296"),
        ({"view": -1}, ValueError, r"view must be in \[0, 2\^32\), got -1"),
        ({"index": torch.tensor([0, -1])}, ValueError, r"index must be in \[0, 2\^32\), got -1"),
        ({"index": torch.tensor([0, 1 << 32])}, ValueError, r"index must be in .* 0 .. 4294967296"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, r"index must be int64, got torch.float32"),
        ({"index": torch.arange(3)}, ValueError, r"got \(3,\) and \(2, 2\)"),
        ({"sizes": torch.ones(2, 2)}, TypeError, r"sizes must be int32 or int64"),
        ({"sizes": torch.ones(2, 3).int()}, ValueError, r"index must be \(B,\) and sizes \(B, 2\)"),
        ({"sizes": torch.tensor([[1, 1], [5, 0]])}, ValueError, r"sizes must be in \[1, 2\^31\)"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(change, error, message):
    arguments = dict(sizes=torch.full((2, 2), 9), seed=0, epoch=0, index=torch.arange(2), view=0)
    with pytest.raises(error, match=message):
        sample_params(AugmentConfig(), **(arguments | change))
