"""DALIViews: NVIDIA DALI decodes, on a CPU or by nvJPEG on a GPU, and our kernels make the views.

DALI is fed in our own order with files that we read (external_source), from any source with
`encoded`: folder, Parquet, WebDataset. Which files it gets and which decode_image keeps is said in
dali_decoding.py; a source without files, such as an array, is not decoded at all. Everything else
is FusedViews: order, cache, resident images, views on a stream of their own on a GPU.

views="fused": two_views, exact given the pixels. On a CPU the pixels are those of decode_image, bit
for bit; nvJPEG's may differ by a level or two.

views="dali": DALI's operators, driven by AugmentParams like every pipeline, since what DALI draws
by itself (random_resized_crop) depends on the batch and cannot be restored. Mean and largest
deviation from reference.py in levels of 255, each operation alone on crops of 64 ImageNet photos at
224 pixels, drawn as SimCLR draws them:

    resize      0.008    6   the edge of the crop is repeated, where the original leaves taps
                             outside it out; positions are not rounded to 1/1024
    brightness  0.006    7   that of the resize: exact, as are flip, solarize, mean and std
    contrast     9.8    75   about 0.5, not about the mean of each channel
    saturation   5.8   117   linear, in YIQ, not by HSV
    hue          6.7   143   linear, in YIQ; in degrees: 0.2 of a turn is 72
    all four    13.6   255   one matrix: saturation and hue first, in no other order, no clips
                             between them, one behind
    grayscale    0.13    6   saturation 0, in the same matrix
    blur         0.80  161   at the border, which is reflected, not padded with zeros

Study operations (params.study) are refused.

Same seed, same bits in either mode, whatever the batch size, number of workers and ranks and the
resume point, on one kind of device; each image goes the same way in every batch.

On a GPU the decoder keeps no decoded images (cache_gib counts for arrays only), and DALI holds
memory of its own beside torch's; `close` frees that and ends DALI's threads, until the pipeline is
used again. For a file that it refuses DALI prints to the standard error.

On Zen 3 cores without a cache an ImageNet photo takes 3.6 ms of processor time from JPEG to its two
views at 224 pixels, 5.5 with FusedViews, whose decoder is Pillow, 21 with views="dali"
(`make bench-views`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from simclr_kernels.augment import check_crops, check_images, check_params, image_sizes
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ImageSource
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params
from simclr_kernels.pipelines.dali_decoding import DALIDecodedBatches
from simclr_kernels.pipelines.dali_operators import ViewOperators, free_memory
from simclr_kernels.pipelines.fused_views import FusedViews

VIEWS = ("fused", "dali")


class DALIViews(FusedViews):
    """Two views of every image, decoded by DALI.

    Args:
        source: see ImageSource.
        config: what the views look like.
        batch_size: images per batch (and rank).
        views: "fused": our kernels; "dali": DALI's operators. See the module.
        device: where images are decoded and views made.
        options: the other arguments of FusedViews; `workers` counts DALI's threads.

    Raises:
        ValueError: views is neither, the config asks DALI for study operations.
        RuntimeError and others: as FusedViews.
    """

    def __init__(
        self,
        source: ImageSource,
        config: AugmentConfig,
        batch_size: int,
        *,
        views: str = "fused",
        device: torch.device | str = "cpu",
        **options,
    ):
        if views not in VIEWS:
            raise ValueError(f"views must be 'fused' or 'dali', got {views!r}")
        if views == "dali" and config.has_study_operations:
            raise ValueError("views='dali' has no study operations, got a config with some")
        super().__init__(source, config, batch_size, device=device, **options)
        self._operators = None
        workers, kept = self._decoder.workers, self._decoder.cache.limit_bytes
        if views == "dali":
            self._operators = ViewOperators(max(workers, 1), self.device)
        if hasattr(source, "encoded"):
            self._decoder = DALIDecodedBatches(source, self.quarantine, workers, kept, self.device)

    @property
    def decoded_by(self) -> dict[str, int]:
        """Number of images so far decoded by "dali" and, as none of its files, by "pillow"."""
        return dict(getattr(self._decoder, "decoded_by", {}))

    def _views(self, pixels: Tensor | PackedImages, index: Tensor) -> Tensor:
        if self.device.type == "cuda" and isinstance(pixels, PackedImages):
            # the decoder allocates on a stream of its own
            for tensor in (pixels.buffer, pixels.offsets, pixels.sizes, index):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        if self._operators is None:
            return super()._views(pixels, index)
        images, numbers = _each(pixels), index.cpu()
        sizes = torch.tensor([image.shape[:2] for image in images])
        B, S = len(images), self.config.size
        views = torch.empty(
            (2 * B, 3, S, S),
            dtype=self.dtype,
            device=self.device,
            memory_format=self.memory_format,
        )
        for view, out in enumerate(views.split(B)):
            params = sample_params(
                self.config, sizes, seed=self.seed, epoch=self.epoch, index=numbers, view=view
            )
            out.copy_(self._operators(images, params, self.config))
        return views

    def close(self) -> None:
        super().close()
        for part in (self._operators, self._decoder):
            if hasattr(part, "close"):
                part.close()
        free_memory()


def dali_augment(
    images: Tensor | PackedImages, params: AugmentParams, config: AugmentConfig
) -> Tensor:
    """One view of each image by DALI's operators. See the module for what they cannot do.

    Runs on torch.get_num_threads() threads of DALI on a CPU. The last graphs are kept for the next
    call with as many images; not for calls from several threads at once.

    Args:
        images: (B, H, W, 3) uint8, or PackedImages.
        params: of the B images, on the same device.
        config: of which size, brightness_mode, mean and std are read.

    Returns:
        (B, 3, size, size) float32, in units of 1.0 = white, in [0, 1] unless the config normalises.

    Raises:
        ValueError: shapes or devices disagree, a crop is empty or reaches outside its image, or
            params has study operations.
        TypeError: images are not uint8.
    """
    check_images(images)
    check_params(params, images)
    if params.study is not None:
        raise ValueError("DALI has no study operations, got params with some (params.study)")
    params = params.to("cpu")
    check_crops(params.crop, image_sizes(images).cpu())
    if not len(images):
        return torch.empty(0, 3, config.size, config.size, device=images.device)
    operators = _kept_operators(torch.get_num_threads(), images.device)
    return operators(_each(images), params, config)


_kept_operators = lru_cache(maxsize=2)(ViewOperators)


def _each(images: Tensor | PackedImages) -> list[Tensor]:
    """(H, W, 3) uint8 views of the images."""
    if isinstance(images, Tensor):
        return list(images.contiguous())  # DALI takes no strides
    places = zip(images.offsets.tolist(), images.sizes.tolist(), strict=True)
    return [images.image_at(offset, *size) for offset, size in places]
