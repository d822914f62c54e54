"""The loss as a module, with a temperature that learns and a queue of earlier rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from simclr_kernels.ntxent import DTYPES, check_tau, fused_nt_xent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LearnableTemperature(nn.Module):
    """A temperature to learn, never under `smallest`: pass `module()` as tau.

    The parameter is log_temperature, 0-d float32, so that no step makes the temperature negative.
    As CLIP clips its scale 1 / tau at 100, every call first sets a parameter that fell under the
    limit back to it. The value is not clamped inside the graph, where the gradient would be 0 and
    the temperature could never leave the limit again.

    Args:
        temperature: to start from; CLIP's by default.
        smallest: limit, in the same unit as the temperature.

    Raises:
        ValueError: either is not positive and finite, or temperature is under smallest.
    """

    def __init__(self, temperature: float = 0.07, smallest: float = 0.01) -> None:
        super().__init__()
        check_tau(temperature)
        check_tau(smallest)
        if temperature < smallest:
            raise ValueError(
                f"temperature must be at least the smallest allowed, {smallest}, got {temperature}"
            )
        self.smallest = smallest
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(temperature), dtype=torch.float32)
        )

    def forward(self) -> Tensor:
        """tau, 0-d, differentiable in log_temperature."""
        # data: a penalty on the parameter from before this call keeps its backward
        self.log_temperature.data.clamp_(min=math.log(self.smallest))
        return self.log_temperature.exp()

    def extra_repr(self) -> str:
        # elsewhere to read it would wait for the device, and meta has none to read
        known = self.log_temperature.device.type == "cpu"
        temperature = f"temperature={self.log_temperature.exp().item():g}, " if known else ""
        return f"{temperature}smallest={self.smallest:g}"


class NTXentLoss(nn.Module):
    """NT-Xent of two (N, D) batches of views, row k of each from one image. See fused_nt_xent.

    Takes the place of other losses of this name, with the same value and gradients:

    - lightly's NTXentLoss(temperature=0.5, gather_distributed=False). Gathered, it returns the mean
      over a rank's own rows, here that over all rows; DistributedDataParallel makes the same
      gradient of both. Its memory_bank_size is another loss, between one view and a bank alone:
      here `negatives`, of a NegativeQueue for example, add to those of the batch.
    - solo-learn's simclr_loss_func(z, indexes, temperature=0.1), where every index occurs twice and
      z holds view 0 of all images, then view 1. Images with more than two views, or with equal
      indexes, are several positives there, and separate images here.
    - pytorch-metric-learning's NTXentLoss(temperature=0.07) with each label on two rows, in
      contrast to its other uses with labels. It takes one (2N, D) tensor.

    These three return the dtype of their input; here it is float32, or float64 for float64 views.
    The loss of the TensorFlow code of SimCLR is twice this one.

    Args:
        temperature: > 0; the one to start from if it learns.
        learnable: learn the temperature, as `learned`, a LearnableTemperature.
        gather_distributed: take negatives from all ranks of the default process group. One process
            without a process group is a group of one.

    Raises:
        ValueError: temperature is not positive and finite, or under 0.01 and learnable.
    """

    def __init__(
        self, temperature: float = 0.5, learnable: bool = False, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        check_tau(temperature)
        self.fixed_temperature = temperature
        self.learned = LearnableTemperature(temperature) if learnable else None
        self.gather_distributed = gather_distributed

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a float, or a scalar tensor with a gradient if learnable."""
        return self.fixed_temperature if self.learned is None else self.learned()

    def forward(self, z0: Tensor, z1: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The mean loss over the 2N rows of z0 and z1, each (N, D), and those of other ranks.

        negatives (K, D) are more negatives of every row: see fused_nt_xent.
        """
        if z0.shape != z1.shape:
            raise ValueError(
                "z0 and z1 must have the same shape (N, D), "
                f"got {tuple(z0.shape)} and {tuple(z1.shape)}"
            )
        group = None
        if self.gather_distributed and distributed.is_available() and distributed.is_initialized():
            group = distributed.group.WORLD
        z = torch.cat((z0, z1))
        return fused_nt_xent(z, self.temperature, negatives=negatives, group=group)

    def extra_repr(self) -> str:
        gather = ["gather_distributed=True"] if self.gather_distributed else []
        fixed = [f"temperature={self.fixed_temperature:g}"] if self.learned is None else []
        return ", ".join(fixed + gather)


class NegativeQueue(nn.Module):
    """The last rows pushed, as further negatives (the queue of MoCo, arXiv 1911.05722).

        loss = fused_nt_xent(z, tau, negatives=queue.negatives)
        loss.backward()
        queue.push(z)

    A ring: new rows take the place of the oldest. Only rows that were pushed are negatives. The
    state dict holds rows, position and count exactly. Push after backward: the loss keeps its
    negatives, which are no copy, and torch refuses the gradient where they have changed since.
    Pass them to a compiled function as an argument: one that reads the queue itself is compiled
    again after each push until the queue is full.

    The rows are a buffer, in one dtype, which must be that of z (bfloat16 under autocast). Inside
    DistributedDataParallel buffers are overwritten with those of rank 0: keep the queue outside, or
    push with a group, so that all ranks have the same rows.

    Args:
        size: rows to hold.
        features: D.
        dtype: of the rows; a row of another is cast when it is pushed.
        device: of the rows.

    Raises:
        ValueError: size or features is under 1.
    """

    def __init__(
        self,
        size: int,
        features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or features < 1:
            raise ValueError(f"size and features must be at least 1, got {size} and {features}")
        self.register_buffer("rows", torch.zeros(size, features, dtype=dtype, device=device))
        # plain numbers: the shape of the negatives must not wait for a GPU
        self.position = 0
        self.count = 0

    @property
    def negatives(self) -> Tensor | None:
        """(count, D) without gradient, in no particular order; None before the first push."""
        return self.rows[: self.count] if self.count else None

    @torch.no_grad()
    def push(self, z: Tensor, group: ProcessGroup | None = None) -> None:
        """Stores the rows of z (M, D), the last `size` if there are more, in their order.

        With a group, those of all its ranks in rank order: all ranks then hold the same.

        Raises:
            ValueError: z is not (M, D), or with a group its shape or the queue's dtype or features
                differ between ranks.
        """
        if group is not None:
            from simclr_kernels.ntxent_distributed import (
                check_group,
                gather_rows,
                refuse_unlike_ranks,
            )

            check_group(group)
            values = {
                "elements of z": z.numel(),
                "features of the queue": self.rows.shape[1],
                "dtype of the queue": self.rows.dtype,
            }
            choices = {"dtype of the queue": DTYPES}
            refuse_unlike_ranks(group, z.device, lambda: self._check(z), values, choices)
            z = gather_rows(z.to(self.rows.dtype), group)
        self._check(z)
        size = len(self.rows)
        kept = z[-size:]
        start = (self.position + len(z) - len(kept)) % size
        before_the_end = min(len(kept), size - start)
        self.rows[start : start + before_the_end] = kept[:before_the_end]
        self.rows[: len(kept) - before_the_end] = kept[before_the_end:]
        self.position = (start + len(kept)) % size
        self.count = min(self.count + len(z), size)

    def _check(self, z: Tensor) -> None:
        features = self.rows.shape[1]
        if z.dim() != 2 or z.shape[1] != features:
            raise ValueError(f"z must be (rows, {features}), got shape {tuple(z.shape)}")

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.position, self.count], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.position, self.count = state.tolist()

    def extra_repr(self) -> str:
        size, features = self.rows.shape
        return f"size={size}, features={features}, count={self.count}"
