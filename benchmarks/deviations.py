"""`python -m benchmarks.deviations PHOTOS`: how far each library's views lie from the reference.

Every library gets the same photos and the same AugmentParams. Single operations start from the
photos at the size of the view, rounded to 8 bits, with only that operation on; the crop and the
whole recipes start from the photos themselves. Prints a Markdown table of mean absolute differences
in 8-bit levels with the 99th percentile; 192 photos take 4 minutes of CPU time, on all cores.
`--out docs/deviations.md --json FILE` write it and the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, warm_heap
from simclr_kernels import reference
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.compare import Difference, difference, exact_view, levels_apart, view_by
from simclr_kernels.data import ImageSource, open_source
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params
from simclr_kernels.report import table

BATCH = 16
SEED = 0

View = Callable[[Any, AugmentParams, AugmentConfig], Tensor]


@dataclass(frozen=True)
class Column:
    """One library: its name in the table, its package, and how to get its view function."""

    label: str
    package: str
    load: Callable[[], View]


def _pipeline(name: str) -> Callable[[], View]:
    # DALI takes one caller at a time
    turn = Lock() if name == "dali" else nullcontext()

    def view(images: Any, params: AugmentParams, config: AugmentConfig) -> Tensor:
        with turn:
            return view_by(name, images, params, config)

    return lambda: view


def _formulas(module: str, name: str, **options: str) -> Callable[[], View]:
    def load() -> View:
        function = getattr(import_module(f"benchmarks.{module}_formulas"), name)
        return lambda images, params, config: function(images, params, config, **options)

    return load


TORCHVISION = _formulas("torchvision", "torchvision_augment")
BILINEAR = _formulas("torchvision", "torchvision_augment", interpolation="bilinear")
COLUMNS = {
    "ours": Column("ours", "simclr-kernels", _pipeline("fused")),
    "kornia": Column("KorniaViews", "kornia", _pipeline("kornia")),
    "dali": Column("DALIViews", "nvidia-dali-cuda130", _pipeline("dali")),
    "kornia-stock": Column("Kornia", "kornia", _formulas("kornia", "stock_augment")),
    "torchvision": Column("torchvision", "torchvision", TORCHVISION),
    "albumentations": Column(
        "albumentations", "albumentations", _formulas("albumentations", "albumentations_augment")
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, and the parameters of B images (sizes, index).

    `instead` names columns to compare in this line alone, by other functions.
    """

    label: str
    config: AugmentConfig
    params: Callable[[Tensor, Tensor], AugmentParams]
    whole_photos: bool
    instead: dict[str, Callable[[], View]] = field(default_factory=dict)


def rows(size: int) -> list[Row]:
    """All lines of the table, for views of that size in pixels."""
    plain = AugmentConfig(size=size)
    crop = replace(plain, flip=0.0, jitter=0.0, grayscale=0.0, blur=(0.0, 0.0))
    jitter = replace(plain, crop=False, flip=0.0, jitter=1.0, grayscale=0.0, blur=(0.0, 0.0))
    lines = [
        _drawn("crop, bicubic resize", crop),
        replace(_drawn("crop, bilinear resize", crop), instead={"torchvision": BILINEAR}),
        _alone("flip", plain, flip=True),
        _alone("brightness +0.4", replace(plain, brightness_mode="add"), brightness=0.4),
    ]
    for name, label, values in (
        ("brightness", "brightness x{:g}", (0.2, 1.8)),
        ("contrast", "contrast x{:g}", (0.2, 1.8)),
        ("saturation", "saturation x{:g}", (0.2, 1.8)),
        ("hue_turns", "hue {:+g} turns", (-0.2, 0.1, 0.2)),
    ):
        lines += [_alone(label.format(value), plain, **{name: value}) for value in values]
    lines.append(_drawn("these four, drawn, in drawn order", jitter, whole_photos=False))
    lines.append(_alone("grayscale", plain, grayscale=True))
    lines += [_alone(f"blur {sigma:g} px", plain, sigma_px=sigma) for sigma in (0.5, 1.0, 2.0)]
    lines.append(_alone("solarize above 0.5", plain, solarize=0.5))
    for preset in ("simclr", "simclr_v1", "moco_v2", "byol", "torchvision"):
        # mean and std would only scale what is compared
        config = replace(getattr(AugmentConfig, preset)(size=size), mean=None, std=None)
        for view in (0, 1) if preset == "byol" else (0,):
            name = f"whole recipe {preset}" + (f", view {view}" if preset == "byol" else "")
            lines.append(_drawn(name, config, view))
    return lines


