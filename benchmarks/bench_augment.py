"""Time and memory of two views of decoded pixels, ours and others': `pytest --benchmark-only`.

2 x 224 of photos of 375 x 500, and 2 x 32 of CIFAR-10, from uint8 pixels in memory. On a CPU every
library has one core (ours also all of them), and CPU time is recorded beside the clock's; on a GPU
images and views stay on it, and ours are float16. Ours and the reference are first checked against
the reference in float64, the peers, which define other operations, by shape and range only.
`make bench-views` writes the results as JSON and prints their table.
"""

from typing import NamedTuple

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.view_contenders import ViewSize, view_contenders, view_measurement
from benchmarks.view_peers import VIEW_PEERS

ALL = tuple(VIEW_PEERS)
FEW = ("ours", "ours-all-cores", "albumentations", "dali")


class Case(NamedTuple):
    size: ViewSize
    names: tuple[str, ...] = ALL
    large: bool = False


CPU_CASES = (
    Case(ViewSize(224, 64)),
    Case(ViewSize(224, 256), large=True),
    Case(ViewSize(32, 64), FEW),
    Case(ViewSize(32, 512)),
    Case(ViewSize(32, 4096), FEW),
)
GPU_CASES = tuple(
    Case(ViewSize(side, batch)) for side in (224, 32) for batch in (64, 256, 512, 1024, 4096)
)
CASES = GPU_CASES if DEVICE == "cuda" else CPU_CASES


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id="-".join(map(str, (*case.size, name))))
        for case in CASES
        for name in case.names
    ],
)
def test_time_of_two_views(cuda_benchmark, request, asked, case, name):
    if case.large and not request.config.getoption("large"):
        pytest.skip("takes minutes: --large")

    def info(result, results):
        return view_measurement(name, result, case.size)

    cuda_benchmark(
        f"views, {case.size}",
        name,
        lambda: view_contenders(asked, case.size, DEVICE),
        info,
    )
