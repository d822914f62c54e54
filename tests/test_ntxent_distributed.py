"""fused_nt_xent over process groups of 1 to 4 gloo ranks; what they do is in ntxent_on_ranks.py."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, shared_path
from ntxent_on_ranks import (
    CASES,
    FEATURES,
    GOLDEN_SIZES,
    ROWS,
    Case,
    Encoder,
    draw,
    inputs_of,
    negatives_of,
    upstream_of,
)

from simclr_kernels import fused_nt_xent
from simclr_kernels.reference import nt_xent, nt_xent_metrics

WORLD = 4
WORLDS = [1, 2, 3, 4]
PREFLIGHT_BYTES = 72


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    golden = SHARED / "golden/nt_xent.npz"
    program = Path(__file__).with_name("ntxent_on_ranks.py")
    processes = []
    for rank in range(WORLD):
        arguments = [rank, WORLD, folder / "store", folder / f"{rank}.pt"]
        command = [sys.executable, program, *arguments, golden if golden.exists() else ""]
        with open(folder / f"{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    list(map(str, command)),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
    try:
        for process in processes:
            process.wait(timeout=120)
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(WORLD))
    assert not any(process.returncode for process in processes), logs
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def halves_order(world: int, pairs: str) -> torch.Tensor:
    """Which rows of the ranks, one rank after another, are views 0 and then views 1."""
    i = torch.arange(world * ROWS)
    if pairs == "interleaved":
        return torch.cat((i[::2], i[1::2]))
    return i.view(world, 2, -1).transpose(0, 1).reshape(-1)


def one_process(case: Case, world: int) -> dict:
    """The same by the reference in float64, all rows in one batch. Rows stay in rank order."""
    double = dataclasses.replace(case, dtype=torch.float64)
    model = Encoder(double)
    order = halves_order(world, case.pairs)
    z = torch.cat([model(inputs_of(rank))[0] for rank in range(world)])
    blocks = []
    for rank in range(world):
        negatives = negatives_of(rank, double)
        rows = nt_xent(
            z[order],
            model.tau,
            normalize=case.normalize,
            reduction="none",
            negatives=negatives,
        )[order.argsort()]
        blocks.append(rows.view(world, ROWS)[rank])
    rows = torch.cat(blocks)
    if case.reduction == "none":
        # each rank derives something from its rows, and DDP takes the mean
        upstream = torch.cat([upstream_of(rank) for rank in range(world)])
        loss, objective = rows, (rows * upstream).sum() / world
    else:
        loss = objective = rows.sum() if case.reduction == "sum" else rows.mean()
    objective.backward()
    return {"loss": loss.detach(), "weight": model.weight.grad, "tau": model.tau.grad}


def tolerance(case: Case) -> float:
    """Relative: rounding of similarities grows by 1 / tau, and bfloat16 rounds the rows."""
    if case.dtype == torch.bfloat16:
        return 0.02
    return 1e-12 if case.dtype == torch.float64 else max(1e-6, 1e-7 / case.tau)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_through_ddp_are_those_of_one_process_with_the_whole_batch(ranks, case, world):
    expected = one_process(case, world)
    for rank in range(world):
        found = ranks[rank][world, case.name]
        assert relative(found["weight"], expected["weight"]) <= tolerance(case)
        if case.learnable:
            assert relative(found["tau"], expected["tau"]) <= tolerance(case)
        else:
            assert found["tau"] is None


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_returns_the_loss_of_all_rows_in_the_same_bits(ranks, case, world):
    expected = one_process(case, world)["loss"]
    found = [ranks[rank][world, case.name]["loss"] for rank in range(world)]
    if case.reduction != "none":
        assert all(torch.equal(loss, found[0]) for loss in found)
        assert abs(found[0] - expected) <= tolerance(case) * expected
        return
    # of the rank's own rows, in its own order
    assert relative(torch.cat(found), expected) <= tolerance(case)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_sends_the_rows_and_one_number_a_row_and_backward_nothing(ranks, case, world):
    size = case.dtype.itemsize
    of_row = max(size, 4)
    running_maximum = not case.normalize or case.tau < 0.0128
    of_rows = [ROWS * of_row] * (2 if running_maximum else 1)
    for rank in range(world):
        found = ranks[rank][world, case.name]
        sent = [PREFLIGHT_BYTES, ROWS * FEATURES * size, *of_rows]
        assert found["forward"] == [("_allgather_base_", count) for count in sent]
        back = [ROWS * of_row] if case.reduction == "none" else []
        assert found["backward"] == [("_allgather_base_", count) for count in back]
        # no gradient of the gathered rows, which have none
        assert (world * ROWS, FEATURES) not in found["zeros"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_group_of_one_equals_no_group_bit_for_bit_and_sends_nothing(ranks, case):
    found = ranks[0][1, case.name]
    model = Encoder(case)
    z, tau = model(inputs_of(0))
    loss, metrics = fused_nt_xent(
        z,
        tau,
        pairs=case.pairs,
        normalize=case.normalize,
        reduction=case.reduction,
        negatives=negatives_of(0, case),
        return_metrics=True,
    )
    objective = (loss * upstream_of(0)).sum() if case.reduction == "none" else loss
    objective.backward()
    assert torch.equal(found["loss"], loss)
    assert torch.equal(found["weight"], model.weight.grad)
    assert not case.learnable or torch.equal(found["tau"], model.tau.grad)
    assert all(map(torch.equal, found["metrics"], metrics))
    assert found["forward"] == found["backward"] == []


@pytest.mark.parametrize("name", ["halves", "interleaved", "same negatives", "dot products"])
@pytest.mark.parametrize("world", [2, 4])
def test_metrics_are_means_over_the_rows_of_the_rank_against_all_rows(ranks, name, world):
    case = next(case for case in CASES if case.name == name)
    double = dataclasses.replace(case, dtype=torch.float64)
    z = torch.cat([ranks[rank][world, name]["z"] for rank in range(world)]).double()
    found = [ranks[rank][world, name]["metrics"] for rank in range(world)]
    whole = nt_xent_metrics(
        z[halves_order(world, case.pairs)],
        case.tau,
        normalize=case.normalize,
        negatives=negatives_of(0, double),
    )
    for k, expected in enumerate(whole):
        mean = torch.stack([metrics[k] for metrics in found]).double().mean()
        assert mean.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", r"rows of z must be the same on every rank, got \[8, .*6\]"),
        ("features", r"features of z must be the same on every rank, got \[6, .*5\]"),
        ("dtype", r"dtype of z must be the same .* got \[torch.float32, .*torch.float64\]"),
        ("tau", r"tau must be the same on every rank, got \[0.1, .*0.2\]"),
        ("pairs", r"pairs must be the same on every rank, got \['halves', .*'interleaved'\]"),
        ("reduction", r"reduction must be the same on every rank, got \['mean', .*'sum'\]"),
        ("normalize", r"normalize must be the same on every rank, got \[1, .*0\]"),
    ],
)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_that_differ_are_refused_on_every_rank(ranks, what, message, world):
    for rank in range(world):
        assert re.match("ValueError: " + message, ranks[rank][world, "refusals"][what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("odd rows", "ValueError: z must have an even number of rows .*, got 7"),
        ("dimensions", "ValueError: z must be 2-D"),
        ("negatives", "ValueError: negatives must not require a gradient"),
        ("negative tau", "ValueError: tau must be a positive finite number, .*, got -1"),
        ("negative tensor", "ValueError: tau must be a positive finite number, .*, got -1"),
        ("integer tau", "TypeError: tau must be a floating-point tensor .*, got torch.int64"),
        ("two temperatures", r"ValueError: tau must be a scalar tensor, got shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_one_rank_refuses_raises_on_every_rank(ranks, what, message, world):
    found = [ranks[rank][world, "refusals"][what] for rank in range(world)]
    assert re.match(message, found[-1])
    expected = (
        f"ValueError: the arguments must be valid on every rank, rank {world - 1} refused its own"
    )
    assert found[:-1] == [expected] * (world - 1)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_second_derivative_raises_on_every_rank(ranks, world):
    for rank in range(world):
        messages = ranks[rank][world, "derivatives"]["second"]
        expected = "fused_nt_xent has no second derivative"
        assert len(messages) == 8 and all(expected in message for message in messages)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_whose_loss_has_no_gradient_takes_part_in_those_of_the_others(ranks, world):
    z = torch.cat([draw(rank, ROWS, FEATURES) for rank in range(world)]).requires_grad_()
    order = halves_order(world, "halves")
    rows = nt_xent(z[order], 0.5, reduction="none")[order.argsort()]
    (expected,) = torch.autograd.grad(rows[:-ROWS].sum(), z)
    found = [ranks[rank][world, "derivatives"]["dropped"] for rank in range(world)]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-11, atol=1e-12)


def test_queues_that_differ_between_ranks_are_refused_on_every_rank(ranks):
    for rank in range(WORLD):
        found = ranks[rank]["modules"]
        message = r"ValueError: features of the queue must be the same .* got \[6, 12, 12, 12\]"
        assert re.match(message, found["wider"])
        message = "ValueError: dtype of the queue must .* got .torch.float32, torch.float64"
        assert re.match(message, found["finer"])


def test_a_process_outside_of_the_group_is_told_so(ranks):
    for rank in (2, 3):
        assert "TypeError: group must be a torch.distributed process" in ranks[rank]["outsider"]


@pytest.mark.parametrize("group", [True, "gloo"])
def test_a_group_that_is_no_process_group_is_refused(group):
    with pytest.raises(TypeError, match="group must be a torch.distributed process group .*, got"):
        fused_nt_xent(torch.zeros(4, 3), 0.1, group=group)


@pytest.mark.parametrize("size", GOLDEN_SIZES)
def test_equals_what_the_replicas_of_the_original_applied(ranks, size):
    golden = np.load(shared_path("golden/nt_xent.npz"))
    world = int(size[0])
    found = [ranks[rank][world, size] for rank in range(world)]
    expected = torch.from_numpy(golden[f"rep_grad_{size}"]).double()
    # the original's loss is twice the mean, and its gradient the sum over replicas
    ours = 2 * torch.stack([x["dz"] for x in found]).double() / world
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()
    loss = 2 * found[0]["loss"].item()
    assert loss == pytest.approx(golden[f"rep_loss_{size}"].mean(), rel=2e-6)


def test_the_module_gathers_and_the_queue_holds_the_rows_of_all_ranks(ranks):
    rows = torch.cat([draw(rank, ROWS, FEATURES) for rank in range(WORLD)]).requires_grad_()
    loss = nt_xent(rows[halves_order(WORLD, "halves")], 0.2)
    loss.backward()
    z, dz = rows.detach(), rows.grad.view(WORLD, ROWS, FEATURES)
    for rank in range(WORLD):
        found = ranks[rank]["modules"]
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        assert relative(found["dz"] / WORLD, dz[rank]) <= 1e-6
        # the ring holds the last 24 of 32 rows
        assert sorted(found["negatives"].tolist()) == sorted(z[ROWS:].float().tolist())
        assert torch.equal(found["bfloat16"], z.float().bfloat16())


def test_rows_in_any_layout_and_without_gradient_have_the_same_loss(ranks):
    for rank in range(WORLD):
        found = ranks[rank]["modules"]
        assert torch.equal(found["without_gradient"], found["loss"])
        assert not found["without_gradient"].requires_grad


def test_the_compiler_breaks_its_graph_at_a_group_and_says_why(ranks):
    for rank in (0, 1):
        found = ranks[rank]["compiled"]
        assert "fused_nt_xent with a group communicates outside of the graph" in found["error"]
        assert torch.equal(found["broken"], found["eager"])
