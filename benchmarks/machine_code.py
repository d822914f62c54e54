"""Reads machine code: instructions with their jumps, loops, and the path a loop mostly takes.

Text in, tuples out: SASS as `cuobjdump -sass` prints it, and AMDGCN assembly. A loop is what a
backward jump closes. Of the ways through its body the hot one does the most work on tensor cores,
then the most exponentials, then accesses global memory the most, and among such is the shortest:
what lies beside it is a masked variant of a tile, a wait that rarely waits, a prefetch's end. An
inner loop that works is passed as often as it turns; one that only waits, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    """`flow` says where to next: "" on, "branch" on or to `target`, "jump" to `target`, "exit"."""

    address: int
    predicate: str
    opcode: str
    operands: str
    flow: str = ""
    target: int | None = None


SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.M
)
SASS_TARGET = re.compile(r"(?:^|\s|`)\(?(0x[0-9a-f]+)\)?$")


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of a cubin with one kernel. A call comes back: it flows on."""
    instructions = []
    for address, predicate, opcode, operands in SASS.findall(text):
        flow, target = "", None
        name = opcode.partition(".")[0]
        if name == "BRA":
            # a uniform predicate stands among the operands
            always = predicate in ("", "@PT") and operands.startswith("0x")
            flow = "jump" if always else "branch"
            target = int(SASS_TARGET.search(operands)[1], 16)
        elif name in ("EXIT", "RET", "BRX", "JMX") and predicate in ("", "@PT"):
            flow = "exit"
        instructions.append(
            Instruction(int(address, 16), predicate, opcode, operands, flow, target)
        )
    return instructions


