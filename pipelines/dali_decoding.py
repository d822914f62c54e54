"""Decoding by DALI in the order of a pipeline: which files it gets, and what becomes of the others.

DALI fails a whole batch for one damaged file and, on a CPU, can end the process for one it takes
for no image (2.4.0). So it gets only what it decodes as decode_image does: 8-bit JPEG files,
baseline or progressive, grey or YCbCr, whose segments are in order from the first to the end mark.
All other files are decoded by decode_image: PNG, WebP, GIF and the rest, for which DALI has no
decoder on the GPU and other rules for transparency, palettes and 16 bits; CMYK, RGB and 12-bit
JPEG; orientation in XMP; images above max_pixels; and whatever is broken, which it names.
If DALI refuses a file all the same, the batch is decoded file by file, and those that fail by
decode_image. The path of a file thus never depends on the batch it is in.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.data import DecodeError, ImageSource
from simclr_kernels.decode import MAX_PIXELS, decode_image
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines.dali_operators import DecodeOperators, UndecodableBatch
from simclr_kernels.pipelines.decoding import DecodedBatches
from simclr_kernels.pipelines.quarantine import Quarantine

CHUNK = 64  # images DALI decodes at once
END_MARK = b"\xff\xd9"
TRAILING_BYTES = 64  # that may follow it, as padding does
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=\"|>)[2-8]")  # where Pillow looks for it


class DALIDecodedBatches(DecodedBatches):
    """DecodedBatches by DALI; on a GPU batches are made there, and none are kept.

    Args:
        source: see ImageSource; must offer `encoded`.
        quarantine: takes the unreadable items.
        workers: threads of DALI, and as many that read; 0 decodes image by image in the calling
            thread.
        cache_bytes: limit on decoded pixels kept in memory, 0 on a GPU.
        device: where the pixels are wanted.
    """

    def __init__(
        self,
        source: ImageSource,
        quarantine: Quarantine,
        workers: int,
        cache_bytes: float,
        device: torch.device,
    ):
        on_gpu = device.type == "cuda"
        # two chunks in work: one is read while the other is decoded
        super().__init__(source, quarantine, min(workers, 2), 0 if on_gpu else cache_bytes)
        self.chunk = CHUNK if workers else 1
        self.threads, self.device = max(workers, 1), device
        self.max_pixels = getattr(source, "max_pixels", MAX_PIXELS)
        self.decoded_by = {"dali": 0, "pillow": 0}
        self._operators = DecodeOperators(self.chunk, self.threads, device)
        self._refused: set[int] = set()
        self._running = threading.Lock()  # DALI decodes one batch at a time
        self._counting = threading.Lock()
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def _decode(self, items: list[int]) -> list:
        if self.threads > 1 and len(items) > 1:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="decode-read") as readers:
                read = list(readers.map(self._read, items))
        else:
            read = [self._read(i) for i in items]
        for_dali = [k for k, content in enumerate(read) if isinstance(content, bytes)]
        with self._running:
            decoded = self._by_dali([items[k] for k in for_dali], [read[k] for k in for_dali])
        for k, image in zip(for_dali, decoded, strict=True):
            read[k] = image
        return read

    def _read(self, i: int) -> bytes | np.ndarray | Tensor | DecodeError:
        """A file for DALI, pixels, or why there are none."""
        image = self.cache.get(i)
        if image is not None:
            return image
        try:
            data = self.source.encoded(i)
        except DecodeError as error:
            return error
        if i not in self._refused and is_for_dali(data, self.max_pixels):
            return data
        return self._by_pillow(i, data)

    def _by_pillow(self, i: int, data: bytes) -> np.ndarray | Tensor | DecodeError:
        try:
            name = self.source.name(i)
            image = decode_image(data, name=name, max_pixels=self.max_pixels)
        except DecodeError as error:
            return error
        self._count("pillow", 1)
        if self._stream is None:
            return image
        # the stream that reads it, see _collated
        with torch.cuda.stream(self._stream):
            return torch.from_numpy(image).to(self.device)

    def _by_dali(self, items: list[int], files: list[bytes]) -> list:
        if not items:
            return []
        try:
            images = self._operators(files)
        except UndecodableBatch:
            if len(items) > 1:
                singly = zip(items, files, strict=True)
                return [image for i, data in singly for image in self._by_dali([i], [data])]
            self._refused.add(items[0])
            return [self._by_pillow(items[0], files[0])]
        self._count("dali", len(images))
        return images if self._stream is not None else [image.numpy() for image in images]

    def _count(self, decoder: str, images: int) -> None:
        with self._counting:
            self.decoded_by[decoder] += images

    def _collated(self, index: tuple[int, ...], images: tuple) -> tuple[Tensor, PackedImages]:
        if self._stream is None:
            return super()._collated(index, images)
        with torch.cuda.stream(self._stream):
            sizes = torch.tensor([image.shape[:2] for image in images])
            ends = (3 * sizes.prod(1)).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
            buffer = torch.cat([image.reshape(-1) for image in images])
            packed = PackedImages(
                buffer, offsets.to(self.device), sizes.to(self.device), checked=True
            )
            numbers = torch.tensor(index).to(self.device)
        # complete on the host's clock: no reader has to wait, and DALI may reuse its memory
        self._stream.synchronize()
        return numbers, packed

    def close(self) -> None:
        """Ends DALI's threads; a later batch starts them again."""
        self._operators.close()


def is_for_dali(data: bytes, max_pixels: int) -> bool:
    """Whether DALI may have this file; see the module. Only headers are looked at."""
    if data[:2] != b"\xff\xd8" or data.rfind(END_MARK, -TRAILING_BYTES) < 0:
        return False
    at, frame = 2, False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        content = data[at + 4 : at + 2 + length]
        if length < 2 or len(content) != length - 2:
            return False
        if marker == 0xDA:  # the scan
            return frame
        check = SEGMENTS.get(marker)
        if check is None and marker not in PLAIN_SEGMENTS:
            return False
        if check is not None and not check(content, max_pixels):
            return False
        frame = frame or marker in FRAMES
        at += 2 + length
    return False


def _is_plain_frame(content: bytes, max_pixels: int) -> bool:
    if len(content) < 6 or len(content) != 6 + 3 * content[5]:
        return False
    height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
    components = content[6::3]
    plain = content[0] == 8 and len(components) in (1, 3) and components != b"RGB"
    return plain and 0 < height * width <= max_pixels


def _is_not_rgb(content: bytes, max_pixels: int) -> bool:
    """Of an Adobe segment, whose last byte names the colours: 0 for RGB."""
    return not content.startswith(b"Adobe") or content[11:12] != b"\0"


def _has_no_xmp_orientation(content: bytes, max_pixels: int) -> bool:
    return XMP_ORIENTATION.search(content) is None


FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
SEGMENTS: dict[int, Callable[[bytes, int], bool]] = {
    **dict.fromkeys(FRAMES, _is_plain_frame),
    0xEE: _is_not_rgb,
    0xE1: _has_no_xmp_orientation,
}
# tables, restart interval, comment, application data
PLAIN_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
