"""Augmented views of uint8 images: checks and dispatch; every formula is in reference.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simclr_kernels import augment_cpu, reference
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages, refuse_where
from simclr_kernels.params import (
    AugmentParams,
    check_counters,
    kernel_draws,
    sample_params,
    triton_views,
)

# pixels, of sources or of views, in one piece of a batch: the fastest of 2^15 .. 2^18 on a CPU;
# elsewhere about 1 GiB of temporaries, since a piece costs hundreds of launches and some waits
PIECE_PIXELS = 1 << 17
GPU_PIECE_PIXELS = 1 << 23

VIEW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def augment(
    images: Tensor | PackedImages,
    params: AugmentParams,
    config: AugmentConfig,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """One view of each image, exactly as params say: same images, same params, same view.

    crop, resize, flip -> colour jitter -> grayscale -> blur -> solarize -> mean/std; every formula
    is in reference.py (google-research/simclr, tf2/data_util.py). Where the operations of
    params.study come in is said at reference.augment.

    Args:
        images: (B, H, W, 3) uint8, or PackedImages, on any device.
        params: of the B images, on the same device.
        config: of which size, brightness_mode, mean and std are read.
        dtype: of the result. float16 and bfloat16 are computed in float32 and rounded once.
        memory_format: torch.contiguous_format or torch.channels_last.

    Returns:
        (B, 3, size, size), in units of 1.0 = white, in [0, 1] unless the config normalises.

    Raises:
        ValueError: shapes or devices disagree, or (checked on the CPU only: on a GPU it would wait
            for the device) a crop is empty or reaches outside its image.
        TypeError: images are not uint8, or dtype is not a floating dtype listed above.
    """
    check_images(images)
    views = _empty_views(len(images), config, dtype, images.device, memory_format)
    check_params(params, images)
    if params.crop.device.type == "cpu":
        check_crops(params.crop, image_sizes(images))

    _fill(views, images, params, config)
    return views


def two_views(
    images: Tensor | PackedImages,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Two random views of each image, view-major: rows i and i + B are one image.

    See augment and, for seed, epoch and index, sample_params.

    Returns:
        (2B, 3, size, size) in dtype.
    """
    check_images(images)
    if index.device != images.device:
        raise ValueError(
            f"images and index must be on one device, got {images.device} and {index.device}"
        )
    B = len(images)
    check_counters(seed, epoch, index)
    if len(index) != B:
        raise ValueError(f"index must be of as many images as there are: {B}, got {len(index)}")
    views = _empty_views(2 * B, config, dtype, images.device, memory_format)
    if _in_triton(views) and not config.has_study_operations:
        triton_views().fill_two_views(views, images, config, seed, epoch, index)
        return views
    if _in_cpp(views) and kernel_draws(config):
        augment_cpu.fill_two_views(views, images, config, seed, int(epoch), index)
        return views
    sizes = image_sizes(images)
    for view, out in enumerate(views.split(B) if B else ()):
        params = sample_params(config, sizes, seed=seed, epoch=epoch, index=index, view=view)
        _fill(out, images, params, config)
    return views


def _empty_views(
    count: int,
    config: AugmentConfig,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format,
) -> Tensor:
    """(count, 3, size, size), not yet filled."""
    if dtype not in VIEW_DTYPES:
        raise TypeError(f"dtype must be one of {VIEW_DTYPES}, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    shape = (count, 3, config.size, config.size)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _in_cpp(views: Tensor) -> bool:
    return views.is_cpu and views.dtype in augment_cpu.DTYPES


def _in_triton(views: Tensor) -> bool:
    return views.is_cuda and views.dtype != torch.float64


def _fill(
    views: Tensor, images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> None:
    """Writes one view of each image into views (B, 3, size, size)."""
    if _in_cpp(views) and params.study is None:
        augment_cpu.fill_views(views, images, params, config)
    elif _in_triton(views) and params.study is None:
        triton_views().fill_views(views, images, params, config)
    else:
        _fill_by_reference(views, images, params, config)


def _fill_by_reference(
    views: Tensor, images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> None:
    """The same in torch, in pieces of bounded memory."""
    compute = torch.promote_types(views.dtype, torch.float32)
    packed = isinstance(images, PackedImages)
    if len(views) == 0:
        return
    height, width = params.crop[:, 2:].amax(0).tolist() if packed else images.shape[1:3]
    most = PIECE_PIXELS if views.device.type == "cpu" else GPU_PIECE_PIXELS
    step = max(1, most // max(height * width, config.size**2))
    for first in range(0, len(views), step):
        piece = slice(first, first + step)
        part = params[piece]
        if packed:
            pixels = _cut_out(images, first, part.crop)
            crop = torch.cat([torch.zeros_like(part.crop[:, :2]), part.crop[:, 2:]], 1)
            part = replace(part, crop=crop)
        else:
            pixels = images[piece]
        views[piece] = reference.augment(pixels, part, config, compute)


def _cut_out(images: PackedImages, first: int, crop: Tensor) -> Tensor:
    """(B, h, w, 3) uint8: each crop (B, 4) of the images from first on, in the top left corner."""
    height, width = crop[:, 2:].amax(0).tolist()
    pixels = images.buffer.new_zeros(len(crop), height, width, 3)
    own = slice(first, first + len(crop))
    # on a GPU each of these waits for the device: once per piece, not per image
    places = zip(
        images.offsets[own].tolist(), images.sizes[own].tolist(), crop.tolist(), strict=True
    )
    for i, (offset, size, (y, x, h, w)) in enumerate(places):
        pixels[i, :h, :w] = images.image_at(offset, *size)[y : y + h, x : x + w]
    return pixels


def check_params(params: AugmentParams, images: Tensor | PackedImages) -> None:
    """Refuses params that are not of these images. See augment."""
    if len(params) != len(images):
        raise ValueError(
            f"params must be of as many images as there are: {len(images)}, got {len(params)}"
        )
    if params.crop.device != images.device:
        raise ValueError(
            f"images and params must be on one device, got {images.device} and {params.crop.device}"
        )


def check_crops(crop: Tensor, sizes: Tensor) -> None:
    """Refuses crops (B, 4) that are empty or reach outside their images (B, 2); both on the CPU."""
    start, length = crop.long().chunk(2, 1)
    bad = (start < 0) | (length < 1) | (start > sizes.long() - length)
    refuse_where(
        bad.any(1),
        "the crop of image {i} must lie inside its {4}x{5} pixels and not be empty, "
        "got y {0}, x {1}, height {2}, width {3}",
        torch.cat([crop, sizes], 1),
    )


def check_images(images: Tensor | PackedImages, floating: bool = False) -> None:
    """Refuses what are no images, which may be floating where that is said. See augment."""
    if isinstance(images, PackedImages):
        return
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor or PackedImages, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not (floating and images.is_floating_point()):
        allowed = "uint8 or floating" if floating else "uint8"
        raise TypeError(f"images must be {allowed}, got {images.dtype}")
    if images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(
            f"images must be (B, height, width, 3) with pixels, got {tuple(images.shape)}"
        )


def image_sizes(images: Tensor | PackedImages) -> Tensor:
    """(B, 2) integer, height and width of each of checked images; nothing waits for a GPU."""
    if isinstance(images, PackedImages):
        return images.sizes
    sides = [torch.full((len(images),), side, device=images.device) for side in images.shape[1:3]]
    return torch.stack(sides, 1)
