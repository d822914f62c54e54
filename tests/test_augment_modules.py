"""TwoViews and pack_collate: views for anybody's DataLoader."""

import dataclasses
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from simclr_kernels import AugmentConfig, PackedImages, TwoViews, pack_collate, two_views
from simclr_kernels.data import ArrayImages
from simclr_kernels.pipelines.fused_views import FusedViews

CONFIG = AugmentConfig.cifar10(size=8)
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 9, 12, 3), np.uint8))
INDEX = torch.tensor([7, 3, 0, 5, 9, 2])


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def made(images, index=INDEX, **options):
    module = TwoViews(CONFIG, seed=4, **options)
    module.set_epoch(2)
    return module(images, index)


def expected(index=INDEX, epoch=2, seed=4):
    return two_views(IMAGES, CONFIG, seed=seed, epoch=epoch, index=index)


def test_every_form_of_a_batch_gives_the_views_of_two_views():
    first = IMAGES.permute(0, 3, 1, 2)
    for images in (IMAGES, PackedImages.from_images(list(IMAGES)), list(IMAGES), [*IMAGES.numpy()]):
        assert_same(made(images), expected())
    for images in (first, first.contiguous(), list(first), [*first.numpy()]):
        assert_same(made(images, channels_first=True), expected())
    assert_same(made(IMAGES, INDEX.tolist()), expected())
    assert_same(made(IMAGES, INDEX.int()), expected())


def test_the_two_halves_are_the_views_of_the_images_in_order():
    identity = dataclasses.replace(CONFIG, crop=False, flip=0.0, jitter=0.0, grayscale=0.0, size=9)
    squares = IMAGES[:, :, :9]
    view0, view1 = TwoViews(identity)(squares).chunk(2)
    for view in (view0, view1):
        torch.testing.assert_close(view, squares.permute(0, 3, 1, 2) / 255)


def test_with_an_index_a_module_shows_what_fused_views_shows():
    pipeline = FusedViews(ArrayImages(IMAGES), CONFIG, 3, seed=4)
    pipeline.set_epoch(2)
    for batch in pipeline:
        assert_same(made(IMAGES[batch.index], batch.index), batch.views)


def test_dtype_and_memory_format_are_those_asked_for():
    views = made(IMAGES, dtype=torch.float16, channels_last=True)
    assert views.dtype == torch.float16
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_without_an_index_images_are_counted_from_the_epoch_on():
    module = TwoViews(CONFIG, seed=4)
    first, second = module(IMAGES), module(IMAGES)
    assert_same(first, expected(torch.arange(6), epoch=0))
    assert_same(second, expected(torch.arange(6, 12), epoch=0))
    module.set_epoch(1)
    assert_same(module(IMAGES), expected(torch.arange(6), epoch=1))
    module.set_epoch(1)
    assert_same(module(IMAGES), expected(torch.arange(6, 12), epoch=1))


def test_the_count_wraps_where_the_random_numbers_do():
    module = TwoViews(CONFIG, seed=4)
    module.seen = 2**32 - 2
    assert_same(module(IMAGES), expected(torch.tensor([2**32 - 2, 2**32 - 1, 0, 1, 2, 3]), epoch=0))


def test_an_index_without_an_epoch_is_refused():
    with pytest.raises(RuntimeError, match=r"set_epoch\(epoch\) must be called before each epoch"):
        TwoViews(CONFIG)(IMAGES, INDEX)


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_a_restored_module_goes_on_where_it_was_saved(seed, tmp_path):
    model = torch.nn.Sequential(TwoViews(CONFIG, seed=seed), torch.nn.Flatten())
    model(IMAGES)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    rest = model(IMAGES)
    other = torch.nn.Sequential(TwoViews(CONFIG, seed=1), torch.nn.Flatten())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other[0].seed == seed and other[0].epoch is None
    assert_same(other(IMAGES), rest)
    other[0].set_epoch(3)
    model.load_state_dict(other.state_dict())
    assert (model[0].epoch, model[0].seen) == (3, 0)


