import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from simclr_kernels import evaluate, reference
from simclr_kernels.decode import DecodeError
from simclr_kernels.evaluate import (
    effective_rank,
    eval_batches,
    extract_features,
    few_labels,
    knn_accuracy,
    linear_probe,
)


def clusters(n, width=8, classes=4, distance=6.0, seed=0):
    """(n, width) float32 in normal clusters whose centres lie `distance` from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, width, generator=generator)
    x[torch.arange(n), labels] += distance
    return x, labels


def knn_by_loops(bank, bank_labels, queries, labels, k):
    """The rule of knn_accuracy in float64, one query and one neighbour at a time."""
    right = 0
    for query, label in zip(queries.double(), labels.tolist(), strict=True):
        similarity = [(query @ b / query.norm() / b.norm()).item() for b in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes = dict.fromkeys(sorted(set(bank_labels.tolist())), 0.0)
        for i in nearest:
            votes[bank_labels[i].item()] += math.exp(similarity[i] / 0.07)
        right += max(votes, key=votes.get) == label
    return right / len(labels)


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_agrees_with_loops(k, monkeypatch):
    bank, bank_labels = clusters(60, distance=2.0)
    queries, labels = clusters(90, distance=2.0, seed=1)
    expected = knn_by_loops(bank, bank_labels, queries, labels, k)
    assert 0.3 < expected < 0.9
    assert knn_accuracy(bank, bank_labels, queries, labels, k) == expected
    # the same answer in slices of seven queries, of which the last has six
    monkeypatch.setattr(evaluate, "KNN_TILE", 7 * 60)
    assert knn_accuracy(bank, bank_labels, queries, labels, k) == expected


def test_knn_compares_directions_and_not_lengths():
    bank = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    queries = torch.tensor([[0.1, 0.0], [1.0, 5.0]])
    assert knn_accuracy(bank, torch.tensor([7, 3]), queries, torch.tensor([7, 3]), k=1) == 1.0


def test_knn_lets_a_close_neighbour_outvote_two_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    assert knn_accuracy(bank, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), k=3) == 1.0


def test_knn_gives_exact_ties_to_the_smaller_label():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for labels in ([5, 2], [2, 5]):
        query = torch.tensor([[1.0, 0.0]])
        assert knn_accuracy(bank, torch.tensor(labels), query, torch.tensor([2]), k=2) == 1.0


def test_knn_votes_right_where_all_neighbours_are_opposite():
    bank = -torch.ones(2, 3)
    labels = torch.tensor([1, 1])
    query = torch.ones(1, 3)
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=2) == 1.0


def test_knn_of_zero_features_is_a_number():
    accuracy = knn_accuracy(
        torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), torch.zeros(2, 2), torch.tensor([0, 1]), k=4
    )
    assert accuracy == 0.5


@pytest.mark.parametrize(
    "bank, bank_labels, queries, labels, k, message",
    [
        ((5, 3), 5, (2, 3), 2, 6, r"k must lie in 1..5, the size of the bank, got 6"),
        ((5, 3), 5, (2, 3), 2, 0, r"k must lie in 1..5, the size of the bank, got 0"),
        ((5, 3), 5, (2, 4), 2, 1, r"of equal width, got \(5, 3\) and \(2, 4\)"),
        ((5, 3), 4, (2, 3), 2, 1, r"one label per row, got features \(5, 3\) and labels \(4,\)"),
        ((5, 3), 5, (2, 3), 3, 1, r"one label per row, got features \(2, 3\) and labels \(3,\)"),
        ((5, 3), 5, (0, 3), 0, 1, "features must have at least one row, got none"),
    ],
)
def test_knn_refuses_what_does_not_fit(bank, bank_labels, queries, labels, k, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(
            torch.rand(bank),
            torch.zeros(bank_labels, dtype=torch.int64),
            torch.rand(queries),
            torch.zeros(labels, dtype=torch.int64),
            k,
        )


def test_probe_separates_what_is_separable():
    x, y = clusters(400)
    test_x, test_y = clusters(200, seed=1)
    # neither scale nor offset of a feature matters
    scale = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0, 1.0, 1.0])
    accuracy = linear_probe(x * scale + 10 * scale, y, test_x * scale + 10 * scale, test_y)
    assert accuracy >= 0.99


def test_probe_on_features_without_information_is_at_chance():
    generator = torch.Generator().manual_seed(0)
    x, test_x = (torch.randn(n, 16, generator=generator) for n in (500, 4000))
    y = torch.randint(4, (500,), generator=generator)
    test_y = torch.randint(4, (4000,), generator=generator)
    assert linear_probe(x, y, test_x, test_y) == pytest.approx(0.25, abs=0.03)


def test_probe_reaches_the_minimum_of_its_objective():
    x, y = clusters(300, distance=1.0)
    l2 = 1e-2
    probe = evaluate._Probe(8, 4, x.device)
    probe.fit(x, y, l2)
    weight = probe.weight.detach().double()
    p = (x.double() @ weight + probe.bias.detach().double()).softmax(1)
    p[torch.arange(300), y] -= 1
    gradient = x.double().T @ p / 300 + l2 * weight
    assert gradient.abs().max() < 1e-4
    assert (p.sum(0) / 300).abs().max() < 1e-4


def test_probe_chooses_a_penalty_that_suits_the_data():
    # 40 rows in 30 dimensions: without penalty the probe fits noise
    x, y = clusters(40, width=30, classes=2, distance=1.0)
    test_x, test_y = clusters(2000, width=30, classes=2, distance=1.0, seed=1)
    chosen = linear_probe(x, y, test_x, test_y)
    loosest = linear_probe(x, y, test_x, test_y, l2_grid=(1e-6,))
    assert chosen > loosest + 0.02


def test_probe_gives_the_same_bits_twice_and_leaves_the_random_state_alone():
    x, y = clusters(300, distance=1.0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = linear_probe(x[:200], y[:200], x[200:], y[200:])
    assert linear_probe(x[:200], y[:200], x[200:], y[200:]) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_accepts_any_label_values_and_runs_without_gradients():
    x, y = clusters(400)
    renamed = torch.tensor([40, 10, 30, 20])[y]
    with torch.no_grad():
        assert linear_probe(x, renamed, x, renamed) >= 0.99
    # a label that training does not know counts as wrong
    assert linear_probe(x, renamed, x, torch.full_like(renamed, 99)) == 0.0


def test_probe_of_collapsed_features_is_no_better_than_chance():
    _, y = clusters(100)
    x = torch.zeros(100, 8)
    assert linear_probe(x, y, x, y) == y.bincount().max().item() / 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_accuracy_of_features_that_are_not_finite_is_nan(value):
    x, y = clusters(40)
    broken = x.clone()
    broken[3, 2] = value
    for train, test in ((broken, x), (x, broken)):
        assert math.isnan(knn_accuracy(train, y, test, y))
        assert math.isnan(linear_probe(train, y, test, y))


def test_probe_refuses_too_few_rows_and_an_empty_grid():
    x, y = clusters(10)
    with pytest.raises(ValueError, match="features must have at least 2 rows, got 1"):
        linear_probe(x[:1], y[:1], x, y)
    with pytest.raises(ValueError, match="l2_grid must hold at least one value, got none"):
        linear_probe(x, y, x, y, l2_grid=())
    with pytest.raises(ValueError, match="one label per row"):
        linear_probe(x, y[:9], x, y)


def test_few_labels_are_balanced_and_nested():
    labels = np.repeat(np.array([3, 1, 2]), [50, 20, 30])
    few, more = few_labels(labels, 5, seed=1), few_labels(labels, 20, seed=1)
    assert np.bincount(labels[few]).tolist() == [0, 5, 5, 5]
    assert len(set(more.tolist())) == 60
    assert set(few.tolist()) < set(more.tolist())
    assert torch.equal(few, few_labels(torch.from_numpy(labels), 5, seed=1))
    assert not torch.equal(few, few_labels(labels, 5, seed=2))


def test_few_labels_refuse_a_class_that_is_too_small():
    labels = torch.tensor([0] * 5 + [1] * 3)
    with pytest.raises(ValueError, match="every class must have 4 images, got 3 of class 1"):
        few_labels(labels, 4)
    with pytest.raises(ValueError, match="per_class must be at least 1, got 0"):
        few_labels(labels, 0)


class Images:
    """A source in memory; an image that is None cannot be read."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def decode(self, i):
        if self.images[i] is None:
            raise DecodeError(f"image {i} is broken")
        return self.images[i]


