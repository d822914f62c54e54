"""The tolerances and the cases that tests and benchmarks of the loss share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr_kernels.reference import positive_index, unit_rows


def assert_as_accurate_as(
    actual: Tensor, same_dtype: Tensor, truth: Tensor, slack: float = 2.0
) -> None:
    """Asserts that actual is about as near to the truth as torch's own answer in the same dtype.

    Errors are Euclidean norms over the whole tensor. Allowed is slack times the larger of torch's
    error and one rounding (the dtype's eps) of the norm of the truth.

    Args:
        actual: any shape and dtype, without NaN: NaN fails, whatever the truth.
        same_dtype: the reference, evaluated by torch in the dtype of actual.
        truth: the reference in float64.
        slack: how many times torch's own error is allowed.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    truth = truth.detach().double().cpu()
    error, own_error = ((x.detach().double().cpu() - truth).norm() for x in (actual, same_dtype))
    allowed = slack * max(own_error.item(), torch.finfo(actual.dtype).eps * truth.norm().item())
    assert error.item() <= allowed, (
        f"error {error:.3g} is more than {slack:g} times torch's own, {own_error:.3g}, "
        f"at a norm of {truth.norm():.3g}"
    )


def size_of_terms(
    z: Tensor,
    tau: float,
    upstream: Tensor | None = None,
    pairs: str = "halves",
    normalize: bool = True,
) -> Tensor:
    """Norm of sum_j |w_ij| |z^_j| / tau: what the gradient would be if nothing cancelled.

    upstream (M,) are the gradients of the rows of the loss, by default 1.
    """
    z = z.double()
    unit = unit_rows(z) if normalize else z
    i = torch.arange(len(z), device=z.device)
    logits = unit @ unit.T / tau
    logits[i, i] = -math.inf
    p = logits.softmax(1)
    p[i, positive_index(len(z), pairs, z.device)] -= 1
    w = p.abs() if upstream is None else upstream.double().abs()[:, None] * p.abs()
    terms = (w + w.T) @ unit.norm(dim=1) / tau
    return (terms / z.norm(dim=1).clamp_min(1e-6) if normalize else terms).norm()


@dataclass(frozen=True)
class LossCase:
    """Rows for the loss, and the regime they stand for."""

    regime: str
    rows: int
    features: int
    tau: float
    kind: str = "random"

    def z(self, seed: int = 0) -> Tensor:
        """(rows, features) float32 of this kind, view-major; rows are not normalised."""
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.features, generator=generator)

        images = self.rows // 2
        if self.kind == "random":
            return 3 * normal(self.rows)
        if self.kind == "pairs":
            image = normal(images)
            return torch.cat((image, image + 0.5 * normal(images)))
        if self.kind == "tight":
            image = normal(images)
            return torch.cat((image, image + 1e-3 * normal(images)))
        if self.kind == "duplicates":
            return normal(max(images // 4, 1)).repeat(9, 1)[: self.rows]
        if self.kind == "collapsed":
            return normal(1).repeat(self.rows, 1) * (1 + torch.arange(self.rows)[:, None] % 3)
        if self.kind == "zeros":
            z = normal(self.rows)
            z[::5] = 0
            z[1::5] *= 1e-8
            return z
        raise ValueError(f"kind must be one of the six above, got {self.kind!r}")


# the smallest shapes at which each path through the tiles is taken
LOSS_CASES = (
    LossCase("one image, no negatives", 2, 16, 0.5),
    LossCase("one feature", 6, 1, 0.5),
    LossCase("less than any tile, and an odd width", 34, 33, 0.1),
    LossCase("whole tiles", 128, 128, 0.5),
    LossCase("one image more than whole tiles", 130, 128, 0.05, "pairs"),
    LossCase("many chunks of features", 34, 1024, 0.1, "pairs"),
    LossCase("close pairs, where p - 1 would cancel", 130, 33, 0.1, "tight"),
    LossCase("the same image more than once", 130, 33, 0.1, "duplicates"),
    # a little above 0.0128, which float32 rounds down
    LossCase("the smallest temperature with a constant maximum", 66, 33, 0.012801),
    LossCase("a running maximum", 66, 33, 0.005),
)
