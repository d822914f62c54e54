"""The report on machine code: how it reads instructions, and what it holds the kernels to."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import simclr_kernels
from benchmarks import codegen, machine_code
from benchmarks.codegen_report import Kernel, resources
from benchmarks.pipes import GPUS, clocks, kind_and_unit, occupancy, product, work_of

ROOT = Path(__file__).resolve().parents[1]


def sass(*lines, registers="REG:40 STACK:0 SHARED:0 LOCAL:0"):
    """The lines as cuobjdump prints them: the nth at address 16 n, `@n` a jump to the nth."""
    text = f" Function kernel:\n  {registers}\n\tcode for sm_90a\n\t\tFunction : kernel\n"
    for index, line in enumerate(lines):
        body, _, target = line.partition("@@")
        line = f"{body}{16 * int(target):#x}" if target else line
        predicate, line = line.split(" ", 1) if line.startswith("@") else ("", line)
        text += (
            f"        /*{16 * index:04x}*/  {predicate:>10} {line} ;  /* 0x00000a00ff017b82 */\n"
        )
        text += f"{'':60}/* 0x000e620000000800 */\n"
    return text


# a tile of 32 x 16 by one warp; the loop over its features turns twice
NESTED = sass(
    "S2R R0, SR_TID.X",
    # 1: a turn for a tile
    "UIADD3 UR4, UR4, 0x10, URZ",
    # 2: a turn for a chunk of features
    "LDS.128 R8, [R4]",
    "@!P1 LDGSTS.E.BYPASS.128 [R25+0x4000], desc[UR44][R16.64]",
    "HMMA.16816.F32.BF16 R12, R8, R10, R12",
    "@!P0 BRA @@2",
    "@P2 BRA @@16",
    # 7: what the out-of-line block comes back to
    "MUFU.EX2 R5, R6",
    "FMUL R6, R6, R7",
    "@!PT LDS RZ, [RZ]",
    "FSEL R6, R6, -INF , P4",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR14], R8",
    "@!P6 BRA @@11",
    "@!P5 BRA @@1",
    "STG.E desc[UR4][R2.64], R6",
    "EXIT",
    # 16: masks, out of line
    "ISETP.NE.AND P4, PT, R5, UR4, PT",
    "MUFU.RCP R9, R9",
    "BRA @@7",
)
TILE = {"BLOCK_M": 32, "BLOCK_N": 16, "D": 64, "BLOCK_D": 32}


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


AMDGCN = """
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
kernel:                                 ; @kernel
.Lfunc_begin0:
\ts_load_dword s85, s[0:1], 0x40
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
.Ltmp1:
\t.loc\t1 99 25                         ; ntxent_triton.py:99:25
\ts_and_saveexec_b64 s[6:7], vcc
\ts_cbranch_execz .LBB0_3
; %bb.2:
\tglobal_load_dwordx4 v[8:11], v[8:9], off
.LBB0_3:                                ;   in Loop: Header=BB0_1 Depth=1
\tds_read2_b64 v[36:39], v4 offset1:16
\tv_mfma_f32_32x32x8_f16 v[0:15], v[36:37], v[38:39], v[0:15]
\tv_exp_f32_e32 v0, v0
\tv_mul_f32_e32 v3, v80, v3
\ts_cbranch_scc1 .LBB0_1
; %bb.4:
\tglobal_store_dword v[0:1], v2, off
\ts_endpgm
.Lfunc_end0:
    .agpr_count:     0
    .private_segment_fixed_size: SCRATCH
    .sgpr_spill_count: 0
    .vgpr_count:     128
    .vgpr_spill_count: SPILLED
