"""Galleries and contact sheets hold the very pixels of the views; embeddings keep classes apart."""

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from simclr_kernels.figure_style import CLASS_COLORS, PALETTE
from simclr_kernels.picture_sheet import Sheet, wrap
from simclr_kernels.report_pictures import (
    _tsne,
    save_contact_sheet,
    save_embedding,
    save_gallery,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def random_views(count, side):
    levels = torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)
    )
    return levels.float() / 255, levels.permute(0, 2, 3, 1).numpy()


def enlarged(tile, factor):
    return np.kron(tile, np.ones((factor, factor, 1), tile.dtype))


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def clusters(count=120, classes=4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, 32, generator=generator)
    return centres[labels] + 0.3 * torch.randn(count, 32, generator=generator), labels


def test_gallery_shows_every_pixel_of_source_and_views_unresampled(tmp_path):
    views, levels = random_views(4, 24)
    sources = list(np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8))
    save_gallery(views, tmp_path / "g.png", sources=sources)
    sheet = pixels(tmp_path / "g.png")
    assert sheet.shape == (8 + 192 + 8, 8 + 592 + 48 + 592 + 8, 3)
    second = 8 + 592 + 48
    for i, left in enumerate((8, second)):
        for column, tile in enumerate((sources[i], levels[i], levels[i + 2])):
            x = left + column * 200
            assert (sheet[8:200, x : x + 192] == enlarged(tile, 8)).all()
    assert (sheet[:8] == 255).all()


def test_sheet_has_exactly_the_size_asked_for():
    for side in range(20, 400):
        assert FigureCanvasAgg(Sheet(side, side + 1).figure).get_width_height() == (side, side + 1)


def test_gallery_of_large_views_is_pixel_for_pixel(tmp_path):
    views, levels = random_views(2, 224)
    save_gallery(views.half(), tmp_path / "g.png", captions=["an image"])
    sheet = pixels(tmp_path / "g.png")
    assert (sheet[8:232, 8:232] == levels[0]).all()
    assert (sheet[8:232, 240:464] == levels[1]).all()
    assert (sheet[232:] < 128).any(), "the caption is under the views"


def test_gallery_scales_a_source_into_the_frame_and_keeps_its_shape(tmp_path):
    views, _ = random_views(2, 64)
    source = np.full((100, 400, 3), (10, 20, 30), np.uint8)
    save_gallery(views, tmp_path / "g.png", sources=[source])
    frame = pixels(tmp_path / "g.png")[8:200, 8:200]
    assert (frame[72:120] == (10, 20, 30)).all()
    assert (frame[:72] == 255).all() and (frame[120:] == 255).all()


