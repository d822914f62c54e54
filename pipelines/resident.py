"""All readable images of a source in the memory of one device: a batch is a choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines.decoding import PixelCache

# of the free memory of a GPU, so that encoder and optimiser find room
SHARE_OF_FREE_MEMORY = 0.5


@dataclass(frozen=True)
class ResidentImages:
    """Decoded images by their number in the source.

    Attributes:
        pixels: (m, H, W, 3) uint8 where all have one size, an array on a CPU and a tensor
            elsewhere; PackedImages, numbered as the source, where sizes differ.
        rows: (n,) int64, the row of pixels that holds an item; None: item i is row i.
        held: (n,) bool, which items are among them.
    """

    pixels: np.ndarray | Tensor | PackedImages
    rows: Tensor | None
    held: np.ndarray

    @classmethod
    def of_array(cls, images: np.ndarray, device: torch.device) -> ResidentImages:
        """Of (n, H, W, 3) uint8; on a CPU the array itself, memory-mapped or not."""
        pixels = images if device.type == "cpu" else torch.tensor(images, device=device)
        return cls(pixels, None, np.ones(len(images), bool))

    @classmethod
    def of_cache(cls, cache: PixelCache, device: torch.device) -> ResidentImages:
        """Of what a cache holds; on a CPU its own buffer."""
        packed, held = cache.packed(), cache.held
        size = cache.one_size()
        if size is None:
            return cls(packed.to(device), None, held)
        rows = packed.offsets // (3 * size[0] * size[1])
        pixels = packed.buffer.view(-1, *size, 3).to(device)
        return cls(pixels.numpy() if device.type == "cpu" else pixels, rows.to(device), held)

    def take(self, index: Tensor) -> Tensor | PackedImages:
        """Pixels of index (B,) int64 on the device: (B, H, W, 3), or uncopied PackedImages."""
        if isinstance(self.pixels, PackedImages):
            return self.pixels.take(index)
        rows = index if self.rows is None else self.rows[index]
        if isinstance(self.pixels, Tensor):
            return self.pixels.index_select(0, rows)
        return torch.from_numpy(self.pixels.take(rows.numpy(), axis=0))

    def holds_all_but(self, missing: list[int]) -> bool:
        """Whether it lacks no item but the missing ones."""
        return holds_all_but(self.held, missing)


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
