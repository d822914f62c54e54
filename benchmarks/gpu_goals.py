"""What the loss must show on an H200-class GPU, and the least time that a GPU's rates allow."""

from __future__ import annotations

from typing import Any

# dense tensor FLOP/s in bfloat16, TF32 and float32, and exponentials/s (multiprocessors x 16 a
# clock x boost clock), as published for the SXM boards
PUBLISHED_RATES = {
    "A100": (312e12, 156e12, 19.5e12, 108 * 16 * 1.41e9),
    "H100": (989e12, 494.5e12, 67e12, 132 * 16 * 1.83e9),
    "H200": (989e12, 494.5e12, 67e12, 132 * 16 * 1.83e9),
    "B200": (2250e12, 1125e12, 75e12, 148 * 16 * 1.85e9),
}
RATE_OF = {"bfloat16": 0, "tf32": 1, "float32": 2}


def roofline_seconds(device: str, record: dict[str, Any]) -> float | None:
    """The longer of the counted FLOPs and the exponentials at full rate; None: GPU unknown.

    Exponentials: half a matrix in forward, where each serves two rows, a whole one in backward.
    """
    rates = next((rates for name, rates in PUBLISHED_RATES.items() if name in device), None)
    if rates is None:
        return None
    exponentials = (0.5 if record["what"] == "forward" else 1.5) * record["rows"] ** 2
    return max(record["flops"] / rates[RATE_OF[record["dtype"]]], exponentials / rates[3])


def goals(plan, records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each goal of forward + backward at D = 128, what was measured, and whether it is met.

    Args:
        plan: a gpu.Plan: the 2N that the goals are about.
        records: of contenders.measurement, and of gpu.huge_batch.
    """
    timed = {
        (r["rows"], r["dtype"], r["name"]): r
        for r in records
        if r["what"] != "forward" and r["features"] == 128 and "seconds" in r
    }
    found = []

    def add(goal, measured, met):
        state = "not measured" if met is None else "met" if met else "NOT MET"
        found.append({"goal": goal, "measured": measured, "state": state})

    def ratio(rows, dtype, rival, least, clock="seconds"):
        goal = f"2N = {rows}, {dtype}: at least {least:g} times as fast as {rival}"
        ours, theirs = (timed.get((rows, dtype, name)) for name in ("ours", rival))
        if not (ours and theirs):
            missing = next(
                (
                    r.get("missing")
                    for r in records
                    if (r["rows"], r["dtype"], r["name"]) == (rows, dtype, rival)
                ),
                None,
            )
            add(goal, missing or "", None)
            return
        speed = theirs[clock] / ours[clock]
        times = f"{ours[clock] * 1e3:.3f} and {theirs[clock] * 1e3:.3f} ms"
        add(goal, f"{speed:.2f} times ({times})", speed >= least)

    ratio(plan.target, "bfloat16", "eager", 5)
    ratio(plan.target, "bfloat16", "compile", 3)
    ratio(plan.target, "tf32", "eager", 5)
    rate_goal = f"2N = {plan.large}, bfloat16: at least 350 TFLOP/s, counted as 2.5 U"
    if ours := timed.get((plan.large, "bfloat16", "ours")):
        rate = ours["flops"] / ours["seconds"] / 1e12
        share = ours.get("roofline_share")
        measured = f"{rate:.3g} TFLOP/s" + (f", {share:.0%} of the roofline" if share else "")
        add(rate_goal, measured, rate >= 350)
    else:
        add(rate_goal, "", None)
    memory_goal = f"2N = {plan.huge}: completes with O(M D) memory"
    if ours := timed.get((plan.huge, "bfloat16", "ours")):
        measured = f"{ours['seconds']:.3g} s, {ours['peak_mib']:.0f} MiB"
        add(memory_goal, measured, ours["finite"] and ours["peak_mib"] <= ours["bound_mib"])
    else:
        add(memory_goal, "", None)
    for dtype in ("bfloat16", "tf32"):
        ratio(plan.small, dtype, "eager", 1, clock="wall_seconds")
    return found
