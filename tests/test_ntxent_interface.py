"""fused_nt_xent as torch sees it: the registered operators, the compiler, autograd, the errors."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from simclr_kernels import _C, NegativeQueue, NTXentLoss, fused_nt_xent, ntxent

FLAGS = ("halves", True, "mean", "ieee")
forward = torch.ops.simclr_kernels.ntxent
backward = torch.ops.simclr_kernels.ntxent_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize(("reduction", "with_metrics"), [("mean", False), ("none", True)])
def test_opcheck_accepts_both_operators(reduction, with_metrics, extra, dtype):
    z = torch.randn(34, 16, dtype=dtype, requires_grad=True)
    tau = torch.tensor(0.3, requires_grad=True)
    negatives = torch.randn(extra, 16, dtype=dtype) if extra else None
    flags = ("interleaved", True, reduction, "ieee")
    operands = (z, tau, negatives, *flags, with_metrics)
    torch.library.opcheck(forward.default, operands)
    z, tau = z.detach(), tau.detach()
    loss, _, *kept = forward(z, tau, negatives, *flags, with_metrics)
    operands = (loss, z, tau, negatives, *kept, *flags)
    torch.library.opcheck(backward.default, operands)


def test_backward_operator_takes_what_forward_kept_in_any_layout_and_dtype():
    z, tau, flags = torch.randn(34, 16), torch.tensor(0.3), ("halves", True, "none", "ieee")
    loss, _, stats, *empty = forward(z, tau, None, *flags, False)
    plain = backward(loss, z, tau, None, stats, *empty, *flags)
    strided = [torch.stack((x, x * math.nan), -1)[..., 0] for x in (loss, stats)]
    for dloss, kept in (strided, (loss.double(), stats.double())):
        again = backward(dloss, z, tau, None, kept, *empty, *flags)
        assert all(map(torch.equal, again, plain))


def test_operators_refuse_rows_that_the_kernels_would_read_out_of_bounds():
    z, tau, flags = torch.randn(6, 4), torch.tensor(0.3), ("interleaved", True, "none", "ieee")
    rows, stats, empty = torch.ones(6), torch.ones(3, 6), torch.ones(0)
    with pytest.raises(ValueError, match="even number of rows .* got 5"):
        forward(z[:5], tau, None, *flags, False)
    with pytest.raises(ValueError, match="even number of rows .* got 5"):
        backward(rows[:5], z[:5], tau, None, stats[:, :5], empty, empty, *flags)
    with pytest.raises(ValueError, match=r"the 4 features of z, got shape \(2, 3\)"):
        forward(z, tau, torch.ones(2, 3), *flags, False)
    with pytest.raises(ValueError, match=r"the 4 features of z, got shape \(2, 3\)"):
        backward(rows, z, tau, torch.ones(2, 3), stats, empty, empty, *flags)
    with pytest.raises(ValueError, match="tau must be a positive finite number, .*, got -2"):
        forward(z, torch.tensor(-2.0), None, *flags, False)
    for dloss, kept, got in (
        (rows[:4], stats, r"\[\(4,\), \(3, 6\)\]"),
        (rows, stats[:, :4], r"\[\(6,\), \(3, 4\)\]"),
        (rows, stats[0], r"\[\(6,\), \(6,\)\]"),
        (rows[0], stats, r"\[\(\), \(3, 6\)\]"),
    ):
        rule = r"what forward kept its own, \[\(6,\), \(3, 6\)\], got "
        with pytest.raises(ValueError, match=rule + got):
            backward(dloss, z, tau, None, kept, empty, empty, *flags)


def test_compiles_to_one_graph_for_any_number_of_images_and_any_temperature():
    loss = NTXentLoss(0.2, learnable=True)
    learnable = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    plain = torch.compile(fused_nt_xent, fullgraph=True, dynamic=True, backend="aot_eager")
    for images, tau in ((4, 0.1), (9, 0.1), (17, 0.3)):
        z = torch.randn(2 * images, 16, requires_grad=True)
        gradients = [torch.autograd.grad(f(z, tau), z)[0] for f in (plain, fused_nt_xent)]
        assert torch.equal(*gradients)
        assert torch.equal(learnable(*z.chunk(2)), loss(*z.chunk(2)))


def test_compiles_to_one_graph_with_negatives_and_metrics():
    queue = NegativeQueue(12, 16)
    options = {"reduction": "none", "return_metrics": True}

    def step(z):
        loss, metrics = fused_nt_xent(z, 0.1, negatives=queue.negatives, **options)
        return loss.sum(), *metrics

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (4, 9, 17):
        z = torch.randn(2 * images, 16)
        for actual, expected in zip(compiled(z), step(z), strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)
        queue.push(z[:5])


def test_compiles_twice_for_any_number_of_temperatures():
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_nt_xent, fullgraph=True, backend=frames)
    z = torch.randn(8, 4)
    for k in range(12):
        assert torch.equal(compiled(z, 0.1 + k / 20), fused_nt_xent(z, 0.1 + k / 20))
    # the first number is taken for a constant
    assert frames.frame_count <= 2


def test_a_queue_that_fills_compiles_twice_where_its_negatives_are_an_argument():
    queue = NegativeQueue(40, 4)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_nt_xent, fullgraph=True, backend=frames)
    for _ in range(12):
        z = torch.randn(8, 4)
        queue.push(z[:4])
        loss = compiled(z, 0.2, negatives=queue.negatives)
        assert torch.equal(loss, fused_nt_xent(z, 0.2, negatives=queue.negatives))
    assert frames.frame_count <= 2


def test_the_compiler_refuses_what_the_function_refuses():
    compiled = torch.compile(fused_nt_xent, fullgraph=True, backend="aot_eager")
    # the compiler may know the number of rows by a name only
    with pytest.raises(Exception, match="z must have an even number of rows .*, got (3|s[0-9]+)"):
        compiled(torch.zeros(3, 2), 0.1)
    with pytest.raises(Exception, match="negatives must not require a gradient"):
        compiled(torch.zeros(4, 2), 0.1, negatives=torch.zeros(1, 2, requires_grad=True))


def test_matmul_precision_is_read_as_torch_has_it_also_by_the_compiler():
    read = ntxent._float32_precision
    compiled = torch.compile(lambda x: x + (read() == "ieee"), fullgraph=True, backend="aot_eager")
    assert read() == "ieee" and compiled(torch.zeros(())) == 1
    on_a_gpu = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    try:
        torch.set_float32_matmul_precision("high")
        assert read() == "tf32"
        expected = "ieee" if torch.version.hip else "tf32"
        assert ntxent._dot_precision(on_a_gpu) == expected
        for other in ({"dtype": torch.float16}, {"is_cuda": False}):
            assert ntxent._dot_precision(SimpleNamespace(**vars(on_a_gpu) | other)) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ntxent._dot_precision(on_a_gpu) == "ieee"


@pytest.mark.parametrize(("newer", "expected"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_matmul_precision_is_read_from_the_newer_setting_where_torch_mixes_both(
    newer, expected, monkeypatch
):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    matmul = SimpleNamespace(fp32_precision=newer)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert ntxent._float32_precision() == expected


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    for name in ("ntxent_triton", "ntxent_rows_triton"):
        monkeypatch.delitem(sys.modules, f"simclr_kernels.{name}", raising=False)
        monkeypatch.delattr(f"simclr_kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="needs triton.*pip install triton"):
        ntxent._triton_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_compiler_knows_what_a_gpu_keeps_for_backward(dtype, monkeypatch):
    shapes = SimpleNamespace(kept_shapes=lambda rows, features: ((4, rows), (rows, 64), (rows,)))
    monkeypatch.setattr(ntxent, "_triton_kernels", lambda: shapes)
    with FakeTensorMode():
        z = torch.empty(6, 5, dtype=dtype, device="cuda")
        loss, metrics, stats, unit, stretch = forward(z, torch.tensor(0.1), None, *FLAGS, True)
    of_row = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in (loss, metrics, stats, stretch)} == {of_row} and unit.dtype == dtype
    assert loss.shape == () and metrics.shape == (3, 6)
    kept = [stats.shape, unit.shape, stretch.shape]
    assert kept == ([(3, 6), (0,), (0,)] if dtype == torch.float64 else [(4, 6), (6, 64), (6,)])


def test_autocast_does_not_change_a_bit():
    z = torch.randn(34, 16)

    def results():
        pairs = [fused_nt_xent(x, 0.1, return_metrics=True) for x in (z, z.double())]
        return [x for loss, metrics in pairs for x in (loss, *metrics)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    assert all(map(torch.equal, inside, results()))


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
    assert [given[:2] for given in returned] == [[True, False], [False, True], [True, True]]


def test_rows_that_are_not_contiguous_are_read_right():
    wide = torch.randn(34, 64)
    assert torch.equal(fused_nt_xent(wide[:, ::2], 0.1), fused_nt_xent(wide[:, ::2].clone(), 0.1))


def test_activation_checkpointing_computes_the_same_gradient():
    layer, z = torch.nn.Linear(4, 4), torch.randn(6, 4, requires_grad=True)
    checkpoint(lambda x: fused_nt_xent(layer(x), 0.5), z, use_reentrant=False).backward()
    (expected,) = torch.autograd.grad(fused_nt_xent(layer(z), 0.5), z)
    assert torch.equal(z.grad, expected)


def test_second_derivative_raises():
    z = torch.randn(6, 4, requires_grad=True)
    (dz,) = torch.autograd.grad(fused_nt_xent(z, 0.5), z, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_nt_xent has no second derivative"):
        dz.sum().backward()


def test_derivatives_by_transforms_and_in_forward_mode_are_errors_and_not_zero():
    z = torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.jvp(lambda x: fused_nt_xent(x, 0.5), (z,), (z,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        fused_nt_xent(forward_ad.make_dual(z, z), 0.5)


def test_a_loss_that_nothing_needs_a_gradient_of_has_none():
    z = torch.randn(6, 4)
    assert not fused_nt_xent(z, 0.5).requires_grad
    with torch.no_grad():
        assert not fused_nt_xent(z.requires_grad_(), 0.5).requires_grad
    with torch.inference_mode():
        assert torch.equal(fused_nt_xent(z.clone(), 0.5), fused_nt_xent(z, 0.5))


def test_two_losses_in_one_graph_add_their_gradients():
    z = torch.randn(6, 4, requires_grad=True)
    (both,) = torch.autograd.grad(fused_nt_xent(z, 0.5) + 3 * fused_nt_xent(z, 0.1), z)
    apart = [torch.autograd.grad(fused_nt_xent(z, tau), z)[0] for tau in (0.5, 0.1)]
    torch.testing.assert_close(both, apart[0] + 3 * apart[1])


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "z", "tau", "kwargs"),
    [
        (ValueError, r"z must be 2-D \(rows, features\), got shape \(4,\)", Z[:, 0], 0.1, {}),
        (ValueError, "z must have an even number of rows .*, got 3", Z[:3], 0.1, {}),
        (ValueError, "z must have at least 2 rows .*, got 0", Z[:0], 0.1, {}),
        (ValueError, "z must have at least 1 feature, got 0", Z[:, :0], 0.1, {}),
        (TypeError, "z must be float32, .*, got torch.int64", Z.long(), 0.1, {}),
        (ValueError, "tau must be a positive finite number, .*, got 0", Z, 0, {}),
        (ValueError, "tau must be a positive finite number, .*, got -0.5", Z, -0.5, {}),
        (ValueError, "tau must be a positive finite number, .*, got nan", Z, math.nan, {}),
        (ValueError, "tau must be a positive finite number, .*, got inf", Z, math.inf, {}),
        (ValueError, "tau must be a positive finite number, .*, got -2", Z, torch.tensor(-2.0), {}),
        (ValueError, r"tau must be .*, 2\^-126 to 2\^127, got 1e-38", Z, 1e-38, {}),
        (ValueError, r"tau must be .*, 2\^-126 to 2\^127, got 1e\+39", Z, 1e39, {}),
        (
            TypeError,
            "z must be a dense torch.Tensor, got <class 'numpy.ndarray'>",
            Z.numpy(),
            1,
            {},
        ),
        (TypeError, "z must be a dense .*, got torch.sparse_coo", Z.to_sparse(), 0.1, {}),
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


@pytest.mark.parametrize(
    ("error", "message", "negatives"),
    [
        (TypeError, "be a dense torch.Tensor, got <class 'list'>", Z.tolist()),
        (TypeError, "be a dense torch.Tensor, got torch.sparse_coo", Z.to_sparse()),
        (TypeError, "the dtype of z, torch.float32, got torch.float64", Z.double()),
        (ValueError, "on the device of z, cpu, got meta", Z.to("meta")),
        (ValueError, r"2-D with at least 1 row and the 3 features .* got shape \(4,\)", Z[:, 0]),
        (ValueError, r"the 3 features of z, got shape \(4, 2\)", Z[:, :2]),
        (ValueError, r"got shape \(0, 3\); None stands for no negatives", Z[:0]),
        (ValueError, "not require a gradient", torch.zeros(1, 3, requires_grad=True)),
    ],
)
def test_errors_about_negatives_state_the_rule_and_the_value(error, message, negatives):
    with pytest.raises(error, match=f"negatives must.*{message}"):
        fused_nt_xent(Z, 0.1, negatives=negatives)


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="instruction set must be one that runs here, got 'mmx'"):
        _C.use_instruction_set("mmx")
