"""The modules around the loss: drop-in NTXentLoss, the temperature that learns, the queue."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import lightly_formula, solo_learn_formula
from simclr_kernels import LearnableTemperature, NegativeQueue, NTXentLoss, fused_nt_xent
from simclr_kernels.reference import nt_xent


def metric_learning_formula(z, temperature):
    """NTXentLoss of pytorch-metric-learning 2: one term for each pair of rows of one label."""
    z = F.normalize(z)
    logits = z @ z.T / temperature
    labels = image_of(z)
    terms = []
    for anchor, positive in (labels[:, None] == labels).fill_diagonal_(False).nonzero():
        negatives = logits[anchor][labels != labels[anchor]]
        candidates = torch.cat((logits[anchor, positive][None], negatives))
        terms.append(candidates.logsumexp(0) - logits[anchor, positive])
    return torch.stack(terms).mean()


def lightly():
    from lightly.loss import NTXentLoss as Lightly

    return lambda z, temperature: Lightly(temperature)(*z.chunk(2))


def solo_learn():
    from solo.losses.simclr import simclr_loss_func

    return lambda z, temperature: simclr_loss_func(z, image_of(z), temperature)


def metric_learning():
    from pytorch_metric_learning.losses import NTXentLoss as MetricLearning

    return lambda z, temperature: MetricLearning(temperature)(z, image_of(z))


def image_of(z):
    return torch.arange(len(z) // 2).repeat(2)


def assert_same_loss(peer, temperature):
    views = torch.randn(2, 16, 32)
    results = []
    for loss_of in (NTXentLoss(temperature), lambda *zs: peer(torch.cat(zs), temperature)):
        z0, z1 = (view.clone().requires_grad_() for view in views)
        loss = loss_of(z0, z1)
        loss.backward()
        results.append((loss.detach(), z0.grad, z1.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("formula", [lightly_formula, solo_learn_formula, metric_learning_formula])
def test_takes_the_place_of_the_formulas_of_others_with_equal_value_and_gradients(
    formula, temperature
):
    assert_same_loss(formula, temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("package", [lightly, solo_learn, metric_learning])
def test_takes_the_place_of_the_losses_of_others_with_equal_value_and_gradients(
    package, temperature
):
    try:
        peer = package()
    except (ImportError, RuntimeError) as error:  # a package for another torch raises the latter
        pytest.skip(f"{package.__name__} cannot be imported: {error}")
    assert_same_loss(peer, temperature)


def test_defaults_are_those_of_lightly():
    assert NTXentLoss().temperature == 0.5
    assert not NTXentLoss().gather_distributed


def test_module_equals_the_function_and_learns_its_temperature():
    z0, z1 = torch.randn(2, 8, 16)
    fixed = NTXentLoss(0.2)
    assert torch.equal(fixed(z0, z1), fused_nt_xent(torch.cat((z0, z1)), 0.2))
    assert not list(fixed.parameters())
    learnable = NTXentLoss(0.2, learnable=True)
    learnable(z0, z1).backward()
    z = torch.cat((z0, z1)).double()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    nt_xent(z, tau).backward()
    ((name, parameter),) = learnable.named_parameters()
    assert name == "learned.log_temperature"
    # d/d log tau = tau d/d tau
    assert parameter.grad.item() == pytest.approx(0.2 * tau.grad.item(), rel=1e-5)
    assert repr(fixed) == "NTXentLoss(temperature=0.2)"
    assert "LearnableTemperature(temperature=0.2, smallest=0.01)" in repr(learnable)


def test_module_repr_reads_no_value_that_is_not_in_memory():
    module = NTXentLoss(0.2, learnable=True).to("meta")
    assert "LearnableTemperature(smallest=0.01)" in repr(module)


def test_module_takes_more_negatives():
    z0, z1 = torch.randn(2, 8, 16)
    negatives = torch.randn(5, 16)
    loss = fused_nt_xent(torch.cat((z0, z1)), 0.2, negatives=negatives)
    assert torch.equal(NTXentLoss(0.2)(z0, z1, negatives), loss)


def test_gathering_without_a_process_group_is_a_group_of_one():
    z0, z1 = torch.randn(2, 8, 16)
    assert torch.equal(NTXentLoss(gather_distributed=True)(z0, z1), NTXentLoss()(z0, z1))


def test_modules_refuse_bad_temperatures_and_views_of_different_shape():
    with pytest.raises(ValueError, match="tau must be a positive finite number, .*, got 0"):
        NTXentLoss(0)
    with pytest.raises(ValueError, match="tau must be a positive finite number, .*, got -1"):
        LearnableTemperature(0.1, smallest=-1)
    with pytest.raises(ValueError, match="at least the smallest allowed, 0.01, got 0.005"):
        NTXentLoss(0.005, learnable=True)
    with pytest.raises(ValueError, match=r"same shape .* got \(4, 3\) and \(2, 3\)"):
        NTXentLoss()(torch.zeros(4, 3), torch.zeros(2, 3))


def test_temperature_stops_at_the_smallest_and_can_leave_it_again():
    temperature = LearnableTemperature(0.02)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)
    for gradient, expected in ((5.0, 0.01), (5.0, 0.01), (-math.log(3), 0.03)):
        optimizer.zero_grad()
        # of log tau, so that a step multiplies tau by exp(-gradient)
        (temperature() / temperature().detach() * gradient).backward()
        optimizer.step()
        assert temperature().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("start", [0.02, 0.01])
def test_a_penalty_from_before_and_a_second_call_keep_their_gradient(start):
    temperature = LearnableTemperature(start)
    penalty = temperature.log_temperature.square()
    (penalty + temperature() + temperature()).backward()
    expected = 2 * math.log(start) + 2 * start
    assert temperature.log_temperature.grad.item() == pytest.approx(expected, rel=1e-5)


def test_temperature_under_the_limit_compiles_to_one_graph_that_sets_it_back():
    temperature = LearnableTemperature(0.02)
    compiled = torch.compile(temperature, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        temperature.log_temperature.fill_(-9.0)
    tau = compiled()
    tau.backward()
    assert tau.item() == pytest.approx(0.01) == temperature.log_temperature.grad.item()
    assert temperature.log_temperature.item() == pytest.approx(math.log(0.01))


def test_temperature_starts_where_clip_does_and_moves_with_its_module():
    temperature = LearnableTemperature()
    assert temperature().item() == pytest.approx(0.07)
    assert LearnableTemperature(0.5).to(torch.float64)().dtype == torch.float64
    other = LearnableTemperature(0.5)
    other.load_state_dict(temperature.state_dict())
    assert torch.equal(other(), temperature())


def numbered(first, last):
    """Rows first ... last - 1, each made of its number."""
    return torch.arange(first, last).float()[:, None].expand(-1, 3)


def numbers(queue):
    return sorted(queue.negatives[:, 0].int().tolist())


def test_queue_holds_the_last_rows_whatever_the_sizes_of_the_batches():
    for sizes in ([1] * 12, [3] * 6, [2, 5, 4, 1, 3], [5, 5, 5], [6], [11, 2], [7, 13]):
        queue, one_by_one = NegativeQueue(5, 3), NegativeQueue(5, 3)
        pushed = 0
        for size in sizes:
            queue.push(numbered(pushed, pushed + size))
            for row in range(pushed, pushed + size):
                one_by_one.push(numbered(row, row + 1))
            pushed += size
            assert numbers(queue) == list(range(max(0, pushed - 5), pushed))
            assert torch.equal(queue.rows, one_by_one.rows)
            assert queue.position == one_by_one.position


def test_queue_has_no_negatives_before_the_first_push_and_grows_until_full():
    queue = NegativeQueue(4, 3)
    z = torch.randn(6, 3)
    assert queue.negatives is None
    assert torch.equal(fused_nt_xent(z, 0.1, negatives=queue.negatives), fused_nt_xent(z, 0.1))
    queue.push(z[:0])
    assert queue.negatives is None
    lengths = []
    for _ in range(3):
        queue.push(z[:2])
        lengths.append(len(queue.negatives))
    assert lengths == [2, 4, 4]


def test_queue_keeps_no_graph_and_its_own_copy():
    queue = NegativeQueue(4, 3)
    z = torch.randn(4, 3, requires_grad=True)
    queue.push(z * 2)
    assert not queue.negatives.requires_grad
    expected = queue.negatives.clone()
    with torch.no_grad():
        z.zero_()
    assert torch.equal(queue.negatives, expected)
    loss = fused_nt_xent(torch.randn(4, 3, requires_grad=True), 0.1, negatives=queue.negatives)
    loss.backward()


def test_pushing_between_loss_and_backward_is_refused_by_torch():
    queue = NegativeQueue(4, 3)
    queue.push(torch.randn(4, 3))
    loss = fused_nt_xent(torch.randn(4, 3, requires_grad=True), 0.1, negatives=queue.negatives)
    queue.push(torch.randn(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_dict_holds_rows_position_and_count_exactly(tmp_path):
    queue = NegativeQueue(5, 3)
    queue.push(torch.randn(7, 3))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = NegativeQueue(5, 3)
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    for each in (queue, other):
        each.push(numbered(0, 2))
    assert torch.equal(other.rows, queue.rows)
    assert (other.position, other.count) == (queue.position, queue.count) == (4, 5)
    with pytest.raises(RuntimeError, match="size mismatch for rows"):
        NegativeQueue(6, 3).load_state_dict(queue.state_dict())


def test_queue_moves_and_casts_with_its_module():
    queue = NegativeQueue(5, 3, dtype=torch.bfloat16)
    queue.push(torch.randn(2, 3))
    assert queue.negatives.dtype == torch.bfloat16
    assert queue.to(torch.float64).negatives.dtype == torch.float64
    assert queue.to("meta").negatives.shape == (2, 3)


def test_queue_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="size and features must be at least 1, got 0 and 3"):
        NegativeQueue(0, 3)
    with pytest.raises(ValueError, match=r"z must be \(rows, 3\), got shape \(4, 2\)"):
        NegativeQueue(5, 3).push(torch.zeros(4, 2))
    with pytest.raises(TypeError, match="group must be a torch.distributed process group"):
        NegativeQueue(5, 3).push(torch.zeros(4, 3), group=True)


def test_queue_says_what_it_holds():
    queue = NegativeQueue(5, 3)
    queue.push(torch.zeros(2, 3))
    assert repr(queue) == "NegativeQueue(size=5, features=3, count=2)"
