"""Image sources: shapes10, arrays, image folders, Parquet files, WebDataset shards; their splits.

A source is any object that keeps the contract of ImageSource; a class of your own needs no base
class and no registration. `open_source` finds the right one for a path, `split_source` cuts a test
split off a source that has none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from simclr_kernels.decode import MAX_PIXELS, DecodeError, declared_size, decode_image
from simclr_kernels.image_folder import ImageFolder, class_folders, holds_images
from simclr_kernels.parquet_images import ParquetImages
from simclr_kernels.shapes10 import CLASSES, SPLITS, render
from simclr_kernels.webdataset_images import WebDatasetImages

__all__ = [
    "ArrayImages",
    "DecodeError",
    "ImageFolder",
    "ImageSource",
    "ParquetImages",
    "Subset",
    "WebDatasetImages",
    "MissingSplit",
    "decode_image",
    "decoded_bytes",
    "open_source",
    "open_splits",
    "shapes10",
    "split_source",
]

FINGERPRINTED_IMAGES = 4096
MEASURED_IMAGES = 64
SPLIT_STREAM = 2**32  # second word of the Philox key; shapes10 uses 0 and 1
SPLIT_NAMES = {  # what a split's folder or files may be called, the first found wins
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation"),
    "val": ("val", "valid", "validation"),
}
ALL_SPLIT_NAMES = set().union(*SPLIT_NAMES.values())


class ImageSource(Protocol):
    """What a pipeline asks of a data set. Items are numbered 0 .. len(source) - 1.

    `decode` is called from several threads at once. A source that has all its pixels in memory may
    also offer `images`, an (n, H, W, 3) uint8 numpy array or None; one that holds encoded files
    `encoded(i) -> bytes`, which raises DecodeError like `decode`, and `max_pixels`.
    """

    labels: np.ndarray | None  # (n,) int64; -1 where unknown
    classes: tuple[str, ...] | None  # names, indexed by label

    def __len__(self) -> int: ...

    def decode(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8 pixels of item i; raises DecodeError naming it if it is unreadable."""

    def name(self, i: int) -> str:
        """Where item i comes from, for messages: a path, or "file.parquet[row]"."""

    def fingerprint(self) -> str:
        """Short string that changes with the content, so that a resumed run can compare."""


class ArrayImages:
    """Images of one size that are already in memory (or memory-mapped).

    Args:
        images: (n, H, W, 3) uint8, numpy or torch (CPU).
        labels: (n,) or (n, 1) integers, or None.
        classes: names of the labels, or None.
        origin: what `name` calls the array.

    Raises:
        TypeError: images are not uint8, or labels not integers.
        ValueError: images are not (n, H, W, 3), or there is not one label per image.
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor,
        labels: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        classes: Sequence[str] | None = None,
        origin: str = "array",
    ):
        self.images = images.numpy() if isinstance(images, torch.Tensor) else images
        if self.images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got {self.images.dtype}")
        if self.images.ndim != 4 or self.images.shape[3] != 3 or 0 in self.images.shape:
            raise ValueError(f"images must be (n, height, width, 3), got {self.images.shape}")
        self.labels = None if labels is None else _checked_labels(labels, len(self.images))
        self.classes = None if classes is None else tuple(classes)
        self.origin = origin

    @classmethod
    def load(cls, path: str | Path) -> ArrayImages:
        """Read a .npy file (images only, memory-mapped), or a .npz file with images and labels.

        The arrays of the .npz file are called `images` or `x`, and `labels` or `y` (optional).
        """
        path = Path(path)
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return cls(content, origin=path.name)
        with content:
            images, labels = (
                next((content[key] for key in keys if key in content), None)
                for keys in (("images", "x"), ("labels", "y"))
            )
        if images is None:
            raise ValueError(f"{path} must hold an array 'images' or 'x', got {content.files}")
        return cls(images, labels, origin=path.name)

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"{self.origin}[{i}]"

    def fingerprint(self) -> str:
        """Of the shape, the labels and at most 4096 images evenly spread over the array."""
        step = -(-len(self) // FINGERPRINTED_IMAGES)
        parts = [str(self.images.shape).encode(), np.ascontiguousarray(self.images[::step])]
        return _digest("array", len(self), parts + ([] if self.labels is None else [self.labels]))


def shapes10(split: str = "train", size: int = 24, seed: int = 0) -> ArrayImages:
    """The built-in data set: ten procedural shape classes of random colour and pose.

    Args:
        split: "train" (4096 images) or "test" (1000).
        size: height and width in pixels, at least 8.
        seed: 0 is the data set of the published numbers; the same seed gives the same bits.
            At least 0 and below 2^64.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    _check_seed(seed)
    images, labels = render(split, size, seed)
    return ArrayImages(images, labels, CLASSES, origin=f"shapes10/{split}")


