"""What the machine code of one kernel says: as a record, as text, and against what was recorded."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from benchmarks import machine_code
from benchmarks.machine_code import Block, HotPath, Instruction, Loop, Work
from benchmarks.pipes import GPUS, KINDS, clocks, kind_and_unit, occupancy, product, work_of

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def _disassemble(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / command[0], *command[1:], file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassembly(asm: dict[str, Any]) -> str:
    """Machine code as text, with what it says of registers and spills."""
    if "cubin" not in asm:
        return asm["amdgcn"]
    return _disassemble(asm["cubin"], "cuobjdump", "-res-usage", "-sass")


def sources(asm: dict[str, Any]) -> machine_code.Sources:
    """Which line of Python each instruction comes from."""
    if "cubin" not in asm:
        return machine_code.amdgcn_sources(asm["amdgcn"])
    return machine_code.sass_sources(_disassemble(asm["cubin"], "nvdisasm", "-g", "-c"))


def resources(text: str) -> dict[str, int]:
    """Registers of a thread, and the bytes of memory that it spills them to."""
    if "amdgcn_target" in text:
        # scalar registers spill into lanes of vector registers, which is no memory
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        found = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names}
        spills = max(4 * found["vgpr_spill_count"], found["private_segment_fixed_size"])
        return {"registers": found["vgpr_count"], "spills": spills}
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


class Kernel:
    """The machine code of one kernel, with its hot loops: those that turn once a tile.

    Such a loop is an innermost one of those with exponentials outside of inner loops, and also one
    with products if the exponentials are in another: warps that specialise. A kernel with
    exponentials outside of loops is one tile. A loop is taken to make one tile a turn; a loop
    inside it goes over the features, BLOCK_D at a time. `warps` are those that run a tile.
    """

    def __init__(self, text: str, target: str, constants: dict[str, Any], warps: int):
        self.text, self.gpu, self.constants, self.warps = text, GPUS[target], constants, warps
        parse = machine_code.parse_amdgcn if self.gpu.warp == 64 else machine_code.parse_sass
        self.code = parse(text)
        self.graph: list[Block] = machine_code.blocks(self.code)
        self.loops = machine_code.loops(self.graph)
        # similarities in a tile; None for a kernel that goes row by row
        self.tile = None
        if "BLOCK_M" in constants and "BLOCK_N" in constants:
            self.tile = constants["BLOCK_M"] * constants["BLOCK_N"]
        self.features = constants.get("WIDTH", constants.get("D", 0))
        self.hot_loops = self._hot_loops() if self.tile else []

    def _hot_loops(self) -> list[tuple[Loop, HotPath]]:
        """Loops that turn once a tile and their paths: of most work, on the shortest path first."""
        found = [(loop, self._path(self.graph, loop)) for loop in self._innermost("exponentials")]
        if not found and any(work_of(instruction).exponentials for instruction in self.code):
            graph, loop = machine_code.whole(self.graph)
            found = [(loop, self._path(graph, loop))]
        if not any(work_of(instruction).tensor for _, path in found for instruction, _ in path):
            found += [(loop, self._path(self.graph, loop)) for loop in self._innermost("tensor")]

        def order(item: tuple[Loop, HotPath]) -> Work:
            work = Work()
            for instruction, times in item[1]:
                work = work.plus(work_of(instruction)._replace(memory=0, shortness=-1), times)
            # a running maximum has more exponentials, but they are no reason to come first
            return Work(work.exponentials > 0, work.tensor, 0, work.shortness)

        return sorted(found, key=order, reverse=True)

    def _innermost(self, what: str) -> list[Loop]:
        working = [loop for loop in self.loops if self._own_work(loop, what)]
        return [a for a in working if not any(b.members < a.members for b in working)]

    def _path(self, graph: list[Block], loop: Loop) -> HotPath:
        own = [i for block in sorted(loop.own()) for i in graph[block].instructions]
        exponentials = sum(work_of(instruction).exponentials for instruction in own)
        computed = exponentials * self.warps * self.gpu.warp / self.tile

        def turns(body: HotPath) -> float:
            _, products, _ = clocks(body, self.code, self.gpu, self.warps)
            products += self._scalar_products(body)
            chunk = self.constants.get("BLOCK_D", 0)
            if products < self.tile or not 0 < chunk < self.features:
                return 1
            # unrolled, or every similarity computed more than once: then exponentials are too
            chunks = products / (self.tile * chunk) / max(1, round(computed))
            return -(-self.features // chunk) / max(1, round(chunks))

        return machine_code.hot_path(graph, loop, work_of, turns)

    def _own_work(self, loop: Loop, what: str) -> bool:
        own = (i for block in loop.own() for i in self.graph[block].instructions)
        return any(getattr(work_of(instruction), what) for instruction in own)

    def _scalar_products(self, path: HotPath) -> float:
        lanes = {"FFMA": 1, "FFMA2": 2, "v_fma_f32": 1, "v_fmac_f32": 1, "v_pk_fma_f32": 2}
        each = self.warps * self.gpu.warp
        names = ((re.split(r"\.|_e\d\d", i.opcode)[0], times) for i, times in path)
        return sum(times * lanes.get(name, 0) * each for name, times in names)

    def describe_loop(self, loop: Loop, path: HotPath) -> dict[str, Any]:
        kinds: Counter[str] = Counter()
        for instruction, times in path:
            kinds[kind_and_unit(instruction)[0]] += times
        hot = {instruction.address for instruction, _ in path}
        members = [i for block in sorted(loop.members) for i in self.graph[block].instructions]
        exponentials = sum(work_of(i).exponentials * times for i, times in path)
        needed, products, loaded = clocks(path, self.code, self.gpu, self.warps)
        each = self.warps * self.gpu.warp / self.tile
        per_similarity = {kind: round(kinds[kind] * each, 4) for kind in KINDS}
        work = {pipe: needed[pipe] for pipe in needed if pipe != "issue"}
        beside = max((needed[pipe] for pipe in needed if pipe != "tensor"), default=0)
        return {
            "first": members[0].address,
            "last": members[-1].address,
            "instructions": {kind: kinds[kind] for kind in KINDS} | {"all": kinds.total()},
            "cold": sum(i.address not in hot for i in members),
            "per_similarity": per_similarity | {"all": round(kinds.total() * each, 4)},
            "exponentials": exponentials * each,
            "multiply_adds": (products or self._scalar_products(path)) / self.tile,
            "loaded_bytes": loaded,
            "clocks": {pipe: round(number, 1) for pipe, number in needed.items()},
            "binds": max(needed, key=needed.get),
            "overlapped": round(max(needed.values()), 1),
            "products_then_rest": round(needed.get("tensor", 0) + beside, 1),
            "one_after_another": round(sum(work.values()), 1),
        }

    def tensor_instructions(self, instructions: list[Instruction]) -> list[str]:
        """Matrix instructions that occur, with the shape that UTCHMMA hides."""
        names = set()
        for instruction in instructions:
            if work_of(instruction).tensor:
                name = instruction.opcode
                if name.startswith("UTC"):
                    one = product(instruction, self.code)
                    name += f".{one.rows}x{one.columns}x{one.depth}"
                names.add(name)
        return sorted(names)

    def describe(self, shared: int, tensor_memory: int, all_warps: int) -> dict[str, Any]:
        """The record of a kernel whose blocks have `all_warps` and `shared` bytes."""
        found = resources(self.text)
        held, warps, limit = occupancy(
            self.gpu, found["registers"], shared, all_warps, tensor_memory
        )
        in_loop = [instruction for _, path in self.hot_loops for instruction, _ in path]
        kinds = Counter(kind_and_unit(instruction)[0] for instruction in self.code)
        return found | {
            "shared": shared,
            "warps": all_warps,
            "blocks_on_an_sm": held,
            "warps_on_an_sm": warps,
            "limit": limit,
            "tile": [*(self.constants.get(name) for name in ("BLOCK_M", "BLOCK_N")), self.features],
            "tensor_cores": self.tensor_instructions(self.code),
            "tensor_cores_in_loop": self.tensor_instructions(in_loop),
            "instructions": {kind: kinds[kind] for kind in KINDS} | {"all": kinds.total()},
            "loops": [self.describe_loop(loop, path) for loop, path in self.hot_loops],
        }

    def annotated(self, sources: machine_code.Sources) -> str:
        """The disassembly with loops marked, and what the hot path passes and how often.

        Before it, which lines of source the instructions of the hottest loop come from.
        """
        begins: dict[int, list[str]] = {}
        depth: Counter[int] = Counter()
        for loop in reversed(self.loops):
            members = [i for block in sorted(loop.members) for i in self.graph[block].instructions]
            name = "hot loop" if any(loop is other for other, _ in self.hot_loops) else "loop"
            header = self.graph[loop.header].instructions[0].address
            begins.setdefault(header, []).append(f"{name}, {len(members)} instructions")
            for instruction in members:
                depth[instruction.address] += 1
        times = {i.address: count for _, path in reversed(self.hot_loops) for i, count in path}
        lines, inside = self._by_source(sources) if self.hot_loops else [], 0
        for i in self.code:
            now = depth[i.address]
            lines += [f"{'  ' * inside}<<< end" for _ in range(inside - now)]
            lines += [f"{'  ' * now}>>> {text}" for text in begins.get(i.address, [])]
            inside = now
            mark = f"x{times[i.address]:g}" if i.address in times else "cold" if now else ""
            where = f" -> {i.target:#06x}" if i.target is not None else ""
            text = f"{i.predicate:>5} {i.opcode} {i.operands}{where}"
            file, row = sources.get(i.address, ("", 0))
            text = f"{i.address:#06x} {'  ' * now}{text}"
            lines.append(f"{mark:>5} {kind_and_unit(i)[0]:8} {text:90} {Path(file).name}:{row}")
        return "\n".join(lines) + "\n"

    def _by_source(self, sources: machine_code.Sources) -> list[str]:
        counts: dict[tuple[str, int], Counter[str]] = {}
        for instruction, times in self.hot_loops[0][1]:
            at = sources.get(instruction.address, ("", 0))
            counts.setdefault(at, Counter())[kind_and_unit(instruction)[0]] += times
        lines = []
        for (file, row), kinds in sorted(counts.items(), key=lambda item: -item[1].total()):
            text = Path(file).read_text().splitlines()[row - 1].strip() if row else ""
            each = ", ".join(f"{kind} {count:g}" for kind, count in kinds.most_common())
            lines.append(f"{kinds.total():6g}  {Path(file).name}:{row}  {text}\n        {each}")
        return ["instructions of a warp for a tile, by the line they come from", *lines, ""]
