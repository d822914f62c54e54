"""Recipes: what the presets set and what is refused."""

import dataclasses

import jsonargparse
import pytest

from simclr_kernels.augment_config import IMAGENET_MEAN, AugmentConfig


def test_the_default_is_simclr_v2_at_224_pixels():
    assert AugmentConfig() == AugmentConfig.simclr() == AugmentConfig.simclr(224, 1.0)


def test_strength_scales_the_four_half_ranges():
    config = AugmentConfig.simclr(96, strength=0.5)
    ranges = (config.brightness, config.contrast, config.saturation, config.hue)
    assert config.size == 96 and ranges == (0.4, 0.4, 0.4, 0.1)


def test_presets_differ_where_their_papers_do():
    v1, v2 = AugmentConfig.simclr_v1(), AugmentConfig.simclr()
    assert dataclasses.replace(v1, brightness_mode="multiply") == v2 != v1
    assert AugmentConfig.cifar10() == dataclasses.replace(
        AugmentConfig.simclr(32, 0.5), blur=(0.0, 0.0)
    )
    byol = AugmentConfig.byol()
    assert byol.blur == (1.0, 0.1) and byol.solarize == (0.0, 0.2)
    assert byol.brightness_mode == "add" and byol.sampler == "tensorflow"
    moco = AugmentConfig.moco_v2()
    assert moco.area == (0.2, 1.0) and moco.hue == 0.1 and moco.mean == IMAGENET_MEAN
    assert AugmentConfig.torchvision(strength=0.5).contrast == 0.4
    assert AugmentConfig.torchvision().sampler == "torchvision"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"size": 0}, r"size must be a whole number >= 1, got 0"),
        ({"size": 2.5}, r"size must be a whole number >= 1, got 2.5"),
        ({"sampler": "pil"}, r"sampler must be one of tensorflow, torchvision, got 'pil'"),
        ({"brightness_mode": "gamma"}, r"brightness_mode must be one of multiply, add, got"),
        ({"flip": 1.5}, r"flip is a probability and must be in \[0, 1\], got 1.5"),
        ({"jitter": -0.1}, r"jitter is a probability"),
        ({"grayscale": float("nan")}, r"grayscale is a probability"),
        ({"blur": (0.5, 2.0)}, r"blur\[1\] is a probability and must be in \[0, 1\], got 2.0"),
        ({"solarize": (0.5,)}, r"solarize must be two probabilities \(one per view\)"),
        ({"brightness": -1.0}, r"brightness is a half-range and must be in \[0, inf\], got -1.0"),
        ({"contrast": 1.01}, r"contrast is a half-range and must be in \[0, 1.0\], got 1.01"),
        ({"saturation": 1.2}, r"saturation is a half-range and must be in \[0, 1.0\], got 1.2"),
        ({"hue": 0.6}, r"hue is a half-range and must be in \[0, 0.5\], got 0.6"),
        ({"area": (0.5, 0.2)}, r"area must be \(low, high\) with 0 < low <= high <= 1.0"),
        ({"area": (0.5, 1.2)}, r"area must be .* got \(0.5, 1.2\)"),
        ({"aspect": (0.0, 1.0)}, r"aspect must be \(low, high\) with 0 < low <= high <= inf"),
        ({"sigma_px": (2.0, 0.1)}, r"sigma_px must be \(low, high\)"),
        ({"area": (0.05, 0.08)}, r"min_covered must be in \[0, largest area 0.08\], got 0.1"),
        ({"mean": (0.5, 0.5, 0.5)}, r"mean and std must be given together, got mean .* std None"),
        ({"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, r"three values each, std above 0"),
        ({"mean": (0.5,) * 2, "std": (1.0,) * 2}, r"three values each"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_value_outside_its_rule_is_refused_and_named(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)


def test_strength_above_one_and_a_quarter_is_refused_as_by_the_original():
    with pytest.raises(ValueError, match=r"contrast is a half-range"):
        AugmentConfig.simclr(strength=1.3)


def test_a_command_line_can_set_every_field():
    def command(views: AugmentConfig):
        return views

    options = ["--views.size=32", "--views.blur=[0, 0.5]", "--views.mean=[0.5, 0.5, 0.5]"]
    options += ["--views.std=[1, 1, 1]", "--views.sampler=torchvision", "--views.crop=false"]
    config = jsonargparse.auto_cli(command, args=options)
    assert config == AugmentConfig(
        size=32, blur=(0, 0.5), mean=(0.5,) * 3, std=(1, 1, 1), sampler="torchvision", crop=False
    )
