"""Sheets that compare views hold the pixels of views and differences; what is missing is said."""

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_kernels import AugmentConfig, view_sheets
from simclr_kernels.report_views import GAP, MARGIN, Row, save_comparison, save_recipes
from simclr_kernels.view_sheets import draw_comparison, draw_gallery

HEAD = 36  # pixels of the names above the columns


def pixels(path):
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def random_levels(count, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator)


def picture(levels):
    return levels.permute(1, 2, 0).numpy()


def photo(height=60, width=90):
    x = np.linspace(0, 255, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    return (x * y * np.array([1, 0.6, 0.3])).astype(np.uint8)


def test_comparison_shows_views_and_eight_times_their_difference(tmp_path):
    levels = random_levels(2, 224)
    nearby = (levels + torch.arange(2).view(2, 1, 1, 1) * 3).clamp(0, 255)
    exact, views = levels.double() / 255, {"near": nearby / 255, "equal": levels / 255}
    found = save_comparison(exact, views, ["crop", "crop, flip"], tmp_path / "c.png")
    sheet = pixels(tmp_path / "c.png")
    step = 224 + GAP
    assert sheet.shape[1] == 3 * step - GAP + 2 * MARGIN
    assert (sheet[HEAD : HEAD + 224, MARGIN : MARGIN + 224] == picture(levels[0])).all()
    near = slice(MARGIN + step, MARGIN + step + 224)
    equal = slice(MARGIN + 2 * step, MARGIN + 2 * step + 224)
    assert (sheet[HEAD : HEAD + 224, near] == picture(nearby[0])).all()
    second = np.flatnonzero((sheet[:, near] == picture(nearby[1])[0]).all((1, 2)))
    assert len(second) == 1, "the second view is below the first"
    below = slice(second[0] + step, second[0] + step + 224)
    assert (sheet[below, near] == picture((nearby[1] - levels[1]) * 8)).all()
    assert (sheet[below, equal] == 0).all()
    assert max(found[0]["near"].maximum, found[1]["equal"].maximum) < 1e-4
    assert found[1]["near"].p99 == pytest.approx(3, abs=1e-4)


def test_comparison_keeps_a_pale_column_for_a_pipeline_that_is_missing(tmp_path):
    exact = random_levels(1, 224).double() / 255
    views = {"gone": "needs a library: pip install it", "here": exact.float()}
    found = save_comparison(exact, views, ["crop"], tmp_path / "c.png")
    left = MARGIN + 224 + GAP
    column = pixels(tmp_path / "c.png")[HEAD : HEAD + 2 * 224, left : left + 224]
    assert (column[100:] == (0xE4, 0xE4, 0xE4)).all()
    assert (column[:100] < 0x90).any(), "the reason is written in it"
    assert list(found[0]) == ["here"]


@pytest.mark.parametrize(
    ("views", "captions", "error", "message"),
    [
        ({}, [], ValueError, r"one text per view \(1\), got 0"),
        (
            {"a": torch.zeros(2, 3, 8, 8)},
            ["x"],
            ValueError,
            r"views of a must .*, got \(2, 3, 8, 8",
        ),
        ({"a": torch.zeros(1, 3, 8, 8).int()}, ["x"], TypeError, "must be floating"),
        ({"a": torch.full((1, 3, 8, 8), 1.5)}, ["x"], ValueError, r"must lie in \[0, 1\]"),
    ],
)
def test_comparison_states_the_rule_and_the_value(tmp_path, views, captions, error, message):
    with pytest.raises(error, match=message):
        save_comparison(torch.zeros(1, 3, 8, 8), views, captions, tmp_path / "c.png")


def test_recipes_stand_below_each_other_shrunk_by_area(tmp_path):
    levels = random_levels(3, 224)
    rows = [
        Row("first", "a line", levels[:2] / 255),
        Row("second", "a longer line\nand another", levels[2:] / 255, ["one"]),
    ]
    save_recipes(rows, tmp_path / "r.png")
    sheet = pixels(tmp_path / "r.png").astype(int)
    small = levels.double().reshape(3, 3, 112, 2, 112, 2).mean((3, 5))
    left = sheet.shape[1] - 8 - 2 * 112 - 6
    for k, x in enumerate((left, left + 118)):
        tile = sheet[8 : 8 + 112, x : x + 112]
        assert np.abs(tile - picture(small[k])).max() <= 2.01
    tile = sheet[8 + 118 : 8 + 118 + 112, left : left + 112]
    assert np.abs(tile - picture(small[2])).max() <= 2.01
    assert (sheet[8 + 118 + 112 :, left : left + 112] < 150).any(), "the caption is below its view"
    assert (sheet[:, : left - 5] < 150).any() and (sheet[:, left - 4 : left] == 255).all()


def test_recipes_state_the_rule_and_the_value(tmp_path):
    with pytest.raises(ValueError, match="rows must be at least one, got 0"):
        save_recipes([], tmp_path / "r.png")
    with pytest.raises(ValueError, match=r"captions of 'a' must be one per view \(2\), got 1"):
        save_recipes([Row("a", "", torch.zeros(2, 3, 8, 8), ["x"])], tmp_path / "r.png")


def test_gallery_has_a_row_for_every_preset_and_both_views_of_byol(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(view_sheets, "save_recipes", lambda rows, out_png: drawn.extend(rows))
    presets = draw_gallery(photo(), 24, tmp_path / "g.png", 4, seed=1, index=0)
    titles = [row.title for row in drawn if row.captions is None]
    assert titles == [
        *("simclr", "simclr_v1", "cifar10", "byol, view 0", "byol, view 1"),
        *("moco_v2", "torchvision"),
    ]
    assert presets == 6
    assert all(row.views.shape == (4, 3, 24, 24) for row in drawn if row.captions is None)
    by_title = {row.title: row for row in drawn}
    assert (
        by_title["byol, view 1"].text == "jitter +.4 .4 .2 .1\ncrop .1 to 1\nblur .1, solarize .2"
    )
    assert by_title["torchvision"].text == "jitter .8 .8 .8 .2\ncrop .08 to 1\nblur .5"


def test_gallery_shows_each_operation_alone_and_all_of_them_change_the_image(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(view_sheets, "save_recipes", lambda rows, out_png: drawn.extend(rows))
    draw_gallery(photo(), 64, tmp_path / "g.png", 6, seed=1, index=0)
    rows = [row for row in drawn if row.captions is not None]
    assert [len(row.captions) for row in rows] == [6, 6]
    names = [name for row in rows for name in row.captions]
    views = dict(zip(names, torch.cat([row.views for row in rows]), strict=True))
    centre = views.pop("centre")
    assert list(views)[-4:] == ["cutout", "rotation", "Sobel", "noise"]
    for name, view in views.items():
        assert (view - centre).abs().mean() > 0.005, name
    assert torch.equal(views["rotation"], centre.rot90(1, (1, 2)))
    assert views["grayscale"].amax(0).equal(views["grayscale"].amin(0))


def test_gallery_of_a_narrow_photo_in_any_size_is_a_sheet(tmp_path):
    draw_gallery(photo(200, 3), 8, tmp_path / "g.png", 3, seed=0, index=0)
    assert min(pixels(tmp_path / "g.png").shape[:2]) > 3 * 100


def test_every_preset_is_in_the_gallery():
    made = [name for name, value in vars(AugmentConfig).items() if isinstance(value, classmethod)]
    assert made == list(view_sheets.PRESETS)


def test_comparison_gives_every_pipeline_the_same_parameters(tmp_path, monkeypatch):
    seen = {}

    def view_by(name, images, params, config):
        seen[name] = params
        if name == "dali":
            raise ImportError("DALIViews needs DALI: pip install it")
        return view_sheets.augment(images, params, config)

    monkeypatch.setattr(view_sheets, "view_by", view_by)
    config = AugmentConfig.simclr(size=32)
    found, missing = draw_comparison(
        photo(), config, ("fused", "dali", "kornia"), tmp_path / "c.png", 3, seed=5, index=0
    )
    assert missing == {"dali": "DALIViews needs DALI: pip install it"}
    assert seen["fused"] is seen["dali"] is seen["kornia"]
    assert [list(of) for of in found] == [["fused", "kornia"]] * 3
    assert max(of[name].maximum for of in found for name in of) < 1e-3


def test_comparison_says_what_a_pipeline_cannot_do(tmp_path):
    config = AugmentConfig(size=32, noise=1.0)
    found, missing = draw_comparison(
        photo(), config, ("fused", "dali"), tmp_path / "c.png", 1, seed=0, index=0
    )
    assert list(found[0]) == ["fused"]
    assert "DALI has no study operations" in missing["dali"]
