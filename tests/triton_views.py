"""The GPU kernels of the views and the reference, called alike, for the tests of the kernels."""

import numpy as np
import torch

from simclr_kernels import augment_triton, reference
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import sample_params

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of float32, and of a rounded result: half a step near 1 of the dtype and what the passes add
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1 / 1024, torch.bfloat16: 1 / 512 + 1 / 1024}
if DEVICE == "cpu":
    # Triton's interpreter cuts bfloat16 off instead of rounding it
    TOLERANCE[torch.bfloat16] = 1 / 256 + 1 / 1024


def images_of(*sizes, seed=0):
    """Packed images of noise and edges of these (height, width)."""
    generator = np.random.default_rng(seed)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return PackedImages.from_images(images).to(DEVICE)


def params_of(images, config, view=0, seed=3):
    """Drawn by the torch code, on the CPU."""
    index = torch.arange(len(images))
    return sample_params(config, images.sizes.cpu(), seed=seed, epoch=1, index=index, view=view)


def by_kernels(images, params, config, dtype=torch.float32, channels_last=False):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(params), 3, config.size, config.size)
    views = torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=memory_format)
    augment_triton.fill_views(views, images, params.to(DEVICE), config)
    return views


def by_reference(images, params, config):
    """float64, image by image."""
    views = [
        reference.augment(images[i][None].cpu(), params[i], config, torch.float64)
        for i in range(len(images))
    ]
    return torch.cat(views)


def assert_close_to_the_reference(images, params, config, dtype=torch.float32, **layout):
    views = by_kernels(images, params, config, dtype, **layout)
    truth = by_reference(images, params, config)
    scale = 1.0 if config.std is None else min(config.std)
    error = (views.cpu().double() - truth).abs().amax((1, 2, 3)) * scale
    assert error.max() <= TOLERANCE[dtype], error
