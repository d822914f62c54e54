"""The table of deviations: torchvision's formulas are torchvision's, and what the table claims."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# torchvision's wheels are built for CUDA: its import asks for operators that only their library
# registers, so their schemas are declared first
AGAINST_TORCHVISION = """
import torch
from torch.library import Library
library = Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
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
