"""What instructions cost on a GPU: their kind, the pipe they go through, and its rate.

Rates are peaks for one SM (CU on AMD) and clock. Where they come from:
- FP32, integer, compare and select, special function, shuffle, conversion: table "Throughput of
  Native Arithmetic Instructions" of the CUDA C++ Programming Guide, columns 8.0, 9.0 and 10.0.
  Which pipe: "Pipelines" in the Nsight Compute profiling guide. Selects, comparisons, minima, logic
  and integer sums share the ALU; FP32 and half arithmetic share the FMA pipe with integer products.
- Tensor cores: dense peak over SMs and boost clock. A100 white paper: 312 TFLOP/s, 108 SMs, 1410
  MHz, that is 1024 multiply-adds in 16 bits. H100 white paper: 989.4 TFLOP/s, 132 SMs, 1830 MHz:
  2048. B200 data sheet: 2250 TFLOP/s, 148 SMs at about 1850 MHz: 4096. TF32 half of each.
- Shared memory: 128 bytes; without products on tensor cores, where lanes read the same words, an
  access at a time at best. HGMMA and UTCHMMA read their operands from there: A as well, unless it
  is in registers. That makes HGMMA of fewer than 64 columns slower than tensor cores are.
- Issue: four schedulers, an instruction of a warp each.
- MI300X: CDNA3 white paper, 1307.4 TFLOP/s in 16 bits on 304 CUs at 2100 MHz: 1024 multiply-adds;
  64 lanes for vector instructions, exponentials at a quarter of that in the same pipe; 128 bytes of
  LDS.
mma.sync (HMMA) does not reach these rates on sm_90; they are bounds.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.machine_code import Instruction, Work

KINDS = (
    "tensor",
    "mufu",
    "fp32",
    "select",
    "convert",
    "integer",
    "global",
    "local",
    "shared",
    "shuffle",
    "sync",
    "control",
)

# pattern of the whole opcode, kind in the report, unit with a rate
SASS_KINDS = [
    (r"(?:H|HG|QG|I|IG|D)MMA\b.*|UTC\w*MMA\b.*", "tensor", "tensor"),
    (r"MUFU\b.*", "mufu", "mufu"),
    (r"(?:FFMA|FADD|FMUL)2\b.*", "fp32", "fma2"),
    (r"(?:FFMA|FADD|FMUL|FHFMA|FHADD|FSWZADD)\b.*", "fp32", "fma"),
    (r"(?:FSEL|FMNMX3?|FSETP?|FCHK)\b.*", "select", "alu"),
    (r"(?:F2F|F2I|I2F|FRND)\b.*", "convert", "mufu"),
    (r"(?:HADD2|HMUL2|HFMA2)\b.*", "convert", "fma"),
    (r"(?:F2FP|I2FP|PRMT|HMNMX2|HSETP?2)\b.*", "convert", "alu"),
    (r"(?:LDG|STG|LDGSTS|UTMA\w*|UBLK\w*|RED|REDG|ATOMG?|LD|ST)\b.*", "global", "lsu"),
    (r"(?:LDL|STL)\b.*", "local", "lsu"),
    (r"(?:LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM)\b.*", "shared", "lsu"),
    (r"(?:SHFL|REDUX)\b.*", "shuffle", "shuffle"),
    (
        r"(?:BAR|DEPBAR|LDGDEPBAR|LDTMDEPBAR|MEMBAR|FENCE|WARPGROUP|WARPSYNC|SYNCS|UTCBAR|ARRIVES|"
        r"B(?:SSY|SYNC|REAK)|ERRBAR|CCTL|NANOSLEEP|UTMACMDFLUSH)\b.*",
        "sync",
        "other",
    ),
    (r"(?:BRA|BRX|EXIT|RET|CALL|NOP|BPT|YIELD|JMP|JMX)\b.*", "control", "other"),
    (r"IMAD\b.*", "integer", "imad"),
    # the uniform datapath, and constants: beside the pipes above, but issued
    (r"(?:U[A-Z0-9]+|R2UR|LDC|ULDC|LDCU|S2U?R|CS2R|ELECT|VOTEU?)\b.*", "integer", "other"),
    (r".*", "integer", "alu"),
]
AMD_KINDS = [
    (r"v_mfma_.*", "tensor", "tensor"),
    (r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_.*", "mufu", "mufu"),
    (r"v_(?:pk_)?(?:fma|fmac|fmaak|fmamk|mul|add|sub|subrev|mac|mad)_f32.*", "fp32", "fma"),
    (r"v_(?:max3?|min3?|med3|cmp_\w+|cmpx_\w+)_f32.*|v_cndmask_.*", "select", "alu"),
    (r"v_(?:cvt|pack|perm|alignb|pk)\w*", "convert", "alu"),
    (r"ds_(?:b?permute|swizzle)\w*|v_(?:mov|add)\w*_dpp.*", "shuffle", "lsu"),
    (r"ds_.*", "shared", "lsu"),
    (r"(?:global|buffer|flat)_.*", "global", "lsu"),
    (r"scratch_.*|v_(?:write|read)lane_.*", "local", "lsu"),
    (r"s_(?:barrier|waitcnt\w*|sleep)", "sync", "other"),
    (r"s_(?:cbranch\w*|branch|nop|endpgm|setprio|setpc\w*|trap)", "control", "other"),
    (r"s_.*", "integer", "other"),
    (r".*", "integer", "alu"),
]


@dataclass(frozen=True)
class Gpu:
    """Limits of one SM. `rates`: unit to its pipe and the lanes it serves in a clock."""

    warp: int
    fma16: int
    rates: dict[str, tuple[str, int]]
    issue: int | None
    shared: int
    shared_of_block: int
    registers: int
    warps: int
    blocks: int


def _nvidia(fma16: int, fma: int, shared: int) -> Gpu:
    rates = {"mufu": ("mufu", 16), "fma": ("fma", fma), "fma2": ("fma", fma // 2)}
    rates |= {"imad": ("fma", 64), "alu": ("alu", 64), "shuffle": ("shared", 32)}
    # the driver takes 1 KiB of shared memory for each block
    return Gpu(32, fma16, rates, 4, shared << 10, (shared - 1) << 10, 65536, 64, 32)


GPUS = {
    "sm_80": _nvidia(1024, 64, 164),
    "sm_90": _nvidia(2048, 128, 228),
    "sm_100": _nvidia(4096, 128, 228),
    "gfx942": Gpu(
        64,
        1024,
        {"mufu": ("valu", 16), "fma": ("valu", 64), "alu": ("valu", 64)},
        None,
        64 << 10,
        64 << 10,
        4 * 512 * 64,
        32,
        32,
    ),
}
SHARED_BYTES_IN_A_CLOCK = 128
TENSOR_MEMORY_COLUMNS = 512


def kind_and_unit(instruction: Instruction) -> tuple[str, str]:
    """The kind of the report, and the unit that runs the instruction."""
    if instruction.predicate == "@!PT":
        return "control", "other"
    table = SASS_KINDS if instruction.opcode[0].isupper() else AMD_KINDS
    return next(found[1:] for found in table if re.fullmatch(found[0], instruction.opcode))


def work_of(instruction: Instruction) -> Work:
    """What tells a hot path from a cold one."""
    kind, _ = kind_and_unit(instruction)
    exponential = bool(re.match(r"MUFU\.EX2|v_exp_f32", instruction.opcode))
    return Work(kind == "tensor", exponential, kind == "global")


class Product(NamedTuple):
    """What one matrix instruction multiplies: (rows, depth) by (depth, columns)."""

    rows: int
    columns: int
    depth: int
    bits: int  # of an operand
    threads: int  # that issue it as one; 0: an elected one for the block
    left_in_shared: bool


def product(instruction: Instruction, code: list[Instruction]) -> Product:
    """Shape of a matrix instruction. That of UTCHMMA is in a descriptor: a constant in `code`."""
    opcode, operands = instruction.opcode, instruction.operands
    if found := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)_?(?:\d+b_)?(\w+)", opcode):
        bits = 32 if found[4] in ("f32", "xf32") else 16
        return Product(*map(int, found.group(1, 2, 3)), bits, 64, False)
    if opcode.startswith("UTC"):
        register = re.search(r"idesc\[(\w+)\]", operands)[1]
        before = [i for i in code if i.address < instruction.address]
        move = re.compile(rf"{register}, (0x[0-9a-f]+)")
        value = next(
            int(found[1], 16)
            for i in reversed(before)
            if i.opcode.startswith("UMOV") and (found := move.match(i.operands))
        )
        rows, columns = (value >> 24 & 31) << 4, (value >> 17 & 63) << 3
        bits = 32 if value >> 7 & 7 == 2 else 16
        return Product(rows, columns, 256 // bits, bits, 0, operands.startswith("gdesc"))
    bits = 32 if "TF32" in opcode else 16
    if found := re.match(r"\w+\.(\d+)x(\d+)x(\d+)", opcode):
        in_shared = operands.split(", ")[1].startswith("gdesc")
        return Product(*map(int, found.groups()), bits, 128, in_shared)
    # HMMA.16816: the sizes run together
    digits = re.search(r"\.(16)(8)(\d+)", opcode)
    return Product(*map(int, digits.groups()), bits, 32, False)


def bytes_of(instruction: Instruction, warp: int) -> int:
    """Bytes that a load or store moves for a warp; 0 where a descriptor says how many."""
    opcode = instruction.opcode
    if opcode.startswith(("UTMA", "UBLK", "LDTM", "STTM")):
        return 0
    if found := re.match(r"(?:LDSM|STSM)\.\w+\.\w+(?:\.(\d))?", opcode):
        return 128 * int(found[1] or 1)
    if found := re.search(r"_b(\d+)$|_dword(?:x(\d))?$", opcode):
        lane = int(found[1]) // 8 if found[1] else 4 * int(found[2] or 1)
        return warp * lane * (2 if re.match(r"ds_(?:read|write)2", opcode) else 1)
    if found := re.search(r"\.[US]?(8|16|64|128)\b", opcode):
        return warp * int(found[1]) // 8
    return warp * 4


def clocks(path: list[tuple[Instruction, float]], code: list[Instruction], gpu: Gpu, warps: int):
    """Clocks of one SM that each pipe needs when all warps of a block go along `path`.

    Returns (clocks by pipe, multiply-adds on tensor cores, bytes loaded from global memory).
    """
    needed: Counter[str] = Counter()
    products = loaded = 0.0
    # lanes that multiply the same row read the same words
    scalar = not any(work_of(instruction).tensor for instruction, _ in path)
    for instruction, count in path:
        kind, unit = kind_and_unit(instruction)
        if unit == "tensor":
            one = product(instruction, code)
            times = count * (warps * gpu.warp / one.threads if one.threads else 1)
            done = times * one.rows * one.columns * one.depth
            products += done
            needed["tensor"] += done / (gpu.fma16 * 16 / one.bits)
            if one.threads in (0, 128):
                read = one.columns + (one.rows if one.left_in_shared else 0)
                read *= one.depth * one.bits // 8
                needed["shared"] += times * read / SHARED_BYTES_IN_A_CLOCK
        elif unit in gpu.rates:
            pipe, lanes = gpu.rates[unit]
            needed[pipe] += count * warps * gpu.warp / lanes
        elif unit == "lsu":
            moved = count * warps * bytes_of(instruction, gpu.warp)
            if scalar and kind == "shared":
                moved = count * warps * min(bytes_of(instruction, gpu.warp), 4 * gpu.warp)
            if kind == "shared" or kind == "shuffle" or instruction.opcode.startswith("LDGSTS"):
                needed["shared"] += moved / SHARED_BYTES_IN_A_CLOCK
            if re.match(r"LDG|(?:global|buffer)_load", instruction.opcode):
                loaded += moved
        if gpu.issue:
            needed["issue"] += count * warps / gpu.issue
    return dict(needed), products, loaded


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int, tensor_memory: int = 0):
    """(blocks, warps) that an SM holds, and what stops it from holding more."""
    if gpu.warp == 64:
        # 512 registers for each thread of a SIMD, in eights, up to 8 waves
        by_registers = 4 * min(8, 512 // max(8, -(-registers // 8) * 8)) // warps
        by_shared = gpu.shared // shared if shared else gpu.blocks
    else:
        of_a_warp = -(-registers // 8) * 8 * gpu.warp
        by_registers = gpu.registers // of_a_warp // 4 * 4 // warps
        by_shared = gpu.shared // (shared + 1024)
    limits = {"registers": by_registers, "shared memory": by_shared, "warps": gpu.warps // warps}
    limits["blocks"] = gpu.blocks
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory
    limit = min(limits, key=limits.get)
    return limits[limit], limits[limit] * warps, limit
