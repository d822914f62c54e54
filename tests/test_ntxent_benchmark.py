"""What times the loss: the peers compute it, wrong answers are not timed, results are drawn."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.bench_ntxent import CPU_CASES, GPU_CASES
from benchmarks.contenders import TAU, WHAT, Size, loss_contenders, measurement
from benchmarks.measure import (
    LEAST_ROUNDS,
    Contender,
    Result,
    counted_flops,
    machine,
    peak_memory,
    race,
    warm_heap,
)
from benchmarks.peers import PEERS, PeerMissing, row_blocks
from benchmarks.plot_ntxent import save_plot, table
from benchmarks.tables import read_measurements
from simclr_kernels.reference import nt_xent, positive_index, unit_rows
from simclr_kernels.testing import LossCase

ROOT = Path(__file__).resolve().parents[1]
SMALL = Size(32, 16, "float32")


def value_and_gradient(loss, z):
    z = z.detach().requires_grad_()
    value = loss(z, TAU)
    return value.detach(), *torch.autograd.grad(value, z)


# each of these has kernels for a GPU only
ON_A_GPU = ("inf-cl", "cce")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.gpu) if name in ON_A_GPU else name
        for name in PEERS
        if name != "compile"
    ],
)
def test_every_peer_computes_nt_xent(name):
    try:
        peer = PEERS[name]()
    except PeerMissing as reason:
        pytest.skip(str(reason))
    z = LossCase("", 34, 16, TAU, "pairs").z()
    truth = value_and_gradient(nt_xent, z.double())
    for actual, exact in zip(value_and_gradient(peer.loss, z), truth, strict=True):
        assert (actual - exact).norm() <= 2e-5 * exact.norm()


def test_a_missing_peer_says_why():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    contenders = loss_contenders(("ours", "inf-cl"), SMALL, WHAT[0], "cpu")
    assert contenders["inf-cl"] == "Inf-CL needs a GPU"
    results = race(contenders, "cpu", seconds_each=0)
    assert results["inf-cl"].missing == "Inf-CL needs a GPU" and not results["inf-cl"].seconds
    assert results["ours"].seconds


@pytest.mark.parametrize("self_included", [True, False])
def test_row_blocks_sum_up_to_the_whole_matrix(self_included, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.BLOCK_ROWS", 8)
    z = LossCase("", 34, 16, TAU, "pairs").z().double()
    actual = value_and_gradient(lambda z, tau: row_blocks(z, tau, self_included), z)

    def by_matrix(z, tau):
        if not self_included:
            return nt_xent(z, tau)
        logits = unit_rows(z) @ unit_rows(z).T / tau
        return torch.nn.functional.cross_entropy(logits, positive_index(len(z)))

    for blocks, whole in zip(actual, value_and_gradient(by_matrix, z), strict=True):
        torch.testing.assert_close(blocks, whole)


@pytest.mark.parametrize("what", WHAT)
def test_an_answer_that_is_wrong_is_not_timed(what, monkeypatch):
    scaled = PEERS["eager"]()._replace(loss=lambda z, tau: 1.001 * nt_xent(z, tau))
    monkeypatch.setitem(PEERS, "scaled", lambda: scaled)
    broken = PEERS["eager"]()._replace(loss=lambda z, tau: z.sum() * math.nan)
    monkeypatch.setitem(PEERS, "broken", lambda: broken)
    results = race(loss_contenders(("ours", "scaled", "broken"), SMALL, what, "cpu"), "cpu", 0)
    for name in ("scaled", "broken"):
        assert "error of the value" in results[name].wrong and not results[name].seconds
        assert "missing" in measurement(name, results[name], SMALL, what, "cpu")
    assert not results["ours"].wrong and len(results["ours"].seconds) == LEAST_ROUNDS


def test_a_wrong_gradient_is_noticed_where_the_value_is_right(monkeypatch):
    detached = PEERS["eager"]()._replace(
        loss=lambda z, tau: 1.01 * nt_xent(z, tau) - 0.01 * nt_xent(z, tau).detach()
    )
    monkeypatch.setitem(PEERS, "detached", lambda: detached)
    results = race(loss_contenders(("detached",), SMALL, WHAT[1], "cpu"), "cpu", 0)
    assert "error of the gradient" in results["detached"].wrong


def test_contenders_take_turns():
    calls = []

    def contender(name):
        def call():
            calls.append(name)
            # longer than a turn, so that a turn is one call
            time.sleep(0.02)

        return Contender(name, call, lambda answer: 0.0)

    results = race({name: contender(name) for name in "ab"}, "cpu", seconds_each=0)
    assert "".join(calls).endswith("ab" * LEAST_ROUNDS)
    assert all(0.02 <= result.median < 0.2 for result in results.values())


def test_peak_memory_sees_what_is_freed_again():
    with peak_memory("cpu") as peak:
        torch.ones(64 << 18)
    assert 60 <= peak.extra_bytes / 2**20 <= 80
    with warm_heap(), peak_memory("cpu") as peak:
        torch.ones(64 << 18)
    assert 60 <= peak.extra_bytes / 2**20 <= 80


def test_what_is_counted():
    assert counted_flops(8, 4, "forward", "cpu") == 0.5 * 2 * 8 * 8 * 4
    assert counted_flops(8, 4, "forward + backward", "cpu") == 2 * 2 * 8 * 8 * 4
    assert counted_flops(8, 4, "forward + backward", "cuda") == 2.5 * 2 * 8 * 8 * 4
    about = machine("cpu")
    assert about["torch"] == torch.__version__ and about["threads"] == torch.get_num_threads()


def record(name, rows, milliseconds, what=WHAT[1], features=128, dtype="float32"):
    result = Result(name, [milliseconds / 1e3], [milliseconds / 1e3], 3 << 20, 1e-7)
    return measurement(name, result, Size(rows, features, dtype), what, "cpu")


RECORDS = [
    record("ours", 512, 2.0),
    record("eager", 512, 5.0),
    record("mm", 512, 1.0),
    record("ours", 1024, 8.0),
    measurement("eager", Result("eager", missing="out of memory"), Size(1024, 128, "float32"),
                WHAT[1], "cpu"),
    record("ours", 512, 1.0, WHAT[0]),
    record("ours", 512, 9.0, features=64),
]  # fmt: skip


def test_the_table_holds_times_ratios_memory_and_what_is_missing():
    first, *others = table(RECORDS).split("\n\n**")
    assert first.splitlines() == [
        "**forward + backward, float32, D = 128**: milliseconds (times ours); MiB of memory",
        "",
        "| 2N | 512 | 1024 |",
        "| --- | --- | --- |",
        "| **ours** | 2; 3 | 8; 3 |",
        "| eager | 5 (2.5); 3 | out of memory |",
        # 2 U in 2 ms is the rate of U in 1 ms
        "| ours: rate, of torch.mm's | 1.00 |  |",
    ]
    assert [other.partition("**")[0] for other in others] == [
        "forward, float32, D = 128",
        "forward + backward, float32, D = 64",
    ]


def test_the_figure_is_drawn_from_either_kind_of_file(tmp_path):
    by_pytest = tmp_path / "pytest.json"
    benchmarks = [{"extra_info": r | {"device": "a cpu"}} for r in RECORDS if "seconds" in r]
    by_pytest.write_text(json.dumps({"benchmarks": benchmarks}))
    by_gpu = tmp_path / "gpu.json"
    with_roofline = [r | {"roofline_share": 0.5} for r in RECORDS]
    by_gpu.write_text(
        json.dumps({"machine": {"device": "a gpu"}, "measurements": with_roofline, "tiles": []})
    )
    for path, device, panels in ((by_pytest, "a cpu", 2), (by_gpu, "a gpu", 3)):
        records, named = read_measurements(path, "rows")
        assert named == device
        save_plot(records, path.with_suffix(".png"), named)
        picture = Image.open(path.with_suffix(".png")).convert("RGB")
        assert picture.size == (800 * panels, 800)
        assert (0, 114, 178) in {color for _, color in picture.getcolors(1 << 20)}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=re.escape("got ['a']")):
        read_measurements(path, "rows")
    with pytest.raises(ValueError, match="nothing to draw"):
        save_plot([RECORDS[-1]], tmp_path / "none.png", "a cpu")


def test_every_size_is_listed_once():
    for cases in (CPU_CASES, GPU_CASES):
        for one, other in itertools.combinations(cases, 2):
            assert one.size != other.size
        assert {name for case in cases for name in case.names} <= {*PEERS, "mm"}


def test_pytest_reports_what_was_measured_and_who_is_missing(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "--benchmark-only", f"--benchmark-json={path}"]
    command += ["-k", "(512-128 and (ours or inf-cl)) or 65536-128-float32-ours"]
    # a worker of pytest-xdist would have its runs time nothing
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())["benchmarks"]
    ours = [bench for bench in results if bench["extra_info"]["name"] == "ours"]
    assert {bench["extra_info"]["what"] for bench in ours} == set(WHAT)
    for bench in ours:
        info = bench["extra_info"]
        assert bench["stats"]["median"] == info["seconds"] > 0
        assert bench["group"] == f"{info['what']}, 2N = 512, D = 128, {info['dtype']}"
        assert {"device", "threads", "torch", "commit", "peers", "flops", "peak_mib"} <= info.keys()
        assert info["error"] <= 2e-5 or info["dtype"] != "float32"
    if not torch.cuda.is_available():
        assert len(results) == 2
        assert "inf-cl: Inf-CL needs a GPU" in done.stdout and "--large" in done.stdout
