"""The same parameters through the operators of each pipeline, and how far the views lie apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from simclr_kernels.augment import augment
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams

PIPELINES = ("fused", "kornia", "dali")
LEVELS = 255  # of 8 bits between black and white


class Difference(NamedTuple):
    """Absolute differences over all pixels and channels, in levels: 255 from black to white."""

    mean: float
    p99: float
    maximum: float


def view_by(
    pipeline: str, images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> Tensor:
    """One view of each image by one pipeline's own operators: (B, 3, size, size) float32.

    Args:
        pipeline: one of PIPELINES.
        images: as in augment.
        params: of the B images.
        config: as in augment.

    Raises:
        ValueError: there is no such pipeline, or it cannot do what the parameters ask.
        ImportError: its library is missing; the message names the extra to install.
    """
    if pipeline == "fused":
        return augment(images, params, config)
    if pipeline == "kornia":
        from simclr_kernels.pipelines.kornia_views import kornia_augment

        return kornia_augment(images, params, config)
    if pipeline == "dali":
        from simclr_kernels.pipelines.dali_views import dali_augment

        return dali_augment(images, params, config)
    raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, got {pipeline!r}")


def exact_view(
    images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> Tensor:
    """What reference.py defines, in float64: (B, 3, size, size)."""
    return augment(images, params, config, torch.float64)


def levels_apart(views: Tensor, exact: Tensor) -> Tensor:
    """|views - exact| in levels, in the shape of both, float32."""
    return (views.double() - exact).abs().mul_(LEVELS).float()


def difference(levels: Tensor) -> Difference:
    """Mean, 99th percentile (the smallest level that 99 % do not exceed) and maximum."""
    levels = levels.flatten()
    p99 = levels.kthvalue(math.ceil(0.99 * len(levels))).values
    return Difference(levels.mean(dtype=torch.float64).item(), p99.item(), levels.max().item())
