"""What every pipeline must do: the contract of simclr_kernels.pipelines as tests.

A test class of a pipeline derives from PipelineContract and defines `make`.
"""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import encoded, png_header

from simclr_kernels.data import ImageFolder, ParquetImages
from simclr_kernels.pipelines import epoch_order
from simclr_kernels.pipelines.quarantine import TooManyUnreadable

N, B, SIDE = 30, 8, 16  # images, batch size, side of the views
# neighbours in the order of epoch 0, seed 0, in the first batch: two unreadable images in a row
BAD = tuple(epoch_order(N, 0, 0)[2:4].tolist())

# what a file or a cell may hold instead of an image
UNREADABLE = {
    "empty": b"",
    "text": b"no image",
    "zeros": bytes(500),
    "half a png": encoded(np.zeros((20, 24, 3), np.uint8))[:50],
    "half a jpeg": encoded(np.zeros((20, 24, 3), np.uint8), "JPEG")[:300],
    "60000 x 60000": png_header(60_000, 60_000),
}


def image(i: int) -> Image.Image:
    """Image i: a ramp of its own colour, 20 x 24 pixels."""
    pixels = np.full((20, 24, 3), 8 * i, np.uint8)
    pixels[..., 0] = np.arange(24) * 10
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 readable images in two classes, alternating."""
    return ImageFolder(write_images(tmp_path_factory.mktemp("images")))


def write_images(root, bad=()):
    """Write the images under root; those in bad are empty, cut off or text, in turn."""
    for i in range(N):
        path = root / f"class{i // 15}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        image(i).save(path)
        if i in bad:
            path.write_bytes((b"", path.read_bytes()[:60], b"no image")[bad.index(i) % 3])
    return root


def indices(pipeline) -> list[int]:
    return [i for batch in pipeline for i in batch.index.tolist()]


def views_by_index(batches) -> dict[int, torch.Tensor]:
    """(2, 3, SIDE, SIDE) of each image that the batches show."""
    shown = {}
    for batch in batches:
        pairs = torch.stack(batch.views.chunk(2), 1)
        shown |= dict(zip(batch.index.tolist(), pairs, strict=True))
    return shown


def threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("prefetch", "decode"))}


def assert_same_batches(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


class PipelineContract:
    """See the module. `make(source, batch_size, **options)` builds one with views SIDE wide.

    Attributes:
        tolerance: largest difference between the views of one image in different batches. 0 unless
            the pipeline's module says why its operators depend on their company.
    """

    tolerance = 0.0

    def make(self, source, batch_size, **options):
        raise NotImplementedError

    def test_epoch_is_full_batches_in_the_published_order(self, folder):
        pipeline = self.make(folder, B, seed=5)
        pipeline.set_epoch(2)
        batches = list(pipeline)
        assert len(batches) == len(pipeline) == 3
        shown = torch.cat([batch.index.cpu() for batch in batches])
        torch.testing.assert_close(shown, epoch_order(N, 5, 2)[: 3 * B])
        for batch in batches:
            assert batch.views.shape == (2 * B, 3, SIDE, SIDE) and batch.views.is_floating_point()
            assert batch.index.dtype == batch.label.dtype == torch.int64
            assert batch.label.tolist() == folder.labels[batch.index.cpu().numpy()].tolist()
            assert batch.views.isfinite().all()

    def test_views_show_the_images_of_the_index(self, folder):
        # blue is 8 i in image i; the colour jitter is bounded, so the order by blue roughly stays
        batch = next(iter(self.make(folder, 24)))
        blue = batch.views[:, 2].mean((1, 2)).reshape(2, 24).cpu()
        index = batch.index.double().cpu()
        for view in blue:
            assert torch.corrcoef(torch.stack([view.double(), index]))[0, 1] > 0.5

    def test_sources_without_labels_have_label_minus_one(self, tmp_path):
        for i in range(N):
            image(i).save(tmp_path / f"{i}.png")
        assert set(next(iter(self.make(ImageFolder(tmp_path), B))).label.tolist()) == {-1}

    def test_same_seed_gives_the_same_batches_and_others_differ(self, folder):
        first = list(self.make(folder, B, seed=1))
        assert_same_batches(self.make(folder, B, seed=1), first)
        assert indices(self.make(folder, B, seed=2)) != indices(first)

    def test_epochs_differ_in_order_and_views(self, folder):
        pipeline = self.make(folder, N)
        epochs = []
        for epoch in range(2):
            pipeline.set_epoch(epoch)
            (batch,) = pipeline
            epochs.append((batch.index.tolist(), batch.views[batch.index.argsort()]))
        assert epochs[0][0] != epochs[1][0]
        assert not torch.equal(epochs[0][1], epochs[1][1])

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 15},
            {"batch_size": 6},
            {"workers": 0},
            {"workers": 3},
            {"cache_gib": 0},
            {"world_size": 2},
            {"world_size": 3},
            {"restart": 2},
        ],
        ids=lambda options: " ".join(f"{name} {value}" for name, value in options.items()),
    )
    def test_views_of_an_image_depend_on_seed_epoch_and_index_only(self, tmp_path, options):
        write_images(tmp_path)
        for i in range(N):  # neighbours of other sizes, so that a batch is ragged
            path = tmp_path / f"class{i // 15}" / f"{i:02}.png"
            image(i).resize((24 + i % 5, 20 + i % 3)).save(path)
        source = ImageFolder(tmp_path)
        expected = {}
        for epoch in range(2):
            pipeline = self.make(source, 10, seed=7, max_bad_fraction=0.0)
            pipeline.set_epoch(epoch)
            expected[epoch] = views_by_index(pipeline)
            assert sorted(expected[epoch]) == list(range(N))

        options = {"batch_size": 10, "seed": 7} | options
        restart, ranks = options.pop("restart", None), options.get("world_size", 1)
        shown = {0: {}, 1: {}}
        for rank in range(ranks):
            ours = options | {"rank": rank} | ({"batch_size": 5} if ranks > 1 else {})
            pipeline = self.make(source, **ours)
            # the same pipeline goes on: what it has kept of an epoch is used in the next
            for epoch in range(2):
                pipeline.set_epoch(epoch)
                iteration = iter(pipeline)
                for _ in range(restart or 0):
                    shown[epoch] |= views_by_index([next(iteration)])
                if restart:
                    state = pipeline.state_dict()
                    iteration = pipeline = self.make(source, **ours)
                    pipeline.load_state_dict(state)
                shown[epoch] |= views_by_index(iteration)
        for epoch in range(2):
            assert shown[epoch].keys() == expected[epoch].keys()
            for i, views in shown[epoch].items():
                torch.testing.assert_close(
                    views, expected[epoch][i], rtol=0, atol=self.tolerance, msg=f"image {i}"
                )

    def test_iterator_without_a_batch_follows_the_epoch(self, folder):
        pipeline = self.make(folder, B)
        iteration = iter(pipeline)
        pipeline.set_epoch(1)
        assert next(iteration).index.tolist() == epoch_order(N, 0, 1)[:B].tolist()
        pipeline.set_epoch(2)
        assert next(iteration, None) is None

    def test_every_iteration_starts_at_the_beginning(self, folder):
        pipeline = self.make(folder, B)
        next(iter(pipeline))
        whole = list(pipeline)
        assert len(whole) == 3
        assert_same_batches(pipeline, whole)

    def test_resumed_pipeline_gives_the_remaining_batches(self, folder):
        for handed_out in range(4):
            pipeline = self.make(folder, B, seed=3)
            pipeline.set_epoch(4)
            iteration = iter(pipeline)
            for _ in range(handed_out):
                next(iteration)
            state = json.loads(json.dumps(pipeline.state_dict()))
            assert (state["epoch"], state["position"]) == (4, handed_out)
            rest = list(iteration)

            resumed = self.make(folder, B, seed=3)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            resumed.set_epoch(4)
            assert_same_batches(resumed, rest)
            assert len(list(resumed)) == 3

    def test_finished_epoch_stays_finished_until_the_next(self, folder):
        pipeline = self.make(folder, B)
        list(pipeline)
        assert pipeline.state_dict()["position"] == 3
        pipeline.set_epoch(1)
        assert pipeline.state_dict()["position"] == 0

    def test_foreign_states_are_refused(self, folder, tmp_path):
        pipeline = self.make(folder, B)
        next(iter(pipeline))
        state = pipeline.state_dict()
        with pytest.raises(ValueError, match="must have the seed of the saved state, got 1 where"):
            self.make(folder, B, seed=1).load_state_dict(state)
        with pytest.raises(ValueError, match="must have the batch_size .* got 4 where .* has 8"):
            self.make(folder, 4).load_state_dict(state)
        for i in range(N):
            image(N - i).save(tmp_path / f"{i}.png")
        with pytest.raises(ValueError, match="must have the fingerprint of the saved state"):
            self.make(ImageFolder(tmp_path), B).load_state_dict(state)

    def test_batch_size_may_change_between_epochs(self, folder):
        pipeline = self.make(folder, B)
        pipeline.set_epoch(1)
        resumed = self.make(folder, 4)
        resumed.load_state_dict(pipeline.state_dict())
        assert indices(resumed) == epoch_order(N, 0, 1)[:28].tolist()

    @pytest.mark.parametrize("batch_size", [0, N + 1])
    def test_batch_size_must_fit_the_source(self, folder, batch_size):
        with pytest.raises(ValueError, match=f"got batch_size {batch_size} and {N} images"):
            self.make(folder, batch_size)

    def test_a_gpu_that_is_not_there_is_named(self, folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="device must be one that torch can use, got cuda"):
            self.make(folder, B, device="cuda")

    def test_pairs_are_the_two_views_and_the_label(self, folder):
        pipeline = self.make(folder, B)
        pairs = list(pipeline.pairs())
        assert len(pairs) == len(pipeline.pairs()) == 3
        triples = list(pipeline.pairs(with_index=True))
        assert [index.tolist() for _, _, index in triples] == [b.index.tolist() for b in pipeline]
        for ((view0, view1), label), batch in zip(pairs, pipeline, strict=True):
            torch.testing.assert_close(torch.cat([view0, view1]), batch.views, rtol=0, atol=0)
            assert torch.equal(label, batch.label)

    def test_seconds_accumulate(self, folder):
        pipeline = self.make(folder, B)
        list(pipeline)
        once = dict(pipeline.seconds)
        list(pipeline)
        assert set(once) == {"data", "views"} and sum(once.values()) > 0
        assert all(pipeline.seconds[key] >= once[key] for key in once)

    def test_leaving_an_iteration_or_closing_ends_the_threads(self, folder):
        before = threads()
        pipeline = self.make(folder, B)
        for _ in pipeline:
            break
        assert threads() == before
        iteration = iter(pipeline)
        next(iteration)
        pipeline.close()
        assert threads() == before
        assert next(iteration, None) is None

    # --- unreadable images ------------------------------------------------------------------------

    def test_unreadable_images_are_replaced_by_the_next_of_the_order(self, tmp_path):
        log = tmp_path / "run" / "quarantine.jsonl"
        source = ImageFolder(write_images(tmp_path, BAD))
        pipeline = self.make(source, B, max_bad_fraction=0.1, quarantine=log)
        for epoch in range(2):
            pipeline.set_epoch(epoch)
            readable = [i for i in epoch_order(N, 0, epoch).tolist() if i not in BAD]
            assert indices(pipeline) == readable[: 3 * B]
        assert pipeline.quarantined == 2
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        assert sorted(entry["index"] for entry in entries) == sorted(BAD)
        for entry in entries:
            assert entry["name"] == source.name(entry["index"])
            assert "unreadable image" in entry["reason"]

    def test_batches_stay_full_where_the_order_runs_out_of_readable_images(self, tmp_path):
        bad = tuple(range(9, 17))
        pipeline = self.make(ImageFolder(write_images(tmp_path, bad)), B, max_bad_fraction=0.5)
        readable = [i for i in epoch_order(N, 0, 0).tolist() if i not in bad]
        assert indices(pipeline) == readable + readable[:2]

    def test_resume_after_unreadable_images_gives_the_remaining_batches(self, tmp_path):
        source = ImageFolder(write_images(tmp_path, BAD))
        log = tmp_path / "quarantine.jsonl"
        options = {"max_bad_fraction": 0.1, "quarantine": log}
        pipeline = self.make(source, B, **options)
        iteration = iter(pipeline)
        next(iteration)
        state = pipeline.state_dict()
        rest = list(iteration)
        logged = log.read_text()
        assert state["quarantined"] == sorted(BAD)
        resumed = self.make(source, B, **options)
        resumed.load_state_dict(state)
        assert_same_batches(resumed, rest)
        assert resumed.quarantined == 2 and log.read_text() == logged

    def test_every_kind_of_unreadable_file_is_replaced(self, tmp_path):
        source = ImageFolder(write_images(tmp_path))
        order = epoch_order(N, 0, 0).tolist()
        bad = order[1:16:2]
        paths = [tmp_path / source.paths[i] for i in bad]
        for path, data in zip(paths, UNREADABLE.values(), strict=False):
            path.write_bytes(data)
        for path in paths[-2:]:
            path.unlink()
        paths[-1].mkdir()
        pipeline = self.make(source, 7, max_bad_fraction=0.5)
        assert indices(pipeline) == (2 * [i for i in order if i not in bad])[:28]
        assert pipeline.quarantine.items() == sorted(bad)

    def test_every_kind_of_unreadable_parquet_row_is_replaced(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        rows = [{"bytes": encoded(image(i)), "path": f"{i}.png"} for i in range(N)]
        order = epoch_order(N, 0, 0).tolist()
        bad = order[2:20:2]
        cells = [{"bytes": data, "path": None} for data in UNREADABLE.values()]
        cells += [None, {"bytes": None, "path": None}, {"bytes": None, "path": "nowhere.png"}]
        for i, cell in zip(bad, cells, strict=True):
            rows[i] = cell
        pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
        pipeline = self.make(ParquetImages(tmp_path / "x.parquet"), 7, max_bad_fraction=0.5)
        assert indices(pipeline) == (2 * [i for i in order if i not in bad])[:28]
        assert pipeline.quarantine.items() == sorted(bad)

    def test_animations_and_rare_modes_are_images(self, folder, tmp_path):
        write_images(tmp_path)
        first, second, third = epoch_order(N, 0, 0)[:3].tolist()
        frames = [image(first), image(first).rotate(180)]
        frames[0].save(tmp_path / folder.paths[first], save_all=True, append_images=frames[1:])
        image(second).convert("RGBA").save(tmp_path / folder.paths[second])
        frames = {"save_all": True, "append_images": [image(0), image(1)]}
        (tmp_path / folder.paths[third]).write_bytes(encoded(image(third), "GIF", **frames))
        pipeline = self.make(ImageFolder(tmp_path), B, max_bad_fraction=0.0)
        batch, plain = next(iter(pipeline)), next(iter(self.make(folder, B)))
        assert torch.equal(batch.index, plain.index)
        for views, expected in zip(batch.views.chunk(2), plain.views.chunk(2), strict=True):
            torch.testing.assert_close(views[:2], expected[:2], rtol=0, atol=self.tolerance)

    def test_too_many_unreadable_images_stop_the_run(self, tmp_path):
        bad = epoch_order(N, 0, 0)[B : B + 12].tolist()
        source = ImageFolder(write_images(tmp_path, bad))
        pipeline = self.make(source, B, max_bad_fraction=0.05)
        with pytest.raises(
            RuntimeError, match="at most 0.05 of the images may be unreadable, got 2"
        ):
            list(pipeline)
        pipeline = self.make(source, B, max_bad_fraction=11 / N)
        shown = []
        with pytest.raises(RuntimeError, match="raise max_bad_fraction") as stopped:
            shown.extend(batch.index for batch in pipeline)
        message = str(stopped.value)
        assert f"got 12 of {N}" in message and message.count(".png") == 10 and ", ...;" in message
        assert source.name(bad[0]) in message

    def test_source_without_a_readable_image_stops_the_run(self, tmp_path):
        source = ImageFolder(write_images(tmp_path, tuple(range(N))))
        with pytest.raises(TooManyUnreadable, match="no image in the order is readable"):
            list(self.make(source, B, max_bad_fraction=1.0))
