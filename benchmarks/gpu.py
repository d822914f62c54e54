"""`python -m benchmarks.gpu`: verify loss and views on this GPU, then measure them and their peers.

Under 8 minutes, in three parts with a budget each: every path against float64 (`gpu_checks.py`),
time and memory of the loss against 2N, and the rate of views, beside the peers that are installed,
and the tiles around the shipped ones (`gpu_tiles.py`, `gpu_views.py`). Prints which of the goals
are met and writes `<device>-<date>.json`, and a figure of that name, into benchmarks/results. Exit
code 1 if a check failed or there is no GPU.
`--dry-run` goes the same way on a CPU with tiny sizes, to try the program itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_tiles, gpu_views
from benchmarks.contenders import (
    TAU,
    WHAT,
    Size,
    loss_contenders,
    measurement,
)
from benchmarks.device_checks import memory_bound
from benchmarks.gpu_checks import checks, part_of
from benchmarks.gpu_goals import goals, roofline_seconds
from benchmarks.measure import machine, peak_memory, race, timed
from benchmarks.plot_ntxent import save_plot, table
from benchmarks.view_contenders import ViewSize
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.ntxent_tile_table import TABLES, architecture_of

ROOT = Path(__file__).resolve().parents[1]
FORWARD, BOTH = WHAT
FEW = ("ours", "eager")
# but for torch.compile, which takes seconds at every size
PEERS_AT_ONCE = ("row-blocks", "lightly", "solo-learn", "pml-supcon", "inf-cl", "cce")


class Plan(NamedTuple):
    """The sizes of one run: 2N that the goals speak of, all 2N of the plot, all D."""

    device: str
    small: int
    target: int
    large: int
    huge: int
    rows: tuple[int, ...]
    features: tuple[int, ...]
    names: tuple[str, ...]
    views: tuple[ViewSize, ...]
    workers: int

    def sizes(self) -> list[tuple[Size, str, tuple[str, ...]]]:
        """(size, what, names) to race, what matters most first."""
        found = []
        for rows in (self.target, self.small):
            for dtype in ("bfloat16", "tf32"):
                found.append((Size(rows, 128, dtype), BOTH, self.names))
        found.append((Size(self.large, 128, "bfloat16"), BOTH, self.names))
        for rows in self.rows:
            if rows not in (self.small, self.target, self.large):
                found.append((Size(rows, 128, "bfloat16"), BOTH, self.names))
        found += [(Size(self.target, d, "bfloat16"), BOTH, FEW) for d in self.features if d != 128]
        found.append((Size(self.target, 128, "float32"), BOTH, FEW))
        found += [(Size(rows, 128, "bfloat16"), FORWARD, FEW) for rows in (self.target, self.large)]
        return found


GPU_PLAN = Plan(
    device="cuda",
    small=512,
    target=16384,
    large=65536,
    huge=1 << 20,
    rows=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    features=(64, 128, 256, 512, 1024, 2048),
    names=(*FEW, "compile", *PEERS_AT_ONCE),
    views=gpu_views.GPU_SIZES,
    workers=12,
)
DRY_PLAN = Plan(
    device="cpu",
    small=32,
    target=64,
    large=128,
    huge=256,
    rows=(32, 64, 96, 128),
    features=(16, 128),
    names=(*FEW, *PEERS_AT_ONCE),
    views=gpu_views.DRY_SIZES,
    workers=1,
)


def say(line: str) -> None:
    """Prints a line at once: some parts take a minute."""
    print(line, flush=True)


def verify(plan: Plan, seconds: float) -> list[dict[str, Any]]:
    """Runs gpu_checks in processes of their own; a check that was not reached counts as failed."""
    names = [name for name, _ in checks(plan.device)]

    def run_part(part):
        command = [sys.executable, "-m", "benchmarks.gpu_checks", "--device", plan.device]
        command += ["--part", str(part), str(plan.workers)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            errors += f"stopped after {seconds:.0f} s"
        results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        reason = f"not reached, its process ended with: {errors.strip()[-300:]}"
        missed = part_of(names, part, plan.workers)[len(results) :]
        return results + [{"check": name, "failure": reason} for name in missed]

    with ThreadPoolExecutor(plan.workers) as pool:
        results = [r for part in pool.map(run_part, range(plan.workers)) for r in part]
    for result in results:
        if result["failure"]:
            say(f"  FAILED {result['check']}: {result['failure']}")
    failed = sum(bool(result["failure"]) for result in results)
    say(f"  {len(results) - failed} of {len(results)} hold")
    return results


def measure(plan: Plan, deadline: float) -> list[dict[str, Any]]:
    """Races ours against the peers, size by size; see contenders.measurement."""
    records = [huge_batch(plan)]
    for size, what, names in plan.sizes():
        if time.monotonic() > deadline:
            say(f"  {what}, {size}: no time left")
            continue
        contenders = loss_contenders(names, size, what, plan.device)
        results = race(contenders, plan.device, seconds_each=0.2)
        del contenders
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        parts = []
        for name, result in results.items():
            record = measurement(name, result, size, what, plan.device)
            if "missing" not in record:
                record["roofline_share"] = share_of_roofline(record, plan.device)
                parts.append(f"{record['label']} {record['seconds'] * 1e3:.3f} ms")
            elif result.wrong:
                parts.append(f"{record['label']} WRONG ({result.wrong})")
            records.append(record)
        say(f"  {what}, {size}: {', '.join(parts)}")
    return records


def huge_batch(plan: Plan) -> dict[str, Any]:
    """One forward and backward of more rows than any matrix would fit for: time and memory."""
    size = Size(plan.huge, 128, "bfloat16")
    record = {"name": "ours", "label": "ours", "what": BOTH, **size._asdict()}
    z = size.z(plan.device).requires_grad_()

    def step():
        return torch.autograd.grad(fused_nt_xent(z, TAU), z)

    try:
        with peak_memory(plan.device) as peak:
            (dz,) = step()
        finite = bool(dz.isfinite().all() and dz.count_nonzero())
        seconds, wall, _ = timed(step, plan.device)
    except torch.cuda.OutOfMemoryError:
        say(f"  {size}: out of memory")
        return record | {"missing": "out of memory"}
    flops = 5.0 * size.rows**2 * size.features
    bound = memory_bound(*size, plan.device)
    say(
        f"  {size}: {seconds:.3f} s, {flops / seconds / 1e12:.3g} TFLOP/s, "
        f"{peak.extra_bytes / 2**20:.0f} MiB (O(M D) bound {bound >> 20})"
    )
    record |= {"seconds": seconds, "wall_seconds": wall, "turns": 1, "flops": flops}
    record |= {"peak_mib": peak.extra_bytes / 2**20, "finite": finite, "bound_mib": bound / 2**20}
    record["gflops_per_second"] = flops / seconds / 1e9
    return record | {"roofline_share": share_of_roofline(record, plan.device)}


def share_of_roofline(record: dict[str, Any], device: str) -> float | None:
    """Of the time that the GPU's published rates allow at best; None for an unknown GPU."""
    if device != "cuda":
        return None
    least = roofline_seconds(torch.cuda.get_device_name(), record)
    return least and least / record["seconds"]


