import copy
import math
import re

import numpy as np
import pytest
import torch
from conftest import shared_path
from torch import nn

from simclr_kernels.models import SimCLR, SmallResNet, projection_head
from simclr_kernels.optim import (
    LARS,
    learning_rate,
    parameter_groups,
    peak_learning_rate,
    training_steps,
    warmup_steps,
)


def excluded(name, patterns):
    return bool(patterns) and re.search(patterns, name) is not None


@pytest.mark.parametrize("config", range(8))
def test_lars_agrees_with_the_original(config):
    golden = np.load(shared_path("golden/lars.npz"))
    names = golden["names"]
    params = [nn.Parameter(torch.from_numpy(golden[f"init_{i:02}"])) for i in range(len(names))]
    no_decay = str(golden["cfg_exclude_from_weight_decay"][config])
    no_adaptation = str(golden["cfg_exclude_from_layer_adaptation"][config])
    weight_decay = float(golden["cfg_weight_decay"][config])
    groups = [
        {
            "params": [p],
            "weight_decay": 0.0 if excluded(name, no_decay) else weight_decay,
            "adapt": not excluded(name, no_adaptation),
        }
        for name, p in zip(names, params, strict=True)
    ]
    optimizer = LARS(
        groups,
        lr=0.0,
        momentum=float(golden["cfg_momentum"][config]),
        eta=float(golden["cfg_eeta"][config]),
        nesterov=bool(golden["cfg_use_nesterov"][config]),
        classic_momentum=bool(golden["cfg_classic_momentum"][config]),
    )
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = float(golden["lr"][config, step])
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(golden[f"grad_{i:02}"][step])
        optimizer.step()
        for i, p in enumerate(params):
            momentum = optimizer.state[p]["momentum_buffer"]
            for key, actual in (("param", p.detach()), ("momentum", momentum)):
                expected = golden[f"{key}_{i:02}"][config, step]
                error = np.abs(actual.numpy() - expected).max()
                assert error <= 2e-6 * np.abs(expected).max(), (key, names[i], step)


def lars_by_hand(w, v, g, group):
    """One step on one float64 tensor, line by line from the definition; returns w and v."""
    lr, mu, wd, eta = group["lr"], group["momentum"], group["weight_decay"], group["eta"]
    decayed = g + wd * w
    trust = 1.0
    if group["adapt"]:
        w_norm = w.square().sum().sqrt().item()
        if group["variant"] == "simclr":
            g_norm = denominator = decayed.square().sum().sqrt().item()
        else:
            g_norm = g.square().sum().sqrt().item()
            denominator = g_norm + wd * w_norm
        if w_norm > 0 and g_norm > 0:
            trust = eta * w_norm / denominator
    v = mu * v + lr * trust * decayed
    return w - (mu * v + lr * trust * decayed if group["nesterov"] else v), v


@pytest.mark.parametrize("variant", ["simclr", "you2017"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_agrees_with_its_definition_in_float64(variant, nesterov):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (16, 8), (16,), (4, 4)]
    params = [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
    ]
    with torch.no_grad():
        params[3].zero_()
    groups = [
        {"params": [params[0], params[1], params[3]], "weight_decay": 0.3},
        {"params": [params[2]], "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.0, eta=0.02, variant=variant, nesterov=nesterov)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 + step
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if step == 2:
                p.grad.zero_()
            expected[i] = lars_by_hand(*expected[i], p.grad, group_of[p])
        optimizer.step()
        for p, (w, v) in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
            momentum = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(momentum, v, rtol=1e-12, atol=1e-12)


def one_step(gradient_scale=1.0, adapt=True, **options):
    """The step taken along a gradient that is orthogonal to its weight."""
    generator = torch.Generator().manual_seed(1)
    w = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
    before = w.detach().clone()
    g = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    w.grad = gradient_scale * (g - (g * before).sum() / before.square().sum() * before)
    LARS([{"params": [w], "adapt": adapt}], lr=2.0, **options).step()
    return before - w.detach()


def test_variants_differ_with_weight_decay_and_agree_without():
    torch.testing.assert_close(one_step(variant="simclr"), one_step(variant="you2017"))
    ratio = one_step(weight_decay=1.0).norm() / one_step(weight_decay=1.0, variant="you2017").norm()
    assert 1.3 < ratio < math.sqrt(2) + 1e-6


def test_adapted_step_ignores_the_scale_of_the_loss_and_a_free_step_does_not():
    torch.testing.assert_close(one_step(2.0), one_step(1.0))
    torch.testing.assert_close(one_step(2.0, adapt=False), 2 * one_step(1.0, adapt=False))


def test_tensor_that_is_not_adapted_moves_at_the_full_rate():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    LARS([{"params": [p], "adapt": False}], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.5, -1.0, -1.5]))


@pytest.mark.parametrize("variant", ["simclr", "you2017"])
def test_step_reads_no_value_back_from_the_device(variant):
    # tensors without data: reading one of their values raises
    with torch.device("meta"):
        params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
        for p in params:
            p.grad = torch.ones_like(p)
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "adapt": False}]
    LARS(groups, lr=1.0, variant=variant, nesterov=True).step()


