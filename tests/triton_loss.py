"""The GPU kernels of the loss and the reference, called alike, for the tests of the kernels."""

import torch

from simclr_kernels import ntxent_triton
from simclr_kernels.reference import nt_xent
from simclr_kernels.testing import assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# exp2 and log2 of a GPU are approximate: a few roundings more than torch's own
SLACK = 4.0 if DEVICE == "cuda" else 2.0


def upstream_of(rows):
    return torch.randn(rows, generator=torch.Generator().manual_seed(1))


def by_kernels(
    z, tau, pairs="halves", normalize=True, precision="ieee", reduction="none", negatives=None
):
    """The loss, and gradients in z and tau, from the kernels themselves."""
    z, tau = z.to(DEVICE), torch.tensor(tau)
    negatives = None if negatives is None else negatives.to(DEVICE)
    layout = (pairs, normalize, reduction, precision)
    loss, _, *kept = ntxent_triton.forward(z, tau, negatives, *layout, False)
    dloss = upstream_of(len(z)) if reduction == "none" else torch.tensor(1.5)
    return loss, *ntxent_triton.backward(dloss.to(DEVICE), z, tau, negatives, *kept, *layout)


def by_reference(z, tau, reduction="none", **kwargs):
    z = z.detach().clone().requires_grad_()
    tau = torch.tensor(tau, dtype=z.dtype if z.dtype == torch.float64 else torch.float32)
    tau.requires_grad_()
    loss = nt_xent(z, tau, reduction=reduction, **kwargs)
    loss.backward((upstream_of(len(z)) if reduction == "none" else torch.tensor(1.5)).to(loss))
    return loss.detach(), z.grad, tau.grad


def size_of_dtau_terms(loss, dloss, tau):
    """Of the sum over rows that the gradient in tau is, and that cancels."""
    return (dloss.double().abs() * (loss.double() + 1)).sum() / tau


def assert_close_to_the_reference(z, tau, negatives=None, **kwargs):
    """Loss and gradient as accurate as torch's; the gradient in tau if the kernels return it."""
    loss, dz, dtau = by_kernels(z, tau, negatives=negatives, **kwargs)
    kwargs.pop("precision", None)
    same_dtype = by_reference(z, tau, negatives=negatives, **kwargs)
    exact = None if negatives is None else negatives.double()
    truth = by_reference(z.double(), tau, negatives=exact, **kwargs)
    if tau < 0.01:
        # a logit of 200 is rounded by 1e-5 before its exponential is taken
        assert (loss.cpu() - truth[0]).norm() <= 5e-5 * truth[0].norm()
        assert (dz.cpu() - truth[1]).norm() <= 2e-5 * truth[1].norm()
    else:
        assert_as_accurate_as(loss, same_dtype[0], truth[0], SLACK)
        if z.shape[1] > 1:
            assert_as_accurate_as(dz, same_dtype[1], truth[1], SLACK)
    if not dtau.isnan():
        each = kwargs.get("reduction", "none") == "none"
        dloss = upstream_of(len(z)) if each else torch.tensor(1.5)
        allowed = 2e-6 * size_of_dtau_terms(truth[0], dloss, tau)
        assert (dtau.cpu() - truth[2]).abs() <= allowed
