"""Reads machine code: instructions with their jumps, loops, and the path a loop mostly takes.

Text in, tuples out: SASS as `cuobjdump -sass` prints it, and AMDGCN assembly. A loop is what a
backward jump closes. Of the ways through its body the hot one does the most work on tensor cores,
then the most exponentials, then loads the most, and among such is the shortest: what lies beside
it is a masked variant of a tile, a wait that rarely waits, a prefetch's end. An inner loop that
works is passed as often as it turns; one that only waits, once.
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


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of an assembly text with one kernel; addresses are their numbers."""
    body = re.search(r"^\w+:\s*;\s*@.*?$(.*?)^\.Lfunc_end0:", text, re.M | re.S)[1]
    lines, labels = [], {}
    for line in body.splitlines():
        code = line.partition(";")[0].strip()
        if label := re.fullmatch(r"([.\w]+):", code):
            labels[label[1]] = len(lines)
        elif code and not code.startswith("."):
            lines.append(code)
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
    reached, todo = set(), [0]
    while todo:
        block = todo.pop()
        if block not in reached:
            reached.add(block)
            todo += graph[block].successors
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            before = [dominators[p] for p in predecessors[block] if p in reached]
            now = set.intersection(*before) | {block}
            changed |= now != dominators[block]
            dominators[block] = now

    by_header: dict[int, Loop] = {}
    for latch in reached:
        for header in graph[latch].successors:
            if header in dominators[latch]:
                loop = by_header.setdefault(header, Loop(header, {header}))
                todo = [latch]
                while todo:
                    block = todo.pop()
                    if block in reached and block not in loop.members:
                        loop.members.add(block)
                        todo += predecessors[block]
    found = sorted(by_header.values(), key=lambda loop: (len(loop.members), loop.header))
    for index, loop in enumerate(found):
        around = [outer for outer in found[index + 1 :] if loop.members < outer.members]
        if around:
            around[0].inner.append(loop)
    return found


class Work(NamedTuple):
    """What the hot path has the most of, in this order."""

    tensor: float = 0
    exponentials: float = 0
    loads: float = 0
    shortness: float = 0

    def plus(self, other: Work, times: float = 1) -> Work:
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))

    def any(self) -> bool:
        return bool(self.tensor or self.exponentials)


# an instruction, and how often one turn of the loop passes it
Path = list[tuple[Instruction, float]]


def hot_path(
    graph: list[Block],
    loop: Loop,
    work_of: Callable[[Instruction], Work],
    turns: Callable[[Path], float],
) -> Path:
    """The instructions of one turn of `loop`. `turns` says how often an inner loop turns."""
    # an inner loop is one node, named by its header
    node = {member: member for member in loop.own()}
    bodies: dict[int, Path] = {}
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

    _, names = onward(node[loop.header])
    return [step for name in names for step in bodies[name]]
