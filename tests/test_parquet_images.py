"""ParquetImages: the layouts Hugging Face data sets come in."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import shared_path
from PIL import Image

from simclr_kernels.data import DecodeError, ParquetImages

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def structs(values):
    return [{"bytes": png(value), "path": f"{value}.png"} for value in values]


def save(path, columns, metadata=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
def test_columns_are_found_by_name(tmp_path, image, label):
    columns = {"id": [9, 9], "coarse_label": [5, 5], label: [3, 1], image: structs([7, 8])}
    source = ParquetImages(save(tmp_path / "x.parquet", columns))
    assert source.labels.tolist() == [3, 1] and source.labels.dtype == np.int64
    assert [int(source.decode(i)[0, 0, 0]) for i in range(2)] == [7, 8]


def test_plain_binary_is_read(tmp_path):
    source = ParquetImages(save(tmp_path / "x.parquet", {"image": [png(1), png(2)]}))
    assert source.decode(1).max() == 2 and source.labels is None and source.classes is None


def test_rows_with_a_path_only_name_a_file_beside_the_parquet_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(42))
    paths = ["images/a.png", "images/b.png", "images/\0.png"]
    rows = [{"bytes": None, "path": path} for path in paths]
    source = ParquetImages(save(tmp_path / "x.parquet", {"image": rows}))
    assert source.decode(0).max() == 42
    with pytest.raises(DecodeError, match=r"x\.parquet\[1\]: .*No such file"):
        source.decode(1)
    with pytest.raises(DecodeError, match=r"x\.parquet\[2\]: .*null"):
        source.decode(2)


def test_shards_follow_one_another(tmp_path):
    files = [tmp_path / f"{k}.parquet" for k in range(3)]
    for k, file in enumerate(files):
        values = range(10 * k, 10 * k + 5)
        save(file, {"image": structs(values), "label": list(values)}, row_group_size=2)
    for paths in (tmp_path, files):
        source = ParquetImages(paths)
        values = [int(source.decode(i)[0, 0, 0]) for i in range(len(source))]
        assert values == source.labels.tolist() == [*range(5), *range(10, 15), *range(20, 25)]
        assert source.name(7) == f"{files[1]}[2]"


def test_class_names_come_from_the_huggingface_metadata(tmp_path):
    names = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    metadata = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    columns = {"image": structs([1, 2]), "label": [1, 0]}
    assert ParquetImages(save(tmp_path / "x.parquet", columns, metadata)).classes == ("cat", "dog")


def test_labels_kept_secret_are_no_labels(tmp_path):
    columns = {"image": structs([1, 2]), "label": [-1, -1]}
    assert ParquetImages(save(tmp_path / "x.parquet", columns)).labels is None
    columns["label"] = [None, 4]
    assert ParquetImages(save(tmp_path / "y.parquet", columns)).labels.tolist() == [-1, 4]


@pytest.mark.parametrize(
    "data", [b"", b"garbage", png(1)[:45], None], ids=["empty", "text", "half", "null"]
)
def test_unreadable_rows_are_named(tmp_path, data):
    rows = [{"bytes": png(0), "path": None}, {"bytes": data, "path": None}]
    source = ParquetImages(save(tmp_path / "x.parquet", {"image": rows}))
    with pytest.raises(DecodeError, match=r"x\.parquet\[1\]: unreadable image of \d+ bytes"):
        source.decode(1)


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_threads_read_the_right_rows_with_and_without_memory(tmp_path, memory_gib):
    columns = {"image": structs(range(200))}
    file = save(tmp_path / "x.parquet", columns, row_group_size=3)
    source = ParquetImages(file, memory_gib=memory_gib)
    order = np.random.default_rng(0).permutation(200).tolist()
    with ThreadPoolExecutor(8) as pool:
        values = [int(image[0, 0, 0]) for image in pool.map(source.decode, order)]
    assert values == order


def test_fingerprint_changes_with_the_content(tmp_path):
    files = [
        save(tmp_path / f"{k}.parquet", {"image": structs(values)})
        for k, values in enumerate([(1, 2), (1, 3), (1, 2, 3)])
    ]
    assert len({ParquetImages(file).fingerprint() for file in files}) == 3
    assert ParquetImages(files[0]).fingerprint() == ParquetImages(files[0]).fingerprint()


def test_what_is_missing_is_named(tmp_path):
    photos = save(tmp_path / "photos.parquet", {"photo": structs([1])})
    texts = save(tmp_path / "texts.parquet", {"image": structs([1]), "label": ["cat"]})
    none = save(tmp_path / "none.parquet", {"image": structs([1])}).parent / "empty"
    none.mkdir()
    labelled = save(tmp_path / "labelled.parquet", {"image": structs([1]), "label": [1]})
    for paths, message in [
        (photos, r"must have a column 'image' or 'img', got \['photo'\]"),
        (texts, "column 'label' must hold integers, got string"),
        (none, "must hold .parquet files, got none"),
        ([], "at least one Parquet file, got none"),
        ([labelled, tmp_path / "none.parquet"], r"must have the columns of .*got .*none.parquet"),
    ]:
        with pytest.raises(ValueError, match=message):
            ParquetImages(paths)


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install simclr-kernels\[hf\]"):
        ParquetImages(tmp_path)


def test_cifar10_opens_with_names_and_labels():
    source = ParquetImages(shared_path("data/cifar10/test.parquet"))
    assert len(source) == 10_000 and source.classes[3] == "cat"
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.decode(9_999).shape == (32, 32, 3)
