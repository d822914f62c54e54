import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import shared_path
from PIL import Image
from safetensors import safe_open

from simclr_kernels.cli import main
from simclr_kernels.data import open_source

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = "--batch_size 32 --views.size 12 --views.blur false --model.encoder small --device cpu"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command in an empty folder; returns status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def command(text):
        status = main(text.split())
        output = capsys.readouterr()
        return status, output.out, output.err

    return command


@pytest.fixture
def data(tmp_path):
    """A small labelled data set with a train and a test split, as a folder of Parquet files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 96), ("test", 40)):
        source = open_source("shapes10", split)
        rows = [{"bytes": png(image), "path": None} for image in source.images[:count]]
        table = pa.table({"image": rows, "label": source.labels[:count]})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_train_leaves_a_whole_run_folder_and_eval_reads_it(run, data):
    status, out, err = run(f"train --data data --epochs 2 {SMALL} --eval_every 1 --run_dir a/run")
    assert status == 0, err
    left = {path.name for path in Path("a/run").iterdir()}
    assert left == {
        "checkpoints",
        "config.yaml",
        "curves.png",
        "embedding.png",
        "encoder.safetensors",
        "metrics.jsonl",
        "views.png",
    }
    assert "6 of 6 steps in" in out
    assert "next: simclr-kernels eval a/run --data data" in out
    assert "train: step 6/6: loss" in err
    records = [json.loads(line) for line in open("a/run/metrics.jsonl")]
    assert [record["kind"] for record in records] == ["step"] * 3 + ["eval"] + ["step"] * 3 + [
        "eval"
    ]
    with safe_open("a/run/encoder.safetensors", "pt") as file:
        assert file.metadata()["encoder"] == "small"

    status, out, err = run("eval a/run --data data --labels_per_class 2 --baselines true --k 5")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "96 training images, 40 test images"
    assert lines[1].split("  ")[0] == "accuracy in %"
    rows = {line.split("  ")[0]: line.split()[1:] for line in lines[3:6]}
    assert list(rows) == ["raw pixels", "random small", "a/run"]
    assert all(0 <= float(cell) <= 100 for cell in rows["a/run"])
    assert lines[6] == "in a/run/eval.json"
    accuracy = json.loads(Path("a/run/eval.json").read_text())["accuracy"]["a/run"]
    assert [f"{100 * accuracy[name]:.1f}" for name in ("knn", "linear_probe")] == rows["a/run"][:2]


def test_eval_of_the_exported_encoder_alone_gives_the_same_figures(run, data):
    run(f"train --data data --epochs 1 {SMALL} --run_dir r")
    whole = run("eval r --data data")[1].splitlines()[3].split()[1:]
    Path("r/encoder.safetensors").rename("elsewhere.safetensors")
    alone = run("eval elsewhere.safetensors --data data")[1].splitlines()[3].split()[1:]
    assert alone == whole


def test_settings_come_from_yaml_flags_and_the_run_itself(run, data):
    Path("mine.yaml").write_text("data: data\nepochs: 1\nbatch_size: 16\nviews:\n  size: 8\n")
    status, _, err = run(
        "train --config mine.yaml --batch_size 48 --model.encoder small --device cpu --run_dir r"
    )
    assert status == 0, err
    settings = yaml.safe_load(Path("r/config.yaml").read_text())
    assert (settings["batch_size"], settings["views"]["size"]) == (48, 8)
    assert settings["precision"] == "float32" and settings["pipeline"] == "fused"
    assert "pipeline fused: exact; there is no GPU to decode on\n" in err
    status, out, err = run("train --resume r")
    assert status == 0, err
    assert "2 of 2 steps" in out
    before = Path("r/config.yaml").read_bytes()
    status, _, err = run("train --config mine.yaml --epochs 7 --run_dir r")
    assert (status, Path("r/config.yaml").read_bytes()) == (1, before)
    assert "r is not empty: resume that run or choose another folder" in err
    status, _, err = run("train --resume r --temperature 0.5")
    assert status == 1
    assert "temperature is 0.5, the run has 0.1" in err


@pytest.mark.parametrize("pipeline", ["kornia"])
def test_other_pipelines_train_and_are_kept_when_a_run_continues(run, data, pipeline):
    status, _, err = run(f"train --data data --epochs 1 {SMALL} --pipeline {pipeline} --run_dir r")
    assert status == 0, err
    assert yaml.safe_load(Path("r/config.yaml").read_text())["pipeline"] == pipeline
    status, out, err = run("train --resume r")
    assert status == 0 and "3 of 3 steps" in out, err
    status, _, err = run("train --resume r --pipeline fused")
    assert status == 1 and f"pipeline is fused, the run has {pipeline}" in err


def test_print_config_shows_every_setting(run, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "shapes10", "--views.size", "24", "--print_config"])
    assert end.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["views"]["size"] == 24
    assert settings["optimizer"]["eta"] == 0.001


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --data nowhere --run_dir r", "no nowhere exists"),
        ("train --resume r", "nothing to resume: there is no r/config.yaml"),
        ("train --data shapes10 --model.encoder resnet17 --run_dir r", "encoder must be one of"),
        (
            "train --data shapes10 --views.preset moco_v2 --views.strength 0.5 --run_dir r",
            "strength goes with simclr, simclr_v1 and torchvision, got 'moco_v2'",
        ),
        ("train --data shapes10 --batch_size 5000 --run_dir r", "got batch_size 5000 and 4096"),
        ("eval r --data shapes10", "no encoder at r: name a run folder"),
        ("views nothing.jpg", "No such file or directory: 'nothing.jpg'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, command, message):
    status, _, err = run(command)
    assert status == 1
    assert message in err.splitlines()[-1]
    assert err.startswith("simclr-kernels")


@pytest.mark.parametrize(
    "command",
    [
        "train --data shapes10 --batch_size x",
        "train",
        "fly",
        "train --views.sizes 3",
        "views a.png --compare torch",
    ],
)
def test_unknown_flags_and_values_are_refused_with_status_2(run, command):
    with pytest.raises(SystemExit) as end:
        run(command)
    assert end.value.code == 2


def test_unreadable_images_are_left_out_logged_and_limited(run, data):
    rows = pq.read_table(data / "train.parquet").to_pylist()
    rows[1]["image"]["bytes"] = b"no image"
    rows[7]["image"]["bytes"] = rows[7]["image"]["bytes"][:100]
    pq.write_table(pa.Table.from_pylist(rows), data / "train.parquet")
    status, _, err = run(f"train --data data --epochs 1 {SMALL} --run_dir a")
    assert status == 1
    assert "train.parquet[1]" in err
    assert "max_bad_fraction" in err
    status, _, err = run(
        f"train --data data --epochs 1 {SMALL} --max_bad_fraction 0.05 --run_dir b"
    )
    assert status == 0, err
    assert len(open("b/quarantine.jsonl").readlines()) == 2
    status, out, _ = run("eval b --data data")
    assert out.count("left out, unreadable:") == 2


def test_views_draws_one_sheet_per_image(run):
    for name, size in (("wide.png", (40, 90)), ("thin.png", (200, 1))):
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(name)
    status, out, err = run("views wide.png thin.png --size 32 --count 3 --out sheets")
    assert status == 0, err
    assert out.splitlines() == [
        "wide.png: 3 views in sheets/wide-views.png",
        "thin.png: 3 views in sheets/thin-views.png",
    ]
    with Image.open("sheets/wide-views.png") as sheet:
        assert sheet.width > 3 * 32


def test_views_compares_pipelines_and_says_which_are_missing(run, monkeypatch):
    for name in [name for name in sys.modules if (name + ".").startswith("kornia.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.delitem(sys.modules, "simclr_kernels.pipelines.kornia_views", raising=False)
    Image.fromarray(np.full((40, 90, 3), 90, np.uint8)).save("wide.png")
    status, out, err = run("views wide.png --size 32 --count 2 --compare fused kornia --out sheets")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("wide.png: difference from the reference in levels of 255")
    assert lines[1].split() == ["fused"]
    assert lines[3].split() == ["view", "1", "0.000", "(0.00)"]
    assert lines[5].startswith("kornia is left out: ")
    assert "pip install" in lines[5] and "[kornia]" in lines[5]
    assert lines[6] == "2 views by reference, fused in sheets/wide-compare.png"
    with Image.open("sheets/wide-compare.png") as sheet:
        assert sheet.width > 3 * 224


def test_views_draws_the_gallery_of_presets(run):
    Image.fromarray(np.full((40, 90, 3), 90, np.uint8)).save("wide.png")
    status, out, err = run("views wide.png --size 16 --count 2 --gallery --out sheets")
    assert status == 0, err
    assert out == "wide.png: 6 presets, 2 views each, in sheets/wide-gallery.png\n"
    with Image.open("sheets/wide-gallery.png") as sheet:
        assert sheet.height > 13 * 112
    status, _, err = run("views wide.png --gallery --compare")
    assert status == 1
    assert "ask for one at a time" in err


def test_doctor_says_what_runs_where(run):
    status, out, _ = run("doctor")
    assert status == 0
    assert "simclr_kernels 0." in out
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert rows.count("fused_nt_xent") == rows.count("views") == 3
    assert [rows.count(name) for name in ("fused", "dali", "kornia")] == [1, 1, 1]


def test_demo_prints_a_row_for_each_variant_and_leaves_its_figures(run):
    status, out, err = run("demo --epochs 1 --seeds 0 --run_dir d")
    assert status == 0, err
    rows = [line.split("  ")[0] for line in out.splitlines()[2:7]]
    assert rows == [
        "raw pixels",
        "random encoder",
        "full recipe",
        "without colour distortion",
        "without crop",
    ]
    assert Path("d/table.txt").read_text().strip() in out
    assert Path("d/comparison.png").stat().st_size > 10_000
    assert Path("d/without-crop-seed0/embedding.png").exists()


def test_the_cifar10_recipe_trains_on_the_real_files(run, tmp_path):
    folder = tmp_path / "cifar"
    folder.mkdir()
    for split, count in (("train", 1500), ("test", 300)):
        table = pq.read_table(shared_path(f"data/cifar10/{split}.parquet"))
        pq.write_table(table.slice(0, count), folder / f"{split}.parquet")
    status, out, err = run(
        f"train --config {EXAMPLES}/cifar10_cpu.yaml --data cifar --epochs 1 --run_dir r"
    )
    assert status == 0, err
    status, out, err = run("eval r --data cifar")
    assert status == 0, err
    # chance is 10 %, raw pixels of so few images give about 20 %
    assert float(out.splitlines()[3].split()[1]) > 15


def test_all_imagenet_photos_train(run):
    photos = shared_path("data/imagenet_samples")
    status, out, err = run(
        f"train --data {photos} --epochs 1 --batch_size 48 --views.size 32 --views.strength 1.0 "
        "--model.encoder small --device cpu --run_dir r"
    )
    assert status == 0, err
    assert "4 of 4 steps" in out
    assert not Path("r/quarantine.jsonl").exists()
    status, out, err = run(f"eval r --data {photos} --test_fraction 0.25 --k 3")
    assert status == 0, err
    assert out.startswith("144 training images, 48 test images")
