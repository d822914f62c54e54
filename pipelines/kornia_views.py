"""KorniaViews: the same views by Kornia's operators, driven by our parameters.

Kornia draws nothing here: which crop, which factors and which order an image gets is AugmentParams,
so its views can be laid beside those of the other pipelines. The operators run on any torch device
and pass the gradient on to the pixels; give floating images for that. Slower than FusedViews: about
twenty passes over the views, an interpolation per image, and waits for the device.

Kornia's own transforms differ from SimCLR's (one order of the colour operations for a batch, the
grey mean as centre of the contrast, a blend with grey as saturation, a reflected border under the
blur). Most of it is a choice among its operators, made here so that they agree with reference.py
to rounding: on photos within 1e-6 of 1.0 = white in float32, or with the same bits.

- contrast: each channel is given to adjust_contrast_with_mean_subtraction as a grey image;
- saturation and hue: adjust_saturation and adjust_hue, the ones by HSV;
- grayscale: rgb_to_grayscale with the original's weights;
- blur: gaussian_blur2d with border_type="constant", one sigma per image;
- study operations: rotate with mode="nearest" moves pixels only, spatial_gradient has no epsilon
  under its root as kornia.filters.sobel has, RandomErasing and RandomGaussianNoise are given their
  boxes and their noise.

What Kornia cannot honour:

- Resize. Its bicubic kernel is torch's: Keys with A = -0.75 where SimCLR has -0.5, taps beyond the
  crop are replaced by its edge and not left out, positions are not rounded to 1/1024. On ImageNet
  photos resized crops differ by 0.66 of 255 levels on average, 5.5 at the 99th percentile and 24
  at most, whole views of SimCLR's recipe by 0.43, 5.5 and 26. A crop of the size of the view is
  exact.

Same seed, same pixels, whatever the number of workers, batches, ranks and the resume point, on one
kind of device: torch does not promise the same rounding of a convolution on two kinds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simclr_kernels import reference, reference_study
from simclr_kernels.augment import (
    GPU_PIECE_PIXELS,
    VIEW_DTYPES,
    check_crops,
    check_images,
    check_params,
    image_sizes,
)
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params
from simclr_kernels.pipelines.fused_views import FusedViews

try:
    from kornia.augmentation import RandomErasing, RandomGaussianNoise
    from kornia.color import grayscale_to_rgb, rgb_to_grayscale
    from kornia.enhance import (
        adjust_brightness,
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_hue,
        adjust_saturation,
        normalize,
        solarize,
    )
    from kornia.filters import gaussian_blur2d, spatial_gradient
    from kornia.geometry.transform import hflip, resize, rotate
except ImportError as error:
    raise ImportError(
        f"KorniaViews needs Kornia: pip install simclr-kernels[kornia] ({error})"
    ) from error

# pixels of views that go through the operators at once on a CPU: temporaries stay in its caches
PIECE_PIXELS = 1 << 18


class KorniaViews(FusedViews):
    """Two views of every image by kornia_augment. Arguments and errors are those of FusedViews."""

    def _views(self, pixels: Tensor | PackedImages, index: Tensor) -> Tensor:
        check_images(pixels)
        B, size = len(index), self.config.size
        sizes = image_sizes(pixels)
        views = torch.empty(
            (2 * B, 3, size, size),
            dtype=self.dtype,
            device=index.device,
            memory_format=self.memory_format,
        )
        most = PIECE_PIXELS if index.is_cpu else GPU_PIECE_PIXELS
        step = max(1, most // size**2)
        for view, out in enumerate(views.split(B)):
            params = sample_params(
                self.config, sizes, seed=self.seed, epoch=self.epoch, index=index, view=view
            )
            for first in range(0, B, step):
                piece = slice(first, first + step)
                part = pixels[piece] if isinstance(pixels, Tensor) else pixels.take(piece)
                out[piece] = kornia_augment(part, params[piece], self.config, self.dtype)
        return views


def kornia_augment(
    images: Tensor | PackedImages,
    params: AugmentParams,
    config: AugmentConfig,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One view of each image by Kornia's operators. See simclr_kernels.augment.augment.

    Args:
        images: (B, H, W, 3) uint8, or floating in units of 1.0 = white, or PackedImages. The
            result is differentiable in floating ones.
        params: of the B images, on the same device.
        config: of which size, brightness_mode, mean and std are read.
        dtype: of the result. float16 and bfloat16 are computed in float32 and rounded once.

    Returns:
        (B, 3, size, size), in units of 1.0 = white, in [0, 1] unless the config normalises.

    Raises:
        ValueError: shapes or devices disagree, a crop is empty or reaches outside its image.
        TypeError: images are neither uint8 nor floating, or dtype is no dtype of augment.
    """
    if dtype not in VIEW_DTYPES:
        raise TypeError(f"dtype must be one of {VIEW_DTYPES}, got {dtype}")
    check_images(images, floating=True)
    check_params(params, images)
    # which image an operation is for is decided on the host: one wait, not one per operation
    params = params.to("cpu")
    check_crops(params.crop, image_sizes(images).cpu())
    compute = torch.promote_types(dtype, torch.float32)
    if not len(images):
        return torch.empty(0, 3, config.size, config.size, dtype=dtype, device=images.device)
    planes = _crops(images, params.crop, config.size, compute)
    study = params.study
    _on(planes, params.flip, hflip)
    if study is not None:
        degrees = study.quarter_turns * 90.0
        _on(planes, degrees != 0, lambda x, angle: rotate(x, angle, mode="nearest"), degrees)
    _jitter(planes, params, config.brightness_mode)
    _on(planes, params.grayscale, _grayscale)
    planes = planes.clamp(0, 1)
    _on(planes, params.sigma_px > 0, _blur, params.sigma_px)
    _on(planes, params.solarize < 1, solarize, params.solarize)
    if study is not None:
        _on(planes, study.sobel, _sobel)
        _on(planes, study.noise_sigma > 0, _noise, study.noise_sigma, study.noise_key)
    if config.mean is not None:
        planes = normalize(planes, planes.new_tensor(config.mean), planes.new_tensor(config.std))
    if study is not None:
        _on(planes, study.cutout[:, 2] > 0, _cutout, study.cutout)
    return planes.to(dtype)


