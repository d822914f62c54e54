"""WebDatasetImages: images in tar files as WebDataset shards them, read in any order."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from simclr_kernels.decode import MAX_PIXELS, DecodeError, decode_image
from simclr_kernels.image_folder import IMAGE_SUFFIXES

LABEL_FIELDS = ("label", "cls")  # of a .json member, the first found counts
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class WebDatasetImages:
    """Images in uncompressed tar files, one sample per key: key.jpg, and its label if there is one.

    The key is a member's path up to the first dot of its file name. Its image is the member with
    one of the suffixes .jpg .jpeg .png .webp .bmp .gif, its label an integer in .cls, or, where the
    first sample has no .cls, the integer `label` or `cls` of its .json; other members are ignored.
    Class names are not part of the format.

    The headers of all shards are read once, some 20 thousand members a second; an image is then
    read by its offset. Every read opens its file: threads and forked processes share nothing.

    Args:
        paths: one file, one folder (all its .tar files, at any depth), a pattern such as
            "train-{0000..0009}.tar" or "train-*.tar", or a list of files.
        max_pixels: see decode_image.

    Raises:
        ValueError: no file or no image; a shard that is cut off, damaged or compressed; a sample
            with two images, or with a label and no image; samples with labels beside others
            without, or labels that are not integers.
        OSError: a file cannot be read.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], *, max_pixels: int = MAX_PIXELS):
        self.max_pixels = max_pixels
        self.files = _tar_files(paths)
        self.classes = None
        self._members: list[str] = []
        places, labels, suffix = [], [], None
        for shard, path in enumerate(self.files):
            for key, sample in _samples(path).items():
                if sample.image is None:
                    if ".cls" in sample.notes:
                        raise ValueError(f"every label must have an image, got {path}: {key}.cls")
                    continue
                if not places:
                    suffix = _label_suffix(path, key, sample.notes)
                labels.append(_label(path, key, sample.notes, suffix))
                self._members.append(sample.image.name)
                places.append((shard, sample.image.offset_data, sample.image.size))
        if not places:
            raise ValueError(f"tar files must hold images, got none in {self.files[0]}")
        self._places = np.array(places, np.int64)
        self.labels = None if suffix is None else np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, i: int) -> bytes:
        shard, offset, size = self._places[i].tolist()
        try:
            with open(self.files[shard], "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DecodeError(f"{self.name(i)}: {error}") from error
        if len(data) < size:
            raise DecodeError(f"{self.name(i)}: the file ends after {len(data)} of {size} bytes")
        return data

    def decode(self, i: int) -> np.ndarray:
        return decode_image(self.encoded(i), name=self.name(i), max_pixels=self.max_pixels)

    def name(self, i: int) -> str:
        return f"{self.files[int(self._places[i, 0])]}/{self._members[i]}"

    @cached_property
    def _fingerprint(self) -> str:
        index = [self._members, self._places.tolist(), None]
        if self.labels is not None:
            index[2] = self.labels.tolist()
        digest = hashlib.sha256(json.dumps(index).encode()).hexdigest()
        return f"webdataset:{len(self)}:{digest[:16]}"

    def fingerprint(self) -> str:
        """Of the members' names, places and sizes, and of the labels."""
        return self._fingerprint


class _Sample:
    """The members of one key."""

    def __init__(self):
        self.image: tarfile.TarInfo | None = None
        self.notes: dict[str, bytes] = {}  # content of .cls and .json


def _samples(path: Path) -> dict[str, _Sample]:
    """The samples of one shard by key, in the order of their first members."""
    samples: dict[str, _Sample] = {}
    with open(path, "rb") as file:
        for member in _members(path, file):
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not (stem and dot) or member.issparse():
                continue
            key, suffix = folder + slash + stem, "." + suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                sample = samples.setdefault(key, _Sample())
                if sample.image is not None:
                    raise ValueError(
                        "every sample must have one image, got "
                        f"{sample.image.name} and {member.name} in {path}"
                    )
                sample.image = member
            elif suffix in (".cls", ".json"):
                sample = samples.setdefault(key, _Sample())
                if suffix in sample.notes:
                    raise ValueError(f"{key}{suffix} must be in {path} once, got it twice")
                file.seek(member.offset_data)
                sample.notes[suffix] = file.read(member.size)
    return samples


def _members(path: Path, file) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file; tarfile itself takes damage in the middle for the end."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # would be kept for ever
                if member.isreg():
                    yield member
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} must be a whole, uncompressed tar file, got a damaged one: {error}"
        ) from error
    file.seek(archive.offset)
    rest = file.read()
    if not rest or any(rest):
        what = f"data that are no member from byte {archive.offset} on" if rest else "no end mark"
        raise ValueError(f"{path} must end in blocks of zeros, got {what}")


def _label_suffix(path: Path, key: str, notes: dict[str, bytes]) -> str | None:
    """Where the labels are, judged by the first sample; None if it has none."""
    if ".cls" in notes:
        return ".cls"
    fields = _json(path, key, notes[".json"]) if ".json" in notes else {}
    return ".json" if any(isinstance(fields.get(name), int) for name in LABEL_FIELDS) else None


def _label(path: Path, key: str, notes: dict[str, bytes], suffix: str | None) -> int:
    if suffix is None:
        if ".cls" in notes:
            raise ValueError(f"all samples must have a .cls or none, got {path}: {key}.cls")
        return -1
    if suffix not in notes:
        raise ValueError(f"all samples must have a {suffix} or none, got {path}: {key} without")
    if suffix == ".cls":
        label = notes[".cls"].decode("utf-8", "replace").strip()
        if re.fullmatch(r"-?\d{1,19}", label):
            label = int(label)
    else:
        fields = _json(path, key, notes[".json"])
        label = next((fields[name] for name in LABEL_FIELDS if name in fields), None)
    if isinstance(label, int) and -(2**63) <= label < 2**63:
        return label
    raise ValueError(f"a label must be a 64-bit integer, got {label!r} in {path}: {key}{suffix}")


def _json(path: Path, key: str, content: bytes) -> dict:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {key}.json must be JSON, got {error}") from error
    return fields if isinstance(fields, dict) else {}


def _tar_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(paths, (str, Path)):
        files = [Path(path) for path in paths]
    elif Path(paths).is_dir():
        files = sorted(Path(paths).rglob("*.tar"))
    elif Path(paths).exists():
        files = [Path(paths)]
    else:
        files = [Path(file) for name in _without_ranges(str(paths)) for file in _matches(name)]
    if not files:
        raise ValueError(f"paths must name at least one .tar file, got {paths}")
    return files


def _without_ranges(pattern: str) -> list[str]:
    """{0000..0009} replaced by each of its numbers, as wide as the first is written."""
    pieces = RANGE.split(pattern)
    choices = [
        [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    return [
        "".join(itertools.chain(*zip(pieces[::3], [*numbers, ""], strict=True)))
        for numbers in itertools.product(*choices)
    ]


def _matches(name: str) -> list[str]:
    """The files of a pattern with * or ?; a name without them must be that of a file."""
    return sorted(glob.glob(name)) if glob.has_magic(name) else [name]