def choose_tiles(plan: Plan, deadline: float) -> list[dict[str, Any]]:
    """Searches around the tables of the Triton kernels; see gpu_tiles.search."""
    table = TABLES[architecture_of(torch.device(plan.device))]
    if plan.workers > 1:
        seconds = 0.5 * (deadline - time.monotonic())
        gpu_tiles.compile_ahead(table, plan.target, plan.device, seconds, plan.workers)
    checked_rows = min(gpu_tiles.CHECKED_ROWS, plan.large)
    return gpu_tiles.search(table, plan.target, plan.device, deadline, checked_rows, say=say)


def run(plan: Plan, out: Path, seconds: float) -> int:
    """All parts; returns the exit code. The results are written after each part."""
    start = time.monotonic()
    about = machine(plan.device) | {"date": datetime.date.today().isoformat()}
    say(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['commit']}")
    out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", about["device"]).strip("-")
    path = out / f"{slug}-{about['date']}.json"
    results: dict[str, Any] = {"machine": about}

    def keep(part, found):
        results[part] = found
        path.write_text(json.dumps(results, indent=1) + "\n")
        say(f"  {time.monotonic() - start:.0f} s so far")
        return found

    say(f"1. every path against float64, {0.4 * seconds:.0f} s at most")
    checked = keep("checks", verify(plan, 0.4 * seconds))
    say("2. time and memory")
    records = keep("measurements", measure(plan, start + 0.65 * seconds))
    deadline = start + 0.75 * seconds
    views = keep("views", gpu_views.measure_views(plan.views, plan.device, deadline, say))
    met = keep("goals", goals(plan, records) + gpu_views.view_goals(views))
    save_plot(records, path.with_suffix(".png"), about["device"])
    say("3. tiles")
    keep("tiles", choose_tiles(plan, start + 0.85 * seconds))
    # on a CPU no view takes these tiles
    sizes, deadline = plan.views if plan.device == "cuda" else (), start + 0.95 * seconds
    keep("view_tiles", gpu_views.search_view_tiles(sizes, plan.device, deadline, say))
    say("\n" + table(records) + "\n")
    for goal in met:
        say(f"{goal['state']:>12}  {goal['goal']}: {goal['measured']}")
    say(f"\n{path} and .png")
    return int(any(result["failure"] for result in checked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all parts together")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU that torch can use; --dry-run tries it on the CPU")
    plan = DRY_PLAN if arguments.dry_run else GPU_PLAN
    if arguments.dry_run:
        torch.set_num_threads(1)
    sys.exit(run(plan, arguments.out, arguments.seconds))


if __name__ == "__main__":
    main()
