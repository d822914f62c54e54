"""What a running command shows and writes: phase times, progress, metrics, the stop signal."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PHASES = ("data", "views", "encoder", "loss", "optimizer")


class Laps:
    """Seconds that each phase of a step takes, by the device's own clock where it has one.

    On a GPU phases are timed by events, read when they have passed: the host never waits for
    them, and the optimiser's share is that of the step before. There "views" is what the pipeline
    books for making them: where that is device time beside the encoder, the phases of a step add up
    to more than the step.
    """

    def __init__(self, device: torch.device, pipeline: Any):
        self.pipeline = pipeline
        self.on_gpu = device.type == "cuda"
        self.pending: list[tuple[str, Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a step: the next time to pass is that of fetching a batch."""
        self.start = time.perf_counter()
        self.booked = dict(self.pipeline.seconds)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def fetched(self) -> None:
        """The batch is there: what of the time since the step began was waiting, what views."""
        now = time.perf_counter()
        data, views = (self.pipeline.seconds[name] - self.booked[name] for name in PHASES[:2])
        self.seconds["data"] = data
        self.seconds["views"] = views if self.on_gpu else max(0.0, now - self.start - data)
        self.last = self._now()

    def mark(self, phase: str) -> None:
        """Book the time since the mark before under `phase`."""
        now = self._now()
        if self.on_gpu:
            self.pending.append((phase, self.last, now))
        else:
            self.seconds[phase] += now - self.last
        self.last = now

    def read(self) -> dict[str, float]:
        """Seconds by phase of this step."""
        while self.pending and self.pending[0][2].query():
            phase, start, end = self.pending.pop(0)
            self.seconds[phase] += start.elapsed_time(end) / 1000
        self.total = time.perf_counter() - self.start
        return self.seconds

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Progress:
    """A bar on a terminal; elsewhere one plain line every few seconds. Writes to standard error."""

    INTERVAL = 10.0

    def __init__(self, label: str, total: int, done: int, images_per_step: int):
        self.label, self.total, self.images_per_step = label, total, images_per_step
        self.done = self.shown = done
        self.since = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                dynamic_ncols=True,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar:12}| {elapsed}<{remaining}{postfix}",
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.done > self.shown:
            self._line()

    def update(self, done: int, loss: float, seconds: dict[str, float]) -> None:
        """Count a step. `seconds` by phase."""
        self.done, self.loss = done, loss
        for phase, value in seconds.items():
            self.seconds[phase] += value
        if self.bar is not None:
            self.bar.update(1)
        if time.perf_counter() - self.since >= (1.0 if self.bar is not None else self.INTERVAL):
            self._line()

    def note(self, metrics: dict[str, float]) -> None:
        """Show the figures of an evaluation."""
        text = ", ".join(f"{name} {_figure(name, value)}" for name, value in metrics.items())
        self._write(f"{self.label}: step {self.done}/{self.total}: {text}")

    def _line(self) -> None:
        elapsed = time.perf_counter() - self.since
        rate = (self.done - self.shown) * self.images_per_step / elapsed
        spent = sum(self.seconds.values()) or 1.0
        shares = " ".join(f"{name} {100 * s / spent:.0f}%" for name, s in self.seconds.items())
        text = f"loss {self.loss:.3f}, {rate:.0f} images/s ({shares})"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self._write(f"{self.label}: step {self.done}/{self.total}: {text}")
        self.shown, self.since = self.done, time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def _write(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, whole up to the last line after any crash.

    Opened at `step`, it drops what a run killed later had written beyond it, so that a resumed
    run leaves every step once.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n") and _belongs(json.loads(line), step):
                    kept.append(line)
        path.write_bytes(b"".join(kept))
        self.file = open(path, "a")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the operating system; NaN and infinity become null."""
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.file.write(json.dumps(known, allow_nan=False) + "\n")
        self.file.flush()


class StopSignal:
    """True once Ctrl-C or SIGTERM asked to stop; a second Ctrl-C interrupts at once."""

    def __enter__(self) -> StopSignal:
        self.received: signal.Signals | None = None
        self.previous = {}
        # only the main thread may install handlers; elsewhere signals keep their meaning
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(
            f"\n{self.received.name}: finishing the step and saving; once more to quit at once",
            file=sys.stderr,
            flush=True,
        )


def _belongs(record: dict[str, Any], step: int) -> bool:
    return record["step"] <= step if record["kind"] == "eval" else record["step"] < step


def _figure(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "effective_rank" else f"{100 * value:.1f} %"
