import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simclr_kernels.checkpoint import list_checkpoints, load_checkpoint
from simclr_kernels.config import ModelConfig, OptimizerConfig, TrainConfig, ViewsConfig
from simclr_kernels.data import ArrayImages, open_source
from simclr_kernels.evaluate import eval_batches
from simclr_kernels.pipelines.fused_views import FusedViews
from simclr_kernels.runs import augment_config, build_model
from simclr_kernels.trainer import ConfigMismatch, FeatureBank, NonFiniteTraining, train

CONFIG = TrainConfig(
    data="shapes10",
    epochs=2,
    batch_size=16,
    views=ViewsConfig(preset="simclr", size=16, blur=False),
    model=ModelConfig(encoder="small", out_dim=16),
    optimizer=OptimizerConfig(warmup_epochs=0.5),
    device="cpu",
    eval_every=1,
    bank_size=64,
)
STEPS_PER_EPOCH = 6


def images(count=16 * STEPS_PER_EPOCH):
    source = open_source("shapes10", "test")
    return ArrayImages(source.images[:count], source.labels[:count])


def pieces(config=CONFIG):
    views = augment_config(config.views)
    pipeline = FusedViews(images(), views, config.batch_size, seed=config.seed, workers=1)
    return pipeline, build_model(config)


class StopAfter:
    """A pipeline whose signal arrives while it makes batch number `batches`."""

    def __init__(self, pipeline, batches, number=signal.SIGTERM):
        self.pipeline, self.batches, self.number = pipeline, batches, number

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def __len__(self):
        return len(self.pipeline)

    def __iter__(self):
        for batch in self.pipeline:
            self.batches -= 1
            if self.batches == 0:
                os.kill(os.getpid(), self.number)
            yield batch