"""


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", (64, 128, 16, 16, 128, True)),
        ("HGMMA.64x128x8.F32.TF32 R24, R72, gdesc[UR8], R24", (64, 128, 8, 32, 128, False)),
        ("HMMA.1688.F32.TF32 R12, R8, R10, R12", (16, 8, 8, 32, 32, False)),
        ("UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR3], idesc[UR5], UPT", (64, 32, 16, 16, 0, True)),
        ("v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5]", (16, 16, 16, 16, 64, False)),
    ],
)
def test_matrix_instructions_tell_their_shape(line, expected):
    if line.startswith("v_"):
        opcode, operands = line.split(" ", 1)
        code = [machine_code.Instruction(0, "", opcode, operands)]
    else:
        # the shape of UTCHMMA is in its descriptor
        code = machine_code.parse_sass(sass("UMOV UR5, 0x4080010", line))
    assert product(code[-1], code) == expected
    assert work_of(code[-1]).tensor


@pytest.mark.parametrize(
    ("target", "product_line", "products", "tensor"),
    [
        ("sm_90", "HGMMA.64x128x16.F32.BF16 R24, R72, gdesc[UR8], R24", 8, 1024),
        ("sm_90", "HGMMA.64x128x8.F32.TF32 R24, R72, gdesc[UR8], R24", 16, 2048),
        ("sm_80", "HMMA.16816.F32.BF16 R12, R8, R10, R12", 128, 2048),
    ],
)
def test_clocks_of_a_tile_of_128(target, product_line, products, tensor):
    lines = [product_line] * products + ["MUFU.EX2 R5, R6"] * 64 + ["FFMA R5, R6, R7, R8"] * 64
    code = machine_code.parse_sass(sass(*lines))
    path = [(instruction, 1) for instruction in code]
    needed, multiply_adds, _ = clocks(path, code, GPUS[target], warps=8)
    assert multiply_adds == 128**3
    assert needed["tensor"] == tensor
    assert needed["mufu"] == 128 * 128 / 16
    assert needed["fma"] == 128 * 128 / (64 if target == "sm_80" else 128)
    assert needed["issue"] == 8 * len(lines) / 4


def test_products_with_few_columns_wait_for_shared_memory():
    code = machine_code.parse_sass(sass("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24"))
    needed, _, _ = clocks([(code[0], 1)], code, GPUS["sm_90"], warps=4)
    assert (needed["tensor"], needed["shared"]) == (8, (64 + 16) * 16 * 2 / 128)


@pytest.mark.parametrize(
    ("line", "kind", "unit"),
    [
        ("FMNMX R5, R6, R7, PT", "select", "alu"),
        ("FADD2 R5, R6, R7", "fp32", "fma2"),
        ("IMAD.MOV.U32 R5, RZ, RZ, R6", "integer", "imad"),
        ("LOP3.LUT R5, R6, R7, RZ, 0xc0, !PT", "integer", "alu"),
        ("UIADD3.64 UR20, UR8, 0x2, URZ", "integer", "other"),
        ("F2FP.BF16.F32.PACK_AB R5, R6, R7", "convert", "alu"),
        ("I2F.RP R17, R6", "convert", "mufu"),
        ("UTMALDG.2D [UR8], [UR4]", "global", "lsu"),
        ("LDSM.16.M88.4 R4, [R8]", "shared", "lsu"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "sync", "other"),
        ("@!PT LDS RZ, [RZ]", "control", "other"),
    ],
)
def test_instructions_go_to_their_pipe(line, kind, unit):
    (instruction,) = machine_code.parse_sass(sass(line))
    assert kind_and_unit(instruction) == (kind, unit)


def test_occupancy_is_what_the_scarcest_resource_allows():
    assert occupancy(GPUS["sm_90"], 128, 0, warps=8) == (2, 16, "registers")
    assert occupancy(GPUS["sm_90"], 32, 100 << 10, warps=4) == (2, 8, "shared memory")
    assert occupancy(GPUS["sm_80"], 32, 0, warps=8) == (8, 64, "registers")
    assert occupancy(GPUS["sm_100"], 64, 0, warps=4, tensor_memory=256) == (2, 8, "tensor memory")
    assert occupancy(GPUS["gfx942"], 128, 0, warps=8) == (2, 16, "registers")


def test_arguments_are_specialised_as_a_launch_would():
    def kernel(z_ptr, none_ptr, rows, one, odd, wide, scale, flag, BLOCK):
        pass

    kernel.__annotations__["BLOCK"] = "tl.constexpr"
    given = {"BLOCK": 64, "num_warps": 8, "enable_fp_fusion": True, "maxnreg": 128}
    args = (torch.zeros(16, dtype=torch.bfloat16), None, 256, 1, 17, 2**40, 0.5, True)
    launch = codegen.specialise("sm_90", codegen.HALF, JITFunction(kernel), args, given)
    assert list(launch.signature.values()) == [
        "*bf16",
        "constexpr",
        "i32",
        "constexpr",
        "i32",
        "i64",
        "fp32",
        "u1",
        "constexpr",
    ]
    assert launch.constants == {(1,): None, (3,): 1, (8,): 64}
    aligned = {path[0] for path, attributes in launch.attributes.items() if attributes}
    assert aligned == {0, 2, 5}
    assert launch.options == {"num_warps": 8, "enable_fp_fusion": True, "maxnreg": 128}


def test_growth_against_the_record_is_reported(monkeypatch):
    record = {"target": "sm_90", "kernel": "k", "call": "c", "loops": []}

    def growth(instructions, version):
        monkeypatch.setattr(codegen.triton, "__version__", version)
        known = {"triton": "1", "costs": {"sm_90 k c": {"all": 20}}}
        return codegen.grown(record | {"instructions": {"all": instructions}}, known)

    assert growth(20, "1") == []
    assert growth(21, "1") == ["sm_90 k c: at most 20 all instructions, got 21"]
    assert growth(22, "2") == []
    assert len(growth(23, "2")) == 1
    record["call"] = "other"
    assert "not recorded" in growth(20, "1")[0]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The report on all that is shipped, by a process without Triton's interpreter."""
    file = tmp_path_factory.mktemp("codegen") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--processes", "2", "--json", file]
    run = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text())


def test_the_report_covers_every_kernel_of_the_loss_and_every_call(records):
    modules = [
        pkgutil.resolve_name(f"simclr_kernels.{module.name}")
        for module in pkgutil.iter_modules(simclr_kernels.__path__)
        if module.name.startswith("ntxent") and module.name.endswith("_triton")
    ]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    for target, calls in codegen.CALLS.items():
        here = [record for record in records if record["target"] == target]
        assert {record["kernel"] for record in here} == kernels
        assert {record["call"] for record in here} == set(map(str, calls))


def test_kernels_neither_spill_nor_overflow_and_use_tensor_cores_where_meant(records):
    broken = [rule for record in records for rule in codegen.broken_rules(record)]
    # at 256 registers; buffer loads, which tensors under 2 GiB get there, take it over them
    assert broken == [
        "gfx942 _ntxent_bwd_kernel float16 ieee D=128 halves tau=0.1: must not spill, got 28 bytes"
    ]


def test_a_similarity_takes_no_more_instructions_than_recorded(records):
    known = json.loads(codegen.RECORD.read_text())
    assert [line for record in records for line in codegen.grown(record, known)] == []
    assert known["costs"].keys() == set(map(codegen.key, records))
