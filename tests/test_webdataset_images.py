"""WebDatasetImages: shards as WebDataset writes them, in any order of reading, and damaged ones."""

import io
import json
import multiprocessing
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from simclr_kernels.data import (
    DecodeError,
    ImageFolder,
    MissingSplit,
    Subset,
    WebDatasetImages,
    open_source,
    open_splits,
)


def encoded(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(buffer, kind, quality=100)
    return buffer.getvalue()


def write(path, members, **options):
    """A tar file of (name, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(values):
    """One sample for each value: its image shows the value, its label is the value."""
    for value in values:
        yield f"{value:04}.cls", b"%d\n" % value
        yield f"{value:04}.png", encoded(value)


def shown(source):
    return [int(source.decode(i)[0, 0, 0]) for i in range(len(source))]


def test_samples_are_images_with_labels_in_the_order_of_the_shards(tmp_path):
    for shard in range(3):
        values = range(10 * shard, 10 * shard + 4)
        write(tmp_path / f"s-{shard:02}.tar", samples(values))
    expected = [*range(4), *range(10, 14), *range(20, 24)]
    files = sorted(tmp_path.glob("*.tar"))
    for paths in (tmp_path, files, str(tmp_path / "s-{00..02}.tar"), tmp_path / "s-*.tar"):
        source = WebDatasetImages(paths)
        assert shown(source) == source.labels.tolist() == expected
        assert source.labels.dtype == np.int64 and source.classes is None
        assert source.name(5) == f"{files[1]}/0011.png"
        assert source.encoded(5) == encoded(11)
    chosen = WebDatasetImages(str(tmp_path / "s-{01..02}.tar"))
    assert chosen.labels.tolist() == expected[4:]


@pytest.mark.parametrize("kind, suffix", [("JPEG", "jpg"), ("JPEG", "JPEG"), ("WEBP", "webp")])
def test_formats_are_known_by_their_suffix(tmp_path, kind, suffix):
    source = WebDatasetImages(write(tmp_path / "x.tar", [(f"a.{suffix}", encoded(90, kind))]))
    assert abs(shown(source)[0] - 90) <= 1 and source.labels is None


def test_the_key_ends_at_the_first_dot_of_the_file_name(tmp_path):
    members = [
        ("v1.2/a.png", encoded(1)),
        ("v1.2/a.seg.png", encoded(2)),  # another field of the sample, not its image
        ("v1.2/a.txt", b"a caption"),
        ("v1.2/.hidden.png", encoded(3)),
        ("v1.2/b.png", encoded(4)),
        ("README", b"no sample"),
    ]
    source = WebDatasetImages(write(tmp_path / "x.tar", members))
    assert shown(source) == [1, 4] and source.name(0).endswith("x.tar/v1.2/a.png")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_dialect(tmp_path, format):
    long = "/".join(["folder" * 8] * 3)
    members = [(f"{long}/{value}.png", encoded(value)) for value in (5, 6)]
    source = WebDatasetImages(write(tmp_path / "x.tar", members, format=format))
    assert shown(source) == [5, 6] and source.name(1).endswith(f"{long}/6.png")


@pytest.mark.parametrize("field", ["label", "cls"])
def test_labels_may_be_in_the_json(tmp_path, field):
    members = []
    for value in (7, 8):
        members += [(f"{value}.png", encoded(value))]
        members += [(f"{value}.json", json.dumps({"width": 4, field: value}).encode())]
    source = WebDatasetImages(write(tmp_path / "x.tar", members))
    assert shown(source) == source.labels.tolist() == [7, 8]


def test_json_without_a_label_is_no_label(tmp_path):
    members = [("a.png", encoded(1)), ("a.json", b'{"url": "x"}'), ("b.json", b"not JSON at all")]
    assert WebDatasetImages(write(tmp_path / "x.tar", members)).labels is None


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.png", b""), ("a.jpg", b"")], "one image, got a.png and a.jpg in .*x.tar"),
        ([("a.png", b""), ("b.png", b""), ("a.png", b"")], "one image, got a.png and a.png"),
        ([("a.cls", b"1"), ("a.png", b""), ("a.cls", b"2")], "a.cls must be in .* got it twice"),
        ([("a.png", b""), ("a.cls", b"1"), ("b.cls", b"2")], "must have an image, got .*: b.cls"),
        ([("a.png", b""), ("a.cls", b"1"), ("b.png", b"")], "have a .cls or none, got .*b without"),
        ([("a.png", b""), ("b.png", b""), ("b.cls", b"1")], "have a .cls or none, got .*: b.cls"),
        ([("a.png", b""), ("a.cls", b"cat")], "must be a 64-bit integer, got 'cat' in .*: a.cls"),
        ([("a.png", b""), ("a.cls", b"9" * 19)], "must be a 64-bit integer, got 9+ in .*: a.cls"),
        ([("a.png", b""), ("a.cls", b"9" * 5000)], "must be a 64-bit integer, got '9+' in .*"),
        ([("a.png", b""), ("a.json", b"[" * 100_000)], "a.json must be JSON, got maximum recur"),
        (
            [("a.png", b""), ("a.json", b'{"label": %d}' % 2**63)],
            f"must be a 64-bit integer, got {2**63} in .*: a.json",
        ),
        (
            [("a.png", b""), ("a.json", b'{"cls": 1}'), ("b.png", b""), ("b.json", b"{}")],
            "must be a 64-bit integer, got None in .*: b.json",
        ),
        ([("a.png", b""), ("a.json", b"{")], "a.json must be JSON"),
        ([("a.txt", b"")], "must hold images, got none in .*x.tar"),
        ([], "must hold images, got none in .*x.tar"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        WebDatasetImages(write(tmp_path / "x.tar", members))


def test_damaged_shards_are_refused(tmp_path):
    whole = write(tmp_path / "x.tar", samples(range(4))).read_bytes()
    header = 512 * 6
    assert whole[header:].startswith(b"0001.png")
    cases = [
        (b"", "got a damaged one: empty file"),
        (whole[:300], "got a damaged one"),
        (whole[: header + 100], "no member from byte 3072 on"),  # inside a header
        (whole[: header + 512 + 20], "got a damaged one"),  # inside an image
        (whole[:header], "must end in blocks of zeros, got no end mark"),
        (whole[:header] + b"\xff" + whole[header + 1 :], "no member from byte 3072 on"),
        (whole + whole, "no member from byte"),  # joined by cat: the second would be ignored
        (b"\x1f\x8b" + whole, "must be a whole, uncompressed tar file, got a damaged one"),
    ]
    for data, message in cases:
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(ValueError, match=f"bad.tar.*{message}"):
            WebDatasetImages([tmp_path / "x.tar", tmp_path / "bad.tar"])
    for paths, message in [([], "got \\[\\]"), (tmp_path / "z-*.tar", "at least one .tar file")]:
        with pytest.raises(ValueError, match=message):
            WebDatasetImages(paths)
    with pytest.raises(FileNotFoundError, match=r"x-1\.tar"):
        WebDatasetImages(str(tmp_path / "x-{1..2}.tar"))


def test_unreadable_images_are_named(tmp_path):
    members = [("a.png", encoded(1)), ("b.png", b"no image"), ("c.png", encoded(3))]
    source = WebDatasetImages(write(tmp_path / "x.tar", members))
    with pytest.raises(DecodeError, match=r"x\.tar/b\.png: unreadable image of 8 bytes"):
        source.decode(1)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(encoded(3)) + 9])
    with pytest.raises(DecodeError, match=r"x\.tar/c\.png: the file ends after 9 of \d+ bytes"):
        source.decode(2)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DecodeError, match=r"x\.tar/a\.png: .*No such file"):
        source.encoded(0)


def _sum_of(source):
    return sum(shown(source))


def test_threads_and_forked_processes_read_the_right_images(tmp_path):
    for shard in range(4):
        values = range(50 * shard, 50 * shard + 50)
        write(tmp_path / f"{shard}.tar", samples(values))
    source = WebDatasetImages(tmp_path)
    order = np.random.default_rng(0).permutation(200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [int(image[0, 0, 0]) for image in pool.map(source.decode, order)] == order
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_sum_of, [source] * 4) == [sum(range(200))] * 4


def test_fingerprint_changes_with_the_content_but_not_the_place(tmp_path):
    cases = [samples((1, 2)), samples((1, 3)), samples((1, 2, 3)), [("0001.png", encoded(1))]]
    files = [write(tmp_path / f"{k}.tar", members) for k, members in enumerate(cases)]
    assert len({WebDatasetImages(file).fingerprint() for file in files}) == 4
    moved = write(tmp_path / "elsewhere" / "a.tar", samples((1, 2)))
    assert WebDatasetImages(moved).fingerprint() == WebDatasetImages(files[0]).fingerprint()


def test_image_limit_holds_in_a_subset_too(tmp_path):
    path = write(tmp_path / "x.tar", samples((1, 2)))
    subset = Subset(WebDatasetImages(path, max_pixels=11), [1])
    assert subset.max_pixels == 11 and subset.encoded(0) == encoded(2)
    with pytest.raises(DecodeError, match="at most 11 pixels"):
        subset.decode(0)


# --- open_source ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train, test",
    [
        (["train-0000.tar", "train-0001.tar"], ["test-0000.tar"]),
        (["imagenet1k-train-0000.tar"], ["imagenet1k-validation-00.tar"]),
        (["train/0.tar", "train/1.tar"], ["val/0.tar"]),
    ],
)
def test_splits_are_found_by_name(tmp_path, train, test):
    for k, file in enumerate(train + test):
        write(tmp_path / file, samples([k]))
    source, held_out = open_splits(tmp_path)
    assert source.labels.tolist() == list(range(len(train)))
    assert held_out.labels.tolist() == [len(train)]


def test_shards_without_split_names_are_one_source(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k:05}.tar", samples([k]))
    assert len(open_source(tmp_path)) == len(open_source(tmp_path, "train")) == 3
    with pytest.raises(MissingSplit, match="got 00000.tar, 00001.tar, 00002.tar"):
        open_source(tmp_path, "test")
    for spec, n in ((tmp_path / "00001.tar", 1), (str(tmp_path / "{00000..00001}.tar"), 2)):
        assert len(open_source(spec)) == n
        with pytest.raises(MissingSplit, match="a single file has no splits"):
            open_source(spec, "test")


def test_archive_beside_unpacked_images_is_not_opened(tmp_path):
    write(tmp_path / "all.tar", samples([1]))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(encoded(1))
    assert isinstance(open_source(tmp_path), ImageFolder)
