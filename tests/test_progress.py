import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from simclr_kernels.progress import PHASES, Laps, MetricsLog, Progress, StopSignal


def step(number, **more):
    return {"kind": "step", "step": number} | more


def test_a_log_opened_again_keeps_what_the_checkpoint_knows_and_drops_a_cut_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for number in range(4):
            log.write(step(number))
        log.write({"kind": "eval", "step": 4})
        log.write(step(4))
    with open(path, "a") as file:
        file.write('{"kind": "step", "st')
    with MetricsLog(path, 4) as log:
        log.write(step(4, again=True))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [*map(step, range(4)), {"kind": "eval", "step": 4}, step(4, again=True)]


def test_every_line_of_the_log_is_strict_json(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl", 0) as log:
        log.write(step(0, loss=float("nan"), norm=float("inf"), rate=0.5))

    def refuse(name):
        raise AssertionError(name)

    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert (record["loss"], record["norm"], record["rate"]) == (None, None, 0.5)


def test_without_a_terminal_progress_is_plain_lines_with_shares(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "INTERVAL", 0.0)
    seconds = dict.fromkeys(PHASES, 0.0) | {"views": 0.25, "encoder": 0.75}
    with Progress("train", 2, 0, 64) as progress:
        progress.update(1, 3.5, seconds)
        progress.note({"effective_rank": 12.34, "knn": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: step 1/2: loss 3.500, ")
    assert "(data 0% views 25% encoder 75% loss 0% optimizer 0%)" in lines[0]
    assert lines[1] == "train: step 1/2: effective_rank 12.3, knn 50.0 %"


def test_laps_split_a_step_into_its_phases():
    pipeline = SimpleNamespace(seconds={"data": 5.0, "views": 9.0})
    laps = Laps(torch.device("cpu"), pipeline)
    pipeline.seconds["data"] += 0.01
    time.sleep(0.03)
    laps.fetched()
    time.sleep(0.02)
    laps.mark("encoder")
    laps.mark("loss")
    time.sleep(0.01)
    laps.mark("encoder")
    seconds = laps.read()
    assert seconds["data"] == pytest.approx(0.01)
    assert seconds["views"] >= 0.015
    assert seconds["encoder"] >= 0.03
    assert sum(seconds.values()) <= laps.total
    laps.restart()
    assert sum(laps.seconds.values()) == 0


def test_on_a_gpu_views_are_what_the_pipeline_books_for_them(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return True

        def elapsed_time(self, end):
            return 40.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pipeline = SimpleNamespace(seconds={"data": 5.0, "views": 9.0})
    laps = Laps(torch.device("cuda"), pipeline)
    pipeline.seconds["views"] += 0.25  # beside the encoder of the step before: no time passes here
    laps.fetched()
    laps.mark("encoder")
    seconds = laps.read()
    assert (seconds["data"], seconds["views"], seconds["encoder"]) == (0.0, 0.25, 0.04)


def test_a_signal_is_noted_once_and_a_second_interrupt_ends_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "SIGTERM: finishing the step and saving" in capsys.readouterr().err


def test_outside_the_main_thread_signals_keep_their_meaning():
    handlers = []

    def enter():
        with StopSignal():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [before]
