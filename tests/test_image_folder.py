"""ImageFolder: which files are items, in which order, with which labels."""

import numpy as np
import pytest
from PIL import Image

from simclr_kernels.data import DecodeError, ImageFolder


def save(root, *names):
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(path)


def test_class_folders_are_numbered_by_name_and_files_sorted(tmp_path):
    save(tmp_path, "b/2.png", "b/10.PNG", "a/x/deep.png", "a/1.Jpeg", "c/1.gif")
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    source = ImageFolder(tmp_path)
    assert source.paths == ["a/1.Jpeg", "a/x/deep.png", "b/10.PNG", "b/2.png", "c/1.gif"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2] and source.labels.dtype == np.int64
    assert source.classes == ("a", "b", "c")
    assert source.decode(3).tolist() == np.zeros((3, 4, 3), int).tolist()
    assert source.name(3) == str(tmp_path / "b" / "2.png")


def test_flat_folder_has_no_labels(tmp_path):
    save(tmp_path, "1.png", "0.webp", "2.bmp", "3.jpg")
    source = ImageFolder(tmp_path)
    assert len(source) == 4 and source.labels is None and source.classes is None


def test_hidden_names_are_skipped(tmp_path):
    save(tmp_path, "a/0.png", "a/._0.png", ".thumbnails/0.png", "a/.cache/1.png")
    source = ImageFolder(tmp_path)
    assert source.paths == ["a/0.png"] and source.classes == ("a",)


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere", "0.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "root")
    assert ImageFolder(tmp_path / "root").paths == ["a/0.png"]


def test_given_classes_set_the_numbering(tmp_path):
    save(tmp_path, "b/0.png", "c/0.png")
    assert ImageFolder(tmp_path, classes=["a", "b", "c"]).labels.tolist() == [1, 2]
    with pytest.raises(ValueError, match="must be among the 2 given classes, got c"):
        ImageFolder(tmp_path, classes=["a", "b"])


def test_empty_class_folders_count(tmp_path):
    save(tmp_path, "a/0.png", "c/0.png")
    (tmp_path / "b").mkdir()
    assert ImageFolder(tmp_path).labels.tolist() == [0, 2]


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images \(.*\.png .*\), got none"):
        ImageFolder(tmp_path)


def test_images_beside_class_folders_are_refused(tmp_path):
    save(tmp_path, "a/0.png", "cover.png")
    with pytest.raises(ValueError, match="either class folders or images, got 1 images beside"):
        ImageFolder(tmp_path)


def test_unreadable_files_are_named(tmp_path):
    save(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    source = ImageFolder(tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DecodeError, match=r"1\.png: unreadable image of 7 bytes"):
        source.decode(1)
    with pytest.raises(DecodeError, match=r"2\.png: .*No such file"):
        source.decode(2)


def test_folder_named_like_an_image_is_a_folder(tmp_path):
    save(tmp_path, "a/0.png", "a/x.jpg/1.png")
    (tmp_path / "a" / "y.png").mkdir()
    source = ImageFolder(tmp_path)
    assert source.paths == ["a/0.png", "a/x.jpg/1.png"]
    (tmp_path / "a" / "0.png").unlink()
    (tmp_path / "a" / "0.png").mkdir()
    with pytest.raises(DecodeError, match=r"0\.png: .*Is a directory"):
        source.decode(0)


def test_dangling_link_is_an_unreadable_item(tmp_path):
    save(tmp_path, "0.png")
    (tmp_path / "1.png").symlink_to(tmp_path / "nowhere.png")
    source = ImageFolder(tmp_path)
    assert source.fingerprint().startswith("folder:2:")
    with pytest.raises(DecodeError, match=r"1\.png: .*No such file"):
        source.decode(1)


def test_folder_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere")


def test_of_two_links_to_one_folder_the_first_by_name_counts(tmp_path):
    save(tmp_path / "elsewhere", "0.png")
    (tmp_path / "root").mkdir()
    for name in "cab":
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path / "root").paths == ["a/0.png"]


def test_pixel_limit_is_passed_on(tmp_path):
    save(tmp_path, "0.png")
    with pytest.raises(DecodeError, match="at most 11 pixels"):
        ImageFolder(tmp_path, max_pixels=11).decode(0)


def test_fingerprint_knows_names_and_sizes_but_not_the_place(tmp_path):
    for place in ("x", "y"):
        save(tmp_path / place, "a/0.png", "a/1.png")
    x = ImageFolder(tmp_path / "x").fingerprint()
    assert x == ImageFolder(tmp_path / "y").fingerprint()
    (tmp_path / "x" / "a" / "1.png").write_bytes(b"short")
    (tmp_path / "y" / "a" / "1.png").rename(tmp_path / "y" / "a" / "2.png")
    changed = {ImageFolder(tmp_path / place).fingerprint() for place in ("x", "y")}
    assert len(changed | {x}) == 3