class Subset:
    """Some items of a source, in the order of indices; what else the source offers is kept."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.classes = source.classes
        if hasattr(source, "encoded"):
            self.encoded = self._encoded  # not a lambda: a worker may get the source by pickle
            self.max_pixels = getattr(source, "max_pixels", MAX_PIXELS)

    def _encoded(self, i: int) -> bytes:
        return self.source.encoded(int(self.indices[i]))

    @cached_property
    def images(self) -> np.ndarray | None:
        images = getattr(self.source, "images", None)
        # the copy of an array on the disk might not fit into memory
        return None if images is None or isinstance(images, np.memmap) else images[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def decode(self, i: int) -> np.ndarray:
        return self.source.decode(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def fingerprint(self) -> str:
        return _digest("subset", len(self), [self.source.fingerprint().encode(), self.indices])


def split_source(
    source: ImageSource, test_fraction: float = 0.1, seed: int = 0
) -> tuple[Subset, Subset]:
    """Split a source into (train, test), stratified by label where there are labels.

    Which items go to the test split depends on seed, the number of items and the labels only. Each
    class gives test_fraction of its items, rounded up or down.

    Raises:
        ValueError: test_fraction is not between 0 and 1, seed not in [0, 2^64), or one of the two
            would be empty.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    _check_seed(seed)
    n = len(source)
    words = np.random.Philox(key=np.array([seed, SPLIT_STREAM], np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    if source.labels is not None:
        order = order[np.argsort(source.labels[order], kind="stable")]
    # evenly spread along the classes: each gives its share, rounded up or down
    share = np.floor(np.arange(n + 1) * test_fraction + 0.5)
    is_test = np.zeros(n, bool)
    is_test[order[np.diff(share) > 0]] = True
    if is_test.all() or not is_test.any():
        raise ValueError(
            f"both splits must hold images, got {is_test.sum()} of {n} images in the test split "
            f"for test_fraction {test_fraction}"
        )
    return Subset(source, np.flatnonzero(~is_test)), Subset(source, np.flatnonzero(is_test))


class MissingSplit(ValueError):
    """The data exist, but not the split that was asked for."""


def open_source(spec: str | Path, split: str | None = None) -> ImageSource:
    """Open "shapes10", an image folder, Parquet files or WebDataset shards, a .npz or .npy file.

    A folder has splits if its subfolders, its .parquet or its .tar files are named after them:
    train/ and test/ (or val/, valid/, validation/), or train.parquet, test-00000-of-00001.parquet,
    imagenet1k-train-0000.tar and so on. A .tar file beside images is not opened.

    Args:
        spec: name, path, or pattern of .tar files (see WebDatasetImages).
        split: "train" or None: the train split, or everything where there are no splits at all;
            "test": the test split or, without one, the validation split; "val".

    Raises:
        MissingSplit: there is no such split; the message lists what was looked for.
        ValueError: split is none of these, the path does not exist, or it holds no images.
    """
    if split is not None and split not in SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_NAMES)} or None, got {split!r}")
    if spec == "shapes10":
        return shapes10("test" if split == "val" else split or "train")
    path = Path(spec)
    pattern = path.suffix == ".tar" and any(sign in path.name for sign in "{*?[")
    if not path.exists() and not pattern:
        raise ValueError(
            "data must be 'shapes10', a folder, a .parquet, .tar, .npz or .npy file; "
            f"no {path} exists"
        )
    if path.is_dir():
        if files := sorted(path.rglob("*.parquet")):
            return _open_files(ParquetImages, path, files, split)
        # archives may lie beside the images they held
        if not holds_images(path) and (files := sorted(path.rglob("*.tar"))):
            return _open_files(WebDatasetImages, path, files, split)
        return _open_folder(path, split)
    if split in ("test", "val"):
        raise MissingSplit(f"a single file has no splits, got {path} for the split {split!r}")
    if path.suffix == ".parquet":
        return ParquetImages(path)
    if path.suffix == ".tar":
        return WebDatasetImages(path)
    if path.suffix in (".npz", ".npy"):
        return ArrayImages.load(path)
    raise ValueError(f"a data file must end in .parquet, .tar, .npz or .npy, got {path}")