def test_the_module_has_nothing_to_train_and_moves_with_its_model():
    module = TwoViews(CONFIG)
    assert not list(module.parameters()) and list(module.state_dict()) == ["_extra_state"]
    assert module.to("meta")._place.device.type == "meta"
    assert_same(TwoViews(CONFIG, seed=4).half()(IMAGES), expected(torch.arange(6), epoch=0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: TwoViews(CONFIG, seed=-1), ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        (lambda: TwoViews(CONFIG).set_epoch(-1), ValueError, r"epoch must be in .*, got -1"),
        (lambda: made(IMAGES.float()), TypeError, "images must be uint8, got torch.float32"),
        (
            lambda: made(IMAGES.permute(0, 3, 1, 2)),
            ValueError,
            r"\(..., H, W, 3\) with channels_first=False, got \(6, 3, 9, 12\)",
        ),
        (
            lambda: made(IMAGES, channels_first=True),
            ValueError,
            r"\(..., 3, H, W\) with channels_first=True, got \(6, 9, 12, 3\)",
        ),
        (lambda: made([IMAGES[0, 0]], INDEX[:1]), ValueError, r"got \(12, 3\)"),
        (lambda: made(IMAGES, INDEX[:5]), ValueError, "index must be"),
        (lambda: made(IMAGES, INDEX + 0.5), TypeError, "index must be integers, got torch.float32"),
        (lambda: made(IMAGES, INDEX > 2), TypeError, "index must be integers, got torch.bool"),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


SIZES = [(5, 7), (9, 3), (4, 4)]
RAGGED = [np.random.default_rng(k).integers(0, 256, (*s, 3), np.uint8) for k, s in enumerate(SIZES)]


@pytest.mark.parametrize("kind", [Image.fromarray, np.asarray, torch.from_numpy])
def test_images_of_any_sizes_are_packed_and_the_rest_is_collated(kind):
    images = [kind(pixels) for pixels in RAGGED]
    numbered = list(zip(images, range(3), strict=True))
    for batch in (
        pack_collate(images),
        pack_collate(numbered)[0],
        pack_collate([{"image": image, "label": k} for image, k in numbered])["image"],
    ):
        assert isinstance(batch, PackedImages)
        for k, pixels in enumerate(RAGGED):
            np.testing.assert_array_equal(batch[k].numpy(), pixels)
    assert pack_collate(numbered)[1].tolist() == [0, 1, 2]
    named = pack_collate([{"image": i, "label": k, "name": str(k)} for i, k in numbered])
    assert named["label"].tolist() == [0, 1, 2] and named["name"] == ["0", "1", "2"]
    item = namedtuple("item", "photo label")
    batch = pack_collate([item(*pair) for pair in numbered])
    assert isinstance(batch.photo, PackedImages) and batch.label.tolist() == [0, 1, 2]


def test_pil_images_of_any_mode_are_read_as_the_decoder_does():
    upside_down = Image.fromarray(RAGGED[0])
    upside_down.getexif()[0x0112] = 3
    images = [
        Image.new("RGBA", (2, 3), (0, 0, 0, 0)),
        Image.new("L", (4, 1), 7),
        Image.new("P", (1, 1), 0),
        upside_down,
    ]
    batch = pack_collate(images)
    assert batch.sizes.tolist() == [[3, 2], [1, 4], [1, 1], [5, 7]]
    assert batch[0].unique().tolist() == [255] and batch[1].unique().tolist() == [7]
    np.testing.assert_array_equal(batch[3].numpy(), RAGGED[0][::-1, ::-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_loader_of_pil_images_gives_views(workers):
    dataset = [(Image.fromarray(RAGGED[k % 3]), k) for k in range(6)]
    loader = DataLoader(dataset, batch_size=3, collate_fn=pack_collate, num_workers=workers)
    module = TwoViews(CONFIG, seed=4)
    for k, (images, label) in enumerate(loader):
        assert label.tolist() == [3 * k, 3 * k + 1, 3 * k + 2]
        views = two_views(PackedImages.from_images(RAGGED), CONFIG, seed=4, epoch=0, index=label)
        assert_same(module(images), views)


def test_packed_images_survive_pickling_and_moving():
    batch = PackedImages.from_images(RAGGED)
    for copy in (pickle.loads(pickle.dumps(batch)), batch.to("cpu", non_blocking=True)):
        assert_same(copy[1], batch[1])


@pytest.mark.gpu
def test_a_module_on_a_gpu_takes_batches_from_the_host():
    module = TwoViews(CONFIG, seed=4).cuda()
    pinned = PackedImages.from_images(list(IMAGES)).pin_memory()
    for images in (IMAGES, pinned, list(IMAGES), list(IMAGES.cuda())):
        module.set_epoch(0)
        module.set_epoch(2)
        views = module(images, INDEX)
        assert views.is_cuda
        torch.testing.assert_close(views.cpu(), expected(), rtol=0, atol=2e-5)
