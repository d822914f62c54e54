"""What albumentations makes of our parameters: its own functions on uint8 images, 8 bits a step.

The functions that RandomResizedCrop (cubic: OpenCV's, A = -0.75, no antialias), HorizontalFlip,
ColorJitter, ToGray, GaussianBlur and Solarize call in 2.0. Brightness that adds becomes the
factor 1 + d, as in torchvision_formulas.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams

# otherwise the import asks the network for a newer version
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import cv2  # noqa: E402
from albumentations.augmentations.blur import functional as blur  # noqa: E402
from albumentations.augmentations.pixel import functional as pixel  # noqa: E402


def albumentations_augment(
    images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> Tensor:
    """One view of each image. See torchvision_augment; mean and std are not applied.

    Returns:
        (B, 3, size, size) float32 in [0, 1], multiples of 1/255.
    """
    views = [_augment(images[i].numpy(), params[i], config) for i in range(len(images))]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255


def _augment(image: np.ndarray, one: AugmentParams, config: AugmentConfig) -> np.ndarray:
    """(size, size, 3) uint8."""
    y, x, height, width = one.crop[0].tolist()
    image = np.ascontiguousarray(image[y : y + height, x : x + width])
    if (height, width) != (config.size, config.size):
        image = cv2.resize(image, (config.size, config.size), interpolation=cv2.INTER_CUBIC)
    if one.flip:
        image = np.ascontiguousarray(image[:, ::-1])
    brightness = one.brightness.item() + (config.brightness_mode == "add")
    steps = (
        (pixel.adjust_brightness_torchvision, brightness, 1.0),
        (pixel.adjust_contrast_torchvision, one.contrast.item(), 1.0),
        (pixel.adjust_saturation_torchvision, one.saturation.item(), 1.0),
        (pixel.adjust_hue_torchvision, one.hue_turns.item(), 0.0),
    )
    for code in one.order[0].tolist():
        step, value, neutral = steps[code]
        if value != neutral:
            image = step(image, value)
    if one.grayscale:
        image = np.repeat(pixel.to_gray_weighted_average(image)[..., None], 3, 2)
    radius = config.size // 10 // 2
    if one.sigma_px > 0 and radius:
        kernel = blur.create_gaussian_kernel_1d(one.sigma_px.item(), 2 * radius + 1)
        image = pixel.separable_convolve(image, kernel=kernel)
    return pixel.solarize(image, one.solarize.item()) if one.solarize < 1 else image
