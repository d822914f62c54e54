"""A pipeline in Lightning's Trainer: every epoch whole and new, and checkpoints that continue."""

# isort: off
import benchmarks.torchvision_operators  # noqa: F401 - before Lightning: it may import torchvision

import lightning
import numpy as np
import pytest
import torch

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.data import ArrayImages
from simclr_kernels.pipelines import epoch_order
from simclr_kernels.pipelines.fused_views import FusedViews

N, B, EPOCHS = 24, 4, 3
STEPS = N // B
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)


class Recorder(lightning.LightningModule):
    """Keeps what each step is shown."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 1)
        self.shown = []

    def training_step(self, batch, _):
        views, index, *_ = batch
        if isinstance(views, (tuple, list)):  # of pairs(with_index=True)
            views, index = torch.cat(list(views)), batch[2]
        self.shown.append((self.current_epoch, index.tolist(), views.clone()))
        return self.layer(views.flatten(1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pipeline():
    return FusedViews(ArrayImages(IMAGES), AugmentConfig.cifar10(8), B, seed=3)


def fit(module, loader, folder, resume=None, **options):
    options = {"max_epochs": EPOCHS} | options
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    module = Recorder()
    fit(module, pipeline(), tmp_path_factory.mktemp("run"), enable_checkpointing=False)
    return module.shown


def assert_same_steps(actual, expected):
    assert [step[:2] for step in actual] == [step[:2] for step in expected]
    for (_, _, a), (_, _, b) in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_epoch_shows_every_image_once_in_its_own_order_and_views(whole_run):
    assert len(whole_run) == EPOCHS * STEPS
    orders, views = [], []
    for epoch in range(EPOCHS):
        steps = whole_run[epoch * STEPS : (epoch + 1) * STEPS]
        assert {step[0] for step in steps} == {epoch}
        order = [i for _, index, _ in steps for i in index]
        assert order == epoch_order(N, 3, epoch).tolist()
        orders.append(order)
        first = torch.cat([step[2][:B] for step in steps])
        views.append(first[torch.tensor(order).argsort()])
    assert sorted(orders[0]) == list(range(N)) and orders[0] != orders[1]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        changed = (views[a] != views[b]).flatten(1).any(1)
        assert changed.all()


def test_pairs_are_trained_on_in_the_same_order(whole_run, tmp_path):
    module = Recorder()
    fit(module, pipeline().pairs(with_index=True), tmp_path, enable_checkpointing=False)
    assert_same_steps(module.shown, whole_run)


@pytest.mark.parametrize("done", [2, STEPS, STEPS + 3], ids=["inside", "after one", "inside two"])
def test_a_continued_run_shows_what_was_still_to_come(whole_run, tmp_path, done):
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="last", every_n_train_steps=done, save_top_k=1
    )
    module = Recorder()
    fit(module, pipeline(), tmp_path, callbacks=[checkpoint], max_steps=done)
    assert len(module.shown) == done
    continued = Recorder()
    fit(
        continued,
        pipeline(),
        tmp_path,
        resume=tmp_path / "last.ckpt",
        enable_checkpointing=False,
    )
    assert_same_steps(module.shown + continued.shown, whole_run)
