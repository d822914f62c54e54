"""LARS and the learning-rate schedule of SimCLR (google-research/simclr, tf2/lars_optimizer.py).

With v the momentum, mu its factor and g' = g + weight_decay w, an adapted tensor takes the step

    trust = eta |w| / |g'|          (variant "you2017": eta |w| / (|g| + weight_decay |w|))
    v = mu v + lr trust g'
    w = w - v

with trust = 1 where the norm of w or of the gradient is zero. A tensor that is not adapted takes
it with trust = 1, so at the full learning rate. Adapted tensors do not notice the scale of the
loss; the others do. The original's loss is twice the paper's mean over 2N rows that this library
returns: there biases and normalisation parameters take steps twice as long as here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

VARIANTS = ("simclr", "you2017")
SCALING_RULES = ("sqrt", "linear")


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888), as the original SimCLR defines it.

    Each parameter group may set any of the arguments for itself, and `adapt` (default True): False
    takes its tensors out of the adaptation. See parameter_groups for the usual two groups. All
    tensors of a group are stepped together by torch's _foreach operations, without a host sync.

    Args:
        params: parameters, or groups of them.
        lr: learning rate >= 0, a float or a scalar tensor.
        momentum: mu, in [0, 1).
        weight_decay: >= 0; added to the gradient, before its norm is taken.
        eta: trust coefficient > 0.
        variant: "simclr": the norm of the decayed gradient is the denominator of the trust ratio.
            "you2017": the sum of both norms is, as in the paper of LARS (Eq. 6), in timm and in
            lightly. Without weight decay they agree; with it, steps are up to sqrt(2) shorter for
            a gradient orthogonal to its weight, as that of a convolution before batch norm is.
        nesterov: step along mu v + lr trust g' in place of v. Needs momentum.
        classic_momentum: True multiplies the learning rate and the trust ratio into v, as above.
            False accumulates v = mu v + g' and multiplies both into the step, the trust ratio
            being that of the step; only for variant "simclr".

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        variant: str = "simclr",
        nesterov: bool = False,
        classic_momentum: bool = True,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "variant": variant,
            "nesterov": nesterov,
            "classic_momentum": classic_momentum,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group after checking its values, those of the defaults included."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step on every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # norms are stacked, and only tensors of one device and dtype stack
            alike: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append(p)
            for params in alike.values():
                self._step_together(params, group)
        return loss

    def _step_together(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params]
        momenta = [self._momentum(p) for p in params]
        lr, mu, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        nesterov = group["nesterov"]

        decayed = grads
        if weight_decay != 0:
            decayed = torch._foreach_add(grads, params, alpha=weight_decay)
        torch._foreach_mul_(momenta, mu)

        if group["classic_momentum"]:
            scaled = _scaled(decayed, lr, _trust(params, grads, decayed, group))
            torch._foreach_add_(momenta, scaled)
            steps = momenta
            if nesterov:
                steps = torch._foreach_add(scaled, momenta, alpha=mu)
        else:
            torch._foreach_add_(momenta, decayed)
            steps = momenta
            if nesterov:
                steps = torch._foreach_add(decayed, momenta, alpha=mu)
            steps = _scaled(steps, lr, _trust(params, steps, steps, group))
        torch._foreach_sub_(params, steps)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _trust(
    params: list[Tensor], grads: list[Tensor], decayed: list[Tensor], group: dict
) -> Tensor | None:
    """(len(params),) trust ratios; None where the group is not adapted."""
    if not group["adapt"]:
        return None
    w_norm = torch.stack(torch._foreach_norm(params))
    if group["variant"] == "simclr":
        denominator = g_norm = torch.stack(torch._foreach_norm(decayed))
    else:
        g_norm = torch.stack(torch._foreach_norm(grads))
        denominator = g_norm + group["weight_decay"] * w_norm
    trust = group["eta"] * w_norm / denominator
    return torch.where((w_norm > 0) & (g_norm > 0), trust, 1.0)


def _scaled(tensors: list[Tensor], lr: float | Tensor, trust: Tensor | None) -> list[Tensor]:
    """lr * trust * tensor for each tensor, as new tensors."""
    if trust is None:
        return torch._foreach_mul(tensors, lr)
    return torch._foreach_mul(tensors, list((lr * trust).unbind()))


def _check(group: dict) -> None:
    lr, momentum, variant = group["lr"], group["momentum"], group["variant"]
    if isinstance(lr, Tensor):
        if lr.dim() != 0:
            raise ValueError(f"lr must be a float or a scalar tensor, got {tuple(lr.shape)}")
    elif not lr >= 0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']}")
    if not group["eta"] > 0:
        raise ValueError(f"eta must be positive, got {group['eta']}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be 'simclr' or 'you2017', got {variant!r}")
    if group["nesterov"] and momentum == 0:
        raise ValueError("nesterov needs momentum above 0, got 0")
    if variant == "you2017" and not group["classic_momentum"]:
        raise ValueError("classic_momentum=False needs variant 'simclr', got 'you2017'")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for LARS, by the kind of layer that declares a parameter.

    Weights of convolutions and of linear layers (attention's input projections included) are
    adapted and decayed. Everything else, that is biases, normalisation parameters and free-standing
    parameters such as a learnable temperature, is neither.

    Args:
        model: any module; parameters that do not require gradients are left out.
        weight_decay: of the first group.

    Returns:
        The group of the weights (adapt True), then that of the rest (adapt False, no decay).
    """
    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    weights, others, seen = [], [], set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad or p in seen:
                continue
            seen.add(p)
            is_weight = isinstance(module, layers) and name.endswith("weight")
            (weights if is_weight else others).append(p)
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]


def training_steps(num_examples: int, batch_size: int, epochs: int) -> int:
    """Steps of a whole run, as the original counts them: num_examples * epochs // batch_size + 1.

    Args:
        num_examples: images of the training set.
        batch_size: N, images per step over all devices.
        epochs: passes over the training set.
    """
    return num_examples * epochs // batch_size + 1


def warmup_steps(num_examples: int, batch_size: int, warmup_epochs: float) -> int:
    """Steps of warm-up, rounded down as in the original. See training_steps."""
    return int(warmup_epochs * num_examples // batch_size)


def peak_learning_rate(base: float, batch_size: int, rule: str = "sqrt") -> float:
    """The rate at the end of warm-up for a batch of N images.

    Args:
        base: 0.075 for "sqrt" and 0.3 for "linear" in the paper: 4.8 for both at N = 4096.
        batch_size: N, images per step over all devices.
        rule: "sqrt" gives base * sqrt(N), better below 4096 (paper, Table B.1); "linear" gives
            base * N / 256.

    Raises:
        ValueError: rule is none of these.
    """
    if rule == "sqrt":
        return base * math.sqrt(batch_size)
    if rule == "linear":
        return base * batch_size / 256
    raise ValueError(f"rule must be one of {', '.join(SCALING_RULES)}, got {rule!r}")


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """The rate of one step: linear from 0 to peak over warm-up, then half a cosine down to 0.

    Args:
        step: number of the step, from 0, whose rate is 0 if there is a warm-up.
        peak: see peak_learning_rate.
        warmup: steps of warm-up.
        total: steps of the run, warm-up included; from there on the rate is 0. A run that ends
            within its warm-up never reaches its peak.
    """
    if step < warmup:
        return peak * step / warmup
    if step >= total:
        return 0.0
    progress = (step - warmup) / (total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
