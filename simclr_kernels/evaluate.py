"""What frozen features are worth: nearest neighbours, a linear probe, and an alarm for collapse.

Accuracies are fractions in [0, 1]. Everything is deterministic on one device and may be called
while training: nothing here keeps a gradient or touches torch's random state.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from simclr_kernels import reference
from simclr_kernels.decode import DecodeError

KNN_TEMPERATURE = 0.07
KNN_TILE = 2**24  # similarities held at once: 64 MiB
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PROBE_STEPS = 100
PROBE_HISTORY = 10
BATCHES_AHEAD = 2


@dataclass(eq=False)
class EvalBatches:
    """The labelled images of a source in its own order, decoded in threads. See eval_batches.

    Attributes:
        items: indices of the images that have a label.
        skipped: indices of the unreadable images of the latest pass.
    """

    source: Any
    items: list[int]
    size: int
    batch_size: int
    device: torch.device | str
    workers: int
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    skip_unreadable: bool
    skipped: list[int] = field(default_factory=list, init=False)

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped = []
        ahead: deque[list[tuple[int, Future]]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for start in range(0, len(self.items), self.batch_size):
                batch = self.items[start : start + self.batch_size]
                ahead.append([(i, pool.submit(self._view, i)) for i in batch])
                if len(ahead) > BATCHES_AHEAD:
                    yield from self._collect(ahead.popleft())
            while ahead:
                yield from self._collect(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _view(self, i: int) -> Tensor:
        # a copy: torch warns about arrays it may not write to
        image = torch.from_numpy(np.array(self.source.decode(i), order="C"))
        return reference.eval_view(image[None], self.size)[0]

    def _collect(self, pending: list[tuple[int, Future]]) -> Iterator[tuple[Tensor, Tensor]]:
        views, index = [], []
        for i, future in pending:
            try:
                views.append(future.result())
            except DecodeError:
                if not self.skip_unreadable:
                    raise
                self.skipped.append(i)
            else:
                index.append(i)
        if not views:
            return
        images = torch.stack(views).to(self.device)
        if self.mean is not None:
            images = reference.normalize(images, self.mean, self.std)
        labels = torch.tensor([int(self.source.labels[i]) for i in index])
        yield images, labels.to(self.device)


def eval_batches(
    source: Any,
    size: int,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 4,
    *,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    skip_unreadable: bool = False,
) -> EvalBatches:
    """Batches of (images, labels) for evaluation, without randomness. See reference.eval_view.

    Can be iterated again and again; every pass decodes again.

    Args:
        source: any object with `len(source)`, `source.decode(i)` to (H, W, 3) uint8, and
            `source.labels`, (n,) integers; images with a negative label are left out.
        size: S, the side of a view in pixels.
        batch_size: B; the last batch holds what is left.
        device: of images and labels. Views are made on the CPU, in the threads that decode.
        workers: threads.
        mean: per channel, subtracted, in units of 1.0 = white; None leaves [0, 1].
        std: per channel, divided by; given where mean is given.
        skip_unreadable: leave unreadable images out, and list them in `skipped`.

    Returns:
        An iterable of images (B, 3, S, S) float32 with labels (B,) int64.

    Raises:
        ValueError: the source has no labels, or an argument is out of its range.
        DecodeError: while iterating, an image is unreadable and skip_unreadable is False.
    """
    labels = np.asarray([] if source.labels is None else source.labels)
    items = np.flatnonzero(labels >= 0).tolist()
    if not items:
        raise ValueError("source must have labels to be evaluated on, got a source without")
    for name, value in (("size", size), ("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean {mean} and std {std}")
    return EvalBatches(source, items, size, batch_size, device, workers, mean, std, skip_unreadable)


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Features and labels of all batches, in evaluation mode and without gradients.

    Args:
        encode: a module, or a method of one such as `model.features`, from images (B, 3, S, S) to
            features (B, C). The module is put into evaluation mode and gets its modes back, also
            after an error. Any other callable is taken as it is.
        batches: pairs of images and labels (B,).

    Returns:
        Features (n, C) float32 and labels (n,) int64, on the device of the features.

    Raises:
        ValueError: there is not a single batch.
    """
    module = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    modes = {m: m.training for m in module.modules()} if isinstance(module, nn.Module) else {}
    features, labels = [], []
    try:
        for m in modes:
            m.training = False
        for images, truth in batches:
            features.append(encode(images).float())
            labels.append(truth.to(features[-1].device))
    finally:
        for m, training in modes.items():
            m.training = training
    if not features:
        raise ValueError("batches must hold at least one batch, got none")
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20
) -> float:
    """Share of queries that their k most similar bank rows, voting, give the right label.

    A neighbour of cosine similarity s votes with weight exp(s / 0.07) (arXiv 1805.01978): a
    weighted vote all but never ties, and on the raw pixels of CIFAR-10 it gives 36.3 % against
    35.3 % for a plain majority (k = 20, ties to the smaller label). Exact ties go to the smaller
    label here too. O(len(bank) + len(queries)) memory: queries come in slices.

    Args:
        bank: (n, C) features, not normalised.
        bank_labels: (n,) integers.
        queries: (q, C) features.
        labels: (q,) integers.
        k: number of neighbours, at most n.

    Returns:
        A fraction in [0, 1]; NaN if a feature is not finite.

    Raises:
        ValueError: shapes do not fit, there are no queries, or k is not in 1..n.
    """
    _check_features(bank, bank_labels, queries, labels)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in 1..{len(bank)}, the size of the bank, got {k}")
    if not (bank.isfinite().all() and queries.isfinite().all()):
        return math.nan
    classes, bank_class = torch.unique(bank_labels, return_inverse=True)
    bank = reference.unit_rows(bank.float())
    right = torch.zeros((), dtype=torch.int64, device=bank.device)
    rows = max(1, KNN_TILE // len(bank))
    for query, truth in zip(queries.split(rows), labels.split(rows), strict=True):
        similarity, neighbour = (reference.unit_rows(query.float()) @ bank.T).topk(k)  # [rows, k]
        weight = (similarity / KNN_TEMPERATURE).exp()
        votes = weight.new_zeros(len(query), len(classes))
        # one rank at a time: no two votes meet in one sum, whose order a GPU would not fix
        for rank in range(k):
            own = slice(rank, rank + 1)
            votes.scatter_add_(1, bank_class[neighbour[:, own]], weight[:, own])
        right += (classes[votes.argmax(1)] == truth).sum()
    return right.item() / len(queries)


def few_labels(labels: Tensor | np.ndarray, per_class: int, seed: int = 0) -> Tensor:
    """Indices of the first `per_class` images of each class in an order drawn from the seed.

    A smaller choice is part of a larger one of the same seed.

    Args:
        labels: (n,) integers.
        per_class: images of each class.
        seed: of the order.

    Returns:
        (classes * per_class,) int64 on the CPU, class by class.

    Raises:
        ValueError: a class has fewer images, or per_class is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    labels = torch.as_tensor(labels).cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique().tolist():
        members = order[labels[order] == label]
        if len(members) < per_class:
            raise ValueError(
                f"every class must have {per_class} images, got {len(members)} of class {label}"
            )
        chosen.append(members[:per_class])
    return torch.cat(chosen)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    seed: int = 0,
) -> float:
    """Test accuracy of multinomial logistic regression on frozen features (paper, Appendix B.8).

    Features are standardised by the training set. Full-batch L-BFGS minimises the mean cross
    entropy plus l2 / 2 times the squared weights (not the biases); l2 is chosen on a held-out fifth
    of the training set, the larger of equals, and the probe fitted again on all of it.

    Args:
        features: (n, C) of the training set.
        labels: (n,) integers; n >= 2.
        test_features: (t, C).
        test_labels: (t,) integers; a label that training does not know counts as wrong.
        l2_grid: penalties to choose from, largest first; a single one is taken as it is.
        seed: of the held-out fifth.

    Returns:
        A fraction in [0, 1]; NaN if a feature is not finite.

    Raises:
        ValueError: shapes do not fit, there are no test rows or fewer than two training rows, or
            the grid is empty.
    """
    _check_features(features, labels, test_features, test_labels)
    if len(features) < 2:
        raise ValueError(f"features must have at least 2 rows, got {len(features)}")
    if len(l2_grid) == 0:
        raise ValueError("l2_grid must hold at least one value, got none")
    if not (features.isfinite().all() and test_features.isfinite().all()):
        return math.nan
    std, mean = torch.std_mean(features.float(), 0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x, test_x = (features.float() - mean) / std, (test_features.float() - mean) / std
    classes, y = torch.unique(labels, return_inverse=True)

    l2 = l2_grid[0]
    if len(l2_grid) > 1:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        fifth = max(1, len(x) // 5)
        held, kept = order[:fifth], order[fifth:]
        x_kept, y_kept, x_held, y_held = x[kept], y[kept], x[held], y[held]
        best, probe = -1, _Probe(x.shape[1], len(classes), x.device)
        for candidate in l2_grid:
            probe.fit(x_kept, y_kept, candidate)
            right = (probe.predict(x_held) == y_held).sum().item()
            if right > best:
                best, l2 = right, candidate
    probe = _Probe(x.shape[1], len(classes), x.device)
    probe.fit(x, y, l2)
    right = (classes[probe.predict(test_x)] == test_labels).sum().item()
    return right / len(test_x)


class _Probe:
    """Weights (C, classes) and biases (classes,) of a logistic regression."""

    def __init__(self, features: int, classes: int, device: torch.device):
        self.weight = torch.zeros(features, classes, device=device, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, requires_grad=True)

    def fit(self, x: Tensor, y: Tensor, l2: float) -> None:
        """Minimise from where the last fit ended."""
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=PROBE_STEPS,
            history_size=PROBE_HISTORY,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(torch.addmm(self.bias, x, self.weight), y)
            value = value + 0.5 * l2 * self.weight.square().sum()
            value.backward()
            return value

        # callers may be in a no_grad block
        with torch.enable_grad():
            optimizer.step(loss)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight).argmax(1)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values, scaled to sum 1 (Roy & Vetterli 2007; RankMe).

    From 1 (all rows are multiples of one: collapsed) to min(n, C) (all directions alike); 0 if all
    features are 0, NaN if one is not finite. O(n C min(n, C)) time.

    Args:
        features: (n, C), not centred.
    """
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"features must be 2-D and not empty, got shape {tuple(features.shape)}")
    features = features.float()
    if not features.isfinite().all():
        return math.nan
    sigma = torch.linalg.svdvals(features).double()
    if sigma.sum() == 0:
        return 0.0
    p = sigma / sigma.sum()
    return torch.special.entr(p).sum().exp().item()


def _check_features(known: Tensor, known_labels: Tensor, asked: Tensor, labels: Tensor) -> None:
    """Two sets of features (rows, C) of equal width, each with a label (rows,) per row."""
    if known.dim() != 2 or asked.dim() != 2 or known.shape[1] != asked.shape[1]:
        shapes = f"{tuple(known.shape)} and {tuple(asked.shape)}"
        raise ValueError(f"features must be 2-D and of equal width, got {shapes}")
    for features, truth in ((known, known_labels), (asked, labels)):
        if truth.shape != features.shape[:1]:
            shapes = f"features {tuple(features.shape)} and labels {tuple(truth.shape)}"
            raise ValueError(f"there must be one label per row, got {shapes}")
        if len(truth) == 0:
            raise ValueError("features must have at least one row, got none")
