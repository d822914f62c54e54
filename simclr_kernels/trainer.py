"""Training: one loop from views to an encoder (SimCLR, arXiv 2002.05709, Algorithm 1).

Both views of a batch go through encoder and head as one batch of 2N rows, the fused loss takes
the projections, LARS updates. All state between two steps is explicit (weights, optimiser,
schedule position, pipeline position, counters, feature bank), so that a run stopped anywhere
continues to the same bits.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr_kernels.checkpoint import load_newest, save_checkpoint
from simclr_kernels.config import TrainConfig
from simclr_kernels.evaluate import effective_rank, extract_features, knn_accuracy, linear_probe
from simclr_kernels.models import SimCLR
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.optim import (
    LARS,
    learning_rate,
    parameter_groups,
    peak_learning_rate,
    warmup_steps,
)
from simclr_kernels.progress import Laps, MetricsLog, Progress, StopSignal

MAX_SKIPS_IN_A_ROW = 3

# what may change between the calls that make up one run: nothing that decides its weights
FREE_TO_CHANGE = {
    "data",
    "workers",
    "cache_gib",
    "max_bad_fraction",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
}


class NonFiniteTraining(RuntimeError):
    """Loss or gradient was not finite in several steps in a row."""


class ConfigMismatch(ValueError):
    """A run is continued under settings that would change its result."""


@dataclass(frozen=True)
class TrainResult:
    """What a run has behind it.

    Args:
        steps: optimiser steps done, of `total_steps`.
        skipped: steps left out because loss or gradient was not finite.
        seconds: wall-clock seconds over all calls that made up the run, evaluations included.
        checkpoint: the newest.
        metrics: of the last evaluation: knn, linear_probe (fractions), effective_rank.
        stopped_by: name of the signal that ended the call early, or None.
    """

    steps: int
    total_steps: int
    skipped: int
    seconds: float
    checkpoint: Path
    metrics: dict[str, float]
    stopped_by: str | None


class FeatureBank:
    """The features of the latest training views with their labels, for evaluation while training.

    Features are those the training step computed anyway, of the first view of each image. A ring
    buffer: (capacity, C) float32 and (capacity,) int64 on the device.
    """

    def __init__(self, capacity: int, feature_dim: int, device: torch.device):
        self.features = torch.zeros(capacity, feature_dim, device=device)
        self.labels = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self.count = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Overwrite the oldest rows with (N, C) features and (N,) labels."""
        capacity = len(self.labels)
        features, labels = features[-capacity:], labels[-capacity:]
        rows = (self.count + torch.arange(len(labels), device=self.labels.device)) % capacity
        self.features[rows] = features.detach().float()
        self.labels[rows] = labels.to(self.labels.device)
        self.count += len(labels)

    def filled(self) -> tuple[Tensor, Tensor]:
        """The rows written so far: features and labels."""
        rows = min(self.count, len(self.labels))
        return self.features[:rows], self.labels[:rows]


