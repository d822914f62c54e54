"""Time and memory of several ways to one answer, side by side: `race`.

Every answer is checked before anything is timed. The contenders then take turns, so that a machine
that slows down slows all of them; medians stand for them. On a GPU the seconds are the device's, by
events; on a CPU memory is the growth of the resident set, and the heap is that of `ordinary_heap`.
CPU time is that of all threads and worker processes: on a machine with other work it is what stays.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

PEER_PACKAGES = (
    *("lightly", "pytorch-metric-learning", "inf-cl", "cut-cross-entropy"),
    *("albumentations", "opencv-python-headless", "kornia", "torchvision", "nvidia-dali-cuda130"),
)
MIB = 1 << 20
LEAST_ROUNDS = 3
MOST_ROUNDS = 15
# a turn repeats a short call until its time can be read well
TURN_SECONDS = 0.01
MOST_REPEATS = 50

# glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


class Contender(NamedTuple):
    """One way to the answer.

    call() gives the answer, check(answer) its error or an AssertionError; None where there is no
    exact answer to compare with. All of it runs within around(); a turn begins with an untimed call
    if `reheat`.
    """

    label: str
    call: Callable[[], Any]
    check: Callable[[Any], float | None]
    around: Callable[[], AbstractContextManager] = nullcontext
    reheat: bool = False


@dataclass
class Result:
    """What a contender did: seconds of a call by turns, or why there are none."""

    label: str
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: float | None = None
    missing: str | None = None
    wrong: str | None = None
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of one call; NaN where nothing was timed."""
        return statistics.median(self.seconds) if self.seconds else math.nan


class Seconds(NamedTuple):
    """Of one call: on the device, by the clock, and of CPU time."""

    device: float
    wall: float
    cpu: float


def race(
    contenders: dict[str, Contender | str],
    device: str,
    seconds_each: float = 1.0,
) -> dict[str, Result]:
    """Checks each contender, then times all in turn. See Result.

    Args:
        contenders: by name; a string is the reason why one is missing.
        device: "cpu" or "cuda".
        seconds_each: after which a contender stops; it has 3 turns at least and 15 at most.

    Returns:
        By name, in the same order. A contender whose answer is wrong, or that is out of memory, was
        not timed.
    """
    if device == "cpu":
        ordinary_heap()
    results, repeats = {}, {}
    for name, contender in contenders.items():
        if isinstance(contender, str):
            results[name] = Result(name, missing=contender)
            continue
        results[name] = Result(contender.label)
        with contender.around():
            repeats[name] = _check(contender, device, results[name])
    for _ in range(MOST_ROUNDS):
        for name, calls in repeats.items():
            result = results[name]
            spent = sum(result.wall_seconds) * calls
            if calls and (len(result.seconds) < LEAST_ROUNDS or spent < seconds_each):
                _take_turn(contenders[name], device, calls, result)
    return results


def _check(contender: Contender, device: str, result: Result) -> int:
    """Warms up, checks the answer and reads the memory; returns the calls in a turn, 0 for none."""
    try:
        contender.call()
        with peak_memory(device) as peak:
            start = time.perf_counter()
            answer = contender.call()
            wait(device)
            seconds = time.perf_counter() - start
        result.peak_bytes = peak.extra_bytes
        result.error = contender.check(answer)
        return max(1, min(MOST_REPEATS, round(TURN_SECONDS / seconds)))
    except AssertionError as error:
        result.wrong = str(error)
    except torch.cuda.OutOfMemoryError:
        result.missing = "out of memory"
    except Exception as error:  # a peer's failure must not end the race of the others
        result.wrong = f"{type(error).__name__}: {error}"[:300]
    if device == "cuda":
        torch.cuda.empty_cache()
    return 0


def _take_turn(contender: Contender, device: str, calls: int, result: Result) -> None:
    with contender.around():
        if contender.reheat:
            contender.call()
        seconds = timed(contender.call, device, calls)
    result.seconds.append(seconds.device)
    result.wall_seconds.append(seconds.wall)
    result.cpu_seconds.append(seconds.cpu)


def timed(call: Callable[[], Any], device: str, repeats: int = 1) -> Seconds:
    """What a call takes, one of several in a row."""
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        wait(device)
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        cpu_start, start = cpu_seconds(), time.perf_counter()
        for _ in range(repeats):
            call()
        if device == "cuda":
            events[1].record()
        wait(device)
        wall = (time.perf_counter() - start) / repeats
        cpu = (cpu_seconds() - cpu_start) / repeats
    finally:
        if gc_was_on:
            gc.enable()
    if device == "cuda":
        return Seconds(events[0].elapsed_time(events[1]) / 1e3 / repeats, wall, cpu)
    return Seconds(wall, wall, cpu)


def cpu_seconds() -> float:
    """CPU time so far of this process and of the processes that it started with multiprocessing.

    Those at work are read to 10 ms.
    """
    # this also waits for the ones that ended, whose time then counts among the children's
    at_work = sum(_cpu_seconds_of(child.pid) for child in multiprocessing.active_children())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + at_work


def _cpu_seconds_of(pid: int) -> float:
    # the name of a process, in parentheses, may hold spaces
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def torch_threads(count: int):
    """torch, and our kernels with it, on so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Peak:
    """Bytes that a block of code held at most, beyond what was held before it."""

    extra_bytes: int


@contextmanager
def peak_memory(device: str):
    """Measures the peak memory of the block: see Peak.

    On a GPU of torch's allocator, on a CPU of the resident set, to a few hundred KiB.
    """
    peak = Peak()
    gc.collect()
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        wait(device)
        peak.extra_bytes = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        yield peak
        peak.extra_bytes = max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def ordinary_heap() -> None:
    """Puts glibc where its own adjustment ends once a process has freed a block of 32 MiB.

    Blocks over 32 MiB come fresh from the system and go back, page by page. To say so fixes the
    thresholds: otherwise they would depend on what ran before.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 65536)
    libc.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
    libc.mallopt(M_TRIM_THRESHOLD, 64 * MIB)


@contextmanager
def warm_heap():
    """Within the block glibc keeps all freed memory, as after `MALLOC_MMAP_MAX_=0
    MALLOC_TRIM_THRESHOLD_=-1`."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        ordinary_heap()
        libc.malloc_trim(0)


def counted_flops(rows: int, features: int, what: str, device: str) -> float:
    """FLOPs that the loss is counted as, whoever computes it, in units of U = 2 M^2 D.

    Forward 0.5 U: the matrix is symmetric. Backward another 1.5 U on a CPU, where ours uses the
    symmetry again, and 2 U on a GPU, where recomputing is cheaper than writing to both sides.
    """
    both = 2.5 if device == "cuda" else 2.0
    return (0.5 if what == "forward" else both) * 2 * rows * rows * features


def machine(device: str) -> dict[str, Any]:
    """What ran: device, threads, versions and the commit."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda if gpu else None,
        "commit": commit(),
        "peers": _versions(PEER_PACKAGES),
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"cpu, {os.cpu_count()} cores"


@cache
def commit() -> str | None:
    """The commit of the checkout, with -dirty if files differ from it; None outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
