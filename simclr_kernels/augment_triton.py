"""Views on a GPU: which kernels run, in which order. The formulas are in reference.py.

    params -> crop, resize, flip, colours before contrast -> contrast and what follows -> blur

At most four launches for both views of a batch, and fewer where a pass has nothing to do: no blur
in a recipe without one, and views of at most WHOLE_SIZE pixels are finished by the first pass.
Beside the output they allocate as many bytes again, which pixels wait in between the passes, and a
few bytes a tile. Nothing waits for the device, and everything can be captured into a graph.
Places within an image are numbers of 32 bits: it must have less than 2^31 bytes, and sides of less
than 2^21 pixels (2^30 / size for views above 512). PackedImages are not asked, which would wait.
The torchvision sampler takes logarithms: it draws its crops on the CPU, which does wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from simclr_kernels.augment_blur_triton import _blur_kernel
from simclr_kernels.augment_color_triton import _color_kernel
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.augment_crop_triton import _crop_kernel
from simclr_kernels.augment_sample_triton import launch_sample
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import (
    AugmentParams,
    kernel_arrays,
    kernel_draws,
    sample_params_in_torch,
)
from simclr_kernels.reference import POSITION_BITS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tiles(NamedTuple):
    """Of a view with up to `size` pixels a side; chosen by machine code, not yet timed."""

    size: int
    WHOLE: bool  # the crop pass owns a whole view
    STRIP: int  # rows of a program of the crop pass
    ROWS: int  # of them at a time
    COLUMNS: int
    crop_warps: int
    color_rows: int
    color_block: int  # pixels at a time
    color_warps: int
    blur_block: int  # pixels at a time, along x and along y
    blur_warps: int


TILES = [
    Tiles(16, True, 16, 16, 16, 2, 16, 256, 2, 256, 2),
    Tiles(32, True, 32, 32, 32, 8, 32, 512, 4, 1024, 4),
    Tiles(1 << 30, False, 64, 16, 32, 4, 32, 512, 4, 1024, 4),
]


def tiles_for(size: int) -> Tiles:
    return next(tiles for tiles in TILES if size <= tiles.size)


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sample_params(
    config: AugmentConfig, sizes: Tensor, seed: int, epoch: int | Tensor, index: Tensor, view: int
) -> AugmentParams:
    """One launch, where kernel_draws(config). See params.sample_params, which checks."""
    with _on(index.device):
        return launch_sample(config, sizes, seed, epoch, index, view, 1)


def fill_two_views(
    views: Tensor,
    images: Tensor | PackedImages,
    config: AugmentConfig,
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
) -> None:
    """Writes both views of each image into views (2B, 3, size, size). See augment.two_views."""
    if len(index) == 0:
        return
    packed = isinstance(images, PackedImages)
    with _on(index.device):
        if kernel_draws(config):
            sizes = images.sizes if packed else images.shape[1:3]
            params = launch_sample(config, sizes, seed, epoch, index, 0, 2)
        else:
            sizes = images.sizes if packed else torch.tensor([images.shape[1:3]] * len(index))
            params = AugmentParams.concatenate(
                [
                    sample_params_in_torch(
                        config, sizes.to(index.device, torch.int64), seed, epoch, index, view
                    )
                    for view in range(2)
                ]
            )
        _launch(views, images, params, config, any(config.blur))


def fill_views(
    views: Tensor, images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> None:
    """Writes views (V, 3, size, size), in its dtype and memory format. See augment.augment.

    params are of V views: of the B images, or of all of them several times over. A view's order
    must be a permutation of the four operations.
    """
    with _on(views.device):
        _launch(views, images, params, config, True)


def _refuse_large(height: int, width: int, size: int) -> None:
    """Refuses images within which the crop pass cannot count. See the module."""
    scale = max(2 * size, 1 << POSITION_BITS)
    if max(3 * height * width, scale * max(height, width)) >= 1 << 31:
        raise ValueError(
            "on a GPU an image must have less than 2^31 bytes and sides of less than "
            f"{(1 << 31) // scale} pixels, got {height}x{width}"
        )


def _launch(
    views: Tensor,
    images: Tensor | PackedImages,
    params: AugmentParams,
    config: AugmentConfig,
    blurs: bool,
) -> None:
    """The passes; without the last one where no view is known to have a blur."""
    count = len(params)
    if count == 0:
        return
    size, tiles = config.size, tiles_for(config.size)
    radius = size // 10 // 2 if blurs else 0
    channels_last = not views.is_contiguous()
    stage_dtype = torch.float32 if views.dtype == torch.float32 else torch.int16
    across, down = triton.cdiv(size, tiles.COLUMNS), triton.cdiv(size, tiles.STRIP)
    stage = torch.empty(count, 3, size, size, dtype=stage_dtype, device=views.device)
    partial = torch.empty(count, 3, across * down, dtype=torch.float32, device=views.device)
    if isinstance(images, PackedImages):
        source = (images.buffer, images.offsets.contiguous(), images.sizes.contiguous(), 0, 0)
    else:
        _refuse_large(*images.shape[1:3], size)
        source = (images.contiguous(), None, None, *images.shape[1:3])
    crop, flip, *adjustments, order, gray, sigma, solarize = kernel_arrays(params)
    colors = (order.view(torch.int32), *adjustments, gray.view(torch.uint8))
    mean, std = config.mean or (0.0, 0.0, 0.0), config.std or (1.0, 1.0, 1.0)
    scale = [1 / s for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    add = config.brightness_mode == "add"
    _crop_kernel[(count * across * down,)](
        *source,
        len(images),
        crop,
        flip.view(torch.uint8),
        *colors,
        sigma,
        solarize,
        stage,
        views,
        partial,
        *scale,
        *shift,
        SIZE=size,
        CHANNELS_LAST=channels_last,
        ADD=add,
        RADIUS=radius,
        WHOLE=tiles.WHOLE,
        STRIP=tiles.STRIP,
        ROWS=tiles.ROWS,
        COLUMNS=tiles.COLUMNS,
        num_warps=tiles.crop_warps,
        enable_fp_fusion=True,
    )
    if radius or not tiles.WHOLE:
        _color_kernel[(count * triton.cdiv(size, tiles.color_rows),)](
            stage,
            views.view(stage_dtype),
            views,
            partial,
            *colors,
            sigma,
            solarize,
            *scale,
            *shift,
            SIZE=size,
            CHANNELS_LAST=channels_last,
            ADD=add,
            RADIUS=radius,
            FINISHED=tiles.WHOLE,
            TILES=across * down,
            TILES_PADDED=triton.next_power_of_2(across * down),
            ROWS=tiles.color_rows,
            BLOCK=tiles.color_block,
            BLUR_BLOCK=tiles.blur_block,
            num_warps=tiles.color_warps,
            enable_fp_fusion=True,
        )
    if radius:
        _blur_kernel[(count * triton.cdiv(size * size, tiles.blur_block),)](
            stage,
            views,
            sigma,
            solarize,
            *scale,
            *shift,
            SIZE=size,
            CHANNELS_LAST=channels_last,
            RADIUS=radius,
            BLOCK=tiles.blur_block,
            num_warps=tiles.blur_warps,
            enable_fp_fusion=True,
        )
