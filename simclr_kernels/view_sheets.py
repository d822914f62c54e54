"""What `simclr-kernels views` draws of an image: views, pipelines side by side, all recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from simclr_kernels import reference
from simclr_kernels.augment import augment
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.compare import Difference, exact_view, view_by
from simclr_kernels.config import ViewsConfig
from simclr_kernels.params import AugmentParams, sample_params
from simclr_kernels.report_pictures import save_contact_sheet
from simclr_kernels.report_views import Row, save_comparison, save_recipes
from simclr_kernels.study_params import StudyParams

PRESETS = get_args(get_type_hints(ViewsConfig)["preset"])


def draw_views(
    image: np.ndarray, config: AugmentConfig, count: int, *, seed: int, index: int
) -> tuple[Tensor, AugmentParams]:
    """The image (H, W, 3) uint8 repeated count times, and what the recipe draws for each.

    Epochs give as many draws as asked for; even numbers are view 0, odd ones view 1.
    """
    draws = [
        sample_params(
            config,
            torch.tensor([image.shape[:2]]),
            seed=seed,
            epoch=k // 2,
            index=torch.tensor([index]),
            view=k % 2,
        )
        for k in range(count)
    ]
    return _repeated(image, count), AugmentParams.concatenate(draws)


def _repeated(image: np.ndarray, count: int) -> Tensor:
    return torch.from_numpy(image).expand(count, *image.shape)


def draw_contact_sheet(
    image: np.ndarray, config: AugmentConfig, out_png: Path, count: int, *, seed: int, index: int
) -> None:
    """The image with its crop boxes, and count views with the parameters that made them."""
    images, params = draw_views(image, config, count, seed=seed, index=index)
    captions = [params.describe(k, config.brightness_mode) for k in range(count)]
    save_contact_sheet(image, augment(images, params, config), captions, params.crop, out_png)


def draw_comparison(
    image: np.ndarray,
    config: AugmentConfig,
    pipelines: Sequence[str],
    out_png: Path,
    count: int,
    *,
    seed: int,
    index: int,
) -> tuple[list[dict[str, Difference]], dict[str, str]]:
    """count views by the reference and by each pipeline, with the same parameters.

    Returns:
        For each view the difference from the reference by pipeline; and why other pipelines
        made none: what to install, or what they cannot do.
    """
    images, params = draw_views(image, config, count, seed=seed, index=index)
    views, missing = {}, {}
    for name in pipelines:
        try:
            views[name] = view_by(name, images, params, config).clamp(0, 1)
        except (ImportError, ValueError) as error:
            # no such library here, or it has no such operation; a wrong argument fails below
            views[name] = missing[name] = str(error)
    captions = [params.describe(k, config.brightness_mode) for k in range(count)]
    exact = exact_view(images, params, config)
    return save_comparison(exact, views, captions, out_png), missing


def draw_gallery(
    image: np.ndarray, size: int, out_png: Path, count: int, *, seed: int, index: int
) -> int:
    """Every operation alone, and count draws of every preset: the number of presets.

    Draws of one column share their random numbers: what differs between presets are the ranges.
    """
    lines = _operation_rows(image, size, count)
    for preset in PRESETS:
        # mean and std would leave the range that a picture can show
        config = replace(getattr(AugmentConfig, preset)(size=size), mean=None, std=None)
        differ = config.blur[0] != config.blur[1] or config.solarize[0] != config.solarize[1]
        for view in (0, 1) if differ else (0,):
            one_view = _of_view(config, view)
            images, params = draw_views(image, one_view, count, seed=seed, index=index)
            views = augment(images, params, one_view)
            title = f"{preset}, view {view}" if differ else preset
            lines.append(Row(title, _summary(config, view), views))
    save_recipes(lines, out_png)
    return len(PRESETS)


def _of_view(config: AugmentConfig, view: int) -> AugmentConfig:
    """The recipe with both views as that one is drawn."""
    blur, solarize = config.blur[view], config.solarize[view]
    return replace(config, blur=(blur, blur), solarize=(solarize, solarize))


def _summary(config: AugmentConfig, view: int) -> str:
    """Three short lines on a recipe: jitter is brightness, contrast, saturation and hue."""
    ranges = (config.brightness, config.contrast, config.saturation, config.hue)
    jitter = "jitter " + " ".join(map(_short, ranges))
    if config.brightness_mode == "add":
        jitter = jitter.replace("jitter ", "jitter +")
    low = config.area[0]
    if config.sampler == "tensorflow":
        low = max(low, config.min_covered)
    last = f"blur {_short(config.blur[view])}"
    if config.solarize[view]:
        last += f", solarize {_short(config.solarize[view])}"
    return f"{jitter}\ncrop {_short(low)} to 1\n{last}"


def _short(value: float) -> str:
    """0.8 as .8"""
    return f"{value:g}".removeprefix("0") or "0"


def _operation_rows(image: np.ndarray, size: int, across: int) -> list[Row]:
    """Operations one at a time on the centre square, `across` to a line."""
    height, width = image.shape[:2]
    plain = AugmentParams.identity(torch.tensor([[height, width]]))
    square = reference.eval_crop(height, width, size, size, 1.0)
    plain = replace(plain, crop=torch.tensor([square], dtype=torch.int32))
    y, x, side, _ = square
    corner = torch.tensor([[y, x, side * 5 // 8, side * 5 // 8]], dtype=torch.int32)
    one = torch.ones(1)
    none = StudyParams.identity(1)
    box = torch.tensor([[size // 4, size // 4, size // 2, size // 2]], dtype=torch.int32)
    study = {
        "cutout": replace(none, cutout=box),
        "rotation": replace(none, quarter_turns=one.to(torch.int8)),
        "Sobel": replace(none, sobel=one.bool()),
        "noise": replace(none, noise_sigma=AugmentConfig.noise_sigma * one),
    }
    alone = {
        "centre": plain,
        "crop": replace(plain, crop=corner),
        "brightness": replace(plain, brightness=1.6 * one),
        "contrast": replace(plain, contrast=1.8 * one),
        "saturation": replace(plain, saturation=0.2 * one),
        "hue": replace(plain, hue_turns=0.2 * one),
        "grayscale": replace(plain, grayscale=one.bool()),
        "blur": replace(plain, sigma_px=2 * one),
    } | {name: replace(plain, study=params) for name, params in study.items()}
    params = AugmentParams.concatenate(list(alone.values()))
    views = augment(_repeated(image, len(alone)), params, AugmentConfig(size=size))
    names = list(alone)
    lines = []
    for first in range(0, len(names), across):
        part = slice(first, first + across)
        title, text = ("", "") if first else ("operations", "one at a time")
        lines.append(Row(title, text, views[part], names[part]))
    return lines
