"""`python -m benchmarks.gpu`, on a CPU: the same way through the program, at tiny sizes."""

import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from benchmarks import gpu, gpu_checks, gpu_tiles, loss_checks
from benchmarks.gpu_goals import goals, roofline_seconds
from simclr_kernels.ntxent import fused_nt_xent

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_without_a_gpu_it_ends_at_once_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = run()
    assert done.returncode == 1
    assert done.stderr == (
        "benchmarks.gpu needs a GPU that torch can use; --dry-run tries it on the CPU\n"
    )


def test_a_dry_run_verifies_measures_and_writes_its_results(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    names = [name for name, _ in gpu_checks.checks("cpu")]
    assert sorted(check["check"] for check in results["checks"]) == sorted(names)
    assert len(set(names)) == len(names)
    assert not any(check["failure"] for check in results["checks"])
    timed = {(r["name"], r["rows"], r["what"]) for r in results["measurements"] if "seconds" in r}
    for rows in gpu.DRY_PLAN.rows:
        assert ("ours", rows, gpu.BOTH) in timed and ("eager", rows, gpu.BOTH) in timed
    assert ("ours", gpu.DRY_PLAN.huge, gpu.BOTH) in timed
    assert {goal["state"] for goal in results["goals"]} <= {"met", "NOT MET", "not measured"}
    assert len(results["goals"]) == 7
    assert Image.open(path.with_suffix(".png")).size == (1600, 800)
    # no machine in a file that is published but its device
    assert str(ROOT) not in path.read_text()


def test_a_check_that_is_not_reached_counts_as_failed():
    results = gpu.verify(gpu.DRY_PLAN, seconds=0.01)
    assert len(results) == len(list(gpu_checks.checks("cpu")))
    assert all("stopped after" in result["failure"] for result in results)


def wrong_by(factor):
    def loss(z, tau, **options):
        return fused_nt_xent(z, tau, **options) * factor

    return loss


@pytest.mark.parametrize(
    "check",
    [
        lambda: loss_checks.check_accuracy("cpu", 34, 16, "float32", 0.1),
        lambda: loss_checks.check_accuracy("cpu", 34, 16, "bfloat16", 0.1),
        lambda: loss_checks.check_accuracy("cpu", 34, 16, "float32", 0.005, tau_is_tensor=True),
        lambda: loss_checks.check_sampled_rows("cpu", 130, "float32"),
        lambda: loss_checks.check_zero_and_tiny_rows("cpu"),
        lambda: loss_checks.check_equal_rows("cpu", "float32"),
        lambda: loss_checks.check_half_at_size("cpu", 130),
        lambda: loss_checks.check_not_finite("cpu", math.nan, 0.5, "float32"),
    ],
)
def test_a_check_fails_where_the_loss_is_wrong(check, monkeypatch):
    assert gpu_checks.run_check(check) is None
    # a NaN is still one when it is scaled: a mask takes it away
    monkeypatch.setattr(
        loss_checks,
        "fused_nt_xent",
        lambda z, tau, **options: wrong_by(1.05)(z.nan_to_num(), tau, **options),
    )
    assert gpu_checks.run_check(check).startswith("AssertionError")


def records(speed):
    found = []
    for rows in (gpu.GPU_PLAN.small, gpu.GPU_PLAN.target):
        for dtype in ("bfloat16", "tf32"):
            for name, seconds in (("ours", 1.0), ("eager", speed), ("compile", speed)):
                timed = {"seconds": seconds, "wall_seconds": seconds}
                key = {"name": name, "rows": rows, "dtype": dtype, "features": 128}
                found.append(key | timed | {"what": gpu.BOTH})
    return found


def test_goals_are_met_not_met_or_not_measured():
    assert [goal["state"] for goal in goals(gpu.GPU_PLAN, records(5.5))] == [
        *("met", "met", "met"), *("not measured", "not measured"), *("met", "met"),
    ]  # fmt: skip
    assert [goal["state"] for goal in goals(gpu.GPU_PLAN, records(0.9))] == [
        *("NOT MET", "NOT MET", "NOT MET"), *("not measured", "not measured"),
        *("NOT MET", "NOT MET"),
    ]  # fmt: skip
    ours = {"name": "ours", "dtype": "bfloat16", "features": 128, "what": gpu.BOTH}
    large = ours | {"rows": gpu.GPU_PLAN.large, "flops": 351e12, "seconds": 1.0}
    huge = ours | {"rows": gpu.GPU_PLAN.huge, "seconds": 2.0, "finite": True}
    huge |= {"peak_mib": 900.0, "bound_mib": 1000.0}
    states = [goal["state"] for goal in goals(gpu.GPU_PLAN, [large, huge])]
    assert states.count("met") == 2 and states.count("not measured") == 5
    states = [goal["state"] for goal in goals(gpu.GPU_PLAN, [huge | {"peak_mib": 1001.0}])]
    assert states.count("NOT MET") == 1


def test_the_roofline_is_the_slower_of_products_and_exponentials():
    both = {"what": gpu.BOTH, "dtype": "bfloat16", "rows": 1 << 16, "flops": 1e12}
    # 1.5 * 2^32 exponentials take 1.67 ms, the products 1 ms
    assert roofline_seconds("NVIDIA H200", both) == pytest.approx(1.667e-3, rel=1e-3)
    assert roofline_seconds("NVIDIA H200", both | {"flops": 2 * 989e12}) == 2.0
    assert roofline_seconds("a new one", both) is None


class Tiles(NamedTuple):
    BLOCK_M: int
    num_warps: int


def test_the_tile_search_finds_what_is_faster_and_puts_everything_back():
    module = types.SimpleNamespace(
        HALF_TILES={"forward": Tiles(64, 8), "backward": Tiles(64, 8)},
        IEEE_TILES=Tiles(64, 8),
        OTHER=(1, 2),
    )
    before = dict(vars(module))

    def seconds_of(size, what, device):
        if size.dtype == "float32" or what == "forward":
            return 1.0
        tiles = module.HALF_TILES["backward"]
        if tiles.BLOCK_M == 32:
            raise ValueError("too small")
        return 1.0 / tiles.BLOCK_M * tiles.num_warps

    said = []
    deadline = time.monotonic() + 60
    report = gpu_tiles.search(module, 64, 16, "cpu", deadline, seconds_of, said.append)
    assert vars(module) == before
    assert [entry["best"] for entry in report] == [
        Tiles(64, 8)._asdict(), Tiles(128, 4)._asdict(), Tiles(64, 8)._asdict(),
    ]  # fmt: skip
    assert [(entry["what"], entry["size"]["dtype"]) for entry in report] == [
        ("forward", "bfloat16"), (gpu.BOTH, "bfloat16"), (gpu.BOTH, "float32"),
    ]  # fmt: skip
    assert "too small" in report[1]["trials"][0]["failure"] and len(said) == 3
    assert gpu_tiles.search(module, 64, 16, "cpu", 0.0, seconds_of, said.append) == []