def open_splits(
    spec: str | Path, test_fraction: float = 0.1, seed: int = 0
) -> tuple[ImageSource, ImageSource]:
    """Open (train, test); where the data have no test split, split_source makes one."""
    try:
        test = open_source(spec, "test")
    except MissingSplit:
        return split_source(open_source(spec), test_fraction, seed)
    return open_source(spec, "train"), test


def _open_files(kind: type, root: Path, files: list[Path], split: str | None) -> ImageSource:
    named = {}
    for file in files:
        *folders, stem = (part.lower() for part in file.relative_to(root).with_suffix("").parts)
        # train-00000-of-00004 and train_0 name a split, trainer does not
        for word in {*folders, *re.split(r"[^a-z]+", stem)}:
            named.setdefault(word, []).append(file)
    for name in SPLIT_NAMES[split or "train"]:
        if name in named:
            return kind(named[name])
    if split is None or (split == "train" and not named.keys() & ALL_SPLIT_NAMES):
        return kind(files)
    found = ", ".join(str(file.relative_to(root)) for file in files[:10])
    raise _missing_split(root, split, found)


def _open_folder(root: Path, split: str | None) -> ImageFolder:
    folders = {name.lower(): root / name for name in class_folders(root)}
    held_out = split if split in ("test", "val") else "test"
    train, test = (
        next((folders[name] for name in SPLIT_NAMES[wanted] if name in folders), None)
        for wanted in ("train", held_out)
    )
    # a class may be called "train": one such folder among others does not make splits
    if not (train and test) and not folders.keys() <= ALL_SPLIT_NAMES:
        train = test = None
    if split in ("test", "val"):
        chosen = test
    else:
        chosen = train or (None if test and split else root)
    if chosen is None:
        raise _missing_split(root, split, ", ".join(sorted(folders)[:10]) or "no subfolders")
    # all splits are numbered by the folders of the train split
    numbering = class_folders(train) if train else None
    return ImageFolder(chosen, classes=numbering or None)


def _missing_split(root: Path, split: str, found: str) -> MissingSplit:
    looked_for = ", ".join(SPLIT_NAMES[split])
    return MissingSplit(
        f"{root} must hold a subfolder or files named {looked_for} for the split "
        f"{split!r}, got {found}"
    )


def decoded_bytes(source: ImageSource) -> int:
    """About what all images take as uint8 pixels, by the headers of up to 64 of them.

    The source must offer `encoded`. Unreadable images are left out; 0 where all of those are.
    """
    sizes = []
    for i in np.linspace(0, len(source) - 1, min(len(source), MEASURED_IMAGES)).astype(int):
        with suppress(DecodeError):
            height, width = declared_size(source.encoded(int(i)))
            sizes.append(3 * height * width)
    return int(np.mean(sizes) * len(source)) if sizes else 0


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2^64, got {seed}")


def _checked_labels(labels, n: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape not in ((n,), (n, 1)):
        raise ValueError(f"labels must be ({n},), one per image, got {labels.shape}")
    return labels.reshape(n).astype(np.int64)


def _digest(kind: str, n: int, parts: list) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"{kind}:{n}:{digest.hexdigest()[:16]}"
