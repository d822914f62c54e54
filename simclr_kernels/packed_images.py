"""PackedImages: uint8 images of different sizes in one buffer, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedImages:
    """Images of different sizes in one buffer.

    Attributes:
        buffer: (bytes,) uint8. Image i is a contiguous (height, width, 3) array at offsets[i].
        offsets: (B,) int64, in bytes.
        sizes: (B, 2) int32 or int64, height and width in pixels.
        checked: the caller knows that every image lies inside the buffer; otherwise this is
            checked here, which on a GPU waits for the device.

    Raises:
        ValueError: shapes or devices disagree, an image is empty or reaches outside the buffer.
        TypeError: a tensor has another dtype.
    """

    buffer: Tensor
    offsets: Tensor
    sizes: Tensor
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool):
        if checked:
            return
        if self.buffer.dtype != torch.uint8:
            raise TypeError(f"buffer must be uint8, got {self.buffer.dtype}")
        if self.offsets.dtype != torch.int64:
            raise TypeError(f"offsets must be int64, got {self.offsets.dtype}")
        if self.sizes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sizes must be int32 or int64, got {self.sizes.dtype}")
        shapes = [tuple(t.shape) for t in (self.buffer, self.offsets, self.sizes)]
        if self.buffer.dim() != 1 or shapes[1:] != [(len(self.offsets),), (len(self.offsets), 2)]:
            raise ValueError(
                "buffer must be (bytes,), offsets (B,) and sizes (B, 2), "
                f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
            )
        if not self.buffer.is_contiguous():
            raise ValueError(f"buffer must be contiguous, got stride {self.buffer.stride()}")
        devices = [t.device for t in (self.buffer, self.offsets, self.sizes)]
        if len(set(devices)) != 1:
            raise ValueError(f"buffer, offsets and sizes must be on one device, got {devices}")
        heights, widths = self.sizes.long().unbind(1)
        refuse_where((heights < 1) | (widths < 1), "image {i} is empty: {0}x{1}", self.sizes)
        # by division: a product of forged sizes could wrap round
        too_large = heights > self.buffer.numel() // 3 // widths
        outside = (self.offsets < 0) | too_large
        outside |= self.offsets > self.buffer.numel() - 3 * heights * widths
        refuse_where(
            outside,
            f"image {{i}} reaches outside the buffer of {self.buffer.numel()} bytes: "
            "offset {0}, {1}x{2} pixels",
            torch.cat([self.offsets[:, None], self.sizes], 1),
        )

    @classmethod
    def from_images(cls, images: Sequence, *, pin_memory: bool = False) -> PackedImages:
        """Copies (height, width, 3) uint8 arrays or tensors into one buffer on the CPU.

        pin_memory makes it page-locked, for copies to a GPU beside other work.
        """
        # arrays that are read-only or run backwards are copied: torch takes neither
        tensors = [
            image if isinstance(image, Tensor) else torch.from_numpy(np.require(image, None, "CW"))
            for image in images
        ]
        for i, image in enumerate(tensors):
            if image.dtype != torch.uint8:
                raise TypeError(f"images must be uint8, got {image.dtype} for image {i}")
            if image.dim() != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"images must be (height, width, 3), got {tuple(image.shape)} for image {i}"
                )
        ends = torch.tensor([0] + [image.numel() for image in tensors]).cumsum(0)
        flat = [image.reshape(-1).cpu() for image in tensors]
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pin_memory)
        if flat:
            torch.cat(flat, out=buffer)
        sizes = [image.shape[:2] for image in tensors]
        sizes = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
        offsets = ends[:-1]
        if pin_memory:
            offsets, sizes = offsets.pin_memory(), sizes.pin_memory()
        return cls(buffer, offsets, sizes)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> Tensor:
        """(height, width, 3) uint8, a view into the buffer."""
        return self.image_at(self.offsets[i].item(), *self.sizes[i].tolist())

    def image_at(self, offset: int, height: int, width: int) -> Tensor:
        """(height, width, 3) uint8 at an offset in bytes, a view into the buffer."""
        return self.buffer[offset : offset + height * width * 3].view(height, width, 3)

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def take(self, index: Tensor | slice) -> PackedImages:
        """The images of a slice or of index (B,) int64 on the same device; the buffer is shared."""
        return PackedImages(self.buffer, self.offsets[index], self.sizes[index], checked=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedImages:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedImages:
        """A copy in page-locked memory; a DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change) -> PackedImages:
        tensors = (change(t) for t in (self.buffer, self.offsets, self.sizes))
        return PackedImages(*tensors, checked=True)


def refuse_where(bad: Tensor, message: str, values: Tensor) -> None:
    """Raises ValueError for the first image i where bad (B,), with its row of values (B, K)."""
    if bad.any():
        i = bad.int().argmax().item()
        raise ValueError(message.format(*values[i].tolist(), i=i))
