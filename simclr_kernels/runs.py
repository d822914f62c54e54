"""One run from its settings to its folder: images, pipeline, model, training, figures, encoder.

A run folder holds config.yaml (all settings, resolved), metrics.jsonl, checkpoints/, curves.png,
views.png (a gallery of what the encoder was trained on), embedding.png (where labels exist),
quarantine.jsonl (where images could not be read) and encoder.safetensors.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from simclr_kernels import __version__
from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import STUDY_OPERATIONS, AugmentConfig
from simclr_kernels.checkpoint import write_atomically
from simclr_kernels.config import TrainConfig, ViewsConfig
from simclr_kernels.data import (
    DecodeError,
    ImageSource,
    MissingSplit,
    decoded_bytes,
    open_source,
)
from simclr_kernels.doctor import is_installed
from simclr_kernels.evaluate import (
    eval_batches,
    extract_features,
    few_labels,
    knn_accuracy,
    linear_probe,
)
from simclr_kernels.models import SimCLR, build_encoder, projection_head
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.pipelines import Pipeline
from simclr_kernels.pipelines.fused_views import FusedViews
from simclr_kernels.report import save_curves
from simclr_kernels.report_pictures import save_embedding, save_gallery
from simclr_kernels.trainer import TrainResult, train

STUDY_SETTINGS = (*STUDY_OPERATIONS, "cutout_side", "noise_sigma")


def augment_config(views: ViewsConfig) -> AugmentConfig:
    """The AugmentConfig that the settings ask for."""
    arguments: dict[str, Any] = {"size": views.size}
    if views.strength is not None:
        if views.preset not in ("simclr", "simclr_v1", "torchvision"):
            raise ValueError(
                f"strength goes with simclr, simclr_v1 and torchvision, got {views.preset!r}"
            )
        arguments["strength"] = views.strength
    config = getattr(AugmentConfig, views.preset)(**arguments)
    if views.min_area is not None:
        config = dataclasses.replace(config, area=(views.min_area, config.area[1]))
    if not views.crop:
        config = dataclasses.replace(config, crop=False)
    if not views.color:
        config = dataclasses.replace(config, jitter=0.0, grayscale=0.0)
    if not views.blur:
        config = dataclasses.replace(config, blur=(0.0, 0.0))
    study = {name: getattr(views, name) for name in STUDY_SETTINGS}
    return dataclasses.replace(config, **study)


def build_model(config: TrainConfig) -> SimCLR:
    """The untrained model of a run: the same weights for the same seed, on the run's device."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.model.encoder)
    head = projection_head(
        config.model.head, encoder.feature_dim, config.model.hidden_dim, config.model.out_dim
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return SimCLR(encoder, head).to(config.device, memory_format=layout)


def choose_pipeline(config: TrainConfig, source: ImageSource) -> tuple[str, str]:
    """What `pipeline: auto` stands for with these images on this machine, and why."""
    if torch.device(config.device).type != "cuda":
        return "fused", "exact; there is no GPU to decode on"
    if not hasattr(source, "encoded"):
        return "fused", "exact; the images are not encoded, so there is nothing to decode"
    needed = decoded_bytes(source) / 2**30
    images = f"decoded, the images take about {needed:.3g} GiB"
    if needed <= config.cache_gib:
        return "fused", f"exact; {images} and fit cache_gib {config.cache_gib:g}"
    if not is_installed("nvidia.dali"):
        return "fused", f"{images}, and DALI is not here to decode them on the GPU ([dali])"
    return "dali", f"{images} and do not fit cache_gib {config.cache_gib:g}: the GPU decodes them"


def build_pipeline(
    config: TrainConfig, source: ImageSource, quarantine: str | Path | None = None
) -> Pipeline:
    """The pipeline that resolved settings name; `quarantine` is its log of unreadable images.

    Raises:
        ImportError: the pipeline's library is not installed; names the extra.
        ValueError: pipeline is still "auto", or a setting is out of the pipeline's range.
    """
    arguments = (source, augment_config(config.views), config.batch_size)
    options = {
        "seed": config.seed,
        "device": config.device,
        "workers": config.workers,
        "channels_last": config.channels_last,
        "cache_gib": config.cache_gib,
        "max_bad_fraction": config.max_bad_fraction,
        "quarantine": quarantine,
    }
    if config.pipeline == "fused":
        return FusedViews(*arguments, **options)
    if config.pipeline == "dali":
        from simclr_kernels.pipelines.dali_views import DALIViews

        return DALIViews(*arguments, views="fused", **options)
    if config.pipeline == "kornia":
        from simclr_kernels.pipelines.kornia_views import KorniaViews

        return KorniaViews(*arguments, **options)
    raise ValueError(f"pipeline must be fused, dali or kornia, got {config.pipeline!r}")


def fit(
    config: TrainConfig, run_dir: str | Path, *, resume: bool = False, label: str = "train"
) -> TrainResult:
    """Train as `config` says and leave the run's folder as the module describes. See train."""
    config = config.resolve()
    run_dir = Path(run_dir)
    if not resume and run_dir.is_dir() and any(run_dir.iterdir()):
        raise FileExistsError(f"{run_dir} is not empty: resume that run or choose another folder")
    source = open_source(config.data)
    views = augment_config(config.views)
    reason = None
    if config.pipeline == "auto":
        name, reason = choose_pipeline(config, source)
        config = dataclasses.replace(config, pipeline=name)
    pipeline = build_pipeline(config, source, run_dir / "quarantine.jsonl")
    try:
        held_out = open_source(config.data, "test")
    except MissingSplit:
        held_out = None
    validation = None
    if held_out is not None and held_out.labels is not None:
        validation = eval_batches(
            held_out,
            views.size,
            config.batch_size,
            config.device,
            mean=views.mean,
            std=views.std,
            skip_unreadable=True,
        )
    model = build_model(config)
    if reason is not None:
        _say(f"pipeline {config.pipeline}: {reason}")
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume:
        settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        write_atomically(run_dir / "config.yaml", settings.encode())
    with closing(pipeline):
        result = train(
            config, pipeline, model, run_dir, validation=validation, resume=resume, label=label
        )
    save_encoder(run_dir / "encoder.safetensors", model.encoder, config)
    save_curves(run_dir, run_dir / "curves.png")
    if result.stopped_by is None:
        _draw_views(source, views, config.seed, run_dir / "views.png")
        if validation is not None:
            features, labels = extract_features(model.encoder, validation)
            title = f"{config.model.encoder} on {config.data}, step {result.steps}"
            save_embedding(features, labels, held_out.classes, run_dir / "embedding.png", title)
    return result


def save_encoder(path: Path, encoder: nn.Module, config: TrainConfig) -> None:
    """Write the encoder's weights as safetensors; what its images must look like as metadata."""
    views = augment_config(config.views)
    metadata = {
        "format": "pt",
        "encoder": config.model.encoder,
        "size": str(views.size),
        "mean": str(views.mean),
        "std": str(views.std),
        "simclr_kernels": __version__,
    }
    tensors = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    aside = path.with_name("." + path.name)
    save_file(tensors, aside, metadata)
    aside.replace(path)


def load_encoder(path: str | Path, device: str = "cpu") -> tuple[nn.Module, str, AugmentConfig]:
    """Read what save_encoder wrote.

    Args:
        path: encoder.safetensors, or the run folder that holds it.

    Returns:
        The encoder on `device` in evaluation mode, its name, a config with its size, mean, std.

    Raises:
        FileNotFoundError: there is none; a run that was stopped before its first export has none.
        ValueError: the file was not written by save_encoder.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no encoder at {path}: name a run folder or a .safetensors file")
    with safe_open(path, framework="pt", device=device) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "encoder" not in metadata:
        raise ValueError(f"{path} does not say which encoder it holds (metadata {metadata})")
    encoder = build_encoder(metadata["encoder"])
    encoder.load_state_dict(tensors)
    config = AugmentConfig(
        size=int(metadata["size"]),
        mean=ast.literal_eval(metadata["mean"]),
        std=ast.literal_eval(metadata["std"]),
    )
    return encoder.to(device).eval(), metadata["encoder"], config


def frozen_accuracy(
    encode: Callable[[Tensor], Tensor],
    train_batches: Any,
    test_batches: Any,
    *,
    k: int = 20,
    labels_per_class: int | None = 10,
    probe: bool = True,
) -> dict[str, float]:
    """Accuracies (fractions) of frozen features: the bank is the whole training split.

    Args:
        encode: (B, 3, S, S) images to (B, C) features.
        train_batches, test_batches: iterables of (images, labels), without augmentation.
        k: neighbours of the cosine kNN.
        labels_per_class: also a linear probe on so few labels of each class; None: not.
        probe: False: kNN alone.

    Returns:
        knn, and linear_probe, linear_probe_few.
    """
    bank, bank_labels = extract_features(encode, _shown("training images", train_batches))
    queries, labels = extract_features(encode, _shown("test images", test_batches))
    _say(f"kNN: {len(labels)} images against {len(bank_labels)}, {bank.shape[1]} features")
    result = {"knn": knn_accuracy(bank, bank_labels, queries, labels, k=k)}
    if probe and labels_per_class is not None:
        few = few_labels(bank_labels, labels_per_class, seed=0)
        result["linear_probe_few"] = linear_probe(bank[few], bank_labels[few], queries, labels)
    if probe:
        _say(f"linear probe: {len(bank_labels)} images")
        result["linear_probe"] = linear_probe(bank, bank_labels, queries, labels)
    return result


def _shown(what: str, batches: Any) -> Any:
    """The batches, with progress on standard error: a bar, or a line now and then in a log."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(batches, desc=what, unit="batch", mininterval=interval, leave=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _draw_views(source: Any, views: AugmentConfig, seed: int, path: Path) -> None:
    # without mean and std, which would leave the range a picture can show
    views = dataclasses.replace(views, mean=None, std=None)
    images, index = [], []
    for i in range(len(source)):
        with suppress(DecodeError):
            images.append(source.decode(i))
            index.append(i)
        if len(images) == 12:
            break
    pixels = two_views(
        PackedImages.from_images(images), views, seed=seed, epoch=0, index=torch.tensor(index)
    )
    save_gallery(pixels, path, sources=images)
