"""Augmented views of uint8 images: checks and dispatch; every formula is in reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from simclr_kernels import reference
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.params import AugmentParams, sample_params

# pixels, of sources or of views, in one piece of a batch: the fastest of 2^15 .. 2^18 on a CPU;
# elsewhere about 1 GiB of temporaries, since a piece costs hundreds of launches and some waits
PIECE_PIXELS = 1 << 17
GPU_PIECE_PIXELS = 1 << 23

VIEW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        _refuse_where((heights < 1) | (widths < 1), "image {i} is empty: {0}x{1}", self.sizes)
        # by division: a product of forged sizes could wrap round
        too_large = heights > self.buffer.numel() // 3 // widths
        outside = (self.offsets < 0) | too_large
        outside |= self.offsets > self.buffer.numel() - 3 * heights * widths
        _refuse_where(
            outside,
            f"image {{i}} reaches outside the buffer of {self.buffer.numel()} bytes: "
            "offset {0}, {1}x{2} pixels",
            torch.cat([self.offsets[:, None], self.sizes], 1),
        )

    @classmethod
    def from_images(cls, images: Sequence) -> PackedImages:
        """Copies (height, width, 3) uint8 arrays or tensors into one buffer on the CPU."""
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
        flat = [image.reshape(-1) for image in tensors]
        sizes = [image.shape[:2] for image in tensors]
        return cls(
            buffer=torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8),
            offsets=ends[:-1],
            sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> Tensor:
        """(height, width, 3) uint8, a view into the buffer."""
        return self._image(self.offsets[i].item(), *self.sizes[i].tolist())

    def _image(self, offset: int, height: int, width: int) -> Tensor:
        return self.buffer[offset : offset + height * width * 3].view(height, width, 3)

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def take(self, index: Tensor) -> PackedImages:
        """The images of index (B,) int64 on the same device; the buffer is shared, not copied."""
        return PackedImages(self.buffer, self.offsets[index], self.sizes[index], checked=True)

    def to(self, device: torch.device | str) -> PackedImages:
        tensors = (t.to(device) for t in (self.buffer, self.offsets, self.sizes))
        return PackedImages(*tensors, checked=True)


def augment(
    images: Tensor | PackedImages,
    params: AugmentParams,
    config: AugmentConfig,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """One view of each image, exactly as params say: same images, same params, same view.

    crop, resize, flip -> colour jitter -> grayscale -> blur -> solarize -> mean/std; every formula
    is in reference.py (google-research/simclr, tf2/data_util.py).

    Args:
        images: (B, H, W, 3) uint8, or PackedImages, on any device.
        params: of the B images, on the same device.
        config: of which size, brightness_mode, mean and std are read.
        dtype: of the result. float16 and bfloat16 are computed in float32 and rounded once.
        memory_format: torch.contiguous_format or torch.channels_last.

    Returns:
        (B, 3, size, size), in units of 1.0 = white, in [0, 1] unless the config normalises.

    Raises:
        ValueError: shapes or devices disagree, or (checked on the CPU only: on a GPU it would wait
            for the device) a crop is empty or reaches outside its image.
        TypeError: images are not uint8, or dtype is not a floating dtype listed above.
    """
    sizes = _image_sizes(images)
    views = _empty_views(len(images), config, dtype, images.device, memory_format)
    if len(params) != len(images):
        raise ValueError(
            f"params must be of as many images as there are: {len(images)}, got {len(params)}"
        )
    if params.crop.device != images.device:
        raise ValueError(
            f"images and params must be on one device, got {images.device} and {params.crop.device}"
        )
    if params.crop.device.type == "cpu":
        start, length = params.crop.long().chunk(2, 1)
        bad = (start < 0) | (length < 1) | (start > sizes.long() - length)
        _refuse_where(
            bad.any(1),
            "the crop of image {i} must lie inside its {4}x{5} pixels and not be empty, "
            "got y {0}, x {1}, height {2}, width {3}",
            torch.cat([params.crop, sizes], 1),
        )

    _fill(views, images, params, config)
    return views


def two_views(
    images: Tensor | PackedImages,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    index: Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Two random views of each image, view-major: rows i and i + B are one image.

    See augment and, for seed, epoch and index, sample_params.

    Returns:
        (2B, 3, size, size) in dtype.
    """
    sizes = _image_sizes(images)
    if index.device != images.device:
        raise ValueError(
            f"images and index must be on one device, got {images.device} and {index.device}"
        )
    B = len(images)
    views = _empty_views(2 * B, config, dtype, images.device, memory_format)
    for view, out in enumerate(views.split(B) if B else ()):
        params = sample_params(config, sizes, seed=seed, epoch=epoch, index=index, view=view)
        _fill(out, images, params, config)
    return views


def _empty_views(
    count: int,
    config: AugmentConfig,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format,
) -> Tensor:
    """(count, 3, size, size), not yet filled."""
    if dtype not in VIEW_DTYPES:
        raise TypeError(f"dtype must be one of {VIEW_DTYPES}, got {dtype}")
    shape = (count, 3, config.size, config.size)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _fill(
    views: Tensor, images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> None:
    """Writes one view of each image into views (B, 3, size, size), in pieces of bounded memory."""
    compute = torch.promote_types(views.dtype, torch.float32)
    packed = isinstance(images, PackedImages)
    if len(views) == 0:
        return
    height, width = params.crop[:, 2:].amax(0).tolist() if packed else images.shape[1:3]
    most = PIECE_PIXELS if views.device.type == "cpu" else GPU_PIECE_PIXELS
    step = max(1, most // max(height * width, config.size**2))
    for first in range(0, len(views), step):
        piece = slice(first, first + step)
        part = params[piece]
        if packed:
            pixels = _cut_out(images, first, part.crop)
            crop = torch.cat([torch.zeros_like(part.crop[:, :2]), part.crop[:, 2:]], 1)
            part = replace(part, crop=crop)
        else:
            pixels = images[piece]
        views[piece] = reference.augment(pixels, part, config, compute)


def _cut_out(images: PackedImages, first: int, crop: Tensor) -> Tensor:
    """(B, h, w, 3) uint8: each crop (B, 4) of the images from first on, in the top left corner."""
    height, width = crop[:, 2:].amax(0).tolist()
    pixels = images.buffer.new_zeros(len(crop), height, width, 3)
    own = slice(first, first + len(crop))
    # on a GPU each of these waits for the device: once per piece, not per image
    places = zip(
        images.offsets[own].tolist(), images.sizes[own].tolist(), crop.tolist(), strict=True
    )
    for i, (offset, size, (y, x, h, w)) in enumerate(places):
        pixels[i, :h, :w] = images._image(offset, *size)[y : y + h, x : x + w]
    return pixels


def _image_sizes(images: Tensor | PackedImages) -> Tensor:
    """(B, 2) integer, height and width of each image."""
    if isinstance(images, PackedImages):
        return images.sizes
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor or PackedImages, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(
            f"images must be (B, height, width, 3) with pixels, got {tuple(images.shape)}"
        )
    sizes = torch.tensor(images.shape[1:3], device=images.device)
    return sizes.expand(len(images), 2)


def _refuse_where(bad: Tensor, message: str, values: Tensor) -> None:
    """Raises ValueError for the first image i where bad (B,), with its row of values (B, K)."""
    if bad.any():
        i = bad.int().argmax().item()
        raise ValueError(message.format(*values[i].tolist(), i=i))
