"""The table of deviations: torchvision's formulas are torchvision's, and what the table claims."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import shared_path

from benchmarks import deviations
from benchmarks.torchvision_formulas import torchvision_augment
from simclr_kernels import AugmentConfig, reference
from simclr_kernels.data import open_source
from simclr_kernels.params import AugmentParams

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64

AGAINST_TORCHVISION = """
import torch
import benchmarks.torchvision_operators
import torchvision.transforms.v2.functional as theirs
from torchvision.transforms.v2 import InterpolationMode
from benchmarks import torchvision_formulas as ours
from simclr_kernels import reference

torch.manual_seed(0)
image = torch.rand(3, 61, 83)
image[:, 20:40, 20:40] = image[:1, 20:40, 20:40]  # gray: no hue
image[:, :4, :4] = 0
worst = {}
def compare(name, mine, their):
    worst[name] = max(worst.get(name, 0), (mine - their).abs().max().item())
for factor in (0.0, 0.2, 0.9, 1.8):
    for name in ("brightness", "contrast", "saturation"):
        name = "adjust_" + name
        compare(name, getattr(ours, name)(image, factor), getattr(theirs, name)(image, factor))
for turns in (-0.5, -0.2, 0.1, 0.37):
    compare("adjust_hue", ours.adjust_hue(image, turns), theirs.adjust_hue(image, turns))
for sigma in (0.1, 0.7, 2.0):
    compare("blur", ours.gaussian_blur(image, 5, sigma), theirs.gaussian_blur(image, 11, sigma))
for mode in InterpolationMode.BILINEAR, InterpolationMode.BICUBIC:
    for crop in [3, 5, 50, 71], [0, 0, 10, 83], [4, 4, 24, 24]:
        there = theirs.resized_crop(image, *crop, [24, 24], mode, antialias=True)
        compare("resized_crop", ours.resized_crop(image, crop, 24, mode.value), there)
compare("grayscale", reference.grayscale(image[None])[0], theirs.rgb_to_grayscale(image, 3))
solarized = reference.solarize(image[None], torch.tensor([0.5]))[0]
compare("solarize", solarized, theirs.solarize(image, 0.5))
for name, error in worst.items():
    assert error < 2e-6, (name, error)
