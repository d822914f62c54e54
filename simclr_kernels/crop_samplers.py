"""How the box of a crop is drawn: TensorFlow's sampler, torchvision's, and its fallback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.philox import below, between, uniform

TENSORFLOW_ATTEMPTS = 100
TORCHVISION_ATTEMPTS = 10
ATTEMPTS_AT_ONCE = 4  # most images need one or two


def whole_image(sizes: Tensor) -> Tensor:
    """(B, 4) int32."""
    return torch.cat([torch.zeros_like(sizes), sizes], 1).to(torch.int32)


def first_accepted(config, sampler, attempts: int, sizes: Tensor, index: Tensor, draw) -> Tensor:
    """(B, 4) int32: the first box of each image that the sampler accepts; zeros where none is."""
    crop = torch.zeros(len(index), 4, dtype=torch.int32, device=index.device)
    waiting = torch.arange(len(index), device=index.device)
    for first in range(0, attempts, ATTEMPTS_AT_ONCE):
        if not len(waiting):
            break
        numbers = torch.arange(first, min(first + ATTEMPTS_AT_ONCE, attempts), device=index.device)
        height, width = sizes[waiting, :, None].unbind(1)
        boxes, accepted = sampler(config, height, width, draw(numbers, index[waiting]))
        found, attempt = accepted.max(1)  # the first of equals
        chosen = boxes[torch.arange(len(waiting), device=index.device), attempt]
        crop[waiting[found]] = chosen[found].to(torch.int32)
        waiting = waiting[~found]
    return crop


def tensorflow_crop(
    config: AugmentConfig, H: Tensor, W: Tensor, words: Tensor
) -> tuple[Tensor, Tensor]:
    """One attempt of TensorFlow's sample_distorted_bounding_box, for each of many words.

    Args:
        config: area, aspect and min_covered are read.
        H: (B, 1) int64, height of the image.
        W: (B, 1) int64, width.
        words: (B, A, 4) random words.

    Returns:
        (B, A, 4) int64 boxes (y, x, height, width) and (B, A) bool: whether they are accepted.
    """
    float32 = torch.float32
    aspect = between(uniform(words[..., 0]), *config.aspect)
    area_low, area_high = torch.tensor(config.area, dtype=float32)
    min_area = area_low * W.to(float32) * H.to(float32)
    max_area = area_high * W.to(float32) * H.to(float32)

    def width_of(height: Tensor) -> Tensor:
        return (height.to(float32) * aspect).round().long()

    def height_of(area: Tensor) -> Tensor:
        # by float64: torch's float32 root, MKL's, is not always the nearest float32
        return (area / aspect).double().sqrt().float().round().long()

    height, most = height_of(min_area), height_of(max_area)
    # the largest height whose width still fits
    fitting = ((W.to(float32) + 0.5 - 1e-7) / aspect).long()
    fitting = fitting - (width_of(fitting) > W).long()
    most = torch.where(width_of(most) > W, fitting, most).minimum(H)
    height = height.minimum(most)
    height = height + below(words[..., 1], most - height + 1)
    # rounding may leave the range of areas by one pixel of height
    height = height + (height * width_of(height) < min_area).long()
    height = height - (height * width_of(height) > max_area).long()
    width = width_of(height)
    area = height * width
    accepted = (area >= min_area) & (area <= max_area)
    accepted &= (width <= W) & (height <= H) & (width > 0) & (height > 0)
    accepted &= area.to(float32) / (H * W).to(float32) >= config.min_covered
    # an offset of H - height, the last one possible, is never drawn
    y = below(words[..., 2], (H - height).clamp_min(0))
    x = below(words[..., 3], (W - width).clamp_min(0))
    return torch.stack([y, x, height, width], -1), accepted


def torchvision_crop(
    config: AugmentConfig, H: Tensor, W: Tensor, words: Tensor
) -> tuple[Tensor, Tensor]:
    """One attempt of torchvision's RandomResizedCrop, in float64. See tensorflow_crop."""
    log_low, log_high = (math.log(ratio) for ratio in config.aspect)
    aspect = (uniform(words[..., 0]).double() * (log_high - log_low) + log_low).exp()
    low, high = config.area
    area = (uniform(words[..., 1]).double() * (high - low) + low) * (H * W)
    height = (area / aspect).sqrt().round().long()
    width = (area * aspect).sqrt().round().long()
    accepted = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    y = below(words[..., 2], (H - height).clamp_min(0) + 1)
    x = below(words[..., 3], (W - width).clamp_min(0) + 1)
    return torch.stack([y, x, height, width], -1), accepted


def centre_crop(config: AugmentConfig, sizes: Tensor) -> Tensor:
    """(B, 4) int32: torchvision's fallback, the largest centred box of an allowed aspect ratio."""
    H, W = sizes.unbind(1)
    low, high = config.aspect
    height = torch.where(W / H < low, (W.double() / low).round().long(), H)
    width = torch.where(W / H > high, (H.double() * high).round().long(), W)
    height, width = height.clamp_min(1), width.clamp_min(1)
    box = [(H - height) // 2, (W - width) // 2, height, width]
    return torch.stack(box, 1).to(torch.int32)
