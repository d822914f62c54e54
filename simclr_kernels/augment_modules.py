"""TwoViews: the views of anybody's batches, as a module; pack_collate: batches of any sizes.

loader = DataLoader(dataset, batch_size=256, shuffle=True, collate_fn=pack_collate)
make_views = TwoViews(AugmentConfig.simclr(224), seed=0).to("cuda")
for epoch in range(100):
    make_views.set_epoch(epoch)
    for images, label in loader:
        view0, view1 = make_views(images).chunk(2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages

INDEX_RANGE = 1 << 32


class TwoViews(nn.Module):
    """Two random views of each image of a uint8 batch, made on the module's device. See two_views.

    With `index`, the images' numbers in their data set, the views of an image depend on seed, epoch
    and its number only, and equal those of FusedViews. Without, an image is numbered by its place
    among all images since set_epoch, or since the beginning where it is never called: views differ
    in every batch and every epoch, and are the same again for the same seed, batches and order.
    Processes that share a data set and pass no index take a seed each.

    state_dict holds seed, epoch and that count, so a restored module goes on where it was saved.
    There are no parameters; train and eval make no difference.

    Args:
        config: what the views look like.
        seed: 0 <= seed < 2^64.
        dtype: of the views.
        channels_last: memory format of the views.
        channels_first: the images are (B, 3, H, W), or a list of (3, H, W), as torchvision reads
            them, and not (B, H, W, 3).
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        channels_first: bool = False,
    ):
        super().__init__()
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        self.config, self.seed, self.dtype = config, seed, dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.channels_first = channels_first
        self.epoch: int | None = None
        self.seen = 0  # images since set_epoch
        # goes where the module goes
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; images without index are counted from 0 again if it is another one."""
        if not 0 <= epoch < INDEX_RANGE:
            raise ValueError(f"epoch must be in [0, 2^32), got {epoch}")
        if epoch != self.epoch:
            self.epoch, self.seen = epoch, 0

    def forward(
        self,
        images: Tensor | PackedImages | Sequence[Tensor | np.ndarray],
        index: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """(2B, 3, S, S), view-major: `.chunk(2)` gives the two views of the B images.

        Args:
            images: (B, H, W, 3) uint8, PackedImages, or a list of (H, W, 3) uint8 tensors or arrays
                of any sizes; on any device.
            index: (B,) integers, 0 <= index < 2^32, or None.

        Raises:
            RuntimeError: index is given, but set_epoch was never called: the views of an image
                would be the same in every epoch.
            ValueError, TypeError: see two_views.
        """
        device = self._place.device
        images = self._pixels(images).to(device, non_blocking=True)
        B = len(images)
        if index is None:
            index = torch.arange(self.seen, self.seen + B, device=device) % INDEX_RANGE
            self.seen += B
        elif self.epoch is None:
            raise RuntimeError(
                "with an index, set_epoch(epoch) must be called before each epoch: else an image "
                "has the same views in all of them"
            )
        else:
            index = torch.as_tensor(index)
            if index.is_floating_point() or index.dtype == torch.bool:
                raise TypeError(f"index must be integers, got {index.dtype}")
            index = index.to(device, torch.int64, non_blocking=True)
        return two_views(
            images,
            self.config,
            seed=self.seed,
            epoch=self.epoch or 0,
            index=index,
            dtype=self.dtype,
            memory_format=self.memory_format,
        )

    def _pixels(self, images: Any) -> Tensor | PackedImages:
        if isinstance(images, PackedImages):
            return images
        if isinstance(images, Tensor):
            return self._channels_behind(images)
        return PackedImages.from_images([self._channels_behind(image) for image in images])

    def _channels_behind(self, image: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """(..., H, W, 3) of (..., 3, H, W) or itself."""
        expected = "(..., 3, H, W)" if self.channels_first else "(..., H, W, 3)"
        if image.ndim < 3 or image.shape[-3 if self.channels_first else -1] != 3:
            raise ValueError(
                f"images must be {expected} with channels_first={self.channels_first}, "
                f"got {tuple(image.shape)}"
            )
        if not self.channels_first:
            return image
        return image.movedim(-3, -1) if isinstance(image, Tensor) else np.moveaxis(image, -3, -1)

    def get_extra_state(self) -> Tensor:
        # a tensor, since some formats of checkpoints hold nothing else; -1 for None
        words = [self.seed >> 32, self.seed % INDEX_RANGE, self.seen]
        return torch.tensor([*words, -1 if self.epoch is None else self.epoch])

    def set_extra_state(self, state: Tensor) -> None:
        high, low, self.seen, epoch = state.tolist()
        self.seed, self.epoch = high << 32 | low, None if epoch < 0 else epoch

    def extra_repr(self) -> str:
        return f"seed={self.seed}, epoch={self.epoch}, {self.config}"


def pack_collate(items: Sequence[Any]) -> Any:
    """A DataLoader's collate_fn for images of any sizes: PackedImages in place of a stack.

    Images are PIL images of any mode (made RGB and upright as decode_image does) and (H, W, 3)
    uint8 arrays or tensors, alone or inside the tuples or dictionaries that the data set gives.
    Everything else, such as labels, is collated as usual.

    Args:
        items: one for each image: an image, (image, label, ...), or {"image": ..., "label": ...}.

    Returns:
        The structure of an item, with PackedImages for images.
    """
    first = items[0]
    if isinstance(first, Mapping):
        return {key: pack_collate([item[key] for item in items]) for key in first}
    if isinstance(first, (tuple, list)):
        columns = [pack_collate(column) for column in zip(*items, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
    if hasattr(first, "getbands"):
        # Pillow is there, since the images are its own
        from simclr_kernels.decode import rgb_pixels

        return PackedImages.from_images([rgb_pixels(image) for image in items])
    if isinstance(first, (Tensor, np.ndarray)) and first.ndim == 3:
        return PackedImages.from_images(items)
    return default_collate(list(items))