class NotFinite(StopAfter):
    """A pipeline that yields NaN views in the given batches."""

    def __iter__(self):
        for batch in self.pipeline:
            self.batches = [b - 1 for b in self.batches]
            yield batch._replace(views=batch.views * float("nan")) if 0 in self.batches else batch


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(run_dir):
    records = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
    return [record["step"] for record in records if record["kind"] == "step"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Weights after an uninterrupted run of CONFIG, and its folder."""
    run_dir = tmp_path_factory.mktemp("whole")
    pipeline, model = pieces()
    result = train(CONFIG, pipeline, model, run_dir)
    assert result.steps == result.total_steps == 2 * STEPS_PER_EPOCH
    return weights(model), run_dir


def test_the_same_seed_gives_the_same_bits(whole_run, tmp_path):
    pipeline, model = pieces()
    before = weights(model)
    train(CONFIG, pipeline, model, tmp_path)
    assert same(weights(model), whole_run[0])
    assert not same(weights(model), before)


def test_another_seed_gives_other_weights(whole_run, tmp_path):
    config = dataclasses.replace(CONFIG, seed=1)
    pipeline, model = pieces(config)
    train(config, pipeline, model, tmp_path)
    assert not same(weights(model), whole_run[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [1, 4, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_a_stopped_run_continues_to_the_same_bits(whole_run, tmp_path, batch, number):
    pipeline, model = pieces()
    stopped = train(CONFIG, StopAfter(pipeline, batch, number), model, tmp_path)
    assert stopped.stopped_by == number.name
    assert stopped.steps == batch
    pipeline, model = pieces()
    result = train(CONFIG, pipeline, model, tmp_path, resume=True)
    assert result.stopped_by is None
    assert result.steps == 2 * STEPS_PER_EPOCH
    assert same(weights(model), whole_run[0])
    assert steps(tmp_path) == list(range(2 * STEPS_PER_EPOCH))


def test_a_run_killed_in_the_middle_of_an_epoch_continues_to_the_same_bits(tmp_path):
    data = tmp_path / "images.npz"
    np.savez(data, images=images(512).images)
    settings = "--epochs 2 --batch_size 32 --checkpoint_every 5 --eval_every 0 --views.size 12"
    model = "--views.blur false --model.encoder small --model.out_dim 16 --device cpu"
    fresh = ["--data", str(data), *settings.split(), *model.split()]

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "simclr_kernels", "train", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(*fresh, "--run_dir", str(whole)))

    process = start(*fresh, "--run_dir", str(killed))
    log = killed / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 23):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert log.read_text().count("\n") < 32
    assert not (killed / "encoder.safetensors").exists()
    finish(start("--resume", str(killed)))

    assert steps(killed) == list(range(32))
    ends = [load_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, killed)]
    assert same(ends[0]["model"], ends[1]["model"])
    exports = [load_file(run / "encoder.safetensors") for run in (whole, killed)]
    assert same(*exports)


def test_a_truncated_newest_checkpoint_is_refused_and_the_one_before_used(
    whole_run, tmp_path, capsys
):
    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    pipeline, model = pieces()
    train(config, StopAfter(pipeline, 5), model, tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    pipeline, model = pieces()
    train(config, pipeline, model, tmp_path, resume=True)
    assert f"{newest} is truncated or damaged" in capsys.readouterr().err
    assert same(weights(model), whole_run[0])
    assert steps(tmp_path) == list(range(2 * STEPS_PER_EPOCH))


def test_a_batch_that_is_not_finite_is_skipped_without_a_trace(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    pipeline, model = pieces(config)
    result = train(config, NotFinite(pipeline, [STEPS_PER_EPOCH]), model, tmp_path)
    assert result.skipped == 1
    after_skip = weights(model)
    # the last batch was skipped: the state is that after the step before it
    pipeline, model = pieces(config)
    train(config, StopAfter(pipeline, STEPS_PER_EPOCH - 1), model, tmp_path / "five")
    assert same(after_skip, weights(model))
    last = json.loads(open(tmp_path / "metrics.jsonl").read().splitlines()[-2])
    assert len(last["skipped_images"]) == config.batch_size


def test_three_batches_in_a_row_that_are_not_finite_stop_the_run_and_are_named(tmp_path):
    pipeline, model = pieces()
    with pytest.raises(NonFiniteTraining, match="3 steps in a row; the last, step 4, .* images"):
        train(CONFIG, NotFinite(pipeline, [3, 4, 5]), model, tmp_path)
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_two_that_are_not_finite_and_two_later_do_not_stop_it(tmp_path):
    pipeline, model = pieces()
    result = train(CONFIG, NotFinite(pipeline, [2, 3, 5, 6]), model, tmp_path)
    assert (result.skipped, result.steps) == (4, 2 * STEPS_PER_EPOCH)


def test_a_run_is_not_overwritten_and_not_continued_under_other_settings(whole_run):
    pipeline, model = pieces()
    with pytest.raises(FileExistsError, match="holds a run: resume it or choose another folder"):
        train(CONFIG, pipeline, model, whole_run[1])
    other = dataclasses.replace(CONFIG, temperature=0.2)
    with pytest.raises(ConfigMismatch, match="temperature is 0.2, the run has 0.1"):
        train(other, pipeline, model, whole_run[1], resume=True)


def test_resuming_a_finished_run_changes_nothing(whole_run):
    pipeline, model = pieces()
    result = train(CONFIG, pipeline, model, whole_run[1], resume=True)
    assert result.steps == result.total_steps
    assert same(weights(model), whole_run[0])


def test_resuming_nothing_says_so(tmp_path):
    pipeline, model = pieces()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        train(CONFIG, pipeline, model, tmp_path, resume=True)


def test_evaluations_use_the_bank_and_are_logged(tmp_path):
    pipeline, model = pieces()
    validation = eval_batches(images(64), 16, 32)
    result = train(CONFIG, pipeline, model, tmp_path, validation=validation)
    assert model.training
    records = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    evals = [record for record in records if record["kind"] == "eval"]
    assert [record["epoch"] for record in evals] == [1, 2]
    assert result.metrics["knn"] == evals[-1]["knn"]
    assert 0 <= result.metrics["linear_probe"] <= 1


def test_bfloat16_trains(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, precision="bfloat16", channels_last=True)
    pipeline, model = pieces(config)
    result = train(config, pipeline, model, tmp_path)
    assert result.skipped == 0


def test_the_bank_keeps_the_latest_rows():
    bank = FeatureBank(4, 1, torch.device("cpu"))
    for start in (0, 3):
        rows = torch.arange(start, start + 3)
        bank.add(rows[:, None].float(), rows)
    features, labels = bank.filled()
    assert sorted(labels.tolist()) == [2, 3, 4, 5]
    assert torch.equal(features[:, 0].long(), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"eval_every": -1}, "eval_every must be at least 0, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
