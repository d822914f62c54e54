"""Pipelines alone, and in a training step, as contenders of a `measure.race`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Contender, Result
from benchmarks.peers import PeerMissing
from benchmarks.pipeline_peers import PIPELINES, PipelinePeer
from benchmarks.view_contenders import check_alike, exact_error, speed
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ImageSource
from simclr_kernels.models import SimCLR, build_encoder, projection_head
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.optim import LARS, parameter_groups
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines import Batch

EPOCH = "epoch of views"
STEP = "training step"
TAU = 0.1
CHECKED_ROWS = 4
# contenders of a training step that are no pipelines: its parts
READY, LOSS = "ready-made", "loss"


class Load(NamedTuple):
    """What a pipeline is asked for: batches of a source."""

    source: ImageSource
    origin: str
    config: AugmentConfig
    batch_size: int
    encoder: str = ""

    def __str__(self) -> str:
        return f"2 x {self.config.size} of {self.origin}, batch {self.batch_size}"

    @property
    def batches(self) -> int:
        return len(self.source) // self.batch_size


def pipelines(names: Iterable[str], load: Load, device: str) -> dict[str, PipelinePeer | str]:
    """By name of PIPELINES, or the reason why one is missing."""
    found = {}
    for name in names:
        try:
            found[name] = PIPELINES[name](load.source, load.config, load.batch_size, device)
        except PeerMissing as reason:
            found[name] = str(reason)
    return found


def epoch_contenders(names: Iterable[str], load: Load, device: str) -> dict[str, Contender | str]:
    """One call is an epoch; its last batch is checked, ours to the pixel."""

    def contender(peer: PipelinePeer) -> Contender:
        def call():
            number, batches = peer.epoch()
            for batch in batches:
                last = batch
            return number, last

        return Contender(peer.label, call, partial(_check_batch, load=load, exact=peer.exact))

    found = pipelines(names, load, device)
    return {k: v if isinstance(v, str) else contender(v) for k, v in found.items()}


def _check_batch(answer: tuple[int, Batch], load: Load, exact: bool) -> float | None:
    epoch, batch = answer
    check_alike(batch.views, load.batch_size, load.config)
    if not exact:
        return None
    rows = torch.arange(min(CHECKED_ROWS, load.batch_size), device=batch.views.device)
    index = batch.index[rows]
    images = PackedImages.from_images([load.source.decode(i) for i in index.tolist()])
    images = images.to(index.device)
    return exact_error(batch.views, rows, images, images.sizes, index, epoch, load.config)


def step_contenders(names: Iterable[str], load: Load, device: str) -> dict[str, Contender | str]:
    """One call is an epoch of training steps: encoder, head, loss, LARS.

    READY is the step with views that are in memory, LOSS the loss alone, forward and backward.
    """
    contenders: dict[str, Contender | str] = {}
    names = list(names)
    found = pipelines([name for name in names if name not in (READY, LOSS)], load, device)
    for name in names:
        if name == LOSS:
            contenders[name] = Contender("loss", _loss(load, device), _finite)
        elif name == READY:
            shape = (2 * load.batch_size, 3, load.config.size, load.config.size)
            views = torch.rand(shape, device=device).to(memory_format=_layout(device))
            views = views.half() if device == "cuda" else views
            ready = [views] * load.batches
            contenders[name] = Contender("ready-made views", _train(load, device, ready), _finite)
        elif isinstance(found[name], str):
            contenders[name] = found[name]
        else:
            call = _train(load, device, _Views(found[name].epoch))
            contenders[name] = Contender(found[name].label, call, _finite)
    return contenders


class _Views:
    """The views of the batches of one epoch after the other."""

    def __init__(self, epoch: Callable):
        self.epoch = epoch

    def __iter__(self):
        _, batches = self.epoch()
        return (batch.views for batch in batches)


def _layout(device: str) -> torch.memory_format:
    return torch.channels_last if device == "cuda" else torch.contiguous_format


def _train(load: Load, device: str, views: Iterable[Tensor]) -> Callable[[], Tensor]:
    """A function that takes a step for each batch, of a model of its own, and gives the losses."""
    encoder = build_encoder(load.encoder)
    model = SimCLR(encoder, projection_head("nonlinear", encoder.feature_dim))
    model.to(device, memory_format=_layout(device))
    optimizer = LARS(parameter_groups(model, 1e-6), lr=0.1)

    def call():
        losses = []
        for batch in views:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                z = model(batch.to(memory_format=_layout(device)))
            loss = fused_nt_xent(z, TAU)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    return call


def _loss(load: Load, device: str) -> Callable[[], Tensor]:
    z = torch.randn(2 * load.batch_size, 128, device=device)
    z = (z.bfloat16() if device == "cuda" else z).requires_grad_()

    def call():
        for _ in range(load.batches):
            (dz,) = torch.autograd.grad(fused_nt_xent(z, TAU), z)
        return dz

    return call


def _finite(answer: Tensor) -> None:
    assert answer.isfinite().all(), "not finite"


def pipeline_measurement(name: str, result: Result, load: Load, what: str) -> dict[str, Any]:
    """One result as it stands in the JSON files: of an EPOCH of views, or of STEPs."""
    record = {
        "name": name,
        "label": result.label,
        "what": what,
        "side": load.config.size,
        "batch": load.batch_size,
        "origin": load.origin,
    }
    if what == STEP:
        record |= {"encoder": load.encoder, "steps": load.batches}
    return record | speed(result, load.batches * load.batch_size)
