"""Two views of a batch as others make them: `VIEW_PEERS`, each imported only when it is asked for.

A peer is a function of (images, config) that returns `ViewPeer(label, call)` or raises PeerMissing
with the reason. images is (B, H, W, 3) uint8 on the device. call() makes fresh random views,
(2B, 3, S, S) view-major, in [0, 1] or as uint8.

Each draws SimCLR's recipe by its own operators at its best settings: sigma decides the window of a
blur where the library allows that, operations are skipped for images that do not get them where it
can skip them, and 8-bit arithmetic is used where it is faster. They are not the operations of
reference.py: crops, saturation, contrast, hue and borders differ (see reference.py and the
pipelines' modules), so that shape and range are all that is checked.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import cores, torch_threads
from benchmarks.peers import PeerMissing
from simclr_kernels import reference
from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.params import sample_params

SEED = 0
# of a blur whose library wants a fixed window: the original's int(S / 10 / 2) on each side
WINDOW = 23


class ViewPeer(NamedTuple):
    """A way to two views of a batch.

    call() gives (2B, 3, S, S), or with `exact` the pair of the epoch that it drew and those; see
    measure.Contender for `around`.
    """

    label: str
    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager] = partial(torch_threads, 1)
    exact: bool = False


def view_dtype(images: Tensor) -> torch.dtype:
    """What a training step takes: float16 on a GPU, float32 on a CPU."""
    return torch.float16 if images.is_cuda else torch.float32


def _ours(images: Tensor, config: AugmentConfig, threads: int = 1) -> ViewPeer:
    index, epochs = torch.arange(len(images), device=images.device), itertools.count()

    def call():
        epoch = next(epochs)
        arguments = {"seed": SEED, "epoch": epoch, "index": index, "dtype": view_dtype(images)}
        return epoch, two_views(images, config, **arguments)

    return ViewPeer("ours", call, partial(torch_threads, threads), exact=True)


def _ours_on_all_cores(images: Tensor, config: AugmentConfig) -> ViewPeer:
    if images.is_cuda:
        raise PeerMissing("on a GPU the host only launches")
    return _ours(images, config, cores())._replace(label="ours, all cores")


def _reference(images: Tensor, config: AugmentConfig) -> ViewPeer:
    index, epochs = torch.arange(len(images), device=images.device), itertools.count()
    sizes = torch.tensor(images.shape[1:3], device=images.device).expand(len(images), 2)

    def call():
        epoch, views = next(epochs), []
        for view in (0, 1):
            drawn = {"seed": SEED, "epoch": epoch, "index": index, "view": view}
            params = sample_params(config, sizes, **drawn)
            # in small pieces: faster on a CPU, and a GPU has room for a few hundred images
            step = 256 if images.is_cuda or config.size < 64 else 2
            views += [
                reference.augment(images[i : i + step], params[i : i + step], config)
                for i in range(0, len(images), step)
            ]
        return epoch, torch.cat(views)

    return ViewPeer("reference (plain torch)", call, exact=True)


def albumentations_transform(config: AugmentConfig) -> Callable[[np.ndarray], np.ndarray]:
    """One view of one (H, W, 3) uint8 image, as (S, S, 3) uint8."""
    try:
        import albumentations as A
        import cv2
    except ImportError as error:
        raise PeerMissing(f"albumentations is not installed: {error}") from error
    operations = [
        A.RandomResizedCrop(
            (config.size, config.size), config.area, config.aspect, interpolation=cv2.INTER_CUBIC
        ),
        A.HorizontalFlip(p=config.flip),
        A.ColorJitter(
            *(_around_one(half) for half in (config.brightness, config.contrast)),
            saturation=_around_one(config.saturation),
            hue=(-config.hue, config.hue),
            p=config.jitter,
        ),
        A.ToGray(p=config.grayscale),
    ]
    if config.blur[0]:
        # the window follows from sigma, as by default
        operations.append(A.GaussianBlur(sigma_limit=config.sigma_px, p=config.blur[0]))
    transform = A.Compose(operations)
    return lambda image: transform(image=image)["image"]


def _around_one(half: float) -> tuple[float, float]:
    return max(1 - half, 0), 1 + half


@contextmanager
def opencv_on_one_core():
    """OpenCV without threads of its own within the block, and torch with one."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with torch_threads(1):
            yield
    finally:
        cv2.setNumThreads(before)