def random_images(*sides):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]


def test_batches_hold_the_evaluation_views_of_images_of_any_size():
    images = random_images((40, 60), (50, 50), (70, 33), (40, 60), (48, 48))
    source = Images(images, np.array([4, 3, 2, 1, 0]))
    batches = eval_batches(source, 36, batch_size=2, workers=3)
    assert len(batches) == 3
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    assert y.tolist() == [4, 3, 2, 1, 0]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    for view, image in zip(x, images, strict=True):
        expected = reference.eval_view(torch.from_numpy(image)[None], 36)[0]
        assert torch.equal(view, expected)
    assert [len(labels) for _, labels in batches] == [2, 2, 1]


def test_batches_do_not_depend_on_the_number_of_workers():
    source = Images(random_images(*[(40, 44)] * 9), np.arange(9))
    passes = [[x for x, _ in eval_batches(source, 33, 2, workers=w)] for w in (1, 4)]
    for a, b in zip(*passes, strict=True):
        assert torch.equal(a, b)


def test_batches_subtract_mean_and_divide_by_std():
    source = Images(random_images((8, 8)), np.zeros(1, dtype=np.int64))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    ((plain, _),) = eval_batches(source, 8)
    ((x, _),) = eval_batches(source, 8, mean=mean, std=std)
    for channel in range(3):
        expected = (plain[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(x[:, channel], expected)


def test_unreadable_image_raises_or_is_skipped_and_counted():
    good = random_images(*[(8, 8)] * 5)
    source = Images([good[0], None, good[2], None, None, good[1]], np.arange(6))
    with pytest.raises(DecodeError, match="image 1 is broken"):
        list(eval_batches(source, 8, 2))
    batches = eval_batches(source, 8, 2, skip_unreadable=True)
    for _ in range(2):
        assert [y.tolist() for _, y in batches] == [[0], [2], [5]]
        assert batches.skipped == [1, 3, 4]
    # a batch of nothing but unreadable images does not appear
    source.images[5] = None
    assert [y.tolist() for _, y in batches] == [[0], [2]]


def test_abandoned_pass_ends_its_threads():
    before = threading.active_count()
    source = Images(random_images(*[(8, 8)] * 100), np.arange(100))
    iterator = iter(eval_batches(source, 8, 4, workers=2))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before


def test_images_without_a_label_are_left_out():
    images = random_images(*[(8, 8)] * 5)
    batches = eval_batches(Images(images, np.array([2, -1, 0, -1, 1])), 8, 2)
    assert len(batches) == 2
    assert [y.tolist() for _, y in batches] == [[2, 0], [1]]
    x = torch.cat([x for x, _ in batches])
    assert torch.equal(x[1], reference.eval_view(torch.from_numpy(images[2])[None], 8)[0])


@pytest.mark.parametrize("labels", [None, np.array([-1])])
def test_source_without_labels_is_refused(labels):
    with pytest.raises(ValueError, match="source must have labels to be evaluated on"):
        eval_batches(Images(random_images((8, 8)), labels), 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std must be given together"),
    ],
)
def test_batches_refuse_values_out_of_range(options, message):
    source = Images(random_images((8, 8)), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match=message):
        eval_batches(source, **{"size": 8, **options})


def network():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten())
    # one layer is frozen while the rest trains
    norm.eval()
    return model


