"""Parameters of cutout, rotation, Sobel filter and noise: words, distributions, bookkeeping."""

import copy
import dataclasses
import itertools

import jsonargparse
import numpy as np
import pytest
import torch
from test_params import assert_equal, draw

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.config import ViewsConfig
from simclr_kernels.params import AugmentParams, philox
from simclr_kernels.runs import augment_config

ALL = AugmentConfig(size=32, cutout=0.3, rotation=0.6, sobel=0.2, noise=0.7)


def near(events, probability):
    return abs(events.float().mean() - probability) < 0.015


def test_without_study_operations_there_are_no_study_params():
    assert not AugmentConfig().has_study_operations and draw(AugmentConfig()).study is None
    for name in ("cutout", "rotation", "sobel", "noise"):
        for value in (0.1, (0.0, 0.1), (0.1, 0.0)):
            config = dataclasses.replace(AugmentConfig(), **{name: value})
            assert config.has_study_operations and draw(config).study is not None
        assert not dataclasses.replace(AugmentConfig(), **{name: (0.0, 0.0)}).has_study_operations


def test_study_operations_leave_the_other_values_alone():
    plain = dataclasses.replace(ALL, cutout=0, rotation=0, sobel=0, noise=0)
    assert_equal(dataclasses.replace(draw(ALL), study=None), draw(plain))


def test_probabilities_are_those_of_the_config_and_independent():
    study = draw(ALL, 20000).study
    events = {
        "cutout": study.cutout[:, 2] > 0,
        "rotation": study.quarter_turns != 0,
        "sobel": study.sobel,
        "noise": study.noise_sigma > 0,
    }
    for name, happened in events.items():
        assert near(happened, getattr(ALL, name)), name
    for a, b in itertools.combinations(events, 2):
        assert near(events[a] & events[b], getattr(ALL, a) * getattr(ALL, b)), (a, b)


def test_views_may_have_probabilities_of_their_own():
    config = AugmentConfig(size=32, cutout=(1, 0), rotation=(0, 1), sobel=(0.2, 0), noise=(0, 0.7))
    for view in (0, 1, 2, 3):
        study = draw(config, 20000, view=view).study
        assert (study.cutout[:, 2] > 0).all() if view % 2 == 0 else (study.cutout == 0).all()
        assert (study.quarter_turns != 0).all() == (view % 2 == 1)
        assert near(study.sobel, (0.2, 0)[view % 2])
        assert near(study.noise_sigma > 0, (0, 0.7)[view % 2])


def test_the_three_rotations_are_equally_likely():
    turns = draw(AugmentConfig(rotation=1), 30000).study.quarter_turns.numpy()
    counts = np.bincount(turns, minlength=4)
    assert counts[0] == 0 and len(counts) == 4
    assert ((counts[1:] - 10000) ** 2 / 10000).sum() < 13.8  # chi square, 2 degrees, 0.1 %


@pytest.mark.parametrize(
    "size, side, half", [(32, 0.5, 8), (224, 0.5, 56), (33, 0.5, 8), (9, 1, 4)]
)
def test_cutout_is_a_square_around_a_uniform_centre_clipped_at_the_border(size, side, half):
    box = draw(AugmentConfig(size=size, cutout=1, cutout_side=side), 20000).study.cutout.long()
    y, x, height, width = box.unbind(1)
    for start, length in ((y, height), (x, width)):
        assert (start >= 0).all() and (length > 0).all() and (start + length <= size).all()
        # whole inside the view, cut at its start, or cut at its end
        whole, at_start, at_end = length == 2 * half, start == 0, start + length == size
        assert (whole | at_start | at_end).all()
        assert length.max() == min(2 * half, size) and length.min() == half
        centre = torch.where(at_start, start + length - half, start + half)
        counts = np.bincount(centre.numpy(), minlength=size)
        expected = 20000 / size
        # chi square of size - 1 degrees: mean and deviation of its normal limit, 4 deviations
        chi = ((counts - expected) ** 2 / expected).sum()
        if size != 9:  # both borders cut a square as large as the view: the centre is not told
            assert chi < size - 1 + 4 * (2 * (size - 1)) ** 0.5
    assert abs(np.corrcoef(y, x)[0, 1]) < 0.03


def test_words_are_used_as_the_table_of_the_module_says():
    config = dataclasses.replace(ALL, cutout=1, rotation=1, noise_sigma=0.3)
    study = draw(config, 1, seed=(5 << 32) + 9, epoch=4, view=3, first=6).study
    counters = torch.tensor([[4, 6, 3, (1 << 16) + 3 + block] for block in range(3)])
    words = philox((9, 5), counters).tolist()
    y, x = (words[0][k] * 32 >> 32 for k in (1, 2))
    box = [max(y - 8, 0), max(x - 8, 0)]
    box += [min(y + 8, 32) - box[0], min(x + 8, 32) - box[1]]
    assert study.cutout[0].tolist() == box
    assert study.quarter_turns.item() == 1 + (words[1][0] * 3 >> 32)
    assert study.sobel.item() == ((words[1][1] >> 8) / 2**24 < np.float32(0.2))
    noisy = (words[1][2] >> 8) / 2**24 < np.float32(0.7)
    assert study.noise_sigma.item() == (np.float32(0.3) if noisy else 0)
    assert study.noise_key[0].tolist() == words[2][:2]