def _amdgcn_lines(text: str) -> list[str]:
    """Labels, instructions and .loc directives of the kernel, with comments only behind .loc."""
    body = re.search(r"^\w+:\s*;\s*@.*?$(.*?)^\.Lfunc_end0:", text, re.M | re.S)[1]
    lines = []
    for line in body.splitlines():
        code = line.partition(";")[0].strip()
        if code.startswith(".loc"):
            lines.append(code)
        elif code.endswith(":") or (code and not code.startswith(".")):
            lines.append(code)
    return lines


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of an assembly text with one kernel; addresses are their numbers."""
    lines, labels = [], {}
    for line in _amdgcn_lines(text):
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
        elif not line.startswith(".loc"):
            lines.append(line)
    instructions = []
    for address, line in enumerate(lines):
        opcode, _, operands = line.partition(" ")
        flow, target = "", None
        if opcode.startswith(("s_cbranch", "s_branch")):
            flow = "jump" if opcode == "s_branch" else "branch"
            target = labels[operands.strip()]
        elif opcode in ("s_endpgm", "s_setpc_b64", "s_trap"):
            flow = "exit"
        instructions.append(Instruction(address, "", opcode, operands.strip(), flow, target))
    return instructions


# address of an instruction to the file and line that it comes from
Sources = dict[int, tuple[str, int]]


def sass_sources(text: str) -> Sources:
    """From what `nvdisasm -g` prints."""
    found, source = {}, None
    pattern = r'^\s*//## File "([^"]+)", line (\d+)|^\s+/\*([0-9a-f]{4,})\*/'
    for file, line, address in re.findall(pattern, text, re.M):
        if file:
            source = file, int(line)
        elif source:
            found[int(address, 16)] = source
    return found


def amdgcn_sources(text: str) -> Sources:
    files = {
        number: f"{folder}/{name}"
        for number, folder, name in re.findall(r'\.file\s+(\d+) "([^"]+)" "([^"]+)"', text)
    }
    found, source = {}, None
    for line in _amdgcn_lines(text):
        if line.startswith(".loc"):
            number, row = line.split()[1:3]
            # line 0: of no source
            source = (files[number], int(row)) if row != "0" else source
        elif not line.endswith(":"):
            if source:
                found[len(found)] = source
            else:
                found[len(found)] = ("", 0)
    return found


class Block(NamedTuple):
    instructions: list[Instruction]
    successors: list[int]  # numbers of blocks


def blocks(instructions: list[Instruction]) -> list[Block]:
    """Runs of instructions that are entered at the first and left at the last."""
    starts = {instructions[0].address}
    for this, after in zip(instructions, instructions[1:] + [None], strict=True):
        if this.flow:
            starts |= {at for at in (this.target, after and after.address) if at is not None}
    runs: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.address in starts:
            runs.append([])
        runs[-1].append(instruction)
    number = {run[0].address: index for index, run in enumerate(runs)}
    found = []
    for index, run in enumerate(runs):
        last = run[-1]
        successors = [number[last.target]] if last.target in number else []
        if last.flow in ("", "branch") and index + 1 < len(runs):
            successors.append(index + 1)
        found.append(Block(run, successors))
    return found


@dataclass(eq=False)
class Loop:
    """A natural loop: every way into it leads through `header`. Members are numbers of blocks."""

    header: int
    members: set[int]
    inner: list[Loop] = field(default_factory=list)

    def own(self) -> set[int]:
        """The blocks that lie in no inner loop."""
        return self.members.difference(*(loop.members for loop in self.inner))


def loops(graph: list[Block]) -> list[Loop]:
    """All loops, inner ones before the loops around them."""
    predecessors: list[list[int]] = [[] for _ in graph]
    for index, block in enumerate(graph):
        for successor in block.successors:
            predecessors[successor].append(index)
    # what only jumps through a table reach begins somewhere too: code of specialised warps
    entries, reached = set(), set()
    for entry in range(len(graph)):
        if entry not in reached:
            entries.add(entry)
            todo = [entry]
            while todo:
                block = todo.pop()
                if block not in reached:
                    reached.add(block)
                    todo += graph[block].successors
    dominators = {block: {block} if block in entries else set(reached) for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - entries):
            now = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            changed |= now != dominators[block]
            dominators[block] = now

    by_header: dict[int, Loop] = {}
    for latch in range(len(graph)):
        for header in graph[latch].successors:
            if header in dominators[latch]:
                loop = by_header.setdefault(header, Loop(header, {header}))
                todo = [latch]
                while todo:
                    block = todo.pop()
                    if block not in loop.members:
                        loop.members.add(block)
                        todo += predecessors[block]
    found = sorted(by_header.values(), key=lambda loop: (len(loop.members), loop.header))
    for index, loop in enumerate(found):
        around = [outer for outer in found[index + 1 :] if loop.members < outer.members]
        if around:
            around[0].inner.append(loop)
    return found


def whole(graph: list[Block]) -> tuple[list[Block], Loop]:
    """The kernel as a loop that turns once: its ends lead to its start."""
    around = [block if block.successors else block._replace(successors=[0]) for block in graph]
    found = loops(graph)
    reached = set(range(len(graph)))
    outermost = [a for a in found if not any(a.members < b.members for b in found)]
    return around, Loop(0, reached, outermost)


class Work(NamedTuple):
    """What the hot path has the most of, in this order."""

    tensor: float = 0
    exponentials: float = 0
    memory: float = 0
    shortness: float = 0

    def plus(self, other: Work, times: float = 1) -> Work:
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))

    def any(self) -> bool:
        return bool(self.tensor or self.exponentials)


# an instruction, and how often one turn of the loop passes it
HotPath = list[tuple[Instruction, float]]


def hot_path(
    graph: list[Block],
    loop: Loop,
    work_of: Callable[[Instruction], Work],
    turns: Callable[[HotPath], float],
) -> HotPath:
    """The instructions of one turn of `loop`. `turns` says how often an inner loop turns."""
    # an inner loop is one node, named by its header
    node = {member: member for member in loop.own()}
    bodies: dict[int, HotPath] = {}
    for inner in loop.inner:
        node |= dict.fromkeys(inner.members, inner.header)
        body = hot_path(graph, inner, work_of, turns)
        times = turns(body)
        bodies[inner.header] = [(instruction, times * count) for instruction, count in body]
    edges: dict[int, set[int]] = {name: set() for name in node.values()}
    latches = set()
    for member in sorted(loop.members):
        for successor in graph[member].successors:
            if successor == loop.header:
                latches.add(node[member])
            elif successor in node and node[successor] != node[member]:
                edges[node[member]].add(node[successor])
    for block in loop.own():
        bodies[block] = [(instruction, 1) for instruction in graph[block].instructions]

    best: dict[int, tuple[Work, list[int]] | None] = {}

    def onward(name: int) -> tuple[Work, list[int]] | None:
        """The best way from a node to a jump back; None where there is none."""
        if name not in best:
            best[name] = None
            ways = [way for successor in sorted(edges[name]) if (way := onward(successor))]
            if name in latches:
                ways.append((Work(), []))
            if ways:
                rest, names = max(ways, key=lambda way: way[0])
                for instruction, count in bodies[name]:
                    rest = rest.plus(work_of(instruction)._replace(shortness=-1), count)
                best[name] = rest, [name, *names]
        return best[name]

    found = onward(node[loop.header])
    # where inner loops overlap no way may be found: then all blocks count
    names = found[1] if found else sorted(bodies)
    return [step for name in names for step in bodies[name]]
