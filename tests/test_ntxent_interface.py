"""fused_nt_xent as torch sees it: the registered operator, the compiler, the module, the errors."""

import math
import sys

import pytest
import torch

from simclr_kernels import _C, ntxent
from simclr_kernels.ntxent import NTXentLoss, fused_nt_xent
from simclr_kernels.reference import nt_xent


def test_opcheck_accepts_both_operators():
    z = torch.randn(34, 16, requires_grad=True)
    tau = torch.tensor(0.3, requires_grad=True)
    flags = ("halves", True, "ieee")
    torch.library.opcheck(torch.ops.simclr_kernels.ntxent.default, (z, tau, *flags))
    loss, *kept = torch.ops.simclr_kernels.ntxent(z.detach(), tau.detach(), *flags)
    operands = (loss, z.detach(), tau.detach(), *kept, *flags)
    torch.library.opcheck(torch.ops.simclr_kernels.ntxent_backward.default, operands)


def test_backward_operator_takes_what_forward_kept_in_any_layout_and_dtype():
    z, tau, flags = torch.randn(34, 16), torch.tensor(0.3), ("halves", True, "ieee")
    loss, *kept = torch.ops.simclr_kernels.ntxent(z, tau, *flags)
    plain = torch.ops.simclr_kernels.ntxent_backward(loss, z, tau, *kept, *flags)
    strided = [torch.stack((x, x.new_full((34,), math.nan)), 1)[:, 0] for x in (loss, *kept)]
    double = [x.double() for x in (loss, *kept)]
    for dloss, *others in (strided, double):
        again = torch.ops.simclr_kernels.ntxent_backward(dloss, z, tau, *others, *flags)
        assert all(map(torch.equal, again, plain))


def test_operators_refuse_rows_that_the_kernels_would_read_out_of_bounds():
    z, tau, flags = torch.randn(6, 4), torch.tensor(0.3), ("interleaved", True, "ieee")
    rows = torch.ones(6)
    with pytest.raises(ValueError, match="even number of rows .* got 5"):
        torch.ops.simclr_kernels.ntxent(z[:5], tau, *flags)
    with pytest.raises(ValueError, match="even number of rows .* got 5"):
        torch.ops.simclr_kernels.ntxent_backward(
            rows[:5], z[:5], tau, rows[:5], rows[:5], rows[:5], *flags
        )
    for k in range(4):
        four = [rows] * 4
        four[k] = rows[:4]
        with pytest.raises(ValueError, match=r"each of 6 rows, got shape \(4,\)"):
            torch.ops.simclr_kernels.ntxent_backward(four[0], z, tau, *four[1:], *flags)


def test_compiles_to_one_graph_for_any_number_of_images_and_any_temperature():
    loss = NTXentLoss(0.2, learnable=True)
    learnable = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    plain = torch.compile(fused_nt_xent, fullgraph=True, dynamic=True, backend="aot_eager")
    for images, tau in ((4, 0.1), (9, 0.1), (17, 0.3)):
        z = torch.randn(2 * images, 16, requires_grad=True)
        gradients = [torch.autograd.grad(f(z, tau), z)[0] for f in (plain, fused_nt_xent)]
        assert torch.equal(*gradients)
        assert torch.equal(learnable(*z.chunk(2)), loss(*z.chunk(2)))


def test_matmul_precision_is_read_as_torch_has_it_also_by_the_compiler():
    read = ntxent._float32_precision
    compiled = torch.compile(lambda x: x + (read() == "ieee"), fullgraph=True, backend="aot_eager")
    assert read() == "ieee" and compiled(torch.zeros(())) == 1
    try:
        torch.set_float32_matmul_precision("high")
        assert read() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    for name in ("ntxent_triton", "ntxent_rows_triton"):
        monkeypatch.delitem(sys.modules, f"simclr_kernels.{name}", raising=False)
        monkeypatch.delattr(f"simclr_kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="needs triton.*pip install triton"):
        ntxent._triton_kernels()


def test_autocast_does_not_change_a_bit():
    z = torch.randn(34, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [fused_nt_xent(x, 0.1) for x in (z, z.double())]
    assert all(map(torch.equal, inside, [fused_nt_xent(x, 0.1) for x in (z, z.double())]))


def test_autocast_does_not_reach_the_products_of_devices_without_a_kernel():
    z, tau = torch.randn(34, 16), torch.tensor(0.1)

    def by_tiles():
        loss, *kept = ntxent._forward_tiles(z, tau, "halves", True, "ieee")
        return loss, *ntxent._backward_tiles(loss, z, tau, *kept, "halves", True, "ieee")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = by_tiles()
    assert all(map(torch.equal, inside, by_tiles()))


def loss_and_gradient(z):
    leaf = z.clone().requires_grad_()
    loss = fused_nt_xent(leaf, 0.1)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_of_torch_changes_nothing(dtype):
    z = torch.randn(34, 16)
    expected = loss_and_gradient(z)
    try:
        torch.set_default_dtype(dtype)
        actual = loss_and_gradient(z)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, actual, expected))