def test_parameter_without_gradient_stays_as_it_is():
    moving, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    moving.grad = torch.ones(3)
    optimizer = LARS([moving, still], lr=1.0, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3))
    assert still not in optimizer.state
    assert not torch.equal(moving.detach(), torch.ones(3))


def test_step_leaves_gradients_alone_and_returns_the_closure_loss():
    w = nn.Parameter(torch.ones(3))
    optimizer = LARS([w], lr=1.0, weight_decay=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert torch.equal(w.grad, torch.full((3,), 2.0))


def test_tensors_of_two_dtypes_step_together():
    params = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    LARS(params, lr=1.0, eta=0.1).step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9))


def small_model_with_gradients():
    torch.manual_seed(0)
    model = SimCLR(SmallResNet(4), projection_head("nonlinear", 16, 8, 4))
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    return model


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float-lr", "tensor-lr"])
def test_resuming_from_a_state_dict_gives_the_same_bits(as_tensor):
    lr = torch.tensor(0.7) if as_tensor else 0.7
    model = small_model_with_gradients()
    optimizer = LARS(parameter_groups(model, 1e-4), lr, nesterov=True)
    optimizer.step()

    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    resumed = LARS(parameter_groups(twin, 1e-4), lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step()
        resumed.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [g["adapt"] for g in resumed.param_groups] == [True, False]


def test_tensor_and_float_learning_rates_agree():
    steps = []
    for lr in (0.7, torch.tensor(0.7)):
        model = small_model_with_gradients()
        LARS(parameter_groups(model, 1e-4), lr).step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(steps[0], steps[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"lr": torch.ones(2)}, r"lr must be a float or a scalar tensor, got \(2,\)"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": -1e-4}, "weight_decay must be at least 0, got -0.0001"),
        ({"eta": 0.0}, "eta must be positive, got 0.0"),
        ({"variant": "lars"}, "variant must be 'simclr' or 'you2017', got 'lars'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum above 0, got 0"),
        (
            {"variant": "you2017", "classic_momentum": False},
            "classic_momentum=False needs variant 'simclr', got 'you2017'",
        ),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


def test_values_of_a_single_group_are_checked_too():
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        LARS([{"params": [nn.Parameter(torch.ones(2))], "weight_decay": -1}], lr=0.1)


def test_groups_split_weights_from_biases_and_norms_by_kind_of_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.MultiheadAttention(4, 2),
    )
    model.register_parameter("log_tau", nn.Parameter(torch.zeros(())))
    weights, others = parameter_groups(model, 1e-4)
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in weights["params"]] == [
        "0.weight",
        "2.weight",
        "4.in_proj_weight",
        "4.out_proj.weight",
    ]
    assert (weights["weight_decay"], weights["adapt"]) == (1e-4, True)
    assert (others["weight_decay"], others["adapt"]) == (0.0, False)
    assert len(weights["params"]) + len(others["params"]) == len(names)


def test_groups_name_shared_parameters_once_and_leave_frozen_ones_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    weights, others = parameter_groups(model, 0.0)
    assert len(weights["params"]) == 1
    assert len(others["params"]) == 2


def test_schedule_agrees_with_the_original():
    golden = np.load(shared_path("golden/schedule.npz"))
    for i in range(len(golden["num_examples"])):
        n, b, epochs = (int(golden[k][i]) for k in ("num_examples", "batch_size", "epochs"))
        warmup = warmup_steps(n, b, float(golden["warmup_epochs"][i]))
        total = training_steps(n, b, epochs)
        peak = peak_learning_rate(float(golden["base_lr"][i]), b, str(golden["scaling"][i]))
        assert warmup == golden["warmup_steps"][i]
        assert total == golden["total_steps"][i]
        rates = [learning_rate(int(step), peak, warmup, total) for step in golden["step"][i]]
        np.testing.assert_allclose(rates, golden["lr"][i], rtol=0, atol=1e-6 * peak)


def test_schedule_starts_at_zero_peaks_after_warmup_and_stays_at_zero_after_the_end():
    rates = [learning_rate(step, 2.0, 10, 100) for step in range(120)]
    assert rates[0] == 0
    assert rates[5] == 1.0
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100:] == [0.0] * 20
    assert learning_rate(0, 2.0, 0, 100) == 2.0


def test_run_shorter_than_its_warmup_never_reaches_the_peak():
    rates = [learning_rate(step, 1.0, 10, 5) for step in range(5)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_both_scaling_rules_meet_at_a_batch_of_4096():
    assert peak_learning_rate(0.075, 4096, "sqrt") == pytest.approx(4.8)
    assert peak_learning_rate(0.3, 4096, "linear") == pytest.approx(4.8)
    with pytest.raises(ValueError, match="rule must be one of sqrt, linear, got 'cube'"):
        peak_learning_rate(0.3, 4096, "cube")
