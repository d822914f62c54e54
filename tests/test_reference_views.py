"""The views of the reference, against arrays that the original TensorFlow code produced."""

from itertools import permutations

import numpy as np
import pytest
import torch
from golden_arrays import largest_difference, params_of, planes_of

from simclr_kernels import reference
from simclr_kernels.augment_config import AugmentConfig


@pytest.mark.parametrize("group", ["s96", "s48", "s32", "r40x56"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crop_resize_and_flip_are_those_of_tensorflow(golden, group, dtype):
    arrays = golden("crop_resize")
    expected = arrays[f"{group}_out_tf2"]
    for k, source in enumerate(arrays[f"{group}_src"]):
        planes = reference.crop_resize(
            torch.from_numpy(arrays[f"src_{source:02}"])[None],
            torch.from_numpy(arrays[f"{group}_box"][k : k + 1]),
            expected.shape[1:3],
            torch.from_numpy(arrays[f"{group}_flip"][k : k + 1]),
            dtype,
        )
        assert planes.dtype == dtype
        assert largest_difference(planes[0], expected[k]) < 2e-6


def test_a_batch_of_crops_equals_single_crops():
    images = torch.randint(0, 256, (5, 20, 30, 3), dtype=torch.uint8)
    crop = torch.tensor([[0, 0, 20, 30], [19, 29, 1, 1], [3, 4, 2, 3], [0, 7, 20, 9], [5, 0, 7, 8]])
    flip = torch.tensor([False, True, True, False, True])
    batch = reference.crop_resize(images, crop, (9, 16), flip)
    for i in range(5):
        one = slice(i, i + 1)
        single = reference.crop_resize(images[one], crop[one], (9, 16), flip[one])
        assert torch.equal(batch[one], single)


def test_resize_taps_stay_inside_the_crop_and_sum_to_one():
    length = torch.arange(1, 40)
    index, weight = reference.resize_taps(torch.full_like(length, 7), length, 24, torch.float64)
    assert (index >= 7).all() and (index < 7 + length[:, None, None]).all()
    assert torch.allclose(weight.sum(2), torch.ones(()).double(), atol=1e-15)


@pytest.mark.parametrize("out, longest", [(24, 2048), (32, 2048), (96, 2048), (224, 897)])
def test_positions_fall_in_the_bins_of_tensorflows_float32_arithmetic(out, longest):
    length = torch.arange(4, longest + 1)
    index, weight = reference.resize_taps(torch.zeros_like(length), length, out, torch.float64)
    scale = length.numpy().astype(np.float32)[:, None] / np.float32(out)
    half = np.float32(0.5)
    position = (np.arange(out, dtype=np.float32) + half) * scale - half
    first = np.floor(position)
    fraction = np.rint((position - first) * 1024).astype(np.float64) / 1024
    interior = (first >= 1) & (first + 3 < length.numpy()[:, None])
    a = reference.KEYS_A
    assert (index[..., 1].numpy() == first + (fraction == 1))[interior].all()
    expected = ((a + 2) * (fraction % 1) - (a + 3)) * (fraction % 1) ** 2 + 1
    assert np.abs(weight[..., 1].numpy() - expected)[interior].max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prefix", ["", "syn_"], ids=["photos", "synthetic"])
def test_single_color_operations_are_those_of_tensorflow(golden, prefix, dtype):
    arrays = golden("color_ops")
    operations = {
        "brightness_mul": reference.brightness,
        "brightness_add": lambda x, f: reference.brightness(x, f, "add"),
        "contrast": reference.contrast,
        "saturation": reference.saturation,
        "hue": reference.hue,
        "grayscale": lambda x, f: reference.grayscale(x),
    }
    for k, op in enumerate(arrays[f"{prefix}op"]):
        name = str(arrays["op_names"][op])
        source = arrays["synthetic"] if prefix else arrays["views"][arrays["view"][k]]
        factor = torch.from_numpy(arrays[f"{prefix}factor"][k : k + 1])
        planes = operations[name](planes_of(source)[None].to(dtype), factor)[0]
        expected = arrays[f"{prefix}out"][k].swapaxes(0, 1)  # [2, H, W, 3]
        tolerance = 2e-6 * max(1.0, abs(factor.item()))
        assert largest_difference(planes, expected[0]) < tolerance, (k, name)
        assert largest_difference(planes.clamp(0, 1), expected[1]) < tolerance, (k, name)


def test_saturation_does_not_share_the_originals_grey_defect(golden):
    arrays = golden("color_ops")
    pixels = planes_of(arrays["edge_in"])[None]
    unchanged = reference.saturation(pixels, torch.ones(1))
    assert (unchanged - pixels).abs().max() < 1e-6
    assert largest_difference(unchanged[0], arrays["edge_sat_out"]) > 0.1


def test_color_jitter_is_the_chain_of_the_original(golden):
    arrays = golden("color_jitter_chain")
    for impl, mode in ((2, "multiply"), (1, "add")):
        cases = np.flatnonzero(arrays["brightness_impl"] == impl)
        factors = torch.from_numpy(arrays["factors"][cases])
        params = params_of(
            len(cases),
            order=torch.from_numpy(arrays["order"][cases]).to(torch.int8),
            brightness=factors[:, 0],
            contrast=factors[:, 1],
            saturation=factors[:, 2],
            hue_turns=factors[:, 3],
        )
        planes = planes_of(arrays["views"][arrays["view"][cases]])
        for dtype in (torch.float32, torch.float64):
            jittered = reference.color_jitter(planes.to(dtype), params, mode)
            assert largest_difference(jittered, arrays["out"][cases]) < 5e-6


def test_every_order_is_the_composition_of_single_operations():
    orders = list(permutations(range(4)))
    planes = torch.rand(24, 3, 8, 8) * 1.2 - 0.1
    params = params_of(
        24,
        order=torch.tensor(orders, dtype=torch.int8),
        brightness=torch.linspace(0.3, 1.7, 24),
        contrast=torch.linspace(1.8, 0.2, 24),
        saturation=torch.linspace(0.2, 1.8, 24),
        hue_turns=torch.linspace(-0.2, 0.2, 24),
    )
    jittered = reference.color_jitter(planes, params)
    values = (params.brightness, params.contrast, params.saturation, params.hue_turns)
    operations = (
        reference.brightness,
        reference.contrast,
        reference.saturation,
        reference.hue,
    )
    for i, order in enumerate(orders):
        one = planes[i : i + 1]
        for code in order:
            one = operations[code](one, values[code][i : i + 1]).clamp(0, 1)
        assert torch.equal(jittered[i : i + 1], one), order


def test_a_neutral_operation_is_skipped_with_its_clip():
    planes = torch.rand(2, 3, 4, 4) * 3 - 1
    assert torch.equal(reference.color_jitter(planes, params_of(2)), planes)
    added = params_of(2, brightness=torch.tensor([0.0, 1.0]))
    assert torch.equal(reference.color_jitter(planes, added, "add")[0], planes[0])
    assert reference.color_jitter(planes, added, "add")[1].max() == 1


def test_color_jitter_leaves_its_input_alone():
    planes = torch.rand(1, 3, 4, 4)
    before = planes.clone()
    reference.color_jitter(planes, params_of(1, contrast=torch.tensor([0.5])))
    assert torch.equal(planes, before)


@pytest.mark.parametrize(
    "operation",
    [reference.brightness, reference.contrast, reference.saturation, reference.hue],
    ids=lambda operation: operation.__name__,
)
def test_color_operations_are_differentiable_in_the_image(operation):
    generator = torch.Generator().manual_seed(0)
    planes = torch.rand(2, 3, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    factor = torch.tensor([0.7, 0.15])
    assert torch.autograd.gradcheck(lambda x: operation(x, factor), planes)


def test_color_jitter_is_differentiable_and_finite_on_grey_and_black_pixels():
    planes = torch.zeros(1, 3, 2, 2)
    planes[..., 1] = 0.5
    planes.requires_grad_()
    params = params_of(
        1,
        brightness=torch.tensor([0.9]),
        contrast=torch.tensor([0.8]),
        saturation=torch.tensor([1.3]),
        hue_turns=torch.tensor([0.1]),
    )
    reference.color_jitter(planes, params).sum().backward()
    assert planes.grad.isfinite().all() and planes.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blur_is_that_of_the_original(golden, dtype):
    arrays = golden("blur")
    sigma = torch.from_numpy(arrays["sigma"])

    def blurred(source):
        planes = (planes_of(source).to(dtype) * (1 / 255)).expand(len(sigma), -1, -1, -1)
        return reference.gaussian_blur(planes, sigma)

    for size in (32, 96):
        expected = arrays[f"s{size}_out"]
        assert largest_difference(blurred(arrays[f"s{size}_src"]), expected) < 1e-6
    large = blurred(arrays["s224_src"])
    for p, (y, x) in enumerate(arrays["s224_patch_yx"]):
        patch = large[:, :, y : y + 40, x : x + 40]
        assert largest_difference(patch, arrays["s224_patch"][:, p]) < 1e-6


def test_blur_darkens_the_frame_of_a_white_image_as_the_original(golden):
    arrays = golden("blur")
    white = torch.ones(len(arrays["sigma"]), 3, 96, 96)
    dark = reference.gaussian_blur(white, torch.from_numpy(arrays["sigma"]))
    difference = dark[:, 0].double() - torch.from_numpy(arrays["white96_out_ch0"]).double()
    assert difference.abs().max() < 1e-6


def test_blur_touches_only_images_with_a_sigma(golden):
    arrays = golden("blur")
    planes = planes_of(arrays["batch32_in"])
    sigma = torch.from_numpy(arrays["batch32_applied"]) * float(arrays["batch32_sigma"])
    planes = reference.gaussian_blur(planes, sigma).clamp(0, 1)
    assert largest_difference(planes, arrays["batch32_out"]) < 1e-6


def test_blur_of_views_under_twenty_pixels_is_the_identity():
    planes = torch.rand(2, 3, 19, 19)
    assert torch.equal(reference.gaussian_blur(planes, torch.tensor([1.0, 2.0])), planes)


def test_a_vanishing_sigma_is_the_identity():
    planes = torch.rand(2, 3, 32, 32)
    assert torch.equal(reference.gaussian_blur(planes, torch.tensor([1e-30, 0.05])), planes)


def test_a_whole_turn_of_hue_and_a_factor_of_one_change_nothing():
    planes = torch.rand(3, 3, 16, 16)
    for turns in (1.0, 0.0, -1.0):
        turned = reference.hue(planes, torch.full((3,), turns))
        assert (turned - planes).abs().max() < 2e-6
    assert torch.allclose(reference.saturation(planes, torch.ones(3)), planes, atol=1e-7)
    assert torch.allclose(reference.contrast(planes, torch.ones(3)), planes, atol=1e-7)


def test_solarize_inverts_from_the_threshold_on():
    planes = torch.tensor([0.2, 0.5, 1.0]).expand(2, 3, 1, 3)
    inverted = reference.solarize(planes, torch.tensor([0.5, 1.0]))
    assert torch.equal(inverted[0, 0, 0], torch.tensor([0.2, 0.5, 0.0]))
    assert torch.equal(inverted[1], planes[1])


def test_a_normalised_view_is_shifted_and_scaled_last():
    images = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8)
    params = params_of(1, crop=torch.tensor([[0, 0, 24, 24]]), solarize=torch.tensor([0.5]))
    plain = reference.augment(images, params, AugmentConfig(size=24))
    config = AugmentConfig(size=24, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    shifted = reference.augment(images, params, config)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        assert torch.allclose(shifted[:, channel], (plain[:, channel] - mean) / std, atol=1e-6)


def test_eval_crops_are_those_of_the_original(golden):
    for height, width, out_height, out_width, *box in golden("eval_preprocess")["rects"].tolist():
        assert list(reference.eval_crop(height, width, out_height, out_width)) == box


def test_eval_views_are_those_of_the_original(golden):
    arrays = golden("eval_preprocess")
    for size, name, tolerance in ((96, "s96_out_tf2", 2e-6), (224, "s224_out_tf2_q16", 1.5e-5)):
        for k, source in enumerate(arrays[f"s{size}_src"]):
            images = torch.from_numpy(arrays[f"src_{source:02}"])[None]
            view = reference.eval_view(images, size)[0]
            assert largest_difference(view, arrays[name][k]) < tolerance


def test_eval_views_up_to_32_pixels_are_neither_cropped_nor_resized(golden):
    arrays = golden("eval_preprocess")
    images = torch.from_numpy(arrays["s32_src"])
    assert largest_difference(reference.eval_view(images, 32), arrays["s32_out_nocrop"]) == 0
    box = torch.tensor([reference.eval_crop(32, 32, 32, 32)]).expand(2, 4)
    cropped = reference.crop_resize(images[:2], box, 32).clamp(0, 1)
    assert largest_difference(cropped, arrays["s32_out_crop"]) < 2e-6
    whole = torch.tensor([[0, 0, 32, 32]]).expand(len(images), 4)
    smaller = reference.crop_resize(images, whole, 24).clamp(0, 1)
    assert torch.equal(reference.eval_view(images, 24), smaller)