def _albumentations(images: Tensor, config: AugmentConfig, to_float: bool = False) -> ViewPeer:
    if images.is_cuda:
        raise PeerMissing("albumentations works on CPU cores only")
    transform = albumentations_transform(config)
    arrays = list(images.numpy())

    def call():
        views = np.stack([transform(image) for _ in range(2) for image in arrays])
        # without a copy: a batch of uint8 in channels-last order is what a DataLoader hands over
        views = torch.from_numpy(views).permute(0, 3, 1, 2)
        return views.float().div_(255) if to_float else views

    label = f"albumentations, {'float32 out' if to_float else 'uint8 out'}"
    return ViewPeer(label, call, opencv_on_one_core)


@cache
def torchvision_v2() -> Any:
    """torchvision.transforms.v2."""
    try:
        importlib.import_module("benchmarks.torchvision_operators")
        from torchvision.transforms import v2
    except Exception as error:  # where it was built for another torch it raises what it likes
        raise PeerMissing(f"torchvision cannot be imported: {error}") from error
    return v2


def torchvision_transform(config: AugmentConfig) -> Callable[[Any], Tensor]:
    """One view of one (3, H, W) uint8 image, as (3, S, S) float32 in [0, 1]."""
    v2 = torchvision_v2()
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    operations = [
        v2.RandomResizedCrop(config.size, config.area, config.aspect, v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(config.flip),
        v2.RandomApply([v2.ColorJitter(*jitter)], config.jitter),
        v2.RandomGrayscale(config.grayscale),
    ]
    if config.blur[0]:
        blur = v2.GaussianBlur(WINDOW, config.sigma_px)
        operations.append(v2.RandomApply([blur], config.blur[0]))
    return v2.Compose([*operations, v2.ToDtype(torch.float32, scale=True)])


def _torchvision(images: Tensor, config: AugmentConfig) -> ViewPeer:
    # one by one: on a batch it draws once for all images
    transform = torchvision_transform(config)
    planes = list(images.permute(0, 3, 1, 2).contiguous())
    call = lambda: torch.stack([transform(image) for _ in range(2) for image in planes])  # noqa: E731
    return ViewPeer("torchvision v2", call)


def _kornia(images: Tensor, config: AugmentConfig) -> ViewPeer:
    try:
        import kornia.augmentation as K
    except ImportError as error:
        raise PeerMissing(f"kornia is not installed: {error}") from error
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    operations = [
        K.RandomResizedCrop(
            (config.size, config.size),
            config.area,
            config.aspect,
            resample="bicubic",
            # the faster of its two ways, and without a loop over the images
            cropping_mode="resample",
        ),
        K.RandomHorizontalFlip(p=config.flip),
        K.ColorJitter(*jitter, p=config.jitter),
        K.RandomGrayscale(p=config.grayscale),
    ]
    if config.blur[0]:
        operations.append(K.RandomGaussianBlur((WINDOW, WINDOW), config.sigma_px, p=config.blur[0]))
    transform = torch.nn.Sequential(*operations)

    # on a CPU pieces of 8 photos take half the time of 64 at once: their temporaries stay in memory
    step = 8 if config.size > 32 and not images.is_cuda else len(images)

    def call():
        views = [[], []]
        with torch.no_grad():
            for piece in images.split(step):
                pixels = piece.permute(0, 3, 1, 2).float() / 255
                for view in views:
                    view.append(transform(pixels))
        return torch.cat(views[0] + views[1])

    return ViewPeer("Kornia", call)


def _dali(images: Tensor, config: AugmentConfig) -> ViewPeer:
    try:
        from benchmarks.dali_peer import dali_two_views
    except ImportError as error:
        raise PeerMissing(f"nvidia-dali is not installed: {error}") from error
    return ViewPeer("DALI", dali_two_views(images, config, SEED))


VIEW_PEERS: dict[str, Callable[[Tensor, AugmentConfig], ViewPeer]] = {
    "ours": _ours,
    "ours-all-cores": _ours_on_all_cores,
    "reference": _reference,
    "albumentations": _albumentations,
    "albumentations-float": partial(_albumentations, to_float=True),
    "dali": _dali,
    "kornia": _kornia,
    "torchvision": _torchvision,
}