@dataclass
class _Counters:
    """What a run counts, in its checkpoint."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    config: TrainConfig,
    pipeline: Iterable,
    model: SimCLR,
    run_dir: str | Path,
    *,
    validation: Iterable[tuple[Tensor, Tensor]] | None = None,
    resume: bool = False,
    label: str = "train",
) -> TrainResult:
    """Train `model` on the batches of `pipeline`; leave metrics.jsonl and checkpoints in `run_dir`.

    Ctrl-C and SIGTERM end the call after the step at hand, with a checkpoint. The same call with
    `resume=True` continues, after a crash too, to the bits of an uninterrupted run (on a CPU with
    the same number of threads).

    Args:
        config: see TrainConfig.
        pipeline: keeps the contract of simclr_kernels.pipelines; views (2N, 3, S, S) on the device.
        model: on the device already; trained in place.
        run_dir: created where missing.
        validation: re-iterable of ((B, 3, S, S) images, (B,) int64 labels), for the evaluations.
        resume: continue from the newest checkpoint that verifies.
        label: shown before the progress.

    Raises:
        NonFiniteTraining: loss or gradient not finite in 3 steps in a row; names the batch.
        ConfigMismatch: `resume` under other settings than those of the run.
        FileExistsError: `run_dir` holds a run and `resume` is False.
        FileNotFoundError, DamagedCheckpoint: nothing to resume from.
    """
    config = config.resolve()
    device = torch.device(config.device)
    run_dir = Path(run_dir)
    folder = run_dir / "checkpoints"
    if not resume and any(folder.glob("step-*.pt")):
        raise FileExistsError(f"{run_dir} holds a run: resume it or choose another folder")

    steps_per_epoch = len(pipeline)
    total = config.epochs * steps_per_epoch
    images = steps_per_epoch * config.batch_size
    warmup = warmup_steps(images, config.batch_size, config.optimizer.warmup_epochs)
    peak = peak_learning_rate(config.optimizer.base_rate, config.batch_size, config.optimizer.rule)
    optimizer = LARS(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=0.0,
        momentum=config.optimizer.momentum,
        eta=config.optimizer.eta,
        variant=config.optimizer.variant,
    )
    encoder = torch.compile(model.encoder) if config.compile else model.encoder
    parameters = [p for p in model.parameters() if p.requires_grad]
    bank = FeatureBank(config.bank_size, model.encoder.feature_dim, device)
    run = _Counters()
    if resume:
        run, checkpoint = _restore(folder, config, model, optimizer, pipeline, bank)
    every = config.checkpoint_every or steps_per_epoch
    started = time.perf_counter() - run.seconds

    def save() -> Path:
        run.seconds = time.perf_counter() - started
        state = _state(run, config, model, optimizer, pipeline, bank)
        return save_checkpoint(folder, run.step, state, config.keep_checkpoints)

    if not resume:
        checkpoint = save()
    model.train()
    with (
        MetricsLog(run_dir / "metrics.jsonl", run.step) as log,
        Progress(label, total, run.step, config.batch_size) as progress,
        StopSignal() as stop,
    ):
        for epoch in range(run.step // steps_per_epoch, config.epochs):
            if pipeline.state_dict()["epoch"] != epoch:
                pipeline.set_epoch(epoch)
            laps = Laps(device, pipeline)
            for batch in pipeline:
                laps.fetched()
                statistics = [buffer.clone() for buffer in model.buffers()]
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
                ):
                    h = encoder(batch.views)
                    z = model.head(h)
                laps.mark("encoder")
                z_leaf = z.detach().requires_grad_()
                loss = fused_nt_xent(z_leaf, config.temperature)
                loss.backward()
                laps.mark("loss")
                z.backward(z_leaf.grad)
                laps.mark("encoder")

                # one host read a step: whether it counts
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
                loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()
                finite = abs(loss_value) < float("inf") and norm_value < float("inf")
                rate = learning_rate(run.step, peak, warmup, total)
                if finite:
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    optimizer.step()
                    bank.add(h[: len(batch.label)], batch.label)
                    run.skipped_in_a_row = 0
                else:
                    for buffer, value in zip(model.buffers(), statistics, strict=True):
                        buffer.copy_(value)
                    run.skipped += 1
                    run.skipped_in_a_row += 1
                optimizer.zero_grad()
                laps.mark("optimizer")

                record = {"kind": "step", "step": run.step}
                run.step += 1
                seconds = laps.read()
                record |= {
                    "epoch": run.step / steps_per_epoch,
                    "loss": loss_value,
                    "gradient_norm": norm_value,
                    "learning_rate": rate,
                    "images_per_second": config.batch_size / laps.total,
                    "seconds": seconds,
                }
                if not finite:
                    record["skipped_images"] = batch.index.tolist()
                log.write(record)
                progress.update(run.step, loss_value, seconds)
                if run.skipped_in_a_row == MAX_SKIPS_IN_A_ROW:
                    raise NonFiniteTraining(
                        f"loss or gradient was not finite in {MAX_SKIPS_IN_A_ROW} steps in a row; "
                        f"the last, step {run.step - 1}, had loss {loss_value}, gradient norm "
                        f"{norm_value} and the images {batch.index.tolist()}"
                    )

                if run.step % steps_per_epoch == 0 and _evaluation_due(config, epoch + 1):
                    run.metrics = _evaluate(model, bank, validation)
                    log.write({"kind": "eval", "step": run.step, "epoch": epoch + 1} | run.metrics)
                    progress.note(run.metrics)
                if stop or run.step == total or run.step % every == 0:
                    checkpoint = save()
                if stop:
                    break
                laps.restart()
            if stop:
                break
    return TrainResult(
        steps=run.step,
        total_steps=total,
        skipped=run.skipped,
        seconds=run.seconds,
        checkpoint=checkpoint,
        metrics=run.metrics,
        stopped_by=stop.received.name if run.step < total else None,
    )


def _evaluation_due(config: TrainConfig, epoch: int) -> bool:
    return epoch == config.epochs or (config.eval_every > 0 and epoch % config.eval_every == 0)


def _evaluate(
    model: SimCLR, bank: FeatureBank, validation: Iterable[tuple[Tensor, Tensor]] | None
) -> dict[str, float]:
    features, labels = bank.filled()
    if not len(features):  # every step so far was skipped
        return {}
    metrics = {"effective_rank": float(effective_rank(features))}
    labelled = labels >= 0
    if validation is not None and labelled.any():
        queries, truth = extract_features(model.encoder, validation)
        bank_features, bank_labels = features[labelled], labels[labelled]
        k = min(20, len(bank_labels))
        metrics["knn"] = knn_accuracy(bank_features, bank_labels, queries, truth, k=k)
        metrics["linear_probe"] = linear_probe(bank_features, bank_labels, queries, truth)
    return metrics


def _state(
    run: _Counters, config: TrainConfig, model: SimCLR, optimizer: LARS, pipeline: Any, bank: Any
) -> dict[str, Any]:
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    return {
        "config": dataclasses.asdict(config),
        "counters": dataclasses.asdict(run),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pipeline": pipeline.state_dict(),
        "bank": {"features": bank.features, "labels": bank.labels, "count": bank.count},
        "random": random,
    }


def _restore(
    folder: Path, config: TrainConfig, model: SimCLR, optimizer: LARS, pipeline: Any, bank: Any
) -> tuple[_Counters, Path]:
    path, state, refused = load_newest(folder)
    for message in refused:
        print(f"refused: {message}; using {path.name}", file=sys.stderr)
    saved, given = _flat(state["config"]), _flat(dataclasses.asdict(config))
    changed = [
        f"{name} is {given.get(name)}, the run has {saved.get(name)}"
        for name in saved | given
        if name not in FREE_TO_CHANGE and given.get(name) != saved.get(name)
    ]
    if changed:
        raise ConfigMismatch("a run is continued under its own settings; " + "; ".join(changed))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    pipeline.load_state_dict(state["pipeline"])
    bank.features.copy_(state["bank"]["features"])
    bank.labels.copy_(state["bank"]["labels"])
    bank.count = state["bank"]["count"]
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in state["random"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return _Counters(**state["counters"]), path


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"views": {"size": 32}} as {"views.size": 32}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
