"""ParquetImages: images in Parquet files as Hugging Face data sets keep them; needs pyarrow."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from simclr_kernels.decode import MAX_PIXELS, DecodeError, decode_image

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
INDEX_BYTES = 2**20
KEPT_ROW_GROUPS = 16


class ParquetImages:
    """Images in Parquet files as Hugging Face data sets keep them; needs the extra [hf].

    The image column is `image` or `img`, a struct {bytes, path} or plain binary; a row with a path
    and no bytes names a file relative to its Parquet file. The label column, if any, is `label`,
    `labels` or `fine_label`; class names come from the schema's huggingface metadata.

    The encoded images stay in memory once read if all of them fit into memory_gib. Otherwise the
    last 16 row groups do, and reading in random order reads one row group per image: extract such
    a data set into a folder.

    Args:
        paths: one file, one folder (all its Parquet files, at any depth), or a list of files.
        max_pixels: see decode_image.
        memory_gib: limit in GiB on encoded images kept in memory.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: no file, no image column, differing columns, or labels that are not integers.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        max_pixels: int = MAX_PIXELS,
        memory_gib: float = 4.0,
    ):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                "Parquet files need pyarrow: pip install simclr-kernels[hf]"
            ) from error
        self.max_pixels = max_pixels
        self.files = _parquet_files(paths)
        self._shards = [pyarrow.parquet.ParquetFile(path) for path in self.files]
        schema = self._shards[0].schema_arrow
        self._image = _column(schema, IMAGE_COLUMNS)
        if self._image is None:
            raise ValueError(
                f"{self.files[0]} must have a column 'image' or 'img', got {schema.names}"
            )
        label = _column(schema, LABEL_COLUMNS)
        for path, shard in zip(self.files, self._shards, strict=True):
            if not {self._image, label} - {None} <= set(shard.schema_arrow.names):
                raise ValueError(
                    f"all files must have the columns of {self.files[0]} ({schema.names}), "
                    f"got {path} with {shard.schema_arrow.names}"
                )
        self.labels = self._read_labels(label)
        self.classes = _huggingface_classes(schema.metadata, label)

        # every row group of every shard, and the number of its first row
        self._groups = [(s, g) for s, f in enumerate(self._shards) for g in range(f.num_row_groups)]
        metadata = [self._shards[s].metadata.row_group(g) for s, g in self._groups]
        self._starts = np.cumsum([0] + [group.num_rows for group in metadata])
        self._shard_starts = np.cumsum([0] + [f.metadata.num_rows for f in self._shards])
        fits = sum(group.total_byte_size for group in metadata) <= memory_gib * 2**30
        self._read_group = lru_cache(None if fits else KEPT_ROW_GROUPS)(self._read_group)
        self._lock = Lock()
        if not len(self):
            raise ValueError(f"Parquet files must hold images, got no rows in {self.files[0]}")

    def _read_labels(self, label: str | None) -> np.ndarray | None:
        if label is None:
            return None
        columns = [shard.read(columns=[label]).column(0) for shard in self._shards]
        if not str(columns[0].type).startswith(("int", "uint")):
            raise ValueError(f"the column {label!r} must hold integers, got {columns[0].type}")
        labels = np.concatenate([c.cast("int64").fill_null(-1).to_numpy() for c in columns])
        # test splits whose labels are kept secret hold -1 only
        return labels if (labels >= 0).any() else None

    def _read_group(self, group: int):
        shard, row_group = self._groups[group]
        return self._shards[shard].read_row_group(row_group, columns=[self._image]).column(0)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def encoded(self, i: int) -> bytes:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        try:
            # one file handle must not be read by two threads
            with self._lock:
                rows = self._read_group(group)
            cell = rows[i - int(self._starts[group])].as_py()
            if not isinstance(cell, dict):
                return cell or b""
            if cell.get("bytes") is None and cell.get("path"):
                shard, _ = self._groups[group]
                return (self.files[shard].parent / cell["path"]).read_bytes()
            return cell.get("bytes") or b""
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DecodeError(f"{self.name(i)}: {error}") from error

    def decode(self, i: int) -> np.ndarray:
        return decode_image(self.encoded(i), name=self.name(i), max_pixels=self.max_pixels)

    def name(self, i: int) -> str:
        shard = int(np.searchsorted(self._shard_starts, i, side="right")) - 1
        return f"{self.files[shard]}[{i - int(self._shard_starts[shard])}]"

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - INDEX_BYTES))
                digest.update(b"%d" % size + file.read())
        return f"parquet:{len(self)}:{digest.hexdigest()[:16]}"

    def fingerprint(self) -> str:
        """Of the size and the last MiB of every file, where Parquet keeps its index."""
        return self._fingerprint


def _parquet_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(paths, (str, Path)):
        root = Path(paths)
        files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
        if not files:
            raise ValueError(f"{root} must hold .parquet files, got none")
    else:
        files = [Path(path) for path in paths]
    if not files:
        raise ValueError("paths must name at least one Parquet file, got none")
    return files


def _column(schema, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _huggingface_classes(metadata: dict[bytes, bytes] | None, label: str | None):
    """The ClassLabel names of the label column, or None."""
    described = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(label) or {}
    names = feature.get("names")
    return tuple(names) if names else None