def test_an_image_gets_the_same_study_values_in_every_batch():
    whole = draw(ALL, 40, first=100)
    parts = [draw(ALL, 10, first=100 + 10 * k) for k in range(4)]
    assert_equal(AugmentParams.concatenate(parts), whole)
    assert_equal(AugmentParams.concatenate([whole[i] for i in range(40)]), whole)
    assert_equal(draw(ALL, 20, first=110), whole[10:30])


def test_noise_keys_differ_between_images_views_epochs_and_seeds():
    config = AugmentConfig(noise=1)
    draws = (dict(), dict(view=1), dict(epoch=1), dict(seed=1), dict(first=1000))
    keys = torch.cat([draw(config, 1000, **counter).study.noise_key for counter in draws])
    assert len(keys.unique(dim=0)) == len(keys)
    assert keys.min() >= 0 and keys.max() < 2**32


def test_params_with_and_without_study_operations_are_joined():
    plain, busy = draw(AugmentConfig(), 2), draw(ALL, 3)
    joined = AugmentParams.concatenate([plain, busy])
    assert_equal(joined[2:], busy)
    assert (joined.study.cutout[:2] == 0).all() and not joined.study.sobel[:2].any()
    assert AugmentParams.concatenate([plain, plain]).study is None


def test_study_params_move_copy_and_cut_with_the_others():
    params = draw(ALL, 5)
    assert_equal(copy.deepcopy(params).to("cpu"), params)
    assert len(params[1:3].study.sobel) == 2 and len(params[-1].study.noise_key) == 1
    assert params.to("meta").study.noise_key.is_meta


def test_types_are_those_the_fields_name():
    study = draw(ALL, 3).study
    types = {name: (value.dtype, tuple(value.shape)) for name, value in vars(study).items()}
    assert types == {
        "quarter_turns": (torch.int8, (3,)),
        "sobel": (torch.bool, (3,)),
        "noise_sigma": (torch.float32, (3,)),
        "noise_key": (torch.int64, (3, 2)),
        "cutout": (torch.int32, (3, 4)),
    }
    assert_equal(type(study).identity(0), draw(ALL, 0).study)


def test_describe_names_study_operations_in_their_order():
    params = AugmentParams.identity(torch.tensor([[40, 60]]))
    params = AugmentParams.concatenate([params, draw(ALL, 1)])
    study = dataclasses.replace(
        params.study,
        quarter_turns=torch.tensor([3, 0]),
        sobel=torch.tensor([True, False]),
        noise_sigma=torch.tensor([0.1, 0.0]),
        cutout=torch.tensor([[3, 4, 16, 12], [0, 0, 0, 0]]),
    )
    params = dataclasses.replace(params, study=study, grayscale=torch.tensor([True, False]))
    assert params.describe(0) == (
        "crop 40x60 at (0, 0), rotate 270 deg, grayscale, sobel, noise 0.10, cutout 16x12 at (3, 4)"
    )
    assert "rotate" not in params.describe(1) and "cutout" not in params.describe(1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"cutout": 1.5}, r"cutout is a probability and must be in \[0, 1\], got 1.5"),
        ({"sobel": (0.5, -1)}, r"sobel\[1\] is a probability and must be in \[0, 1\], got -1"),
        ({"noise": (0.5,)}, r"noise must be two probabilities \(one per view\), got \(0.5,\)"),
        ({"cutout_side": 0}, r"cutout_side is a fraction and must be in \(0, 1\], got 0"),
        ({"noise_sigma": 0}, r"noise_sigma must be positive and finite, got 0"),
    ],
    ids=str,
)
def test_a_value_outside_its_rule_is_refused_and_named(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)


def test_an_ablation_sets_study_operations_on_the_command_line():
    def command(views: ViewsConfig):
        return views

    options = ["--views.cutout=1.0", "--views.rotation=[0, 0.5]", "--views.noise_sigma=0.2"]
    options += ["--views.cutout_side=0.25", "--views.size=32", "--views.sobel=1"]
    views = jsonargparse.auto_cli(command, args=options)
    expected = AugmentConfig(
        size=32, cutout=1.0, rotation=(0, 0.5), sobel=1, noise_sigma=0.2, cutout_side=0.25
    )
    assert augment_config(views) == expected
    assert augment_config(ViewsConfig()) == AugmentConfig()