@pytest.mark.parametrize(
    ("views", "arguments", "error", "message"),
    [
        (torch.zeros(3, 3, 8, 8), {}, ValueError, "even number of rows .two per image., got 3"),
        (torch.zeros(2, 1, 8, 8), {}, ValueError, r"must be .*, got \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 9), {}, ValueError, r"must be .*, got \(2, 3, 8, 9\)"),
        (torch.zeros(0, 3, 8, 8), {}, ValueError, r"must be .*, got \(0, 3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, TypeError, "floating.*, got torch.uint8"),
        (torch.full((2, 3, 8, 8), -2.0), {}, ValueError, r"lie in \[0, 1\].*, got -2 to -2"),
        (torch.full((2, 3, 8, 8), math.nan), {}, ValueError, r"lie in \[0, 1\].*, got nan to nan"),
        (torch.zeros(2, 3, 8, 8), {"sources": []}, ValueError, r"per image \(1\), got 0"),
        (torch.zeros(2, 3, 8, 8), {"captions": "ab"}, ValueError, r"per image \(1\), got 2"),
        (
            torch.zeros(2, 3, 8, 8),
            {"sources": [np.zeros((8, 8, 3))]},
            TypeError,
            "uint8, got float64",
        ),
        (
            torch.zeros(2, 3, 8, 8),
            {"sources": [np.zeros((3, 8, 8), np.uint8)]},
            ValueError,
            r"\(H, W, 3\), got \(3, 8, 8\)",
        ),
    ],
)
def test_gallery_states_the_rule_and_the_value(tmp_path, views, arguments, error, message):
    with pytest.raises(error, match=message):
        save_gallery(views, tmp_path / "g.png", **arguments)


def test_contact_sheet_draws_boxes_where_the_crops_are(tmp_path):
    views, levels = random_views(3, 28)
    source = np.full((48, 40, 3), 128, np.uint8)
    crops = torch.tensor([[4, 4, 20, 24], [10, 12, 30, 20], [0, 0, 48, 40]], dtype=torch.int32)
    captions = ["crop\nflip", "crop", "the whole image"]
    save_contact_sheet(source, views, captions, crops, tmp_path / "c.png")
    sheet = pixels(tmp_path / "c.png")
    factor = 10  # 48 rows in a picture of 480
    for color, (y, x, h, w) in zip(PALETTE, crops.tolist(), strict=False):
        bottom, middle = 8 + (y + h) * factor, 8 + (x + w // 2) * factor
        assert (np.abs(sheet[bottom, middle] - rgb(color)) <= 3).all()
        left, middle = 8 + x * factor, 8 + (y + h // 2) * factor
        assert (np.abs(sheet[middle, left] - rgb(color)) <= 3).all()
    assert (sheet[8 + 470, 8 + 20] == 128).all()
    x = 8 + 400 + 32
    # below the number in the corner of the first view
    assert (sheet[8 + 56 : 8 + 224, x : x + 224] == enlarged(levels[0], 8)[56:]).all()


def test_long_captions_are_broken_after_commas_outside_brackets():
    caption = "crop 264x264 at (196, 134), flip, hue +12 deg, contrast x0.60\nblur 1.31 px"
    assert wrap(caption) == [
        "crop 264x264 at (196, 134),",
        "flip, hue +12 deg,",
        "contrast x0.60",
        "blur 1.31 px",
    ]


def test_contact_sheet_widens_for_words_too_long_to_break(tmp_path):
    views, _ = random_views(2, 28)
    source = np.zeros((30, 30, 3), np.uint8)
    save_contact_sheet(source, views, ["short", "short"], None, tmp_path / "short.png")
    save_contact_sheet(source, views, ["short", "long " * 12], None, tmp_path / "long.png")
    assert pixels(tmp_path / "long.png").shape[1] > pixels(tmp_path / "short.png").shape[1] + 500


def test_contact_sheet_states_the_rule_and_the_value(tmp_path):
    views, _ = random_views(2, 28)
    source = np.zeros((30, 30, 3), np.uint8)
    with pytest.raises(ValueError, match=r"one text per view \(2\), got 1"):
        save_contact_sheet(source, views, ["a"], None, tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"crops must be \(K, 4\) with K = 2 views, got \(1, 4\)"):
        save_contact_sheet(source, views, ["a", "b"], torch.ones(1, 4), tmp_path / "c.png")


def test_tsne_keeps_neighbours_of_a_class_together():
    features, labels = clusters()
    points = _tsne(features)
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(1)
    assert (labels[nearest] == labels).float().mean() > 0.95
    assert points.isfinite().all()


def test_tsne_of_equal_features_is_finite():
    assert _tsne(torch.ones(8, 4)).isfinite().all()


def test_embedding_is_the_same_picture_twice_and_has_a_color_per_class(tmp_path):
    features, labels = clusters()
    names = ["circle", "square", "star", "ring"]
    for name in ("a.png", "b.png"):
        save_embedding(features, labels, names, tmp_path / name, "Features")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == (1100, 1200, 3)
    assert (a == b).all()
    for color in CLASS_COLORS[:4]:
        shown = 255 - 0.75 * (255 - rgb(color))  # dots are three quarters opaque
        assert (np.abs(a - shown).max(-1) <= 3).sum() > 200


def test_more_classes_than_colors_are_drawn_in_one(tmp_path):
    features, _ = clusters(60)
    save_embedding(features, torch.arange(60) % 30, None, tmp_path / "e.png", "Features")
    shown = 255 - 0.75 * (255 - rgb(PALETTE[0]))
    assert (np.abs(pixels(tmp_path / "e.png") - shown).max(-1) <= 3).sum() > 1000


@pytest.mark.parametrize(
    ("features", "labels", "names", "message"),
    [
        (torch.ones(4, 8), torch.zeros(4).long(), None, r"n >= 5 and C >= 2, got \(4, 8\)"),
        (torch.ones(9), torch.zeros(9).long(), None, r"must be \(n, C\).*, got \(9,\)"),
        (torch.ones(9, 1), torch.zeros(9).long(), None, r"C >= 2, got \(9, 1\)"),
        (torch.ones(9, 8), torch.zeros(8).long(), None, r"n = 9, got \(8,\)"),
        (torch.full((9, 8), math.nan), torch.zeros(9).long(), None, "must be finite"),
        (torch.ones(9, 8), torch.arange(9) % 3, ["a", "b"], "name labels 0 to 2, got 2"),
        (torch.ones(9, 8), torch.arange(9) - 1, ["a"] * 9, "name labels -1 to 7, got 9"),
    ],
)
def test_embedding_states_the_rule_and_the_value(tmp_path, features, labels, names, message):
    with pytest.raises(ValueError, match=message):
        save_embedding(features, labels, names, tmp_path / "e.png", "Features")
