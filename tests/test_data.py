"""Arrays, subsets, splits and open_source; the other sources have test files of their own."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_kernels.data import (
    ArrayImages,
    ImageFolder,
    MissingSplit,
    ParquetImages,
    Subset,
    open_source,
    open_splits,
    split_source,
)

PIXELS = np.arange(10 * 4 * 5 * 3, dtype=np.uint8).reshape(10, 4, 5, 3)
LABELS = np.arange(10) % 2


def save_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def save_parquet(path, values):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [bytes([v]) for v in values]}), path)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_arrays_keep_pixels_and_labels(kind):
    source = ArrayImages(kind(PIXELS), kind(LABELS[:, None]), ["even", "odd"])
    assert len(source) == 10 and source.labels.dtype == np.int64
    np.testing.assert_array_equal(source.decode(3), PIXELS[3])
    np.testing.assert_array_equal(source.labels, LABELS)
    assert source.classes == ("even", "odd") and source.name(3) == "array[3]"


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
def test_npz_files_hold_images_and_labels(tmp_path, names):
    np.savez(tmp_path / "set.npz", **dict(zip(names, (PIXELS, LABELS), strict=True)))
    source = open_source(tmp_path / "set.npz")
    np.testing.assert_array_equal(source.images, PIXELS)
    np.testing.assert_array_equal(source.labels, LABELS)
    assert source.name(1) == "set.npz[1]"


def test_npy_files_hold_images_and_stay_on_disk(tmp_path):
    np.save(tmp_path / "set.npy", PIXELS)
    source = open_source(tmp_path / "set.npy")
    assert isinstance(source.images, np.memmap) and source.labels is None
    np.testing.assert_array_equal(source.decode(9), PIXELS[9])


def test_npz_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "set.npz", photos=PIXELS)
    with pytest.raises(ValueError, match=r"an array 'images' or 'x', got \['photos'\]"):
        open_source(tmp_path / "set.npz")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((PIXELS / 255,), TypeError, "images must be uint8, got float64"),
        ((PIXELS[..., 0],), ValueError, r"\(n, height, width, 3\), got \(10, 4, 5\)"),
        ((PIXELS.transpose(0, 3, 1, 2),), ValueError, r"got \(10, 3, 4, 5\)"),
        ((PIXELS[:0],), ValueError, r"got \(0, 4, 5, 3\)"),
        ((PIXELS, LABELS / 2), TypeError, "labels must be integers, got float64"),
        ((PIXELS, LABELS[:9]), ValueError, r"labels must be \(10,\), one per image, got \(9,\)"),
    ],
)
def test_arrays_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        ArrayImages(*arguments)


def test_fingerprint_changes_with_pixels_labels_and_length():
    brighter = PIXELS.copy()
    brighter[7, 0, 0, 0] ^= 1
    sources = [
        ArrayImages(PIXELS),
        ArrayImages(PIXELS, LABELS),
        ArrayImages(PIXELS, 1 - LABELS),
        ArrayImages(brighter),
        ArrayImages(PIXELS[:9]),
        Subset(ArrayImages(PIXELS), range(10)),
        Subset(ArrayImages(PIXELS), range(9, -1, -1)),
    ]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert ArrayImages(PIXELS.copy()).fingerprint() == sources[0].fingerprint()


def test_subset_renumbers_items_labels_and_names():
    subset = Subset(ArrayImages(PIXELS, LABELS), [7, 2])
    assert len(subset) == 2 and subset.name(0) == "array[7]"
    np.testing.assert_array_equal(subset.decode(1), PIXELS[2])
    np.testing.assert_array_equal(subset.images, PIXELS[[7, 2]])
    np.testing.assert_array_equal(subset.labels, [1, 0])


def test_subset_offers_encoded_files_only_where_its_source_does(tmp_path):
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / "b.png", 2)
    folder = ImageFolder(tmp_path)
    assert Subset(folder, [1]).encoded(0) == folder.encoded(1)
    assert Subset(folder, [1]).images is None
    assert not hasattr(Subset(ArrayImages(PIXELS), [1]), "encoded")


def test_subset_of_files_can_be_sent_to_another_process(tmp_path):
    save_image(tmp_path / "a.png", 1)
    save_image(tmp_path / "b.png", 2)
    subset = Subset(ImageFolder(tmp_path), [1])
    assert pickle.loads(pickle.dumps(subset)).encoded(0) == subset.encoded(0)


def test_subset_of_an_array_on_the_disk_stays_there(tmp_path):
    np.save(tmp_path / "set.npy", PIXELS)
    subset = Subset(open_source(tmp_path / "set.npy"), [7, 2])
    assert subset.images is None
    np.testing.assert_array_equal(subset.decode(1), PIXELS[2])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_split_seed_is_checked(seed):
    with pytest.raises(ValueError, match=rf"seed must be at least 0 and below 2\^64, got {seed}"):
        split_source(ArrayImages(PIXELS), 0.5, seed)


def test_split_is_stratified_complete_and_repeatable():
    labels = np.repeat(np.arange(7), [400, 300, 150, 100, 30, 19, 1])
    source = ArrayImages(np.zeros((1000, 2, 2, 3), np.uint8), labels)
    train, test = split_source(source, 0.25, seed=3)
    assert len(test) == 250
    assert sorted([*train.indices, *test.indices]) == list(range(1000))
    share = np.bincount(test.labels, minlength=7) - 0.25 * np.bincount(labels)
    assert np.abs(share).max() < 1
    again = split_source(source, 0.25, seed=3)[1]
    np.testing.assert_array_equal(again.indices, test.indices)
    other = split_source(source, 0.25, seed=4)[1]
    assert not np.array_equal(other.indices, test.indices)


def test_split_without_labels_is_random():
    train, test = split_source(ArrayImages(np.zeros((100, 2, 2, 3), np.uint8)), 0.2)
    assert (len(train), len(test)) == (80, 20) and test.labels is None
    assert len(set(np.diff(test.indices))) > 3


@pytest.mark.parametrize(
    "fraction, message",
    [
        (0, "test_fraction must be between 0 and 1, got 0"),
        (1.5, "test_fraction must be between 0 and 1, got 1.5"),
        (0.01, "both splits must hold images, got 0 of 10 images in the test split"),
        (0.99, "both splits must hold images, got 10 of 10 images in the test split"),
    ],
)
def test_split_fraction_is_checked(fraction, message):
    with pytest.raises(ValueError, match=message):
        split_source(ArrayImages(PIXELS), fraction)


def test_shapes10_opens_by_name():
    assert len(open_source("shapes10")) == len(open_source("shapes10", "train")) == 4096
    assert len(open_source("shapes10", "test")) == len(open_source("shapes10", "val")) == 1000


@pytest.mark.parametrize("held_out", ["test", "val", "Validation"])
def test_split_folders_share_one_numbering(tmp_path, held_out):
    for k, name in enumerate(["ant", "bee", "cow"]):
        save_image(tmp_path / "train" / name / "0.png", k)
    save_image(tmp_path / held_out / "cow" / "0.png")
    for split in (None, "train"):
        assert open_source(tmp_path, split).labels.tolist() == [0, 1, 2]
    train, test = open_splits(tmp_path)
    assert test.labels.tolist() == [2] and test.classes == train.classes == ("ant", "bee", "cow")


def test_test_split_is_preferred_to_validation(tmp_path):
    for name in ("train", "val", "test"):
        save_image(tmp_path / name / "0.png")
    assert open_source(tmp_path, "test").root.name == "test"
    assert open_source(tmp_path, "val").root.name == "val"


def test_class_called_train_does_not_make_splits(tmp_path):
    for name in ("car", "plane", "train"):
        save_image(tmp_path / name / "0.png")
    for split in (None, "train"):
        assert open_source(tmp_path, split).classes == ("car", "plane", "train")
    with pytest.raises(MissingSplit, match="named test, val, valid, validation for the split"):
        open_source(tmp_path, "test")


def test_folder_without_splits_is_split_at_random(tmp_path):
    for k in range(10):
        save_image(tmp_path / f"{k}.png", k)
    train, test = open_splits(tmp_path, 0.3)
    assert (len(train), len(test)) == (7, 3)


def test_missing_train_split_is_not_replaced_by_the_test_split(tmp_path):
    save_image(tmp_path / "images" / "test" / "0.png")
    with pytest.raises(MissingSplit, match="named train, training for the split 'train', got test"):
        open_source(tmp_path / "images", "train")
    save_parquet(tmp_path / "files" / "test.parquet", [1])
    with pytest.raises(MissingSplit, match="named train, training .*got test.parquet"):
        open_source(tmp_path / "files", "train")


@pytest.mark.parametrize(
    "train, test",
    [
        (["train.parquet"], ["test.parquet"]),
        (
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            ["validation-0.parquet"],
        ),
        (["data/train-00000-of-00001-abc.parquet"], ["data/test-00000-of-00001-abc.parquet"]),
        (["train/0.parquet", "train/1.parquet"], ["val/0.parquet"]),
    ],
)
def test_parquet_splits_are_found_by_name(tmp_path, train, test):
    for k, file in enumerate(train + test):
        save_parquet(tmp_path / file, [k, k])
    source, held_out = open_splits(tmp_path)
    assert isinstance(source, ParquetImages)
    assert [source.encoded(2 * k)[0] for k in range(len(train))] == list(range(len(train)))
    assert len(source) == 2 * len(train) and len(open_source(tmp_path)) == 2 * len(train)
    assert len(held_out) == 2 and held_out.encoded(0)[0] == len(train)


def test_parquet_files_without_split_names_are_one_source(tmp_path):
    for k in range(3):
        save_parquet(tmp_path / f"part-{k}.parquet", [k])
    assert len(open_source(tmp_path)) == len(open_source(tmp_path, "train")) == 3
    with pytest.raises(MissingSplit, match="got part-0.parquet, part-1.parquet, part-2.parquet"):
        open_source(tmp_path, "test")


def test_single_file_has_no_test_split(tmp_path):
    save_parquet(tmp_path / "all.parquet", [1, 2])
    assert len(open_source(tmp_path / "all.parquet", "train")) == 2
    with pytest.raises(MissingSplit, match="a single file has no splits, got .*all.parquet"):
        open_source(tmp_path / "all.parquet", "test")


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "set.zip").touch()
    for spec, split, message in [
        ("shapes10", "dev", "split must be one of train, test, val or None, got 'dev'"),
        (
            tmp_path / "nowhere",
            None,
            "a folder, a .parquet, .tar, .npz or .npy file; no .*nowhere exists",
        ),
        (tmp_path / "set.zip", None, "must end in .parquet, .tar, .npz or .npy, got .*set.zip"),
        (tmp_path, None, "must hold images .*got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(spec, split)
