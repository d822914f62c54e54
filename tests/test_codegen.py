"""What instructions cost, what a launch compiles, and what the kernels are held to."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from machine_code_excerpts import sass
from triton.runtime.jit import JITFunction

import simclr_kernels
from benchmarks import codegen, machine_code
from benchmarks.pipes import GPUS, clocks, kind_and_unit, occupancy, product, work_of
from benchmarks.view_calls import VIEW_CALLS, view_summary

ROOT = Path(__file__).resolve().parents[1]


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
        ("STL.64 [R1+0x8], R4", "local", "lsu"),
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
    launch = codegen.specialise("sm_90", codegen.FP16, JITFunction(kernel), args, given)
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
        known = {"triton": "1", "costs": {"sm_90 k c": {"fp32": 10, "all": 20}}}
        return codegen.grown(record | {"instructions": instructions}, known)

    assert growth({"fp32": 10, "all": 20}, "1") == []
    line = "sm_90 k c: at most 10 fp32 instructions, got 11"
    assert growth({"fp32": 11, "all": 20}, "1") == [line]
    assert growth({"fp32": 11, "all": 24}, "2") == []
    assert len(growth({"fp32": 11, "all": 25}, "2")) == 1
    record["call"] = "other"
    assert "not recorded" in growth({"all": 20}, "1")[0]


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


def test_the_report_covers_every_kernel_and_every_call(records):
    modules = [
        pkgutil.resolve_name(f"simclr_kernels.{module.name}")
        for module in pkgutil.iter_modules(simclr_kernels.__path__)
        if module.name.endswith("_triton")
    ]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    for target, calls in codegen.CALLS.items():
        here = [record for record in records if record["target"] == target]
        assert {record["kernel"] for record in here} == kernels
        assert {record["call"].removesuffix(" on negatives") for record in here} == set(
            map(str, calls)
        )


def test_kernels_neither_spill_nor_overflow_and_use_tensor_cores_where_meant(records):
    broken = [rule for record in records for rule in codegen.broken_rules(record)]
    if triton.__version__.startswith("3.9."):
        # its products of 64 x 128 take more registers: up to 624 bytes in the triangle
        broken = [rule for rule in broken if "must not spill" not in rule]
    assert broken == []


def test_a_similarity_takes_no_more_instructions_than_recorded(records):
    known = json.loads(codegen.RECORD.read_text())
    assert [line for record in records for line in codegen.grown(record, known)] == []
    assert known["costs"].keys() == set(map(codegen.key, records))


def test_what_a_view_costs_is_estimated_from_all_its_passes(records):
    (sums,) = [
        {r["kernel"]: r["view"] for r in records if r["target"] == "sm_90" and r["call"] == name}
        for name in [str(VIEW_CALLS["sm_90"][0])]
    ]
    assert {name for name, cost in sums.items() if cost} == {
        "_crop_kernel",
        "_color_kernel",
        "_blur_kernel",
    }
    pixels = 224 * 224
    crop = sums["_crop_kernel"]["instructions"]
    # 16 words a pixel, one store of 8 bytes a channel and four pixels; 48 products and more
    assert 16 <= 32 * crop["global"] / pixels <= 19
    assert 50 <= 32 * crop["fp32"] / pixels <= 200
    assert "estimate from machine code, nothing measured" in view_summary(records)


def test_the_sampler_multiplies_and_adds_in_two_roundings(records):
    """Its kernels would not have the bits of params.py with fused operations."""
    fusion = {r["fp_fusion"] for r in records if r["kernel"] == "_sample_kernel"}
    assert fusion == {False}
