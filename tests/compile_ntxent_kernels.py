"""Compiles what the launchers of ntxent_triton launch for GPU targets, without a GPU.

Run as a program, without TRITON_INTERPRET: `python compile_ntxent_kernels.py sm_90 gfx942`. Prints
one JSON line per kernel and configuration: registers, spilled bytes, shared memory, and how many of
the instructions are matrix products on tensor cores.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simclr_kernels import ntxent_rows_triton, ntxent_triton

KERNELS = [
    (ntxent_rows_triton, "_unit_rows_kernel"),
    (ntxent_triton, "_ntxent_fwd_kernel"),
    (ntxent_triton, "_ntxent_bwd_kernel"),
    (ntxent_rows_triton, "_ntxent_finish_kernel"),
]
JIT_FUNCTIONS = [getattr(module, name) for module, name in KERNELS]
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|v_mfma_\w+)\b")

# dtype, precision, features, pairs, tau: every kernel for every tile table, on sm_90
HALF = (torch.float16, "ieee", 128, "halves", 0.1)
TF32 = (torch.float32, "tf32", 128, "halves", 0.1)
CONFIGURATIONS = {
    "sm_80": [HALF, TF32],
    "sm_90": [
        (torch.float32, "ieee", 128, "halves", 0.1),
        (torch.float32, "ieee", 33, "interleaved", 0.005),
        TF32,
        (torch.float32, "tf32", 128, "halves", 0.005),
        HALF,
        (torch.float16, "ieee", 128, "halves", 0.005),
        (torch.bfloat16, "ieee", 128, "halves", 0.1),
        (torch.bfloat16, "ieee", 2048, "halves", 0.1),
    ],
    "sm_100": [HALF, TF32],
    "gfx942": [HALF],
}


class Compile:
    """Stands in for a kernel: launching it compiles it for the target."""

    def __init__(self, kernel, target, label):
        self.kernel, self.target, self.label = kernel, target, label

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, enable_fp_fusion, num_stages=None, **constants):
        signature, aligned = {}, {}
        for index, (name, value) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if not isinstance(value, int) or value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        if num_stages is not None:
            options["num_stages"] = num_stages
        compiled = triton.compile(
            ASTSource(self.kernel, signature, constants, aligned),
            target=self.target,
            options=options,
        )
        shared = compiled.metadata.shared
        print(json.dumps(self.label | {"shared": shared} | resources(compiled.asm)), flush=True)


def resources(asm):
    """Registers, bytes of spills and tensor-core instructions, from the machine code."""
    if "cubin" not in asm:
        text = asm["amdgcn"]
        spills = re.findall(r"\.(?:sgpr|vgpr)_spill_count:\s*(\d+)", text)
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)[1]
        found = {"registers": int(registers), "spills": 4 * sum(map(int, spills))}
        return found | {"tensor_cores": len(TENSOR_CORES.findall(text))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "tensor_cores": len(TENSOR_CORES.findall(text)),
    }


def compile_all(architecture):
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture[3:]), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    for dtype, precision, features, pairs, tau in CONFIGURATIONS[architecture]:
        label = {"target": architecture, "dtype": str(dtype), "precision": precision}
        label |= {"features": features, "pairs": pairs, "tau": tau}
        for (module, name), kernel in zip(KERNELS, JIT_FUNCTIONS, strict=True):
            setattr(module, name, Compile(kernel, target, label | {"kernel": name}))
        z = torch.zeros(256, features, dtype=dtype)
        # float32, as the launchers make of a number on a GPU
        tau = torch.tensor(tau)
        rows = ntxent_triton.forward(z, tau, pairs, True, precision)
        ntxent_triton.backward(rows[0], z, tau, *rows[1:], pairs, True, precision)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        compile_all(name)
