"""Whole views of every backend, against arrays that the original TensorFlow code produced."""

import numpy as np
import pytest
import torch
from golden_arrays import largest_difference, params_of, whole_view

from simclr_kernels import _C, augment_cpu, reference
from simclr_kernels.augment_config import AugmentConfig


def in_cpp(instruction_set):
    def backend(images, params, config):
        _C.use_instruction_set(instruction_set)
        try:
            views = torch.empty(len(images), 3, config.size, config.size)
            augment_cpu.fill_views(views, images, params, config)
        finally:
            _C.use_instruction_set(_C.instruction_sets()[0])
        return views

    return backend


# name -> backend(images, params, config), each (B, 3, size, size)
BACKENDS = {
    "float32": reference.augment,
    "float64": lambda *arguments: reference.augment(*arguments, torch.float64),
    **{f"cpp-{name}": in_cpp(name) for name in _C.instruction_sets()},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize(
    "group, size, tolerance",
    [("s96", 96, 5e-6), ("s96v1", 96, 2e-5), ("s32", 32, 5e-6), ("s224", 224, 2e-5)],
)
def test_whole_views_are_those_of_the_original(golden, backend, group, size, tolerance):
    arrays = golden("full_view")
    for k in range(len(arrays[f"{group}_src"])):
        images, params, config, expected = whole_view(arrays, group, size, k)
        assert largest_difference(backend(images, params, config)[0], expected) < tolerance, k


@pytest.mark.parametrize("group, size", [("s96", 96), ("s48", 48), ("s32", 32)])
def test_crops_are_those_of_tensorflow_but_clipped(golden, backend, group, size):
    arrays = golden("crop_resize")
    expected = arrays[f"{group}_out_tf2"].clip(0, 1)
    for k, source in enumerate(arrays[f"{group}_src"]):
        params = params_of(
            1,
            crop=torch.from_numpy(arrays[f"{group}_box"][k : k + 1]),
            flip=torch.from_numpy(arrays[f"{group}_flip"][k : k + 1]),
        )
        images = torch.from_numpy(arrays[f"src_{source:02}"])[None]
        view = backend(images, params, AugmentConfig(size=size))
        assert largest_difference(view[0], expected[k]) < 2e-6, k


def test_jitter_of_whole_images_is_the_chain_of_the_original(golden, backend):
    arrays = golden("color_jitter_chain")
    modes = {2: ("multiply", 1.0), 1: ("add", 0.0)}
    # of the inputs only the first two are pixels of 8 bits
    for k in np.flatnonzero(arrays["view"] < 2):
        mode, _ = modes[int(arrays["brightness_impl"][k])]
        pixels = np.rint(arrays["views"][arrays["view"][k]] * 255).astype(np.uint8)
        factors = torch.from_numpy(arrays["factors"][k])
        names = ("brightness", "contrast", "saturation", "hue_turns")
        params = params_of(
            1,
            crop=torch.tensor([[0, 0, 64, 64]], dtype=torch.int32),
            order=torch.from_numpy(arrays["order"][k : k + 1].astype(np.int8)),
            **{name: factor.view(1) for name, factor in zip(names, factors, strict=True)},
        )
        config = AugmentConfig(size=64, brightness_mode=mode)
        view = backend(torch.from_numpy(pixels)[None], params, config)
        assert largest_difference(view[0], arrays["out"][k]) < 5e-6, k


def test_blurs_of_whole_images_are_those_of_the_original(golden, backend):
    arrays = golden("blur")
    sigma = torch.from_numpy(arrays["sigma"])

    def blurred(pixels):
        size = len(pixels)
        crop = torch.tensor([[0, 0, size, size]], dtype=torch.int32).repeat(len(sigma), 1)
        images = torch.from_numpy(pixels).expand(len(sigma), -1, -1, -1)
        return backend(
            images, params_of(len(sigma), crop=crop, sigma_px=sigma), AugmentConfig(size=size)
        )

    for size in (32, 96):
        expected = arrays[f"s{size}_out"]
        assert largest_difference(blurred(arrays[f"s{size}_src"]), expected) < 1e-6
    large = blurred(arrays["s224_src"])
    for p, (y, x) in enumerate(arrays["s224_patch_yx"]):
        patch = large[:, :, y : y + 40, x : x + 40]
        assert largest_difference(patch, arrays["s224_patch"][:, p]) < 1e-6
    white = blurred(np.full((96, 96, 3), 255, np.uint8))
    assert np.abs(white[:, 0].double().numpy() - arrays["white96_out_ch0"]).max() < 1e-6