def _alone(label: str, config: AugmentConfig, **values: float | bool) -> Row:
    """A row with one operation, at that value in every image."""

    def params(sizes: Tensor, index: Tensor) -> AugmentParams:
        identity = AugmentParams.identity(sizes, config.brightness_mode)
        changed = {
            name: torch.full_like(getattr(identity, name), value) for name, value in values.items()
        }
        return replace(identity, **changed)

    return Row(label, config, params, whole_photos=False)


def _drawn(label: str, config: AugmentConfig, view: int = 0, whole_photos: bool = True) -> Row:
    """A row with what the recipe draws."""

    def params(sizes: Tensor, index: Tensor) -> AugmentParams:
        return sample_params(config, sizes, seed=SEED, epoch=0, index=index, view=view)

    return Row(label, config, params, whole_photos)


def load_columns(names: tuple[str, ...] | list[str]) -> tuple[dict[str, View], dict[str, str]]:
    """The view functions of those libraries that are here, and why the others are not."""
    found, missing = {}, {}
    one = PackedImages.from_images([torch.zeros(8, 8, 3, dtype=torch.uint8)])
    for name in names:
        try:
            found[name] = COLUMNS[name].load()
            # a pipeline imports its library when it is first used
            found[name](one, AugmentParams.identity(one.sizes), AugmentConfig(size=8))
        except ImportError as error:
            found.pop(name, None)
            missing[name] = str(error)
    return found, missing


class Photos:
    """Photos in batches, whole or at the size of a view, 8 bits."""

    def __init__(self, source: ImageSource, index: list[int], size: int):
        self.index = torch.tensor(index)
        self.photos = [torch.from_numpy(source.decode(i)) for i in index]
        views = (reference.eval_view(photo[None], size) for photo in self.photos)
        self.sized = [(view[0] * 255).round().byte().permute(1, 2, 0) for view in views]

    def __len__(self) -> int:
        return len(self.photos)

    def batches(self, whole: bool):
        """(index (B,), PackedImages) by turns."""
        images = self.photos if whole else self.sized
        for first in range(0, len(images), BATCH):
            part = slice(first, first + BATCH)
            yield self.index[part], PackedImages.from_images(images[part])


def measure(row: Row, columns: dict[str, View], photos: Photos) -> dict[str, Difference]:
    """The difference of each library from the reference, over all photos."""
    if row.instead:
        columns = {name: row.instead[name]() for name in columns if name in row.instead}

    def levels_of(batch: tuple[Tensor, PackedImages]) -> dict[str, Tensor]:
        index, images = batch
        params = row.params(images.sizes, index)
        exact = exact_view(images, params, row.config)
        made = {name: view(images, params, row.config) for name, view in columns.items()}
        return {name: levels_apart(views, exact).flatten() for name, views in made.items()}

    # a batch to a core: most of these operators gain little from threads of their own
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(levels_of, photos.batches(row.whole_photos)))
    return {name: difference(torch.cat([part[name] for part in parts])) for name in columns}


