"""Damaged files: an image or a DecodeError, in bounded time and memory, whatever the bytes."""

import io
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_path
from PIL import Image

from simclr_kernels.decode import DecodeError, decode_image

MAX_PIXELS = 1_000_000


def files(photo: Image.Image) -> list[bytes]:
    """A photo in every common encoding, still and animated."""
    photo = photo.convert("RGB")
    photo.thumbnail((200, 200))
    moving = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0})]
    kinds += [(kind, options) for kind in ("PNG", "WEBP", "GIF") for options in ({}, moving)]
    encoded = []
    for kind, options in kinds:
        buffer = io.BytesIO()
        photo.save(buffer, kind, **options)
        encoded.append(buffer.getvalue())
    return encoded


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, in the header or anywhere; sometimes cut off as well."""
    pixels = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(0, rng.choice([64, 600, len(data)]), rng.integers(1, 8))
    pixels[where % len(data)] = rng.integers(0, 256, len(where))
    return pixels.tobytes()[: None if rng.random() < 0.7 else rng.integers(len(data))]


def fuzz(photo: Image.Image, attempts: int) -> dict[str, float]:
    """Decode damaged files; the outcome, the longest time and what the memory grew by."""
    warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
    rng = np.random.default_rng(0)
    originals = files(photo)
    report = {"images": 0, "errors": 0, "seconds": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for attempt in range(attempts):
        data = damaged(originals[attempt % len(originals)], rng)
        start = time.thread_time()
        try:
            image = decode_image(data, max_pixels=MAX_PIXELS)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            assert 0 < image.size <= 3 * MAX_PIXELS
            report["images"] += 1
        except DecodeError:
            report["errors"] += 1
        report["seconds"] = max(report["seconds"], time.thread_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return report | {"bytes_per_pixel": grown * 1024 / MAX_PIXELS}


# in a process of its own, whose peak of memory is that of the decoder
@pytest.mark.parametrize("photo", ["drawn", "photo"])
def test_damaged_files_give_an_image_or_an_error_in_bounded_time_and_memory(photo, tmp_path):
    if photo == "photo":
        path = sorted(shared_path("data/imagenet_samples").rglob("*.*"))[0]
    else:
        path = tmp_path / "drawn.png"
        ramp = np.add.outer(np.arange(150), np.arange(200)).astype(np.uint8)
        Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], -1)).save(path)
    output = subprocess.run(
        [sys.executable, __file__, str(path), "1500"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(map(str, sys.path))},
    )
    assert output.returncode == 0, output.stderr
    report = json.loads(output.stdout)
    assert report["images"] > 200 and report["errors"] > 400
    assert report["seconds"] < 2
    assert report["bytes_per_pixel"] < 60  # 20 for the largest image allowed, and the heap's slack


def test_every_truncation_of_a_small_file_is_an_image_or_an_error():
    photo = Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3))
    for data in files(photo):
        for end in range(0, len(data), 3):
            try:
                assert decode_image(data[:end]).shape == (12, 9, 3)
            except DecodeError:
                continue


if __name__ == "__main__":
    print(json.dumps(fuzz(Image.open(Path(sys.argv[1])), int(sys.argv[2]))))
