"""Views on a CPU, by the C++ kernels in csrc/. Every formula is in reference.py.

images are (B, H, W, 3) uint8 or PackedImages, views (B, 3, S, S) or, for both views, (2B, 3, S, S),
in float32, float16 or bfloat16, contiguous or channels-last. The pixels of a row must lie side by
side; other dense images are copied first. One thread makes a whole view: the bits of an image do
not depend on the batch or on the number of threads. Memory: 13 S (S + 30) bytes a thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simclr_kernels import _C
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, kernel_arrays, kernel_ranges

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def fill_views(
    views: Tensor, images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> None:
    """Writes one view of each image, by checked params."""
    # kept alive until the call is over
    source, pixels = _images(images)
    arrays = kernel_arrays(params)
    _C.augment_views(
        source, [array.data_ptr() for array in arrays], _format(views, config), _threads()
    )
    del pixels


def fill_two_views(
    views: Tensor,
    images: Tensor | PackedImages,
    config: AugmentConfig,
    seed: int,
    epoch: int,
    index: Tensor,
) -> None:
    """Writes views 0 and 1 of each image, drawn by the sampler "tensorflow".

    index is (B,) int64; that its entries are in range is checked in C++.
    """
    source, pixels = _images(images)
    index = index.contiguous()
    _C.augment_two_views(
        source,
        kernel_ranges(config),
        seed,
        epoch,
        index.data_ptr(),
        _format(views, config),
        _threads(),
    )
    del pixels


def _threads() -> int:
    return torch.get_num_threads()


def _images(images: Tensor | PackedImages) -> tuple[tuple, object]:
    """The images as C++ takes them, and the tensors that must outlive the call."""
    if isinstance(images, PackedImages):
        offsets, sizes = images.offsets.contiguous(), images.sizes.long().contiguous()
        buffer = images.buffer
        packed = (buffer.data_ptr(), len(buffer), len(offsets))
        return (*packed, offsets.data_ptr(), sizes.data_ptr(), 0, 0, 0, 0), (offsets, sizes)
    B, H, W, _ = images.shape
    if images.stride(3) != 1 or images.stride(2) != 3:
        images = images.contiguous()
    image, row = images.stride(0), images.stride(1)
    last = (B - 1) * image + (H - 1) * row + 3 * W
    return (images.data_ptr(), last, B, 0, 0, H, W, image, row), images


def _format(views: Tensor, config: AugmentConfig) -> tuple:
    """The result as C++ takes it."""
    add = config.brightness_mode == "add"
    mean_std = () if config.mean is None else (*config.mean, *config.std)
    # a view of one pixel is in both layouts
    channels_last = not views.is_contiguous()
    return views.data_ptr(), config.size, DTYPES[views.dtype], channels_last, add, mean_std
