"""NVIDIA DALI's own operators on decoded pixels, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig


def dali_two_views(
    images: Tensor, config: AugmentConfig, seed: int, threads: int = 1
) -> Callable[[], Tensor]:
    """A function without arguments that makes fresh views of images (B, H, W, 3) uint8.

    Nothing runs ahead: work for the next call would run, and be counted, in another's turn.

    Returns:
        The function; it gives (2B, 3, S, S) float32 on the device of the images, float16 on a GPU.
    """
    place = "gpu" if images.is_cuda else "cpu"
    arrays = list(images if images.is_cuda else images.numpy())

    @pipeline_def(
        batch_size=len(images),
        num_threads=threads,
        device_id=images.device.index if images.is_cuda else None,
        seed=seed,
        enable_conditionals=True,
        exec_pipelined=False,
        exec_async=False,
        prefetch_queue_depth=1,
    )
    def pipeline():
        pixels = fn.external_source(
            source=lambda: arrays, batch=True, layout="HWC", no_copy=True, device=place
        )
        return tuple(_view(pixels, config, images.is_cuda) for _ in range(2))

    built = pipeline()
    built.build()

    def call():
        # the outputs belong to DALI until the next run: the copy is what a loader hands over
        views = torch.cat([torch.from_dlpack(views.as_tensor()) for views in built.run()])
        if images.is_cuda:
            # DALI's own iterator waits for its copies too
            torch.cuda.current_stream().synchronize()
        return views

    return call


def _view(pixels, config: AugmentConfig, half: bool):
    view = fn.random_resized_crop(
        pixels,
        size=config.size,
        random_area=config.area,
        random_aspect_ratio=config.aspect,
        interp_type=types.INTERP_CUBIC,
        dtype=types.UINT8,
    )
    if _happens(config.jitter):
        view = fn.color_twist(
            view,
            brightness=_factor(config.brightness),
            contrast=_factor(config.contrast),
            saturation=_factor(config.saturation),
            hue=fn.random.uniform(range=[-360 * config.hue, 360 * config.hue]),
        )
    if _happens(config.grayscale):
        gray = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
        view = fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)
    if config.blur[0]:
        if _happens(config.blur[0]):
            # the window follows from sigma: a quarter less time than for 23 taps
            view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=config.sigma_px))
    # together: flip, planes, float in [0, 1]
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=config.flip),
        mean=[0.0] * 3,
        std=[255.0] * 3,
        output_layout="CHW",
        dtype=types.FLOAT16 if half else types.FLOAT,
    )


def _happens(probability: float):
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _factor(half: float):
    return fn.random.uniform(range=[max(1 - half, 0), 1 + half])
