"""Pipelines from JPEG, and training steps fed by them: `pytest benchmarks --benchmark-only`.

Two regimes, kept apart. An epoch of views from JPEG files, decoding included, all cores; and an
epoch of training steps (encoder, head, loss, LARS) with views that lie ready in memory and with
each pipeline, so that what views and loss add to a step can be read off. On a CPU the encoder is a
small one at 32 x 32; on a GPU ResNet-50 at 224, batch 512. `make bench-views` prints the tables.
"""

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.pipeline_contenders import (
    EPOCH,
    LOSS,
    READY,
    STEP,
    Load,
    epoch_contenders,
    pipeline_measurement,
    step_contenders,
)
from benchmarks.pipeline_peers import PIPELINES
from benchmarks.view_images import photo_source, thumbnails
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ArrayImages

GPU = DEVICE == "cuda"
JPEGS, JPEG_BATCH = (4096, 512) if GPU else (192, 64)
STEPS, STEP_BATCH = (8, 512) if GPU else (4, 64)
# the arrays of a CPU's step are not encoded, so that there is nothing for DALI to decode
OF_A_STEP = tuple(PIPELINES) if GPU else ("fused-cached", "kornia", "albumentations", "torchvision")


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory) -> Load:
    source, origin = photo_source(JPEGS, tmp_path_factory.mktemp("photos"))
    return Load(source, origin, AugmentConfig.simclr(224), JPEG_BATCH)


@pytest.fixture(scope="session")
def step_load(jpegs) -> Load:
    if GPU:
        return jpegs._replace(batch_size=STEP_BATCH, encoder="resnet50")
    pixels, origin = thumbnails(STEPS * STEP_BATCH)
    source = ArrayImages(pixels, origin=origin)
    return Load(source, origin, AugmentConfig.cifar10(), STEP_BATCH, "small")


@pytest.mark.parametrize("name", PIPELINES)
def test_time_of_an_epoch_from_jpeg(cuda_benchmark, asked, jpegs, name):
    cuda_benchmark(
        f"{EPOCH}, {jpegs}",
        name,
        lambda: epoch_contenders(asked, jpegs, DEVICE),
        lambda result, results: pipeline_measurement(name, result, jpegs, EPOCH),
    )


@pytest.mark.parametrize("name", [READY, LOSS, *OF_A_STEP])
def test_time_of_a_training_step(cuda_benchmark, asked, step_load, name):
    cuda_benchmark(
        f"{STEP}, {step_load}",
        name,
        lambda: step_contenders(asked, step_load, DEVICE),
        lambda result, results: pipeline_measurement(name, result, step_load, STEP),
    )
