"""The images that views are timed on: real ones beside the checkout, or synthetic ones like them.

`../shared/data` holds 192 photos of ImageNet and CIFAR-10. Where it is absent, images with the 1/f
spectrum of photos stand in: as JPEG they are about as large, and take as long to decode.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from simclr_kernels.data import ImageSource, Subset
from simclr_kernels.image_folder import ImageFolder
from simclr_kernels.parquet_images import ParquetImages

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PHOTO_SIZE = (375, 500)  # the most frequent of ImageNet
SYNTHETIC = 16  # different ones, where the real ones are absent
JPEG_QUALITY = 90
# of each octave to the one before: JPEG files nearly as large as ImageNet's
OCTAVE_CONTRAST = 0.8


class Images(NamedTuple):
    """(B, H, W, 3) uint8 and what they are."""

    pixels: Tensor
    origin: str


@cache
def photos(count: int) -> Images:
    """Decoded photos of one size, 375 x 500, again from the first where there are fewer."""
    folder = DATA / "imagenet_samples"
    if not folder.is_dir():
        return Images(_stacked([synthetic(i) for i in range(SYNTHETIC)], count), "synthetic photos")
    source = ImageFolder(folder)
    decoded = (source.decode(i) for i in range(len(source)))
    found = [image for image in decoded if image.shape[:2] == PHOTO_SIZE]
    return Images(_stacked(found, count), "ImageNet photos")


@cache
def thumbnails(count: int) -> Images:
    """Images of 32 x 32: CIFAR-10's test images."""
    if not (DATA / "cifar10").is_dir():
        found = [synthetic(i, 32, 32) for i in range(SYNTHETIC)]
        return Images(_stacked(found, count), "synthetic 32 x 32")
    source = cifar_source("test")
    found = [source.decode(i) for i in range(min(count, len(source)))]
    return Images(_stacked(found, count), "CIFAR-10")


def cifar_source(split: str) -> ImageSource:
    return ParquetImages(DATA / "cifar10" / f"{split}.parquet")


def photo_source(count: int, scratch: Path) -> tuple[ImageSource, str]:
    """JPEG photos of different sizes, and what they are; again from the first if there are fewer.

    Args:
        count: number of items.
        scratch: a folder for the synthetic ones.
    """
    folder, origin = DATA / "imagenet_samples", "ImageNet JPEG"
    if not folder.is_dir():
        folder, origin = scratch, "synthetic JPEG"
        for i in range(min(count, SYNTHETIC)):
            path = scratch / f"{i:03d}.jpg"
            Image.fromarray(synthetic(i)).save(path, quality=JPEG_QUALITY)
    source = ImageFolder(folder)
    return Subset(source, np.resize(np.arange(len(source)), count)), origin


def synthetic(seed: int, height: int = PHOTO_SIZE[0], width: int = PHOTO_SIZE[1]) -> np.ndarray:
    """(height, width, 3) uint8: clouds of colour, in octaves of falling contrast."""
    random = torch.Generator().manual_seed(seed)
    image = torch.full((1, 3, height, width), 0.5)
    side, contrast = 2, 0.25
    while side < 2 * max(height, width):
        # most of what varies in a photo is its brightness
        clouds = torch.randn(1, 1, side, side, generator=random)
        clouds = clouds + 0.3 * torch.randn(1, 3, side, side, generator=random)
        image += contrast * interpolate(clouds, (height, width), mode="bilinear", antialias=True)
        side, contrast = 2 * side, contrast * OCTAVE_CONTRAST
    return image.clamp(0, 1).mul(255).byte()[0].permute(1, 2, 0).contiguous().numpy()


def _stacked(images: list[np.ndarray], count: int) -> Tensor:
    chosen = np.resize(np.arange(len(images)), count)
    return torch.from_numpy(np.stack([images[i] for i in chosen]))
