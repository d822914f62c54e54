"""All readable images of a source in the memory of one device: a batch is a choice among them.

Images of one size are packed as well: the kernels read what a crop needs from where it lies, which
on a CPU is up to a tenth faster than gathering whole images into a batch first.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines.decoding import PixelCache

# of the free memory of a GPU, so that encoder and optimiser find room
SHARE_OF_FREE_MEMORY = 0.5


@dataclass(frozen=True)
class ResidentImages:
    """Decoded images by their number in the source.

    Attributes:
        pixels: numbered as the source; those that are not held must not be taken.
        held: (n,) bool.
    """

    pixels: PackedImages
    held: np.ndarray

    @classmethod
    def of_array(cls, images: np.ndarray, device: torch.device) -> ResidentImages:
        """Of (n, H, W, 3) uint8; on a CPU the memory of the array itself if it is contiguous."""
        n, height, width, _ = images.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of read-only arrays: nothing writes into them
            buffer = torch.from_numpy(np.ascontiguousarray(images).reshape(-1))
        offsets = torch.arange(n) * (3 * height * width)
        sizes = torch.tensor([height, width]).repeat(n, 1)
        pixels = PackedImages(buffer, offsets, sizes, checked=True)
        return cls(pixels.to(device), np.ones(n, bool))

    @classmethod
    def of_cache(cls, cache: PixelCache, device: torch.device) -> ResidentImages:
        """Of what a cache holds; on a CPU its own buffer."""
        return cls(cache.packed().to(device), cache.held)


def holds_all_but(held: np.ndarray, missing: list[int]) -> bool:
    """Whether held (n,) bool lacks no item but the missing ones."""
    held = held.copy()
    held[missing] = True
    return bool(held.all())


def fits_on(device: torch.device, nbytes: int) -> bool:
    """Whether a device has that much memory to spare; a CPU has, since it holds them already."""
    if device.type != "cuda":
        return True
    return nbytes <= SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]