def test_features_are_made_in_evaluation_mode_and_modes_come_back():
    model = network()
    model[1].train()
    model[0].eval()
    batches = [
        (torch.rand(2, 3, 5, 5), torch.tensor([0, 1])),
        (torch.rand(1, 3, 5, 5), torch.tensor([2])),
    ]
    features, labels = extract_features(model, batches)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert not features.requires_grad
    assert labels.tolist() == [0, 1, 2]
    assert model[1].num_batches_tracked == 0
    expected = model.eval()(torch.cat([x for x, _ in batches])).detach()
    torch.testing.assert_close(features, expected)


def test_features_through_a_method_switch_its_module_and_modes_survive_an_error():
    class Encoder(nn.Module):
        def features(self, x):
            assert not self.training
            return x.flatten(1)

    model = Encoder()
    features, _ = extract_features(model.features, [(torch.rand(2, 3, 4, 4), torch.zeros(2))])
    assert features.shape == (2, 48)
    assert model.training
    with pytest.raises(IndexError):
        extract_features(model.features, [(torch.tensor(1.0), torch.zeros(1))])
    assert model.training


def test_plain_function_encodes_too_and_half_precision_becomes_float32():
    batches = [(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))]
    features, _ = extract_features(lambda x: x.flatten(1).bfloat16(), batches)
    assert features.dtype == torch.float32
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        extract_features(lambda x: x, [])


def test_effective_rank_counts_the_directions_in_use():
    torch.manual_seed(0)
    rows = torch.randn(200, 1)
    assert effective_rank(torch.eye(6).repeat(3, 1)) == pytest.approx(6, rel=1e-5)
    assert effective_rank(rows * torch.randn(1, 16)) == pytest.approx(1, abs=1e-3)
    assert 12 < effective_rank(torch.randn(200, 16)) <= 16
    # singular values 3 and 1: entropy of (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy))


def test_effective_rank_of_nothing_is_zero_and_of_broken_features_nan():
    assert effective_rank(torch.zeros(5, 3)) == 0.0
    assert math.isnan(effective_rank(torch.full((5, 3), math.inf)))
    with pytest.raises(ValueError, match=r"2-D and not empty, got shape \(0, 3\)"):
        effective_rank(torch.zeros(0, 3))
