"""DALIViews: the contract in both modes, every kind of source, threads, errors."""

import importlib
import os
import sys
import time

import numpy as np
import pipeline_contract
import pytest
import torch
from PIL import Image
from pipeline_contract import SIDE, N, PipelineContract, assert_same_batches
from test_decode import encoded
from test_webdataset_images import write

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ArrayImages, ImageFolder, ParquetImages, WebDatasetImages
from simclr_kernels.params import sample_params

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, the extra [dali]")

from simclr_kernels.pipelines.dali_views import DALIViews, dali_augment  # noqa: E402
from simclr_kernels.pipelines.fused_views import FusedViews  # noqa: E402

CONFIG = AugmentConfig.cifar10(size=SIDE)
WITH_BLUR = AugmentConfig.byol(size=24)
folder = pngs = pipeline_contract.folder


def as_jpeg(root, **options):
    """The same images as JPEG files under the same names, which end in .png still."""
    for path in root.rglob("*.png"):
        path.write_bytes(encoded(Image.open(path), "JPEG", quality=95, **options))
    return root


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpegs")
    return ImageFolder(as_jpeg(pipeline_contract.write_images(root)))


class TestDALIViewsOfJPEG(PipelineContract):
    """DALI decodes, our kernels make the views."""

    @pytest.fixture
    def folder(self, jpegs):
        return jpegs

    @pytest.fixture(autouse=True)
    def jpeg_files(self, monkeypatch):
        whole = pipeline_contract.write_images

        def write_images(root, bad=()):
            as_jpeg(whole(root))
            for k, i in enumerate(bad):
                path = root / f"class{i // 15}" / f"{i:02}.png"
                data = path.read_bytes()
                path.write_bytes((b"", data[: len(data) // 2] + b"\xff\xd9", b"no image")[k % 3])
            return root

        monkeypatch.setattr(pipeline_contract, "write_images", write_images)

    def make(self, source, batch_size, **options):
        return DALIViews(source, CONFIG, batch_size, **options)

    def test_animations_and_rare_modes_are_images(self, pngs, tmp_path):
        super().test_animations_and_rare_modes_are_images(pngs, tmp_path)


class TestDALIViewsByDALI(PipelineContract):
    """DALI makes the views; the files are PNG, which decode_image decodes."""

    def make(self, source, batch_size, **options):
        return DALIViews(source, CONFIG, batch_size, views="dali", **options)


def test_folder_parquet_and_shards_give_the_same_bits(jpegs, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    files = [jpegs.encoded(i) for i in range(N)]
    pq.write_table(pa.table({"image": files, "label": jpegs.labels}), tmp_path / "x.parquet")
    members = []
    for i, data in enumerate(files):
        members += [(f"{i:02}.jpg", data), (f"{i:02}.cls", b"%d" % jpegs.labels[i])]
    write(tmp_path / "x.tar", members)
    expected = list(FusedViews(jpegs, CONFIG, 8, seed=3))
    for source in (
        jpegs,
        ParquetImages(tmp_path / "x.parquet"),
        WebDatasetImages(tmp_path / "x.tar"),
    ):
        pipeline = DALIViews(source, CONFIG, 8, seed=3)
        assert_same_batches(pipeline, expected)
        assert pipeline.decoded_by["dali"] >= 24 and not pipeline.decoded_by["pillow"]


@pytest.mark.parametrize("views", ["fused", "dali"])
def test_arrays_are_fed_as_pixels(pngs, views, tmp_path):
    pixels = np.stack([pngs.decode(i) for i in range(N)])
    np.save(tmp_path / "pixels.npy", pixels)
    expected = list(DALIViews(pngs, CONFIG, 8, views=views))
    mapped = ArrayImages(np.load(tmp_path / "pixels.npy", mmap_mode="r"), pngs.labels)
    for source in (ArrayImages(pixels, pngs.labels), mapped):
        pipeline = DALIViews(source, CONFIG, 8, views=views, cache_gib=0)
        assert_same_batches(pipeline, expected)
        assert pipeline.decoded_by == {}


def test_views_by_dali_are_dali_augment_in_the_dtype_asked_for(pngs):
    options = {"dtype": torch.float16, "channels_last": True}
    pipeline = DALIViews(pngs, WITH_BLUR, 9, views="dali", seed=6, **options)
    batch = next(iter(pipeline))
    assert batch.views.dtype == torch.float16
    assert batch.views.is_contiguous(memory_format=torch.channels_last)
    images = torch.from_numpy(np.stack([pngs.decode(int(i)) for i in batch.index]))
    sizes = torch.tensor([images.shape[1:3]] * 9)
    for view, views in enumerate(batch.views.chunk(2)):
        params = sample_params(WITH_BLUR, sizes, seed=6, epoch=0, index=batch.index, view=view)
        expected = dali_augment(images, params, WITH_BLUR).half()
        torch.testing.assert_close(views, expected, rtol=0, atol=0, check_stride=False)


def threads_fall_to(count: int) -> bool:
    """The system lists a thread for a moment after it was joined."""
    until = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > count and time.monotonic() < until:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task")) <= count


def test_threads_of_dali_end_on_close_and_come_back(jpegs):
    pipeline = DALIViews(jpegs, CONFIG, 8, views="dali", workers=3, cache_gib=0)
    list(pipeline)
    pipeline.close()
    time.sleep(0.1)
    without = len(os.listdir("/proc/self/task"))
    batches = list(pipeline)
    # three threads each of the two graphs, besides what DALI needs to run them
    assert len(os.listdir("/proc/self/task")) >= without + 6
    pipeline.close()
    assert threads_fall_to(without)
    assert_same_batches(pipeline, batches)
    del pipeline
    assert threads_fall_to(without)


def test_arguments_are_checked(pngs):
    study = AugmentConfig(size=SIDE, sobel=0.5)
    for options, config, message in [
        ({"views": "ours"}, CONFIG, "views must be 'fused' or 'dali', got 'ours'"),
        ({"views": "dali"}, study, "has no study operations"),
        ({"workers": -1}, CONFIG, "workers must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            DALIViews(pngs, config, 8, **options)


def test_missing_dali_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name in [name for name in sys.modules if name.startswith("simclr_kernels.pipelines.dali")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install simclr-kernels\[dali\]"):
        importlib.import_module("simclr_kernels.pipelines.dali_views")


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("views", ["fused", "dali"])
def test_views_on_a_gpu_are_those_of_the_cpu_but_for_the_decoder(jpegs, views):
    runs = []
    for device in ("cpu", "cuda"):
        pipeline = DALIViews(jpegs, CONFIG, 8, views=views, device=device)
        runs.append(list(pipeline))
        pipeline.close()
    for cpu, gpu in zip(*runs, strict=True):
        assert {tensor.device.type for tensor in gpu} == {"cuda"}
        assert torch.equal(gpu.index.cpu(), cpu.index) and torch.equal(gpu.label.cpu(), cpu.label)
        assert (gpu.views.cpu() - cpu.views).abs().mean() < 3 / 255


@pytest.mark.gpu
def test_bits_on_a_gpu_do_not_depend_on_the_batch(jpegs):
    runs = []
    for batch_size, workers in ((10, 4), (15, 1), (6, 0)):
        pipeline = DALIViews(jpegs, CONFIG, batch_size, device="cuda", workers=workers)
        runs.append(pipeline_contract.views_by_index(pipeline))
    for run in runs[1:]:
        for i, views in run.items():
            assert torch.equal(views, runs[0][i])
