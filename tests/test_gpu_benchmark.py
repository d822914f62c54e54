"""`python -m benchmarks.gpu`, on a CPU: the same way through the program, at tiny sizes."""

import itertools
import json
import math
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from benchmarks import (
    device_checks,
    gpu,
    gpu_checks,
    gpu_tiles,
    gpu_views,
    loss_checks,
    view_checks,
)
from benchmarks.gpu_goals import goals, roofline_seconds
from simclr_kernels import ntxent_triton
from simclr_kernels.augment import augment, two_views
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.ntxent_tile_table import ANY, TABLES, WHOLE, Table, Tiles
from simclr_kernels.params import sample_params

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
    assert len(results["goals"]) == 9
    assert [(r["name"], r["side"]) for r in results["views"] if "seconds" in r] == [
        ("ours", 32),
        ("reference", 32),
    ]
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
        lambda: loss_checks.check_far_rows("cpu", "float32", 0.1),
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


@pytest.mark.parametrize(
    "check",
    [
        lambda: view_checks.check_preset("cpu", "simclr", 8, torch.float32, False),
        lambda: view_checks.check_preset("cpu", "byol", 8, torch.bfloat16, True),
        lambda: view_checks.check_orders("cpu", 8),
        lambda: view_checks.check_blurs("cpu", 24),
        lambda: view_checks.check_params("cpu", "simclr", 20),
        lambda: view_checks.check_bits("cpu", 8, 1),
    ],
)
def test_a_check_fails_where_views_are_wrong(check, monkeypatch):
    assert gpu_checks.run_check(check) is None
    calls = itertools.count()

    def a_little_brighter(*arguments, **options):
        views = augment(*arguments, **options)
        return views + torch.finfo(views.dtype).eps * 200

    def other_seed(*arguments, seed, **options):
        return two_views(*arguments, seed=next(calls), **options)

    def other_view(*arguments, view, **options):
        return sample_params(*arguments, view=1 - view, **options)

    monkeypatch.setattr(view_checks, "augment", a_little_brighter)
    monkeypatch.setattr(view_checks, "two_views", other_seed)
    monkeypatch.setattr(view_checks, "sample_params", other_view)
    assert gpu_checks.run_check(check).startswith("AssertionError")


def test_goals_of_views_are_those_of_the_best_batch():
    def record(side, batch, rate):
        return {"name": "ours", "side": side, "batch": batch, "images_per_second": rate}

    few = [record(224, 256, 150_000.0), record(224, 1024, 200_000.0)]
    few.append({"name": "ours", "side": 32, "batch": 512, "missing": "out of memory"})
    assert [g["state"] for g in gpu_views.view_goals(few)] == ["met", "not measured"]
    few.append(record(32, 4096, 999_999.0))
    assert [g["state"] for g in gpu_views.view_goals(few)] == ["met", "NOT MET"]


def test_the_tile_search_of_views_keeps_what_is_faster_and_right():
    before, said = list(gpu_views.TILES), []

    def seconds_of(side, batch, device):
        tiles = next(tiles for tiles in gpu_views.TILES if side <= tiles.size)
        assert tiles.ROWS > 8, "too small"
        return (2.0 if tiles.blur_block > 512 else 1.0) / tiles.STRIP

    def check(side, batch, device):
        tiles = next(tiles for tiles in gpu_views.TILES if side <= tiles.size)
        assert tiles.STRIP < 128, "wrong"

    deadline = time.monotonic() + 60
    arguments = (gpu_views.GPU_SIZES, "cpu", deadline, said.append, seconds_of, check)
    large, small = gpu_views.search_view_tiles(*arguments)
    assert gpu_views.TILES == before
    assert (large["batch"], small["batch"]) == (1024, 4096)
    assert large["best"] == before[-1]._replace(blur_block=512)._asdict()
    failures = " ".join(trial.get("failure", "") for trial in large["trials"])
    assert "wrong" in failures and "too small" in failures
    assert {trial["tiles"]["STRIP"] for trial in small["trials"]} == {32}
    assert len(said) == 2
    assert gpu_views.search_view_tiles(gpu_views.GPU_SIZES, "cpu", 0.0, said.append) == []


