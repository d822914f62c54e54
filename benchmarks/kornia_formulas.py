"""What Kornia's own transforms make of our parameters; KorniaViews chooses among its operators.

RandomResizedCrop (cropping_mode="slice", bicubic, align_corners=True as by default), hflip,
ColorJitter, RandomGrayscale, RandomGaussianBlur and RandomSolarize call these functions in 0.9.
ColorJitter has one order of operations for a batch; here each image has its own. Brightness that
adds becomes the factor 1 + d, as in torchvision_formulas.
"""

from __future__ import annotations

import math

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    solarize,
)
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import resize
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams


def stock_augment(
    images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> Tensor:
    """One view of each image. See torchvision_augment; mean and std are not applied.

    Returns:
        (B, 3, size, size) float32 in [0, 1].
    """
    return torch.cat([_augment(images[i], params[i], config) for i in range(len(images))])


def _augment(image: Tensor, one: AugmentParams, config: AugmentConfig) -> Tensor:
    """(1, 3, size, size) of one image (H, W, 3) uint8."""
    y, x, height, width = one.crop[0].tolist()
    planes = image[y : y + height, x : x + width].permute(2, 0, 1)[None].float() / 255
    if (height, width) != (config.size, config.size):
        planes = resize(planes, (config.size, config.size), "bicubic", align_corners=True)
    if one.flip:
        planes = planes.flip(3)
    brightness = one.brightness + (config.brightness_mode == "add")
    steps = (
        (adjust_brightness_accumulative, brightness, 1.0),
        (adjust_contrast_with_mean_subtraction, one.contrast, 1.0),
        (adjust_saturation_with_gray_subtraction, one.saturation, 1.0),
        (lambda x, turns: adjust_hue(x, turns * (2 * math.pi)), one.hue_turns, 0.0),
    )
    for code in one.order[0].tolist():
        step, value, neutral = steps[code]
        if value != neutral:
            # ColorJitter clips before its first operation and after each
            planes = step(planes.clamp(0, 1), value).clamp(0, 1)
    if one.grayscale:
        planes = rgb_to_grayscale(planes).repeat(1, 3, 1, 1)
    taps = 2 * (config.size // 10 // 2) + 1
    if one.sigma_px > 0 and taps > 1:
        planes = gaussian_blur2d(planes, taps, one.sigma_px[:, None].repeat(1, 2))
    if one.solarize < 1:
        planes = solarize(planes.clamp(0, 1), one.solarize)
    return planes.clamp(0, 1)
