"""How machine code is read: instructions, loops, hot paths, spills, lines of source."""

import pytest

pytest.importorskip("triton")

from machine_code_excerpts import AMDGCN, NESTED, TILE, sass

from benchmarks import machine_code
from benchmarks.codegen_report import Kernel, resources


def test_instructions_come_with_predicate_and_jump():
    code = machine_code.parse_sass(NESTED)
    assert len(code) == 19
    assert code[3].predicate == "@!P1"
    assert code[3].opcode == "LDGSTS.E.BYPASS.128"
    assert (code[5].flow, code[5].target) == ("branch", 32)
    assert (code[18].flow, code[18].target) == ("jump", 7 * 16)
    assert code[15].flow == "exit"
    (uniform,) = machine_code.parse_sass(sass("BRA.U !UP3, @@4"))
    assert (uniform.flow, uniform.target) == ("branch", 64)
    (perhaps,) = machine_code.parse_sass(sass("@P0 EXIT"))
    assert perhaps.flow == ""


def test_loops_nest_and_know_their_instructions():
    graph = machine_code.blocks(machine_code.parse_sass(NESTED))
    found = machine_code.loops(graph)
    sizes = {sum(len(graph[block].instructions) for block in x.members): x for x in found}
    assert sorted(sizes) == [2, 4, 16]
    wait, chunk, tile = (sizes[size] for size in sorted(sizes))
    assert set(map(id, tile.inner)) == {id(chunk), id(wait)}
    assert tile.own().isdisjoint(chunk.members | wait.members)


def test_a_hot_path_leaves_out_masks_and_takes_an_inner_loop_as_often_as_it_turns():
    kernel = Kernel(NESTED, "sm_90", TILE, warps=1)
    ((loop, path),) = kernel.hot_loops
    found = kernel.describe_loop(loop, path)
    # two turns of four instructions, and nine others
    assert found["instructions"] == {
        "tensor": 2,
        "mufu": 1,
        "fp32": 1,
        "select": 1,
        "convert": 0,
        "integer": 1,
        "global": 2,
        "local": 0,
        "shared": 2,
        "shuffle": 0,
        "sync": 1,
        "control": 6,
        "all": 17,
    }
    assert found["cold"] == 3
    # 32 threads for 512 similarities
    assert found["per_similarity"]["fp32"] == 1 / 16
    assert found["exponentials"] == 1 / 16
    assert found["multiply_adds"] == 2 * 16 * 8 * 16 / 512
    marked = kernel.annotated({})
    assert "hot loop, 16 instructions" in marked
    assert "   x2 tensor   0x0040" in marked
    assert " cold mufu     0x0110" in marked


def test_the_cheapest_of_several_ways_to_make_a_tile_is_hot():
    text = sass(
        "@P0 BRA @@5",
        # 1: a masked tile
        "FSEL R6, R6, -INF , P4",
        "FSEL R6, R6, -INF , P5",
        "MUFU.EX2 R5, R6",
        "BRA @@6",
        # 5: a tile
        "MUFU.EX2 R5, R6",
        # 6: perhaps a prefetch
        "@P1 BRA @@8",
        "LDG.E.128 R8, desc[UR4][R2.64]",
        "@P2 BRA @@0",
        "EXIT",
    )
    kernel = Kernel(text, "sm_90", TILE, warps=1)
    ((_, path),) = kernel.hot_loops
    assert [instruction.address // 16 for instruction, _ in path] == [0, 5, 6, 7, 8]


def test_a_kernel_with_exponentials_outside_of_loops_is_one_tile():
    text = sass(
        "S2R R0, SR_TID.X",
        # 1: the features, in two chunks
        "HMMA.16816.F32.BF16 R12, R8, R10, R12",
        "@P0 BRA @@1",
        "MUFU.EX2 R5, R6",
        "@P1 EXIT",
        "STG.E desc[UR4][R2.64], R6",
        "EXIT",
    )
    kernel = Kernel(text, "sm_90", TILE | {"BLOCK_M": 16, "BLOCK_N": 8, "BLOCK_D": 16}, warps=1)
    ((loop, path),) = kernel.hot_loops
    assert kernel.describe_loop(loop, path)["multiply_adds"] == 64
    assert [instruction.address // 16 for instruction, _ in path] == [0, 1, 2, 3, 4, 5, 6]


def test_loops_of_specialised_warps_are_found_behind_a_jump_table():
    text = sass(
        "BRX R4 -0x30",
        "MUFU.EX2 R5, R6",
        "@P0 BRA @@1",
        "EXIT",
        "UMOV UR5, 0x4080010",
        "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR3], tmem[UR4], idesc[UR5], UPT",
        "@P0 BRA @@5",
        "EXIT",
    )
    kernel = Kernel(text, "sm_100", TILE, warps=1)
    paths = [[instruction.address // 16 for instruction, _ in path] for _, path in kernel.hot_loops]
    assert paths == [[1, 2], [5, 6]]


def test_instructions_know_their_line_of_source():
    text = """
\t//## File "/src/a.py", line 12
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   MOV R1, R2 ;
\t//## File "/src/b.py", line 3 inlined at "/src/a.py", line 14
        /*0020*/                   MOV R1, R2 ;
"""
    a, b = ("/src/a.py", 12), ("/src/b.py", 3)
    assert machine_code.sass_sources(text) == {0: a, 16: a, 32: b}
    text = AMDGCN.replace(".LBB0_1:", '\t.file\t1 "/src" "c.py"\n.LBB0_1:')
    found = machine_code.amdgcn_sources(text)
    assert found[0] == ("", 0)
    assert found.keys() == {i.address for i in machine_code.parse_amdgcn(text)}
    assert found[1] == found[10] == ("/src/c.py", 99)


def test_amd_assembly_is_read_like_sass():
    kernel = Kernel(AMDGCN, "gfx942", TILE, warps=1)
    ((loop, path),) = kernel.hot_loops
    found = kernel.describe_loop(loop, path)
    counts = {kind: count for kind, count in found["instructions"].items() if count}
    assert counts == {
        "tensor": 1,
        "mufu": 1,
        "fp32": 1,
        "integer": 1,
        "global": 1,
        "shared": 1,
        "control": 2,
        "all": 8,
    }
    assert found["loaded_bytes"] == 64 * 16
    # a wave: a product of 32 x 32 x 8; an exponential at a quarter of the rate
    assert found["clocks"] == {"tensor": 8, "shared": 8, "valu": 4 + 1}


def test_spills_are_counted_in_bytes():
    spilling = sass("EXIT", registers="REG:255 STACK:24 SHARED:0 LOCAL:8")
    assert resources(spilling) == {"registers": 255, "spills": 32}
    assert resources(NESTED) == {"registers": 40, "spills": 0}
    amd = AMDGCN.replace("SPILLED", "7").replace("SCRATCH", "16")
    assert resources(amd) == {"registers": 128, "spills": 28}