print("equal:", *sorted(worst))
"""


def test_the_formulas_of_torchvision_are_those_of_the_installed_torchvision():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: no test or library here depends on it")
    # in a process of its own: the declared operators would stay in this one
    done = subprocess.run(
        [sys.executable, "-c", AGAINST_TORCHVISION], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("equal:", "adjust_brightness", "adjust_contrast", "adjust_hue", "adjust_saturation"),
        *("blur", "grayscale", "resized_crop", "solarize"),
    ]


def test_torchvision_moves_each_image_by_its_own_parameters():
    images = torch.randint(
        0, 256, (2, 24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    params = AugmentParams.identity(torch.tensor([[24, 24]] * 2), "add")
    params = replace(
        params, flip=torch.tensor([True, False]), brightness=torch.tensor([0.0, -0.25])
    )
    config = AugmentConfig(size=24, brightness_mode="add", mean=(0.1,) * 3, std=(0.5,) * 3)
    views = torchvision_augment(images, params, config)
    planes = images.permute(0, 3, 1, 2).float() / 255
    expected = torch.stack([planes[0].flip(2), planes[1] * 0.75])
    assert torch.allclose(views, reference.normalize(expected, config.mean, config.std), atol=1e-6)


@pytest.fixture(scope="module")
def record():
    """The table of six photos, without the library that only benchmarks install."""
    source = open_source(shared_path("data/imagenet_samples"))
    return deviations.measure_all(
        source, 6, SIZE, ["ours", "kornia", "dali", "kornia-stock", "torchvision"]
    )


@pytest.fixture(scope="module")
def mean(record):
    """Mean difference in levels of a column in a row."""
    rows = {row["operation"]: row for row in record["rows"]}
    return lambda operation, column: rows[operation][column]["mean"]


OPERATIONS = (
    *("flip", "brightness x0.2", "brightness x1.8", "contrast x0.2", "contrast x1.8"),
    *("saturation x0.2", "saturation x1.8", "hue -0.2 turns", "hue +0.1 turns", "hue +0.2 turns"),
    *("these four, drawn, in drawn order", "grayscale", "blur 0.5 px", "blur 1 px", "blur 2 px"),
    *("solarize above 0.5", "brightness +0.4"),
)


def test_ours_is_within_a_hundredth_of_a_level_everywhere(record):
    assert record["missing"] == {}
    for row in record["rows"]:
        if "ours" in row:
            assert row["ours"]["maximum"] < 0.01, row["operation"]
    assert sum("ours" in row for row in record["rows"]) == len(record["rows"]) - 1


def test_kornia_views_differ_in_the_resize_only(mean):
    for operation in OPERATIONS:
        assert mean(operation, "kornia") < 0.001, operation
    assert 0.2 < mean("crop, bicubic resize", "kornia") < 2
    assert 0.05 < mean("whole recipe simclr", "kornia") < 2


def test_dali_views_differ_by_many_levels_in_contrast_saturation_and_hue(mean):
    for operation in OPERATIONS:
        if operation.startswith(("contrast", "saturation", "hue", "these four")):
            assert mean(operation, "dali") > 3, operation
    assert mean("blur 2 px", "dali") > 0.5
    assert 0.01 < mean("grayscale", "dali") < 0.5
    for operation in ("flip", "brightness x0.2", "brightness +0.4", "solarize above 0.5"):
        assert mean(operation, "dali") < 0.001, operation
    assert mean("crop, bicubic resize", "dali") < 0.1
    assert mean("whole recipe simclr", "dali") > 3


@pytest.mark.parametrize("library", ["kornia-stock", "torchvision"])
def test_transforms_of_others_differ_in_contrast_saturation_and_the_edges_of_a_blur(mean, library):
    for operation in ("contrast x0.2", "contrast x1.8", "saturation x0.2", "saturation x1.8"):
        assert mean(operation, library) > 3, operation
    assert mean("blur 2 px", library) > 0.5
    assert mean("brightness +0.4", library) > 10
    assert mean("crop, bicubic resize", library) > 0.5
    for operation in ("flip", "brightness x0.2", "hue +0.2 turns", "grayscale"):
        assert mean(operation, library) < 0.1, operation


def test_a_bilinear_resize_lies_further_off_than_a_bicubic_one(mean):
    bicubic = mean("crop, bicubic resize", "torchvision")
    assert mean("crop, bilinear resize", "torchvision") > bicubic


def test_the_page_has_every_row_and_names_what_is_missing(record):
    page = deviations.markdown(record | {"missing": {"albumentations": "no such module"}})
    cells = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert cells[2:] == [row.label for row in deviations.rows(SIZE)]
    assert "albumentations was not measured: no such module" in page
    largest = re.search(r"of any value in any row: (\S+) levels", page)
    assert float(largest[1]) < 0.01


def test_the_published_page_has_the_rows_and_columns_of_the_program():
    page = (ROOT / "docs/deviations.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        row.label for row in deviations.rows(224)
    ]
    header = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    for column in deviations.COLUMNS.values():
        assert (column.label in header) != (f"{column.label} was not measured" in page)
    ours = [line.split("|")[2].strip() for line in lines[2:]]
    assert set(ours) == {"0.00 (0.0)", "-"}


def test_the_command_writes_the_page_and_all_numbers(tmp_path):
    status = deviations.main(
        ["shapes10", "--images", "2", "--size", "24", "--only", "ours"]
        + ["--out", str(tmp_path / "a.md"), "--json", str(tmp_path / "b/c.json")]
    )
    assert status == 0
    assert (tmp_path / "a.md").read_text().startswith("# How far each library")
    record = json.loads((tmp_path / "b/c.json").read_text())
    assert record["photos"] == 2 and record["machine"]["torch"] == torch.__version__
    assert record["rows"][0]["ours"]["maximum"] < 0.01
