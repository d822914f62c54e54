"""What torchvision's transforms make of our parameters: its float path, in plain torch.

torchvision.transforms.v2.functional of 0.28; a test runs both on the same photos. torchvision has
no wheel that can be imported beside a CPU build of torch. Its transforms draw one set of parameters
for a whole batch; here each image has its own, as in a data loader's worker. Whoever ports SimCLR
with brightness that adds replaces it by torchvision's, which multiplies: an addend d becomes the
factor 1 + d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_kernels import reference
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams


def torchvision_augment(
    images: Tensor | PackedImages,
    params: AugmentParams,
    config: AugmentConfig,
    interpolation: str = "bicubic",
) -> Tensor:
    """One view of each image, as simclr_kernels.augment makes it but by torchvision's formulas.

    Args:
        images: (B, H, W, 3) uint8 or PackedImages.
        params: AugmentParams of the B images.
        config: of which size, brightness_mode, mean and std are read.
        interpolation: "bicubic", or "bilinear": the default of RandomResizedCrop. Both antialias.

    Returns:
        (B, 3, size, size) float32.
    """
    views = [
        _augment(images[i].permute(2, 0, 1).float() / 255, params[i], config, interpolation)
        for i in range(len(images))
    ]
    return torch.stack(views)


def _augment(image: Tensor, one: AugmentParams, config: AugmentConfig, interpolation: str):
    """(3, size, size) of one image (3, H, W), with the parameters of one image."""
    image = resized_crop(image, one.crop[0].tolist(), config.size, interpolation)
    if one.flip:
        image = image.flip(-1)
    added = config.brightness_mode == "add"
    brightness = one.brightness.item() + added
    steps = (
        (adjust_brightness, brightness, 1.0),
        (adjust_contrast, one.contrast.item(), 1.0),
        (adjust_saturation, one.saturation.item(), 1.0),
        (adjust_hue, one.hue_turns.item(), 0.0),
    )
    for code in one.order[0].tolist():
        step, value, neutral = steps[code]
        if value != neutral:
            image = step(image, value)
    if one.grayscale:
        image = reference.grayscale(image[None])[0]
    if one.sigma_px > 0 and config.size // 10 // 2:
        image = gaussian_blur(image, config.size // 10 // 2, one.sigma_px.item())
    # what is stored or shown is clipped; bicubic overshoot is not where no operation follows
    image = reference.solarize(image.clamp(0, 1)[None], one.solarize)
    return image[0] if config.mean is None else _normalized(image, config)


def _normalized(image: Tensor, config: AugmentConfig) -> Tensor:
    return reference.normalize(image, config.mean, config.std)[0]


def resized_crop(image: Tensor, crop: list[int], size: int, interpolation: str) -> Tensor:
    """Crops (3, H, W) to (y, x, height, width) and resizes it with antialias, without a clip."""
    y, x, height, width = crop
    image = image[:, y : y + height, x : x + width]
    if (height, width) == (size, size):
        return image
    return F.interpolate(image[None], (size, size), mode=interpolation, antialias=True)[0]


def _blend(image: Tensor, other: Tensor, ratio: float) -> Tensor:
    return (ratio * image + (1 - ratio) * other).clamp(0, 1)


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    return (image * factor).clamp(0, 1)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Away from the mean of the gray image: one centre for the three channels."""
    return _blend(image, reference.grayscale(image[None])[0, 0].mean(), factor)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Away from the gray image, pixel by pixel; no HSV."""
    return _blend(image, reference.grayscale(image[None])[0], factor)


def adjust_hue(image: Tensor, turns: float) -> Tensor:
    """HSV, as in the reference, of an image in [0, 1] (where it is not, torchvision clips)."""
    turns = torch.tensor([turns], device=image.device)
    return reference.hue(image[None], turns)[0].clamp(0, 1)


def gaussian_blur(image: Tensor, radius: int, sigma: float) -> Tensor:
    """2 radius + 1 taps on either axis, the image mirrored at its edges, no clip."""
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    taps = torch.softmax(-0.5 * (x / sigma).square(), 0)
    image = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(image, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[:, 0]
