"""The commands: `simclr-kernels demo | train | eval | views | doctor`.

Settings of a training are the fields of TrainConfig, given as flags, in a YAML file (`--config`),
or both; `train --print_config` prints them all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from simclr_kernels import __version__
from simclr_kernels.checkpoint import DamagedCheckpoint, write_atomically
from simclr_kernels.compare import PIPELINES, Difference
from simclr_kernels.config import TrainConfig, ViewsConfig
from simclr_kernels.data import decode_image, open_source, open_splits
from simclr_kernels.demo import demo
from simclr_kernels.doctor import doctor
from simclr_kernels.evaluate import eval_batches
from simclr_kernels.models import build_encoder
from simclr_kernels.pipelines.quarantine import TooManyUnreadable
from simclr_kernels.report import table
from simclr_kernels.runs import augment_config, fit, frozen_accuracy, load_encoder
from simclr_kernels.trainer import NonFiniteTraining
from simclr_kernels.view_sheets import draw_comparison, draw_contact_sheet, draw_gallery

VIEWS = """Contact sheet of an image and its views; --compare: pipelines side by side on it, with
their difference from the reference; --gallery: the image under every preset."""

# what a user can cause: said in one line; anything else keeps its traceback
EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    NonFiniteTraining,
    DamagedCheckpoint,
    TooManyUnreadable,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status (130 and 143 after Ctrl-C and SIGTERM)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, commands = _parsers()
    try:
        chosen = parser.parse_args(_with_settings_of_the_run(arguments))
        _keep_heap()
        return commands[chosen.command](chosen[chosen.command])
    except EXPECTED as error:
        print(f"simclr-kernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _parsers() -> tuple[ArgumentParser, dict[str, Any]]:
    parser = ArgumentParser(prog="simclr-kernels", description=__doc__, version=__version__)
    commands = parser.add_subcommands(dest="command")

    demonstration = ArgumentParser(description="Train on shapes10, with the recipe and without.")
    demonstration.add_argument("--seeds", type=int, nargs="+", default=[0])
    demonstration.add_argument("--epochs", type=int | None, default=None, help="of each training")
    demonstration.add_argument("--run_dir", type=str | None, default=None)
    commands.add_subcommand("demo", demonstration)

    training = ArgumentParser(description="Train an encoder on images without labels.")
    training.add_argument("--config", action="config", help="YAML file of settings")
    training.add_class_arguments(TrainConfig)
    training.add_argument("--run_dir", type=str | None, default=None, help="default: runs/DATE")
    training.add_argument("--resume", type=str | None, default=None, help="run folder to continue")
    commands.add_subcommand("train", training)

    evaluation = ArgumentParser(description="kNN and linear probe of a trained encoder.")
    evaluation.add_argument("encoder", type=str, help="run folder or encoder.safetensors")
    evaluation.add_argument("--data", type=str, required=True, help="labelled images, as in train")
    evaluation.add_argument("--test_data", type=str | None, default=None, help="default: its split")
    evaluation.add_argument("--test_fraction", type=float, default=0.2, help="where it has none")
    evaluation.add_argument("--size", type=int | None, default=None, help="default: as trained")
    evaluation.add_argument("--k", type=int, default=20, help="neighbours")
    evaluation.add_argument("--labels_per_class", type=int | None, default=None)
    evaluation.add_argument("--baselines", type=bool, default=False, help="pixels, random weights")
    evaluation.add_argument("--batch_size", type=int, default=512)
    evaluation.add_argument("--device", type=str, default="auto")
    commands.add_subcommand("eval", evaluation)

    sheet = ArgumentParser(description=VIEWS)
    sheet.add_argument("images", type=str, nargs="+", help="image files")
    sheet.add_class_arguments(ViewsConfig)
    sheet.add_argument("--count", type=int, default=8, help="views of each image")
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--out", type=str, default="views", help="folder of the sheets")
    sheet.add_argument(
        "--compare",
        type=Literal[PIPELINES],
        nargs="*",
        default=None,
        help="these pipelines with the same parameters beside the reference (none named: all)",
    )
    sheet.add_argument(
        "--gallery", action="store_true", help="every operation, and views of every preset"
    )
    commands.add_subcommand("views", sheet)

    commands.add_subcommand("doctor", ArgumentParser(description="What runs where, and why."))
    return parser, {
        "demo": _demo,
        "train": lambda arguments: _train(training, arguments),
        "eval": _eval,
        "views": lambda arguments: _views(sheet, arguments),
        "doctor": lambda _: print(doctor()) or 0,
    }


def _with_settings_of_the_run(arguments: list[str]) -> list[str]:
    """`train --resume RUN ...` reads RUN/config.yaml first; flags after it may still change it."""
    if arguments[:1] != ["train"]:
        return arguments
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--resume" and (value or i + 1 < len(arguments)):
            settings = Path(value or arguments[i + 1]) / "config.yaml"
            if not settings.is_file():
                raise FileNotFoundError(f"nothing to resume: there is no {settings}")
            return ["train", "--config", str(settings), *arguments[1:]]
    return arguments


def _demo(arguments: Namespace) -> int:
    demo(arguments.seeds, arguments.run_dir or _new_folder("demo-"), arguments.epochs)
    return 0


def _train(parser: ArgumentParser, arguments: Namespace) -> int:
    config = _dataclass(TrainConfig, parser, arguments)
    if arguments.resume and arguments.run_dir:
        raise ValueError("--resume names the run folder already; leave out --run_dir")
    run_dir = Path(arguments.resume or arguments.run_dir or _new_folder(""))
    result = fit(config, run_dir, resume=arguments.resume is not None)
    figures = {
        name: f"{100 * result.metrics[name]:.1f} %"
        for name in ("knn", "linear_probe")
        if name in result.metrics
    }
    skipped = f", {result.skipped} of them skipped as not finite" if result.skipped else ""
    print(f"{result.steps} of {result.total_steps} steps{skipped} in {result.seconds:.0f} s")
    if figures:
        print("while training: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    print(f"in {run_dir}: " + ", ".join(sorted(path.name for path in run_dir.iterdir())))
    if result.stopped_by:
        print(f"stopped by {result.stopped_by}; simclr-kernels train --resume {run_dir} continues")
        return 128 + signal.Signals[result.stopped_by]
    print(f"next: simclr-kernels eval {run_dir} --data {config.data} (or other labelled images)")
    return 0


def _eval(arguments: Namespace) -> int:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, name, views = load_encoder(arguments.encoder, device)
    train_source, test_source = (
        open_splits(arguments.data, arguments.test_fraction)
        if arguments.test_data is None
        else (open_source(arguments.data), open_source(arguments.test_data))
    )
    print(f"{len(train_source)} training images, {len(test_source)} test images")
    batches = [
        eval_batches(
            source,
            arguments.size or views.size,
            arguments.batch_size,
            device,
            mean=views.mean,
            std=views.std,
            skip_unreadable=True,
        )
        for source in (train_source, test_source)
    ]
    few = arguments.labels_per_class
    options = {"k": arguments.k, "labels_per_class": few}
    rows = []
    if arguments.baselines:
        pixels = frozen_accuracy(nn.Flatten(), *batches, k=arguments.k, probe=False)
        torch.manual_seed(0)
        untrained = frozen_accuracy(build_encoder(name).to(device).eval(), *batches, **options)
        rows += [["raw pixels", pixels], [f"random {name}", untrained]]
    rows.append([arguments.encoder, frozen_accuracy(encoder, *batches, **options)])
    columns = {"knn": f"kNN, k = {arguments.k}", "linear_probe": "linear probe"}
    if few is not None:
        columns["linear_probe_few"] = f"{few} labels a class"
    cells = [
        [name, *(f"{100 * result[c]:.1f}" if c in result else "" for c in columns)]
        for name, result in rows
    ]
    print(table(cells, ["accuracy in %", *columns.values()]))
    for source, split in zip((train_source, test_source), batches, strict=True):
        for i in split.skipped:
            print(f"left out, unreadable: {source.name(i)}")
    if Path(arguments.encoder).is_dir():
        report = Path(arguments.encoder) / "eval.json"
        content = {"arguments": arguments.as_dict(), "accuracy": dict(rows)}
        write_atomically(report, json.dumps(content, indent=2).encode())
        print(f"in {report}")
    return 0


def _views(parser: ArgumentParser, arguments: Namespace) -> int:
    if arguments.gallery and arguments.compare is not None:
        raise ValueError("--gallery and --compare are two sheets; ask for one at a time")
    config = augment_config(_dataclass(ViewsConfig, parser, arguments))
    # mean and std would leave the range that a picture can show
    config = dataclasses.replace(config, mean=None, std=None)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(map(Path, arguments.images)):
        image = decode_image(path.read_bytes(), name=str(path))
        draw = {"count": arguments.count, "seed": arguments.seed, "index": index}
        if arguments.gallery:
            sheet = out / f"{path.stem}-gallery.png"
            presets = draw_gallery(image, config.size, sheet, **draw)
            print(f"{path}: {presets} presets, {arguments.count} views each, in {sheet}")
        elif arguments.compare is not None:
            sheet = out / f"{path.stem}-compare.png"
            pipelines = tuple(dict.fromkeys(arguments.compare)) or PIPELINES
            print(
                _comparison(path, sheet, *draw_comparison(image, config, pipelines, sheet, **draw))
            )
        else:
            sheet = out / f"{path.stem}-views.png"
            draw_contact_sheet(image, config, sheet, **draw)
            print(f"{path}: {arguments.count} views in {sheet}")
    return 0


def _comparison(
    path: Path,
    sheet: Path,
    differences: list[dict[str, Difference]],
    missing: dict[str, str],
) -> str:
    """What was compared and how far it is apart, what is missing, and where the picture is."""
    columns = list(differences[0])
    cells = [
        [f"view {k + 1}", *(f"{of[name].mean:.3f} ({of[name].p99:.2f})" for name in columns)]
        for k, of in enumerate(differences)
    ]
    lines = [f"{path}: difference from the reference in levels of 255, mean (99th percentile)"]
    lines.append(table(cells, ["", *columns]))
    lines += [f"{name} is left out: {reason}" for name, reason in missing.items()]
    makers = ", ".join(["reference", *columns])
    return "\n".join([*lines, f"{len(differences)} views by {makers} in {sheet}"])


def _dataclass(kind: type, parser: ArgumentParser, arguments: Namespace) -> Any:
    """The settings among a command's arguments."""
    values = parser.instantiate(arguments)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _new_folder(prefix: str) -> Path:
    return Path("runs") / f"{prefix}{datetime.now():%Y%m%d-%H%M%S}"


def _keep_heap() -> None:
    """Let glibc keep freed memory: giving pages back costs a third of a CPU training step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
