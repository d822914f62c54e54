"""Set-up shared by all tests: Triton's interpreter where there is no GPU, the shared vectors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # before triton is imported: later has no effect
    os.environ["TRITON_INTERPRET"] = "1"

# the tensors of most tests are too small for two threads to gain anything
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(name: str) -> Path:
    """A file of the shared folder beside the checkout; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="session")
def golden():
    """golden(name): the arrays of golden/name.npz, *_q16 converted to float64."""

    def load(name):
        with np.load(shared_path(f"golden/{name}.npz")) as arrays:
            return {
                key: arrays[key] * 1.5 / 65535 - 0.25 if key.endswith("_q16") else arrays[key]
                for key in arrays.files
            }

    return load


@pytest.fixture
def fresh_memory_holds_nan():
    """A kernel that reads what it has not written gives NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tau_on_device(monkeypatch):
    """What the launchers do with a temperature that only the device knows, on CPU tensors too."""
    monkeypatch.setattr("simclr_kernels.ntxent_triton._known", lambda tau: None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_collection_modifyitems(config, items):
    """Plain `pytest` runs no benchmark; `pytest --benchmark-only` runs nothing else."""
    wanted = config.getoption("benchmark_only")
    items[:] = [item for item in items if item.path.name.startswith("bench_") == wanted]