NARROW, WIDE = Tiles(64, 64, WHOLE, 8, 2), Tiles(64, 64, 64, 8, 2)


def small_table():
    none = {"half": [], "tf32": [], "ieee": []}
    return Table(
        triangle=none | {"half": [(128, NARROW), (ANY, WIDE)]},
        rows=none | {"ieee": [(ANY, WIDE)]},
        backward=none | {"half": [(128, NARROW)]},
        weights=none | {"half": [(ANY, WIDE)]},
    )


def test_the_tile_search_reaches_every_entry_once_at_a_width_that_takes_it():
    found = list(gpu_tiles.entries(small_table()))
    assert [(entry.kernel, entry.kind, entry.place, entry.features) for entry in found] == [
        ("triangle", "half", 0, 128),
        ("backward", "half", 0, 128),
        ("rows", "ieee", 0, 128),
        ("triangle", "half", 1, 256),
        # narrower rows need no matrix products
        ("weights", "half", 0, 256),
    ]
    assert [entry.what == gpu.BOTH for entry in found] == [False, True, False, False, True]
    assert {entry.kernel for entry in found if entry.tau < 0.0128} == {"rows"}
    for table in TABLES.values():
        reached = {(entry.kernel, entry.kind) for entry in gpu_tiles.entries(table)}
        assert {("triangle", "half"), ("backward", "half"), ("weights", "half")} <= reached


def test_the_tile_search_finds_what_is_faster_and_right_and_puts_everything_back():
    table, before, said, checked = small_table(), small_table(), [], []

    def seconds_of(entry, rows, device):
        tiles = entry.tiles(table)
        if entry.kernel != "triangle" or entry.place:
            return 1.0
        if tiles.BLOCK_M == 32:
            raise ValueError("too small")
        return tiles.num_warps / tiles.BLOCK_M / tiles.BLOCK_N

    def check(entry, rows, device):
        checked.append(entry.tiles(table))
        assert entry.tiles(table).BLOCK_N < 128, "wrong"

    deadline = time.monotonic() + 60
    report = gpu_tiles.search(table, 64, "cpu", deadline, 34, seconds_of, check, said.append)
    assert table == before
    # wide in M, narrow in N since wider was wrong, and with fewer warps
    best = NARROW._replace(BLOCK_M=128, num_warps=4)
    assert report[0]["best"] == best._asdict() and best in checked
    failures = [trial.get("failure", "") for trial in report[0]["trials"]]
    assert "too small" in failures[0] and any("wrong" in failure for failure in failures)
    assert all(trial["tiles"]["BLOCK_D"] == WHOLE for trial in report[0]["trials"])
    assert all(entry["best"] == entry["shipped"] for entry in report[1:])
    assert len(said) == len(report) == 5
    assert gpu_tiles.search(table, 64, "cpu", 0.0, 34, seconds_of, check, said.append) == []


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, at most, beside `given`."""

    def __init__(self, given):
        super().__init__()
        self.given, self.alive, self.most = given.data_ptr(), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in filter(torch.is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if storage.data_ptr() != self.given:
                self.alive[id(x)] = (storage.data_ptr(), storage.nbytes())
                weakref.finalize(x, self.alive.pop, id(x), None)
        self.most = max(self.most, sum(dict(self.alive.values()).values()))
        return out


@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
def test_the_memory_bound_is_what_the_launchers_allocate(features, arithmetic, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the launchers must not start a kernel")
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
    z = torch.empty(65536, features, dtype=loss_checks.DTYPES[arithmetic])
    tau, layout = torch.tensor(0.1), ("halves", True, "mean", "tf32")
    with Held(z) as held:
        loss, _, *kept = ntxent_triton.forward(z, tau, None, *layout, False)
        # freed by now, where autograd keeps what backward needs
        del _
        ntxent_triton.backward(loss, z, tau, None, *kept, *layout)
    slack = 1 << 20
    bound = device_checks.memory_bound(65536, features, arithmetic, "cpu")
    assert bound - 2 * slack <= held.most <= bound
