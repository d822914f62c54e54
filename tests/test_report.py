"""Metrics read back with their faults, curves of whole, short and broken runs, text tables."""

import json
import math

import matplotlib
import numpy as np
import pytest
from PIL import Image

from simclr_kernels.figure_style import BLUE, PALETTE, PURPLE, STYLE, VERMILION
from simclr_kernels.report import _label_ends, read_metrics, save_comparison, save_curves, table


def step(number, loss=2.0, **fields):
    return {
        "kind": "step",
        "step": number,
        "epoch": number / 4,
        "loss": loss,
        "learning_rate": 0.1,
        "images_per_second": 100.0,
        "seconds": {"data": 0.1, "views": 0.1, "encoder": 0.6, "loss": 0.1, "optimizer": 0.1},
    } | fields


def evaluation(number, **fields):
    return {"kind": "eval", "step": number, "epoch": number / 4, "effective_rank": 9.0} | fields


def write_run(folder, records, tail=""):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count_near(picture, color, distance=12):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture - rgb).max(-1) <= distance).sum())


def test_metrics_are_read_from_the_folder_or_the_file(tmp_path):
    records = [step(1), step(2), evaluation(2, knn=0.5)]
    run = write_run(tmp_path / "run", records)
    assert read_metrics(run) == records
    assert read_metrics(run / "metrics.jsonl") == records


@pytest.mark.parametrize("tail", ['{"kind": "st', "\x00\x00", '{"kind": "step"\u00e9'])
def test_a_last_line_cut_short_by_a_crash_is_left_out(tmp_path, tail):
    assert read_metrics(write_run(tmp_path, [step(1)], tail)) == [step(1)]


def test_a_last_line_that_only_misses_its_newline_is_read(tmp_path):
    assert read_metrics(write_run(tmp_path, [step(1)], json.dumps(step(2)))) == [step(1), step(2)]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    run = write_run(tmp_path, [step(1)], '{"kind": "st\n' + json.dumps(step(2)) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON .*kind"):
        read_metrics(run)


@pytest.mark.parametrize("line", ["[1, 2]", "3", '{"kind": "step", "step": 1}'])
def test_a_line_without_kind_step_and_epoch_is_named(tmp_path, line):
    run = write_run(tmp_path, [step(1)], line + "\n")
    with pytest.raises(ValueError, match="line 2 must be an object with kind, step and epoch"):
        read_metrics(run)


def test_a_step_written_again_after_a_resume_replaces_the_first(tmp_path):
    records = [step(1), step(2, loss=9.0), step(3, loss=9.0), step(2, loss=1.0)]
    losses = [record["loss"] for record in read_metrics(write_run(tmp_path, records))]
    assert losses == [2.0, 1.0, 9.0]


def test_a_run_without_metrics_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="must hold a step or an evaluation record, got 0 others"):
        save_curves(write_run(tmp_path, []), tmp_path / "curves.png")


def test_curves_show_each_line_in_its_color(tmp_path):
    records = [step(i, loss=5 - i / 100) for i in range(1, 201)]
    records += [evaluation(i, knn=i / 250, linear_probe=i / 220) for i in (50, 100, 200)]
    save_curves(write_run(tmp_path, records), tmp_path / "curves.png")
    picture = pixels(tmp_path / "curves.png")
    assert picture.shape == (1000, 1600, 3)
    loss, accuracy = picture[:500, :800], picture[500:, :800]
    assert count_near(loss, BLUE) > 500
    assert count_near(accuracy, PALETTE[2]) > 500
    assert count_near(accuracy, PURPLE) > 500
    assert count_near(loss, PURPLE) == 0


