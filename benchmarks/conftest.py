"""The one fixture of all benchmarks, `cuda_benchmark`, and their options."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from benchmarks.measure import Result, cores, machine, race, torch_threads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_stamps: deque[float] = deque()


def measured_time() -> float:
    """The timer of pytest-benchmark here: goes through what a race has measured before."""
    return _stamps.popleft()


def pytest_addoption(parser):
    parser.addoption(
        "--large",
        action="store_true",
        help="benchmarks on a CPU: also the sizes that take minutes and gigabytes",
    )


def pytest_collection_modifyitems(items):
    """Gives every benchmark the timer that reports what was measured side by side."""
    for item in items:
        if "cuda_benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=measured_time))


@pytest.fixture(scope="session")
def all_cores():
    """torch on all cores: the tests beside the benchmarks set one thread."""
    with torch_threads(cores()):
        yield


@pytest.fixture(scope="session")
def races() -> dict[str, dict[str, Result]]:
    """What was measured so far, by group."""
    return {}


@pytest.fixture
def asked(request) -> list[str]:
    """The contenders of this test's group that this session asks for, in order.

    A group are the tests of one function that differ in their parameter `name` only.
    """

    def group(item):
        return {k: v for k, v in item.callspec.params.items() if k != "name"}

    own = request.node
    return [
        item.callspec.params["name"]
        for item in request.session.items
        if item.originalname == own.originalname and group(item) == group(own)
    ]


@pytest.fixture
def cuda_benchmark(benchmark, all_cores, races):
    """report(group, name, contenders, info): reports the time of one contender of a group.

    The first to ask for a group runs it: contenders() gives measure.Contender by name; each is
    checked, warmed up, and timed in turn with the others, on a GPU by events and synchronised. A
    wrong answer fails the test, a missing contender skips it. info(result, results) gives what
    extra_info holds beside the machine.
    """

    def report(group, name, contenders, info):
        if group not in races:
            races[group] = race(contenders(), DEVICE)
        result = races[group][name]
        if result.missing:
            pytest.skip(f"{name}: {result.missing}")
        assert not result.wrong, f"{result.label}, {group}: {result.wrong}"
        benchmark.group = group
        benchmark.extra_info |= machine(DEVICE) | info(result, races[group])
        for seconds in result.seconds:
            _stamps.extend((0.0, seconds))
        benchmark.pedantic(lambda: None, rounds=len(result.seconds))

    return report
