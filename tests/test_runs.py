import dataclasses
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_decode import encoded

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.config import ModelConfig, TrainConfig, ViewsConfig
from simclr_kernels.data import decoded_bytes, shapes10
from simclr_kernels.pipelines.fused_views import FusedViews
from simclr_kernels.runs import (
    augment_config,
    build_model,
    build_pipeline,
    choose_pipeline,
    frozen_accuracy,
    load_encoder,
    save_encoder,
)

CONFIG = TrainConfig(data="shapes10", model=ModelConfig(encoder="small"), device="cpu").resolve()


def test_views_are_the_preset_but_for_what_is_set():
    assert augment_config(ViewsConfig(size=96)) == AugmentConfig.simclr(96)
    assert augment_config(ViewsConfig("simclr", 32, strength=0.5)) == AugmentConfig.simclr(32, 0.5)
    assert augment_config(ViewsConfig("cifar10", 24)) == AugmentConfig.cifar10(24)
    changed = augment_config(
        ViewsConfig("byol", 32, min_area=0.3, crop=False, color=False, blur=False)
    )
    expected = dataclasses.replace(
        AugmentConfig.byol(32),
        area=(0.3, 1.0),
        crop=False,
        jitter=0.0,
        grayscale=0.0,
        blur=(0.0, 0.0),
    )
    assert changed == expected


def test_a_strength_needs_a_preset_that_has_one():
    with pytest.raises(ValueError, match="strength goes with .* got 'byol'"):
        augment_config(ViewsConfig("byol", 32, strength=0.5))


def test_a_seed_decides_the_first_weights():
    def first(seed):
        return build_model(dataclasses.replace(CONFIG, seed=seed)).encoder.conv1.weight

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_an_encoder_comes_back_with_what_its_images_must_look_like(tmp_path):
    config = dataclasses.replace(CONFIG, views=ViewsConfig("moco_v2", 40))
    encoder = build_model(config).encoder.eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder, config)
    loaded, name, views = load_encoder(tmp_path)
    images = torch.rand(2, 3, 40, 40)
    assert torch.equal(loaded(images), encoder(images))
    assert name == "small"
    original = AugmentConfig.moco_v2(40)
    assert (views.size, views.mean, views.std) == (40, original.mean, original.std)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


ON_GPU = dataclasses.replace(CONFIG, device="cuda")
PNG = encoded(np.zeros((20, 30, 3), np.uint8))


class Files:
    """n encoded images; data[i % len(data)] is image i."""

    def __init__(self, n, *data):
        self.n, self.data = n, data

    def __len__(self):
        return self.n

    def encoded(self, i):
        return self.data[i % len(self.data)]


@pytest.mark.parametrize(
    "config, source, installed, expected, reason",
    [
        (CONFIG, Files(10**9, PNG), True, "fused", "no GPU"),
        (ON_GPU, shapes10("test"), True, "fused", "not encoded"),
        (ON_GPU, Files(10**6, PNG), True, "fused", "1.68 GiB and fit cache_gib 2"),
        (ON_GPU, Files(10**7, PNG), True, "dali", "16.8 GiB and do not fit cache_gib 2"),
        (ON_GPU, Files(10**7, PNG), False, "fused", r"DALI is not here .*\[dali\]"),
        (ON_GPU, Files(10**9, b"broken"), True, "fused", "0 GiB and fit"),
    ],
)
def test_the_pipeline_is_chosen_by_what_is_here(
    monkeypatch, config, source, installed, expected, reason
):
    monkeypatch.setattr("simclr_kernels.runs.is_installed", lambda module: installed)
    name, because = choose_pipeline(config, source)
    assert name == expected and re.search(reason, because) and "\n" not in because


def test_the_size_of_the_decoded_images_is_known_from_their_headers():
    small, large = (encoded(np.zeros((h, w, 3), np.uint8), "JPEG") for h, w in ((8, 4), (40, 20)))
    assert decoded_bytes(Files(64, small, large)) == 32 * 3 * (8 * 4 + 40 * 20)
    assert decoded_bytes(Files(6400, small[:100], small)) == 6400 * 3 * 8 * 4
    assert decoded_bytes(Files(1, large)) == 3 * 40 * 20


@pytest.mark.parametrize(
    "pipeline, kind, more",
    [("dali", "DALIViews", {"views": "fused"}), ("kornia", "KorniaViews", {})],
)
def test_each_pipeline_is_built_with_the_settings_of_the_run(monkeypatch, pipeline, kind, more):
    built = []
    module = SimpleNamespace(**{kind: lambda *a, **o: built.append((a, o))})
    monkeypatch.setitem(sys.modules, f"simclr_kernels.pipelines.{pipeline}_views", module)
    source = shapes10("test")
    config = dataclasses.replace(
        CONFIG, pipeline=pipeline, seed=3, workers=1, cache_gib=0.5, max_bad_fraction=0.25
    )
    build_pipeline(config, source, "log.jsonl")
    fused = build_pipeline(dataclasses.replace(config, pipeline="fused"), source, "log.jsonl")
    ((arguments, options),) = built
    assert arguments == (source, augment_config(config.views), config.batch_size)
    assert options == more | {
        "seed": 3,
        "device": "cpu",
        "workers": 1,
        "channels_last": False,
        "cache_gib": 0.5,
        "max_bad_fraction": 0.25,
        "quarantine": "log.jsonl",
    }
    assert isinstance(fused, FusedViews) and (fused.seed, len(fused)) == (3, 1000 // 256)


def test_a_pipeline_that_is_not_resolved_is_refused():
    with pytest.raises(ValueError, match="must be fused, dali or kornia, got 'auto'"):
        build_pipeline(CONFIG, shapes10("test"))


def test_other_files_are_refused_as_encoders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no encoder at"):
        load_encoder(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not say which encoder it holds"):
        load_encoder(tmp_path / "other.safetensors")


def test_frozen_accuracy_of_features_that_show_the_class_is_one(capsys):
    labels = torch.arange(40) % 2
    images = torch.rand(40, 3, 4, 4) * 0.1 + labels[:, None, None, None]
    batches = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    found = frozen_accuracy(lambda x: x.flatten(1), batches, batches, k=3, labels_per_class=4)
    assert found == {"knn": 1.0, "linear_probe_few": 1.0, "linear_probe": 1.0}
    only = frozen_accuracy(lambda x: x.flatten(1), batches, batches, k=3, probe=False)
    assert only == {"knn": 1.0}
    assert "kNN: 40 images against 40, 48 features" in capsys.readouterr().err
