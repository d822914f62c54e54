import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.config import ModelConfig, TrainConfig, ViewsConfig
from simclr_kernels.runs import (
    augment_config,
    build_model,
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
