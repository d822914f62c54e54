"""Views whose kernels are compiled without a GPU, and what a view costs by their machine code.

An estimate of issue slots and pipes, not a measurement: clocks of one multiprocessor for one view
of a recipe, if no warp ever waited. Colour operations count half in either pass, times the
probability of a jitter; the blur counts with its probability, and with the mean number of taps.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch

from benchmarks import machine_code
from benchmarks.codegen_report import Kernel
from benchmarks.gpu_goals import PUBLISHED_RATES
from benchmarks.machine_code import HotPath, Loop, Work
from benchmarks.pipes import KINDS, bytes_of, clocks, kind_and_unit
from simclr_kernels import augment_triton
from simclr_kernels.augment_blur_triton import COLUMNS, REACH
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages

SOURCE_BYTES = 4 * 16  # that a pixel is made of, in words


class ViewCall(NamedTuple):
    """Two views of a batch: the kernels that their launchers start are compiled."""

    recipe: str
    size: int
    dtype: torch.dtype = torch.float16
    channels_last: bool = False
    packed: bool = False

    def __str__(self) -> str:
        words = [self.recipe, str(self.size), str(self.dtype).removeprefix("torch.")]
        words += ["channels last"] * self.channels_last + ["packed"] * self.packed
        return " ".join(words)

    @property
    def config(self) -> AugmentConfig:
        return getattr(AugmentConfig, self.recipe)(self.size)

    def launch(self, target: str) -> None:
        index = torch.arange(64)
        # sizes and an epoch on the device, or numbers
        if self.packed:
            packed = torch.empty(64, dtype=torch.uint8), index, torch.empty(64, 2).int()
            images, epoch = PackedImages(*packed, checked=True), torch.tensor(0)
        else:
            images, epoch = torch.empty(64, 48, 64, 3, dtype=torch.uint8), 3
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (128, 3, self.size, self.size)
        views = torch.empty(shape, dtype=self.dtype, memory_format=layout)
        augment_triton.fill_two_views(views, images, self.config, 5, epoch, index)

    def on_tensor_cores(self, target: str) -> bool:
        return False


LARGE = ViewCall("simclr", 224, packed=True)
SMALL = ViewCall("cifar10", 32)
VIEW_CALLS = {
    "sm_80": [LARGE, SMALL],
    "sm_90": [
        LARGE,
        LARGE._replace(channels_last=True, packed=False),
        LARGE._replace(dtype=torch.float32),
        ViewCall("byol", 224, torch.bfloat16, channels_last=True),
        SMALL,
        SMALL._replace(channels_last=True, packed=True),
        ViewCall("simclr_v1", 32, torch.float32),
        ViewCall("simclr", 16),
    ],
    "sm_100": [LARGE._replace(channels_last=True), SMALL],
    "gfx942": [LARGE._replace(channels_last=True), SMALL],
}


def mean_taps(config: AugmentConfig, radius: int) -> float:
    """Taps on either side of a blurred view, over the sigmas of a recipe."""
    low, high = config.sigma_px
    sigmas = torch.linspace(low, high, 1001, dtype=torch.float64)
    return (sigmas * REACH.value).ceil().clamp(max=radius).mean().item()


def _work_of(instruction) -> Work:
    return Work(memory=bytes_of(instruction, 1) * (kind_and_unit(instruction)[0] == "global"))


def _loads(kernel: Kernel, loop: Loop) -> bool:
    members = (i for block in loop.members for i in kernel.graph[block].instructions)
    return any(instruction.opcode.startswith("LDG") for instruction in members)


def path_of_a_program(kernel: Kernel, name: str, call: ViewCall) -> HotPath:
    """The instructions that a program is expected to pass, and how often."""
    constants, config = kernel.constants, call.config
    taps = mean_taps(config, constants.get("RADIUS", 0))
    blurred = sum(config.blur) / 2
    around, whole = machine_code.whole(kernel.graph)
    turns: dict[int, float] = {}

    def note(loop: Loop, count: float) -> None:
        turns[kernel.graph[loop.header].instructions[0].address] = count

    jitters = []
    for loop in whole.inner:
        inner = [loop, *(other for other in kernel.loops if other.members < loop.members)]
        jitters += [other for other in inner if not _loads(kernel, other)]
        note(loop, 0)
        if name == "_crop_kernel" and _loads(kernel, loop):
            note(loop, min(constants["STRIP"], call.size) / constants["ROWS"])
        elif name == "_color_kernel":
            pixels = min(constants["ROWS"], call.size) * call.size
            if inner[-1] is loop or not any(_loads(kernel, other) for other in inner[1:]):
                note(loop, pixels / constants["BLOCK"])
            else:
                # channels, tiles of pixels unless there is only one, taps
                tile = min(constants["BLUR_BLOCK"], COLUMNS.value * constants["ROWS"])
                for other in inner[1:]:
                    note(other, pixels / tile if other.inner else taps)
                note(loop, 3 * blurred * (1 if loop.inner[0].inner else pixels / tile))
        elif name == "_blur_kernel":
            note(loop, taps)
    for loop in jitters:
        note(loop, 0)
    path = machine_code.hot_path(
        around, whole, _work_of, lambda body: turns.get(body[0][0].address, 1) if body else 1
    )
    if name in ("_crop_kernel", "_color_kernel"):
        outer = (
            min(constants["STRIP"], call.size) / constants["ROWS"] if "STRIP" in constants else 0
        )
        outer = outer or min(constants["ROWS"], call.size) * call.size / constants["BLOCK"]
        share = config.jitter / 2 * outer
        path += [
            (i, share)
            for loop in jitters
            for block in loop.members
            for i in kernel.graph[block].instructions
        ]
    if name == "_blur_kernel":
        path = [(instruction, count * blurred) for instruction, count in path]
    return path


def view_costs(kernel: Kernel, name: str, call: ViewCall) -> dict[str, Any] | None:
    """Instructions of a warp by kind, and clocks by pipe, for one view.

    None for an AMD GPU, and where the compiler has turned the loop over rows inside out, as for
    sm_80: a path of expected turns is then not to be had.
    """
    if kernel.gpu.warp != 32 or name == "_sample_kernel":
        return None
    constants, size = kernel.constants, call.size
    if name == "_crop_kernel":
        programs = -(-size // constants["COLUMNS"]) * (size / min(constants["STRIP"], size))
    elif name == "_color_kernel":
        programs = size / min(constants["ROWS"], size)
    else:
        programs = size * size / constants["BLOCK"]
    path = path_of_a_program(kernel, name, call)
    needed, _, loaded = clocks(path, kernel.code, kernel.gpu, kernel.warps)
    if name == "_crop_kernel" and programs * loaded < SOURCE_BYTES * size * size:
        return None
    kinds: Counter[str] = Counter()
    for instruction, count in path:
        kinds[kind_and_unit(instruction)[0]] += count * programs * kernel.warps
    accesses = sum(count for i, count in path if kind_and_unit(i)[0] == "global")
    # one access of a warp a clock at best
    needed["lsu"] = accesses * kernel.warps
    return {
        "instructions": {kind: round(kinds[kind]) for kind in KINDS}
        | {"all": round(kinds.total())},
        "clocks": {pipe: round(number * programs) for pipe, number in needed.items()},
    }


def view_summary(records: list[dict[str, Any]]) -> str:
    """A line for each pass and call, and what the whole would allow on a published GPU."""
    pipes = ("fma", "alu", "mufu", "lsu", "shared", "issue")
    lines = [
        f"{'estimated clocks of a multiprocessor for a view':62}"
        f"{'regs':>5}{'warps':>6}{'inst/px':>8}" + "".join(f"{pipe:>8}" for pipe in pipes)
    ]
    totals: dict[tuple[str, str], Counter[str]] = {}
    known = {
        (r["target"], r["call"]) for r in records if r["kernel"] == "_crop_kernel" and r["view"]
    }
    for record in records:
        cost = record.get("view")
        if not cost or (record["target"], record["call"]) not in known:
            continue
        total = totals.setdefault((record["target"], record["call"]), Counter())
        total.update(cost["clocks"])
        name = f"{record['target']} {record['kernel']} {record['call']}"
        each = 32 * cost["instructions"]["all"] / record["size"] ** 2
        lines.append(
            f"{name:62}{record['registers']:5}{record['warps_on_an_sm']:6}{each:8.0f}"
            + "".join(f"{cost['clocks'].get(pipe, 0):8.0f}" for pipe in pipes)
        )
    gpus = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
    for (target, call), total in totals.items():
        rate = PUBLISHED_RATES[gpus[target]][3] / 16  # multiprocessors times clock
        pipe, most = max(total.items(), key=lambda item: item[1])
        lines.append(
            f"{target} {call}: {most:.0f} clocks a view, bound by {pipe}: at most "
            f"{rate / most / 2:,.0f} images/s with two views on an {gpus[target]} "
            "(estimate from machine code, nothing measured)"
        )
    return "\n".join(lines)
