"""Arrays that the original TensorFlow code produced, for the tests of every backend."""

import numpy as np
import torch

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.params import AugmentParams


def planes_of(images):
    """(..., H, W, 3) array as a (..., 3, H, W) tensor."""
    return torch.from_numpy(np.moveaxis(np.asarray(images), -1, -3).copy())


def largest_difference(planes, images):
    return (planes.double() - planes_of(images).double()).abs().max().item()


def params_of(B, **values):
    """Neutral AugmentParams of B images of one pixel, with some values replaced."""
    neutral = AugmentParams.identity(torch.ones(B, 2, dtype=torch.int64))
    return AugmentParams(**{**vars(neutral), **values})


def whole_view(arrays, group, size, k):
    """(images, params, config, expected) of view k of a group of full_view.npz."""
    expected = arrays[f"{group}_out"] if f"{group}_out" in arrays else arrays[f"{group}_out_q16"]
    mode = {2: "multiply", 1: "add"}[int(arrays[f"{group}_brightness_impl"][k])]
    values = {
        "crop": torch.from_numpy(arrays[f"{group}_box"][k : k + 1]),
        "flip": torch.from_numpy(arrays[f"{group}_flip"][k : k + 1]),
        "grayscale": torch.from_numpy(arrays[f"{group}_gray"][k : k + 1]),
        "brightness": torch.full((1,), 1.0 if mode == "multiply" else 0.0),
    }
    if arrays[f"{group}_jitter"][k]:
        names = ("brightness", "contrast", "saturation", "hue_turns")
        factors = torch.from_numpy(arrays[f"{group}_factors"][k])
        values |= {name: factor.view(1) for name, factor in zip(names, factors, strict=True)}
        order = arrays[f"{group}_order"][k : k + 1].astype(np.int8)
        values["order"] = torch.from_numpy(order)
    if arrays[f"{group}_blur"][k]:
        values["sigma_px"] = torch.from_numpy(arrays[f"{group}_sigma"][k : k + 1])
    images = torch.from_numpy(arrays[f"src_{arrays[f'{group}_src'][k]:02}"])[None]
    config = AugmentConfig(size=size, brightness_mode=mode)
    return images, params_of(1, **values), config, expected[k]