RUNS = {
    "one step": [step(1)],
    "one step at epoch 0": [step(0)],
    "no evaluation": [step(i) for i in range(1, 9)],
    "evaluations only": [evaluation(4, knn=0.3), evaluation(8, knn=0.4)],
    "accuracies of null": [step(1), evaluation(1, knn=None)],
    "no learning rate, no times": [{"kind": "step", "step": 1, "epoch": 0.1, "loss": 1.0}],
    "times of zero": [step(i, seconds={"data": 0.0, "encoder": 0.0}) for i in range(1, 4)],
    "a learning rate of zero": [step(1, learning_rate=0.0)],
    "no finite loss": [step(1, loss=None), step(2, loss=math.nan), step(3, loss=math.inf)],
    "one evaluation a step": [r for i in range(1, 4) for r in (step(i), evaluation(i, knn=0.2))],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("records", RUNS.values(), ids=RUNS)
def test_curves_of_a_short_or_partial_run_are_drawn_without_a_warning(tmp_path, records):
    save_curves(write_run(tmp_path, records), tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").shape == (1000, 1600, 3)


def test_steps_without_a_finite_loss_are_marked(tmp_path):
    good = [step(i) for i in range(1, 21)]
    save_curves(write_run(tmp_path / "good", good), tmp_path / "good.png")
    good[9] = step(10, loss=math.nan)
    save_curves(write_run(tmp_path / "bad", good), tmp_path / "bad.png")
    assert count_near(pixels(tmp_path / "good.png")[:500, :800], VERMILION) == 0
    assert count_near(pixels(tmp_path / "bad.png")[:500, :800], VERMILION) > 100


def test_a_loss_of_zero_is_finite(tmp_path):
    save_curves(write_run(tmp_path, [step(1, loss=0.0)]), tmp_path / "curves.png")
    assert count_near(pixels(tmp_path / "curves.png")[:500, :800], VERMILION) == 0


def test_comparison_draws_every_run_in_a_color_of_its_own(tmp_path):
    runs = {}
    for i, name in enumerate(("full recipe", "no colour", "no crop")):
        records = [step(j, loss=5 - i) for j in range(1, 9)]
        runs[name] = write_run(tmp_path / str(i), records + [evaluation(8, knn=0.2 + 0.3 * i)])
    save_comparison(runs, tmp_path / "comparison.png")
    picture = pixels(tmp_path / "comparison.png")
    assert picture.shape == (640, 1600, 3)
    for color in PALETTE[:3]:
        assert count_near(picture[:, :800], color) > 50
        assert count_near(picture[:, 800:], color) > 500


@pytest.mark.filterwarnings("error")
def test_comparison_stands_runs_without_evaluations(tmp_path):
    runs = {"short": write_run(tmp_path, [step(1)])}
    save_comparison(runs, tmp_path / "comparison.png")
    assert pixels(tmp_path / "comparison.png").shape == (640, 1600, 3)


def test_comparison_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="at least one run, got none"):
        save_comparison({}, tmp_path / "comparison.png")


def test_labels_at_the_edge_keep_their_distance_and_order():
    class Axes:
        def __init__(self):
            self.heights = {}

        def get_ylim(self):
            return 0.0, 10.0

        def annotate(self, text, place, **style):
            self.heights[text] = place[1]

    axes = Axes()
    values = {"a": 5.0, "b": 5.1, "c": 5.2, "far": 9.0}
    _label_ends(axes, [(value, text, BLUE) for text, value in values.items()], gap=0.1)
    heights = [axes.heights[text] for text in values]
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
    assert axes.heights["far"] == pytest.approx(0.9)
    assert axes.heights["b"] == pytest.approx(0.51)


def test_matplotlib_settings_of_the_user_neither_matter_nor_change(tmp_path):
    run = write_run(tmp_path, [step(1)])
    save_curves(run, tmp_path / "plain.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        save_curves(run, tmp_path / "dark.png")
        assert matplotlib.rcParams["font.size"] == 30 != STYLE["font.size"]
    assert (pixels(tmp_path / "plain.png") == pixels(tmp_path / "dark.png")).all()


def test_table_puts_numbers_to_the_right_and_text_to_the_left():
    rows = [("full recipe", "88.7 %", 3), ("no colour", "9.1 %", None)]
    assert table(rows, ("run", "kNN", "seeds")).split("\n") == [
        "run             kNN  seeds",
        "-----------  ------  -----",
        "full recipe  88.7 %      3",
        "no colour     9.1 %      -",
    ]


def test_table_as_markdown_aligns_and_escapes():
    rows = [("a|b", 1.5), ("c", -12)]
    assert table(rows, ("name", "value"), markdown=True).split("\n") == [
        "| name | value |",
        "| ---- | ----: |",
        "| a\\|b |   1.5 |",
        "| c    |   -12 |",
    ]


def test_table_of_no_rows_is_its_header():
    assert table([], ("a", "bc")).split("\n") == ["a  bc", "-  --"]


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match=r"a row must have 2 cells, got 3: \(1, 2, 3\)"):
        table([(1, 2, 3)], ("a", "b"))
