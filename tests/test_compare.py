"""One view by each pipeline's operators, and the measure of how far they lie apart."""

import sys

import pytest
import torch

from simclr_kernels import AugmentConfig, reference
from simclr_kernels.compare import difference, exact_view, levels_apart, view_by
from simclr_kernels.params import AugmentParams, sample_params

IMAGES = torch.randint(
    0, 256, (3, 40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
SIZES = torch.tensor([[40, 50]]).expand(3, 2)
CONFIG = AugmentConfig.simclr(size=32)
PARAMS = sample_params(CONFIG, SIZES, seed=0, epoch=0, index=torch.arange(3), view=0)


def test_the_exact_view_is_that_of_the_reference_in_float64():
    exact = exact_view(IMAGES, PARAMS, CONFIG)
    assert torch.equal(exact, reference.augment(IMAGES, PARAMS, CONFIG, torch.float64))


def test_fused_views_lie_within_a_thousandth_of_a_level():
    levels = levels_apart(
        view_by("fused", IMAGES, PARAMS, CONFIG), exact_view(IMAGES, PARAMS, CONFIG)
    )
    assert levels.shape == (3, 3, 32, 32) and levels.dtype == torch.float32
    assert difference(levels).maximum < 1e-3


@pytest.mark.parametrize("pipeline", ["fused", "kornia", "dali"])
def test_every_pipeline_leaves_an_image_alone_when_told_so(pipeline):
    images = IMAGES[:, :32, :32].contiguous()
    params = AugmentParams.identity(SIZES.clamp_max(32))
    view = view_by(pipeline, images, params, CONFIG)
    assert view.shape == (3, 3, 32, 32) and view.dtype == torch.float32
    assert difference(levels_apart(view, exact_view(images, params, CONFIG))).maximum < 1e-3


def test_a_difference_is_in_levels_and_its_percentile_leaves_one_value_of_a_hundred():
    exact = torch.zeros(1, 1, 20, 10, dtype=torch.float64)
    views = torch.arange(200).view(1, 1, 20, 10) / 255
    of = difference(levels_apart(-views, exact))
    assert of.mean == pytest.approx(99.5)
    assert of.p99 == pytest.approx(197) and of.maximum == pytest.approx(199)


def test_an_unknown_pipeline_is_named():
    with pytest.raises(ValueError, match="one of fused, kornia, dali, got 'torch'"):
        view_by("torch", IMAGES, PARAMS, CONFIG)


@pytest.mark.parametrize(("pipeline", "library"), [("kornia", "kornia"), ("dali", "nvidia.dali")])
def test_a_missing_library_names_the_extra(monkeypatch, pipeline, library):
    monkeypatch.setitem(sys.modules, library, None)
    # modules that hold a part of the library, or of the pipeline, would be taken from there
    for name in list(sys.modules):
        if name.startswith((f"{library}.", f"simclr_kernels.pipelines.{pipeline}_")):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"pip install .*\[{pipeline}\]"):
        view_by(pipeline, IMAGES, PARAMS, CONFIG)
