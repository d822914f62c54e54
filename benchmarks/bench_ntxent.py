"""Time and memory of the loss and of what else people use: `pytest --benchmark-only`.

Groups: forward, and forward + backward, at 2N rows of D features, tau 0.1; float32 on a CPU; on a
GPU bfloat16 (peers under autocast), TF32 and float32. Values and gradients are checked first.
`--large` adds sizes that take minutes on a CPU. `make bench` installs the peers, writes the results
as JSON and prints their table.
"""

from typing import NamedTuple

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.contenders import WHAT, Size, loss_contenders, measurement

GPU = DEVICE == "cuda"
FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"

FEW = ("ours", "eager", "compile", "mm")
ALL = (
    *("ours", "eager", "warm-eager", "compile", "row-blocks"),
    *("lightly", "solo-learn", "pml-supcon", "inf-cl", "cce", "mm"),
)
# it takes memory in the cube of 2N: 2 GB at 512
CUBIC = ("pml-ntxent",)
# without a 2N x 2N matrix
LEAN = ("ours", "row-blocks", "inf-cl", "cce")


class Case(NamedTuple):
    size: Size
    names: tuple[str, ...]
    large: bool = False


CPU_CASES = (
    Case(Size(128, 128, FLOAT32), ALL),
    Case(Size(512, 128, FLOAT32), ALL + CUBIC),
    Case(Size(1024, 128, FLOAT32), ALL),
    Case(Size(2048, 128, FLOAT32), ALL),
    Case(Size(4096, 128, FLOAT32), ALL),
    Case(Size(8192, 128, FLOAT32), ALL),
    Case(Size(4096, 64, FLOAT32), FEW),
    Case(Size(4096, 512, FLOAT32), FEW),
    Case(Size(2048, 2048, FLOAT32), FEW),
    Case(Size(16384, 128, FLOAT32), FEW),
    Case(Size(16384, 2048, FLOAT32), FEW, large=True),
    Case(Size(32768, 128, FLOAT32), ("ours", "row-blocks"), large=True),
    Case(Size(65536, 128, FLOAT32), ("ours", "row-blocks"), large=True),
)
GPU_CASES = (
    Case(Size(512, 128, BFLOAT16), ALL + CUBIC),
    Case(Size(1024, 128, BFLOAT16), ALL),
    Case(Size(4096, 128, BFLOAT16), ALL),
    Case(Size(16384, 128, BFLOAT16), ALL),
    Case(Size(65536, 128, BFLOAT16), ALL),
    Case(Size(16384, 64, BFLOAT16), FEW),
    Case(Size(16384, 256, BFLOAT16), FEW),
    Case(Size(16384, 512, BFLOAT16), FEW),
    Case(Size(8192, 2048, BFLOAT16), FEW),
    Case(Size(65536, 2048, BFLOAT16), LEAN),
    Case(Size(4096, 128, TF32), ALL),
    Case(Size(16384, 128, TF32), ALL),
    Case(Size(4096, 128, FLOAT32), FEW),
    Case(Size(16384, 128, FLOAT32), FEW),
)
CASES = GPU_CASES if GPU else CPU_CASES


@pytest.mark.parametrize("what", WHAT, ids=("forward", "both"))
@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id="-".join(map(str, (*case.size, name))))
        for case in CASES
        for name in case.names
    ],
)
def test_time_of_the_loss(cuda_benchmark, request, asked, case, name, what):
    if case.large and not request.config.getoption("large"):
        pytest.skip("takes minutes: --large")
    group = f"{what}, {case.size}"

    def info(result, results):
        record = measurement(name, result, case.size, what, DEVICE)
        if yardstick := results.get("mm"):
            product = measurement("mm", yardstick, case.size, what, DEVICE)
            record["mm_gflops_per_second"] = product["gflops_per_second"]
        return record

    cuda_benchmark(group, name, lambda: loss_contenders(asked, case.size, what, DEVICE), info)
