"""The settings of a run: a small tree of frozen dataclasses, the same in code, YAML and flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch

from simclr_kernels.augment_config import AugmentConfig


@dataclass(frozen=True)
class ViewsConfig:
    """Which views to make: a preset of AugmentConfig and what an ablation changes in it.

    Args:
        preset: name of the AugmentConfig constructor.
        size: side of a view in pixels.
        strength: colour strength s of the paper, for the presets that have one.
        min_area: smallest crop as a fraction of the image; null: that of the preset.
        crop: False resizes the whole image instead of a random crop.
        color: False leaves out colour jitter and grayscale.
        blur: False leaves out the Gaussian blur.
        cutout: probability of masking a square: one, or two: of view 0 and view 1.
        rotation: the same of a rotation by 90, 180 or 270 degrees.
        sobel: the same of a Sobel filter.
        noise: the same of Gaussian noise.
        cutout_side: side of the masked square over that of the view.
        noise_sigma: standard deviation of the noise, in units of 1.0 = white.
    """

    preset: Literal["simclr", "simclr_v1", "cifar10", "byol", "moco_v2", "torchvision"] = "simclr"
    size: int = 224
    strength: float | None = None
    min_area: float | None = None
    crop: bool = True
    color: bool = True
    blur: bool = True
    cutout: float | tuple[float, float] = 0.0
    rotation: float | tuple[float, float] = 0.0
    sobel: float | tuple[float, float] = 0.0
    noise: float | tuple[float, float] = 0.0
    cutout_side: float = AugmentConfig.cutout_side
    noise_sigma: float = AugmentConfig.noise_sigma


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projection head.

    Args:
        encoder: name for models.build_encoder, such as resnet50, resnet50x2, resnet18-cifar, small.
        head: projection head; nonlinear has 2 layers (SimCLR), v2 has 3.
        hidden_dim: width of the head's hidden layers; null: that of the features.
        out_dim: width of the projections z.
    """

    encoder: str = "resnet50"
    head: Literal["identity", "linear", "nonlinear", "v2"] = "nonlinear"
    hidden_dim: int | None = None
    out_dim: int = 128


@dataclass(frozen=True)
class OptimizerConfig:
    """LARS and its schedule: linear warm-up from 0, then cosine to 0.

    Args:
        base_rate: learning rate before the rule: 0.075 for sqrt, 0.3 for linear in the paper.
        rule: sqrt: base * sqrt(batch); linear: base * batch / 256.
        warmup_epochs: length of the warm-up.
        weight_decay: of weights that are neither bias nor normalisation.
        momentum: of LARS.
        eta: trust coefficient of LARS.
        variant: trust ratio of the original code (simclr) or of the LARS paper (you2017).
    """

    base_rate: float = 0.075
    rule: Literal["sqrt", "linear"] = "sqrt"
    warmup_epochs: float = 10
    weight_decay: float = 1e-6
    momentum: float = 0.9
    eta: float = 1e-3
    variant: Literal["simclr", "you2017"] = "simclr"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run.

    Args:
        data: shapes10, an image folder, a Parquet file or folder, an .npz file.
        epochs: passes over the training images.
        batch_size: images N per step; the loss sees 2N views.
        temperature: tau of the loss.
        seed: of weights, order of images and views.
        views: the two views of an image.
        model: encoder and head.
        optimizer: LARS and schedule.
        pipeline: what makes the views. auto: fused, our kernels, exact; or dali, which decodes on
            the GPU and leaves the views to our kernels, where the images are encoded, do not fit
            cache_gib decoded, and DALI is installed. kornia: Kornia's operators, to compare with.
        device: auto takes the GPU where there is one.
        precision: of encoder and head; auto is bfloat16 autocast on a GPU, float32 elsewhere.
        compile: torch.compile of the encoder; null: on a GPU.
        channels_last: memory format of encoder and views; null: on a GPU.
        workers: decoding threads; null: one per core.
        cache_gib: decoded images kept in memory, in GiB.
        max_bad_fraction: share of unreadable images above which the run stops.
        eval_every: epochs between two evaluations (kNN, linear probe); 0: only at the end.
        bank_size: features of the latest training views that serve as bank of these evaluations.
        checkpoint_every: steps between two checkpoints; null: at every epoch's end.
        keep_checkpoints: how many of them stay.
    """

    data: str
    epochs: int = 100
    batch_size: int = 256
    temperature: float = 0.1
    seed: int = 0
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pipeline: Literal["auto", "fused", "dali", "kornia"] = "auto"
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | None = None
    channels_last: bool | None = None
    workers: int | None = None
    cache_gib: float = 2.0
    max_bad_fraction: float = 0.001
    eval_every: int = 10
    bank_size: int = 4096
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "bank_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be at least 0, got {self.eval_every}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def resolve(self) -> TrainConfig:
        """The same run with every `auto` and null replaced by what this machine makes of it.

        But for `pipeline`, which depends on the images: see runs.choose_pipeline.
        """
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on_gpu = torch.device(device).type == "cuda"
        return dataclasses.replace(
            self,
            device=device,
            precision={"auto": "bfloat16" if on_gpu else "float32"}.get(
                self.precision, self.precision
            ),
            compile=on_gpu if self.compile is None else self.compile,
            channels_last=on_gpu if self.channels_last is None else self.channels_last,
        )
