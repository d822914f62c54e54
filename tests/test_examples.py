"""The examples do what they say: each runs as a program of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simclr_kernels.data import shapes10

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--epochs", "3", "--batch_size", "32", "--size", "16"]

# where there is no lightly its published formula stands in
LIGHTLY_FORMULA = """
import torch
from benchmarks.peers import lightly_formula
class NTXentLoss:
    def __init__(self, temperature):
        self.temperature = temperature
    def __call__(self, z0, z1):
        return lightly_formula(torch.cat([z0, z1]), self.temperature)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """128 images in class folders, of two sizes."""
    root = tmp_path_factory.mktemp("photos")
    source = shapes10("test")
    for i in range(128):
        path = root / source.classes[source.labels[i]] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(source.images[i, : 24 - i % 2]).save(path)
    return root


def losses(example, *arguments, path=()):
    """The loss of each epoch that an example prints, run with `path` in front of sys.path."""
    program = ["-m", "benchmarks.torchvision_operators"]
    result = subprocess.run(
        [sys.executable, *program, EXAMPLES / example, *map(str, arguments), *SMALL],
        capture_output=True,
        text=True,
        check=False,
        cwd=EXAMPLES.parent,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, [*path, *sys.path]))},
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^epoch (\d) loss (\d+\.\d+)$", result.stdout, re.MULTILINE)
    assert [epoch for epoch, _ in found] == ["0", "1", "2"], result.stdout
    return [float(loss) for _, loss in found]


@pytest.fixture(scope="module")
def expected(photos):
    """What a loop over the pipeline loses in each epoch."""
    return losses("plain_loop.py", "--data", photos)


def test_plain_loop_trains(expected):
    # identical rows lose log(2N - 1); three epochs are too few to fall below, but not constant
    assert len(set(expected)) == 3 and all(3 < loss < 6 for loss in expected)


def test_lightning_trains_as_the_plain_loop_does(photos, expected):
    actual = losses("lightning_module.py", "--data", photos)
    assert actual == pytest.approx(expected, abs=2e-3)


def test_two_views_of_a_data_loader_train(photos, expected):
    # the same images and views in another order
    actual = losses("two_views_dataloader.py", photos)
    assert actual == pytest.approx(expected, rel=0.1)


def test_lightly_loop_trains(photos, expected, tmp_path):
    path = []
    if importlib.util.find_spec("lightly") is None:
        (tmp_path / "lightly").mkdir()
        (tmp_path / "lightly" / "loss.py").write_text(LIGHTLY_FORMULA)
        path = [tmp_path]
    actual = losses("lightly_loop.py", "--data", photos, path=path)
    # each view has batch statistics of its own
    assert actual == pytest.approx(expected, rel=0.15)


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