def measure_all(
    source: ImageSource, images: int | None, size: int, names: tuple[str, ...] | list[str]
) -> dict[str, Any]:
    """The whole table as a record for JSON, with progress on standard error.

    Args:
        source: the photos.
        images: how many of them, evenly spaced; None for all.
        size: of the views in pixels.
        names: keys of COLUMNS.
    """
    columns, missing = load_columns(names)
    for name, reason in missing.items():
        _say(f"{COLUMNS[name].label} is left out: {reason}")
    count = min(images or len(source), len(source))
    photos = Photos(source, [i * len(source) // count for i in range(count)], size)
    lines = rows(size)
    record = []
    for number, row in enumerate(lines, 1):
        start = time.perf_counter()
        differences = measure(row, columns, photos)
        shown = ", ".join(f"{COLUMNS[n].label} {d.mean:.2f}" for n, d in differences.items())
        seconds = time.perf_counter() - start
        _say(f"{number}/{len(lines)} {row.label}: {shown} ({seconds:.1f} s)")
        record.append({"operation": row.label} | {n: d._asdict() for n, d in differences.items()})
    versions = {}
    for name in columns:
        try:
            versions[name] = metadata.version(COLUMNS[name].package)
        except metadata.PackageNotFoundError:
            versions[name] = None  # its formulas are compared, which need no package
    return {
        "photos": count,
        "size": size,
        "seed": SEED,
        "versions": versions,
        "missing": missing,
        "machine": machine("cpu"),
        "rows": record,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def markdown(record: dict[str, Any]) -> str:
    """The page: what was compared, the table, the largest difference of ours, the reasons."""
    names = list(record["versions"])
    cells = [
        [row["operation"], *(_cell(row[name]) if name in row else None for name in names)]
        for row in record["rows"]
    ]
    header = ["same photos, same parameters", *(COLUMNS[name].label for name in names)]
    versions = {
        COLUMNS[name].package: version
        for name, version in record["versions"].items()
        if version and name != "ours"
    }
    versions = {"torch": record["machine"]["torch"]} | versions
    parts = [
        "# How far each library is from the reference",
        f"Mean absolute difference from `reference.py` in float64, in levels of 8 bits (255 from "
        f"black to white), and in brackets the level that 99 % of the values do not exceed; "
        f"{record['photos']} ImageNet photos, views of {record['size']} x {record['size']} pixels. "
        "`reference.py` itself is held to the outputs of the original TensorFlow code within 5e-6 "
        "of white (0.0013 levels). Every library gets the same `AugmentParams`, so that only "
        "formulas differ, not random draws. Single operations start from the photos at the size "
        "of the view, the crop and the recipes from whole photos.",
        "`python -m benchmarks.deviations PHOTOS --out docs/deviations.md` wrote this page; a test "
        "measures its claims anew.",
        ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
        table(cells, header, markdown=True),
    ]
    if "ours" in names:
        most = max(row["ours"]["maximum"] for row in record["rows"] if "ours" in row)
        parts.append(f"The largest difference of ours, of any value in any row: {most:.2g} levels.")
    for name, reason in record["missing"].items():
        parts.append(f"{COLUMNS[name].label} was not measured: {reason}")
    parts.append(WHY.strip())
    return "\n\n".join(parts) + "\n"


def _cell(values: dict[str, float]) -> str:
    return f"{values['mean']:.2f} ({values['p99']:.1f})"


WHY = """
## Where the differences come from

`ours` is `two_views` and `FusedViews`; `KorniaViews` and `DALIViews` are pipelines of this
library that make the views with Kornia's and DALI's operators; the other columns are those
libraries' own transforms (torchvision by its published formulas, tested against the installed
package), with every image's own parameters and order.

- **Resize.** The original interpolates with Keys' kernel, A = -0.5, without antialias, and leaves
  out taps beyond the crop. DALI's cubic without antialias is the same but for that edge. Kornia
  and albumentations (OpenCV) have A = -0.75; Kornia's transform also aligns corners. torchvision
  smooths before it shrinks (antialias), and its default is bilinear.
- **Brightness.** SimCLR v1 and BYOL add; ColorJitter of the others multiplies. Ports take the
  factor 1 + d for the addend d, and so does this table: the largest difference of all, and that
  of the recipes simclr_v1 and byol.
- **Contrast.** The original moves each channel away from its own mean; the others away from one
  gray mean, DALI away from 0.5 whatever the photo: its largest difference.
- **Saturation.** The original scales the S of HSV, clipped; the others blend with the gray image
  (DALI: scale I and Q of YIQ, which is the same), which keeps luma and not the largest channel.
  On saturated colours this is the largest difference of those that multiply brightness.
- **Hue.** The same rotation in HSV in Kornia and torchvision; albumentations has 180 steps of hue
  in 8 bits. DALI turns I and Q of YIQ, a linear map.
- **Order and clips.** DALI's `color_twist` is one matrix: hue and saturation first, then contrast
  and brightness, one clip at the end. The others take the drawn order and clip after each.
- **Blur.** The same 23 taps, but the original pads with zeros, which darkens the frame; the
  others mirror the image. Only the outer 11 pixels differ.
- **Grayscale, 8 bits.** Kornia weighs red by 0.299 for 0.2989. albumentations rounds to 8 bits
  after every operation.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.deviations", description=__doc__)
    parser.add_argument("photos", help="an image folder, a Parquet file, or shapes10")
    parser.add_argument("--images", type=int, help="how many of them (default: all)")
    parser.add_argument("--size", type=int, default=224, help="of the views in pixels")
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with warm_heap():
        record = measure_all(open_source(given.photos), given.images, given.size, given.only)
    page = markdown(record)
    for path, text in ((given.out, page), (given.json, json.dumps(record, indent=1) + "\n")):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            _say(f"in {path}")
    if given.out is None:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
