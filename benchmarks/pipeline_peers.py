"""From encoded images to batches of views on the device: `PIPELINES`, ours and what others use.

A pipeline is a function of (source, config, batch_size, device) that returns `PipelinePeer` or
raises PeerMissing with the reason. All have the cores of this process. The two that are put
together from a DataLoader decode and augment in one worker process a core: albumentations decodes
with OpenCV and hands over uint8, which becomes float on the device; torchvision with Pillow.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import cores
from benchmarks.peers import PeerMissing
from benchmarks.view_peers import (
    SEED,
    albumentations_transform,
    torchvision_transform,
    torchvision_v2,
)
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ImageSource
from simclr_kernels.pipelines import Batch
from simclr_kernels.pipelines.fused_views import FusedViews

GIB_OF_CACHE = 2.0


class PipelinePeer(NamedTuple):
    """A way to batches of views.

    epoch() gives the number of an epoch and its Batches; `exact`: they are those of two_views.
    """

    label: str
    epoch: Callable[[], tuple[int, Iterator[Batch]]]
    exact: bool = False


def _options(device: str) -> dict[str, Any]:
    """What all pipelines of this library are given: views as a training step takes them."""
    gpu = device == "cuda"
    dtype = torch.float16 if gpu else torch.float32
    return dict(seed=SEED, device=device, workers=cores(), dtype=dtype, channels_last=gpu)


def _epochs(pipeline: Any) -> Callable[[], tuple[int, Iterator[Batch]]]:
    numbers = itertools.count()

    def epoch():
        number = next(numbers)
        pipeline.set_epoch(number)
        return number, iter(pipeline)

    return epoch


def _fused(
    source: ImageSource, config: AugmentConfig, batch_size: int, device: str, cached: bool = False
) -> PipelinePeer:
    cache_gib = GIB_OF_CACHE if cached else 0
    pipeline = FusedViews(source, config, batch_size, cache_gib=cache_gib, **_options(device))
    label = "FusedViews" + (", decoded once" if cached else "")
    return PipelinePeer(label, _epochs(pipeline), exact=True)


def _other(
    source: ImageSource,
    config: AugmentConfig,
    batch_size: int,
    device: str,
    module: str,
    name: str,
    label: str,
    **options: Any,
) -> PipelinePeer:
    """KorniaViews or DALIViews, decoding anew in every epoch."""
    options |= _options(device) | {"cache_gib": 0}
    try:
        views = getattr(importlib.import_module(f"simclr_kernels.pipelines.{module}"), name)
        pipeline = views(source, config, batch_size, **options)
    except ImportError as error:
        raise PeerMissing(f"{name}: {error}") from error
    return PipelinePeer(label, _epochs(pipeline))


class _TwoViews(Dataset):
    """Item i decoded by `decode` and twice through `transform`."""

    def __init__(self, source: ImageSource, decode: Callable, transform: Callable):
        self.source, self.decode, self.transform = source, decode, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple:
        encoded = getattr(self.source, "encoded", None)
        image = self.source.decode(i) if encoded is None else self.decode(encoded(i))
        return self.transform(image), self.transform(image), i


def _loader(
    source: ImageSource,
    batch_size: int,
    device: str,
    decode: Callable,
    transform: Callable,
    finish: Callable[[Tensor], Tensor],
    label: str,
    in_worker: Callable[[int], None] | None = None,
) -> PipelinePeer:
    loader = DataLoader(
        _TwoViews(source, decode, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cores(),
        persistent_workers=True,
        pin_memory=device == "cuda",
        worker_init_fn=in_worker,
    )

    def batches():
        for *pair, index in loader:
            views = torch.cat([view.to(device, non_blocking=True) for view in pair])
            yield Batch(finish(views), index, torch.full_like(index, -1))

    return PipelinePeer(label, lambda: (0, batches()))


def _albumentations(
    source: ImageSource, config: AugmentConfig, batch_size: int, device: str
) -> PipelinePeer:
    transform = albumentations_transform(config)
    import cv2

    def decode(data: bytes) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    def finish(views: Tensor) -> Tensor:
        return views.permute(0, 3, 1, 2).to(_options(device)["dtype"]).div_(255)

    label = "albumentations, OpenCV, DataLoader"
    in_worker = lambda worker: cv2.setNumThreads(0)  # noqa: E731
    return _loader(source, batch_size, device, decode, transform, finish, label, in_worker)


def _torchvision(
    source: ImageSource, config: AugmentConfig, batch_size: int, device: str
) -> PipelinePeer:
    v2, on_tensor = torchvision_v2(), torchvision_transform(config)

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(BytesIO(data)).convert("RGB"))

    def transform(image: np.ndarray) -> Tensor:
        return on_tensor(v2.functional.to_image(image))

    def finish(views: Tensor) -> Tensor:
        return views.to(_options(device)["dtype"])

    label = "torchvision v2, Pillow, DataLoader"
    return _loader(source, batch_size, device, decode, transform, finish, label)


_dali = partial(_other, module="dali_views", name="DALIViews")
PIPELINES: dict[str, Callable[[ImageSource, AugmentConfig, int, str], PipelinePeer]] = {
    "fused": _fused,
    "fused-cached": partial(_fused, cached=True),
    "dali-fused": partial(_dali, label="DALIViews, our kernels", views="fused"),
    "dali-dali": partial(_dali, label="DALIViews, DALI's operators", views="dali"),
    "kornia": partial(_other, module="kornia_views", name="KorniaViews", label="KorniaViews"),
    "albumentations": _albumentations,
    "torchvision": _torchvision,
}