def test_default_device_of_torch_changes_nothing():
    z = torch.randn(34, 16)
    expected = loss_and_gradient(z)
    with torch.device("meta"):
        actual = loss_and_gradient(z)
    assert all(map(torch.equal, actual, expected))


def test_row_blocks_give_nan_where_the_temperature_is_not_positive():
    for tau in (0.0, -0.1):
        loss, *_ = ntxent._forward_tiles(
            torch.randn(6, 4), torch.tensor(tau), "halves", True, "ieee"
        )
        assert loss.isnan().all()


def test_a_gradient_that_nobody_asks_for_is_not_returned():
    z = torch.randn(6, 4, requires_grad=True)
    tau = torch.tensor(0.5, requires_grad=True)
    returned = []
    for operands in ((z, tau.detach()), (z.detach(), tau), (z, tau)):
        loss = fused_nt_xent(*operands, reduction="none")
        loss.grad_fn.register_hook(
            lambda dz_dtau, _: returned.append([d is not None for d in dz_dtau])
        )
        loss.sum().backward()
    assert [kept[:2] for kept in returned] == [[True, False], [False, True], [True, True]]


def test_rows_that_are_not_contiguous_are_read_right():
    wide = torch.randn(34, 64)
    assert torch.equal(fused_nt_xent(wide[:, ::2], 0.1), fused_nt_xent(wide[:, ::2].clone(), 0.1))


def test_second_derivative_raises():
    z = torch.randn(6, 4, requires_grad=True)
    (dz,) = torch.autograd.grad(fused_nt_xent(z, 0.5), z, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_nt_xent has no second derivative"):
        dz.sum().backward()


def test_module_equals_the_function_and_learns_its_temperature():
    z0, z1 = torch.randn(2, 8, 16)
    fixed = NTXentLoss(0.2)
    assert torch.equal(fixed(z0, z1), fused_nt_xent(torch.cat((z0, z1)), 0.2))
    assert not list(fixed.parameters()) and NTXentLoss().temperature == 0.5
    learnable = NTXentLoss(0.2, learnable=True)
    learnable(z0, z1).backward()
    z = torch.cat((z0, z1)).double()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    nt_xent(z, tau).backward()
    # d/d log tau = tau d/d tau
    assert learnable.log_temperature.grad.item() == pytest.approx(0.2 * tau.grad.item(), rel=1e-5)
    assert repr(learnable) == "NTXentLoss(temperature=0.2)"


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "z", "tau", "kwargs"),
    [
        (ValueError, r"z must be 2-D \(rows, features\), got shape \(4,\)", Z[:, 0], 0.1, {}),
        (ValueError, "z must have an even number of rows .*, got 3", Z[:3], 0.1, {}),
        (ValueError, "z must have at least 2 rows .*, got 0", Z[:0], 0.1, {}),
        (ValueError, "z must have at least 1 feature, got 0", Z[:, :0], 0.1, {}),
        (TypeError, "z must be float32, .*, got torch.int64", Z.long(), 0.1, {}),
        (ValueError, "tau must be a positive finite number, got 0", Z, 0, {}),
        (ValueError, "tau must be a positive finite number, got -0.5", Z, -0.5, {}),
        (ValueError, "tau must be a positive finite number, got nan", Z, math.nan, {}),
        (ValueError, "tau must be a positive finite number, got inf", Z, math.inf, {}),
        (ValueError, "tau must be a positive finite number, got -2", Z, torch.tensor(-2.0), {}),
        (ValueError, r"tau must be a scalar tensor, got shape \(4, 3\)", Z, Z, {}),
        (TypeError, "tau must be a floating-point tensor .* torch.int64", Z, torch.tensor(1), {}),
        (ValueError, "on the device of z, cpu, got meta", Z, torch.ones((), device="meta"), {}),
        (ValueError, "pairs must be 'halves' or .*, got 'rows'", Z, 0.1, {"pairs": "rows"}),
        (ValueError, "reduction must be .*, got 'max'", Z, 0.1, {"reduction": "max"}),
    ],
)
def test_errors_state_the_rule_and_the_value(error, message, z, tau, kwargs):
    with pytest.raises(error, match=message):
        fused_nt_xent(z, tau, **kwargs)


def test_module_refuses_a_bad_temperature_and_views_of_different_shape():
    with pytest.raises(ValueError, match="tau must be a positive finite number, got 0"):
        NTXentLoss(0)
    with pytest.raises(ValueError, match=r"same shape .* got \(4, 3\) and \(2, 3\)"):
        NTXentLoss()(Z, Z[:2])


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="instruction set must be one that runs here, got 'mmx'"):
        _C.ntxent_use("mmx")
