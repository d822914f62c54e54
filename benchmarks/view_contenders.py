"""The views of one batch, ours and the peers', as contenders of a `measure.race`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Contender, Result
from benchmarks.peers import PeerMissing
from benchmarks.view_images import Images, photos, thumbnails
from benchmarks.view_peers import SEED, VIEW_PEERS
from simclr_kernels.augment import augment
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import sample_params

# largest error of a pixel against float64, in units of 1.0 = white; float16 rounds once
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-4}
CHECKED_IMAGES = 16
TWO_VIEWS = "two views of decoded pixels"


class ViewSize(NamedTuple):
    """Side of the views, 224 or 32, and images in the batch."""

    side: int
    batch: int

    def __str__(self) -> str:
        return f"2 x {self.side}, batch {self.batch}"

    def config(self) -> AugmentConfig:
        return AugmentConfig.cifar10() if self.side == 32 else AugmentConfig.simclr(self.side)

    def images(self) -> Images:
        return (thumbnails if self.side == 32 else photos)(self.batch)


def view_contenders(
    names: Iterable[str], size: ViewSize, device: str
) -> dict[str, Contender | str]:
    """By name of VIEW_PEERS the contenders at one size, or the reason why one is missing."""
    images, config = size.images().pixels.to(device), size.config()
    contenders = {}
    for name in names:
        try:
            peer = VIEW_PEERS[name](images, config)
        except PeerMissing as reason:
            contenders[name] = str(reason)
            continue
        check = (
            partial(check_exact, images=images, config=config)
            if peer.exact
            else partial(check_alike, batch=len(images), config=config)
        )
        contenders[name] = Contender(peer.label, peer.call, check, peer.around)
    return contenders


def check_exact(answer: tuple[int, Tensor], images: Tensor, config: AugmentConfig) -> float:
    """The largest error of some images in a batch of an epoch, against the reference in float64."""
    epoch, views = answer
    check_alike(views, len(images), config)
    rows = torch.linspace(0, len(images) - 1, min(len(images), CHECKED_IMAGES)).long()
    rows = rows.to(images.device)
    sizes = torch.tensor(images.shape[1:3], device=images.device).expand(len(rows), 2)
    return exact_error(views, rows, images[rows], sizes, rows, epoch, config)


def exact_error(
    views: Tensor,
    rows: Tensor,
    images: Tensor | PackedImages,
    sizes: Tensor,
    index: Tensor,
    epoch: int,
    config: AugmentConfig,
) -> float:
    """The largest error of these rows of a batch (2B, 3, S, S); AssertionError if not allowed.

    images, sizes and index (K,): what sample_params and augment are given for those K rows.
    """
    error = 0.0
    for view, half in enumerate(views.chunk(2)):
        params = sample_params(config, sizes, seed=SEED, epoch=epoch, index=index, view=view)
        # in float64 this is the reference on any device
        truth = augment(images, params, config, torch.float64)
        error = max(error, (half[rows].double() - truth).abs().max().item())
    allowed = TOLERANCES[views.dtype]
    # not error > allowed: NaN is wrong
    assert error <= allowed, f"error of a pixel is {error:.2g}, allowed {allowed:g}"
    return error


def check_alike(views: Tensor, batch: int, config: AugmentConfig) -> None:
    """That views look like views; those of a peer are other operations, drawn by itself."""
    shape = (2 * batch, 3, config.size, config.size)
    assert tuple(views.shape) == shape, f"shape is {tuple(views.shape)}, not {shape}"
    if views.dtype == torch.uint8:
        views = views / 255
    low, high = views.aminmax()
    # where nothing clips it, a bicubic resize leaves the range
    assert -0.5 <= low and high <= 1.5, f"values are in [{low:.3g}, {high:.3g}], not [0, 1]"
    assert high > 0.5 and views.float().std() > 0.05, "views are blank"
    assert not torch.equal(*views.chunk(2)), "both views are one"


def view_measurement(name: str, result: Result, size: ViewSize) -> dict[str, Any]:
    """One result as it stands in the JSON files: all a table or a plot needs."""
    record = {
        "name": name,
        "label": result.label,
        "what": TWO_VIEWS,
        "side": size.side,
        "batch": size.batch,
        "origin": size.images().origin,
    }
    return record | speed(result, size.batch)


def speed(result: Result, images: int) -> dict[str, Any]:
    """Time, memory and rates of a result; an image is a pair of views. Or what is missing."""
    if reason := result.wrong or result.missing:
        return {"missing": reason}
    cpu = statistics.median(result.cpu_seconds)
    return {
        "seconds": result.median,
        "wall_seconds": statistics.median(result.wall_seconds),
        "cpu_seconds": cpu,
        "turns": len(result.seconds),
        "peak_mib": round(result.peak_bytes / 2**20, 2),
        "error": result.error,
        "images_per_second": images / result.median,
        "images_per_core_second": images / cpu,
        "cpu_ms_per_image": cpu / images * 1e3,
    }
