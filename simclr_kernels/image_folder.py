"""ImageFolder: image files in class folders, or in one flat folder without labels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from simclr_kernels.decode import MAX_PIXELS, DecodeError, decode_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


class ImageFolder:
    """A folder of JPEG, PNG, WebP, BMP or GIF files, at any depth, in the order of their paths.

    Every subfolder of root is a class, numbered in the order of the names, even when it is empty;
    images directly in a root without class folders have no labels. Names that begin with a dot
    are skipped.

    Args:
        root: the folder.
        classes: class names in the order of their numbers, where the numbering must be that of
            another split; None numbers the subfolders.
        max_pixels: see decode_image.

    Raises:
        ValueError: no image in root, images both in root and in its subfolders, or a subfolder
            that is not among classes.
        OSError: root or one of its subfolders cannot be listed.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.root = Path(root)
        self.max_pixels = max_pixels
        self.paths = sorted(_image_paths(self.root))  # relative to root, with forward slashes
        if not self.paths:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{self.root} must hold images ({suffixes}), got none")
        loose = sum("/" not in path for path in self.paths)
        if 0 < loose < len(self.paths):
            raise ValueError(
                f"{self.root} must hold either class folders or images, got {loose} images beside "
                f"the folders, such as {next(p for p in self.paths if '/' not in p)}"
            )
        self.labels = self.classes = None
        if not loose:
            self.classes = tuple(class_folders(self.root) if classes is None else classes)
            number = {name: k for k, name in enumerate(self.classes)}
            folders = [path.split("/", 1)[0] for path in self.paths]
            if unknown := sorted(set(folders) - number.keys()):
                raise ValueError(
                    f"the class folders of {self.root} must be among the {len(number)} given "
                    f"classes, got {', '.join(unknown[:10])}"
                )
            self.labels = np.array([number[folder] for folder in folders], np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, i: int) -> bytes:
        try:
            return (self.root / self.paths[i]).read_bytes()
        except OSError as error:
            raise DecodeError(f"{self.name(i)}: {error}") from error

    def decode(self, i: int) -> np.ndarray:
        return decode_image(self.encoded(i), name=self.name(i), max_pixels=self.max_pixels)

    def name(self, i: int) -> str:
        return str(self.root / self.paths[i])

    @cached_property
    def _fingerprint(self) -> str:
        sizes = [_size(self.root / path) for path in self.paths]
        digest = hashlib.sha256(json.dumps([self.paths, sizes]).encode()).hexdigest()
        return f"folder:{len(self)}:{digest[:16]}"

    def fingerprint(self) -> str:
        """Of the paths relative to root and the sizes of the files, -1 where there is none."""
        return self._fingerprint


def holds_images(root: str | Path) -> bool:
    """Whether there is an image file in root, at any depth."""
    return next(_image_paths(Path(root)), None) is not None


def class_folders(root: str | Path) -> list[str]:
    """Names of the subfolders of root, sorted, without those that begin with a dot."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _size(path: Path) -> int:
    """Bytes of a file, -1 where it cannot be found: an unreadable item, as a dangling link is."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _image_paths(root: Path) -> Iterator[str]:
    """Image files at any depth, relative to root, with forward slashes; links are followed."""

    def refuse(error: OSError) -> None:
        raise error

    visited = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        # a link to a parent would be walked for ever; sorted, so that of two links to one folder
        # the same is taken on every file system
        subfolders[:] = [] if real in visited else sorted(s for s in subfolders if s[0] != ".")
        if real not in visited:
            relative = Path(folder).relative_to(root)
            for file in files:
                if file[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                    yield (relative / file).as_posix()
        visited.add(real)
