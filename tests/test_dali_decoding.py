"""What DALI decodes, and that everything else comes out as from FusedViews."""

import numpy as np
import pytest
import torch
from conftest import shared_path
from PIL import Image
from pipeline_contract import SIDE, assert_same_batches, indices
from test_decode import encoded, png_header

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import DecodeError, ImageFolder
from simclr_kernels.decode import MAX_PIXELS, decode_image
from simclr_kernels.pipelines import epoch_order

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, the extra [dali]")

from simclr_kernels.pipelines.dali_decoding import is_for_dali  # noqa: E402
from simclr_kernels.pipelines.dali_operators import (  # noqa: E402
    DecodeOperators,
    UndecodableBatch,
)
from simclr_kernels.pipelines.dali_views import DALIViews  # noqa: E402
from simclr_kernels.pipelines.fused_views import FusedViews  # noqa: E402

CONFIG = AugmentConfig.cifar10(size=SIDE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos():
    return ImageFolder(shared_path("data/imagenet_samples"))


def jpeg(pixels, **options):
    return encoded(Image.fromarray(pixels), "JPEG", **options)


def smooth(height=40, width=56):
    """A photo-like image of its own for each size."""
    y, x = np.mgrid[:height, :width] / 12
    waves = np.stack([np.sin(x + y * k) + np.cos(y - x * k) for k in (0.2, 0.9, 1.7)], 2)
    return (127.5 + 60 * waves).clip(0, 255).astype(np.uint8)


def oriented(turn):
    exif = Image.Exif()
    exif[0x112] = turn
    return exif


def with_segment(marker, content):
    whole = jpeg(smooth())
    length = (len(content) + 2).to_bytes(2, "big")
    return whole[:2] + bytes([0xFF, marker]) + length + content + whole[2:]


FOR_DALI = {
    "baseline": jpeg(smooth()),
    "progressive": jpeg(smooth(), progressive=True),
    "4:4:4": jpeg(smooth(), subsampling="4:4:4"),
    "4:2:2": jpeg(smooth(41, 57), subsampling="4:2:2"),
    "grey": encoded(Image.fromarray(smooth()).convert("L"), "JPEG"),
    "turned": jpeg(smooth(), exif=oriented(6)),
    "mirrored": jpeg(smooth(), exif=oriented(5)),
    "one pixel": jpeg(smooth(1, 1)),
    "comment": with_segment(0xFE, b"a comment"),
    "cut, but ended": jpeg(smooth())[:-300] + b"\xff\xd9",
    "padded": jpeg(smooth()) + bytes(16),
}
CMYK = Image.fromarray(smooth()).convert("CMYK")
TABLE = jpeg(smooth()).index(b"\xff\xc4")
SOF = jpeg(smooth()).index(b"\xff\xc0")
FOR_PILLOW = {
    "cmyk": encoded(CMYK, "JPEG"),
    "rgb jpeg": jpeg(smooth(), keep_rgb=True),
    "turned by XMP": with_segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
    "png": encoded(smooth()),
    "palette": encoded(Image.fromarray(smooth()).convert("P")),
    "grey 16 bits": encoded(smooth()[..., 0].astype(np.uint16) * 257),
    "transparent": encoded(Image.fromarray(smooth()).convert("RGBA")),
    "gif": encoded(Image.fromarray(smooth()).convert("P"), "GIF"),
    "webp": encoded(smooth(), "WEBP", lossless=True),
    "bmp": encoded(smooth(), "BMP"),
}
UNREADABLE = {
    "empty": b"",
    "text": b"no image",
    "cut": jpeg(smooth())[:-40],
    "no end mark": jpeg(smooth())[:-2],
    "header only": jpeg(smooth())[:SOF],
    "large header": jpeg(smooth())[: SOF + 5] + b"\xff" * 4 + jpeg(smooth())[SOF + 9 :],
    "12 bits": jpeg(smooth())[: SOF + 4] + b"\x0c" + jpeg(smooth())[SOF + 5 :],
    "large png": png_header(60_000, 60_000),
    # headers and end mark are whole: DALI gets it, and refuses it
    "wrong table": jpeg(smooth())[: TABLE + 5] + b"\xff" + jpeg(smooth())[TABLE + 6 :],
}


class Files:
    """A source of encoded files in memory."""

    labels = classes = None

    def __init__(self, files, max_pixels=MAX_PIXELS):
        self.files, self.max_pixels = list(files), max_pixels

    def __len__(self):
        return len(self.files)

    def encoded(self, i):
        return self.files[i]

    def decode(self, i):
        return decode_image(self.files[i], name=self.name(i), max_pixels=self.max_pixels)

    def name(self, i):
        return f"file {i}"

    def fingerprint(self):
        return f"files:{len(self)}"


@pytest.mark.parametrize("name", FOR_DALI)
def test_dali_decodes_like_pillow(name):
    data = FOR_DALI[name]
    assert is_for_dali(data, MAX_PIXELS)
    (pixels,) = DecodeOperators(1, 1, CPU)([data])
    np.testing.assert_array_equal(pixels.numpy(), decode_image(data))


@pytest.mark.parametrize("name", [*FOR_PILLOW, *UNREADABLE])
def test_other_files_are_not_for_dali(name):
    data = (FOR_PILLOW | UNREADABLE)[name]
    assert is_for_dali(data, MAX_PIXELS) == (name == "wrong table")
    if name in FOR_PILLOW:
        decode_image(data)
    else:
        with pytest.raises(DecodeError):
            decode_image(data)


def test_every_kind_of_file_gives_the_bits_of_fused_views():
    files = [*FOR_DALI.values(), *FOR_PILLOW.values()]
    pipeline = DALIViews(Files(files), CONFIG, 5, cache_gib=0)
    assert_same_batches(pipeline, FusedViews(Files(files), CONFIG, 5))
    assert pipeline.decoded_by == {"dali": len(FOR_DALI), "pillow": len(FOR_PILLOW)}


def test_files_dali_refuses_leave_the_others_their_bits():
    """64 files in a batch: beside so many, DALI itself would end the process for a text."""
    files = [jpeg(smooth(40 + k % 3, 48)) for k in range(96)]
    order = epoch_order(96, 0, 0).tolist()
    for place, data in zip(range(3, 96, 7), UNREADABLE.values(), strict=False):
        files[order[place]] = data
    source = Files(files)
    runs = []
    for kind in (DALIViews, FusedViews):
        pipeline = kind(source, CONFIG, 29, workers=2, cache_gib=0, max_bad_fraction=0.2)
        runs.append([batch for _ in range(2) for batch in pipeline])
        assert pipeline.quarantined == len(UNREADABLE)
    assert_same_batches(*runs)


def test_image_limit_of_the_source_holds():
    source = Files([jpeg(smooth(20, 20))] * 7 + [jpeg(smooth(20, 21))], max_pixels=400)
    pipeline = DALIViews(source, CONFIG, 7, max_bad_fraction=0.2)
    assert 7 not in indices(pipeline) and pipeline.quarantine.items() == [7]


def test_one_damaged_file_fails_the_batch_and_the_next_batch_is_right():
    operators = DecodeOperators(4, 2, CPU)
    good = [FOR_DALI["baseline"], FOR_DALI["grey"]]
    for _ in range(2):
        with pytest.raises(UndecodableBatch, match="Failed to decode sample #1"):
            operators([good[0], UNREADABLE["wrong table"], good[1]])
        for data, pixels in zip(good, operators(good), strict=True):
            np.testing.assert_array_equal(pixels.numpy(), decode_image(data))


def test_outputs_outlive_the_graph():
    operators = DecodeOperators(2, 1, CPU)
    first = operators([FOR_DALI["baseline"]])
    for _ in range(3):
        operators([FOR_DALI["grey"], FOR_DALI["progressive"]])
    operators.close()
    np.testing.assert_array_equal(first[0].numpy(), decode_image(FOR_DALI["baseline"]))


def test_photos_have_the_bits_of_fused_views(photos):
    config = AugmentConfig.simclr(32)
    pipeline = DALIViews(photos, config, 48, seed=2)
    assert_same_batches(pipeline, FusedViews(photos, config, 48, seed=2))
    assert pipeline.decoded_by["dali"] > 180 and sum(pipeline.decoded_by.values()) == 192


@pytest.mark.gpu
def test_nvjpeg_is_close_to_pillow(photos):
    files = [data for i in range(32) if is_for_dali(data := photos.encoded(i), MAX_PIXELS)]
    decoded = DecodeOperators(32, 4, torch.device("cuda"))(files)
    for data, pixels in zip(files, decoded, strict=True):
        off = pixels.cpu().int() - torch.from_numpy(decode_image(data)).int()
        assert off.abs().max() <= 4 and off.abs().float().mean() < 0.5