def _crops(images: Tensor | PackedImages, crop: Tensor, size: int, compute: torch.dtype) -> Tensor:
    """(B, 3, size, size): the crops (B, 4), each resized by itself, since no two have one size."""
    if isinstance(images, PackedImages):
        places = zip(images.offsets.tolist(), images.sizes.tolist(), strict=True)
        images = [images.image_at(offset, *sides) for offset, sides in places]
    planes = []
    for image, (y, x, height, width) in zip(images, crop.tolist(), strict=True):
        pixels = image[y : y + height, x : x + width].permute(2, 0, 1).to(compute)
        if image.dtype == torch.uint8:
            pixels = pixels * (1 / 255)
        planes.append(resize(pixels, (size, size), "bicubic", align_corners=False))
    return torch.stack(planes)


def _on(planes: Tensor, chosen: Tensor, operation, *values: Tensor) -> None:
    """Replaces the images chosen (B,) of planes by operation(images, *their values), in place.

    chosen and values are on the CPU. Floating values get the dtype of planes.
    """
    chosen = chosen.nonzero()[:, 0]
    if not len(chosen):
        return
    own = [value[chosen].to(planes.device) for value in values]
    own = [value.to(planes.dtype) if value.is_floating_point() else value for value in own]
    chosen = chosen.to(planes.device)
    planes.index_copy_(0, chosen, operation(planes.index_select(0, chosen), *own))


def _jitter(planes: Tensor, params: AugmentParams, brightness_mode: str) -> None:
    """reference.color_jitter in place; each of these operators clips to [0, 1] or is clipped."""
    multiply = brightness_mode == "multiply"
    brighter = adjust_brightness_accumulative if multiply else adjust_brightness
    steps = (
        (brighter, params.brightness, 1.0 if multiply else 0.0),
        (_contrast, params.contrast, 1.0),
        (lambda x, factor: adjust_saturation(x, factor).clamp(0, 1), params.saturation, 1.0),
        (
            lambda x, turns: adjust_hue(x, turns * (2 * math.pi)).clamp(0, 1),
            params.hue_turns,
            0.0,
        ),
    )
    for position in params.order.unbind(1):
        for code, (operation, value, neutral) in enumerate(steps):
            _on(planes, (position == code) & (value != neutral), operation, value)


def _contrast(planes: Tensor, factor: Tensor) -> Tensor:
    channels = planes.flatten(0, 1).unsqueeze(1)  # grey images, each with a mean of its own
    factor = factor.repeat_interleave(3)
    return adjust_contrast_with_mean_subtraction(channels, factor).view_as(planes)


def _grayscale(planes: Tensor) -> Tensor:
    weights = planes.new_tensor(reference.GRAY_WEIGHTS)
    return grayscale_to_rgb(rgb_to_grayscale(planes, weights))


def _blur(planes: Tensor, sigma_px: Tensor) -> Tensor:
    taps = 2 * (planes.shape[2] // 10 // 2) + 1
    sigma_px = sigma_px[:, None].expand(-1, 2)
    return gaussian_blur2d(planes, taps, sigma_px, border_type="constant").clamp(0, 1)


def _sobel(planes: Tensor) -> Tensor:
    # normalised kernels are divided by 8, the reference's by 4
    gradients = 2 * spatial_gradient(planes, "sobel", normalized=True)  # [B, 3, 2, S, S]
    return torch.linalg.vector_norm(gradients, dim=2).clamp(0, 1)


def _noise(planes: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    noise = reference_study.normal_pixels(key, planes.shape[3], planes.dtype)
    params = {"gaussian_noise": noise * sigma.view(-1, 1, 1, 1)}
    return RandomGaussianNoise(p=1.0)(planes, params=params).clamp(0, 1)


def _cutout(planes: Tensor, box: Tensor) -> Tensor:
    y, x, height, width = box.unbind(1)
    boxes = {"xs": x, "ys": y, "widths": width, "heights": height, "values": torch.zeros(len(box))}
    return RandomErasing(p=1.0)(planes, params=boxes)
