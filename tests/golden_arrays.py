"""Arrays that the original TensorFlow code produced, for the tests of every backend."""

import numpy as np
import torch

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
