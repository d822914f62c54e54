"""What this installation can do: versions, devices, and which code each operation will run."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

import torch

from simclr_kernels import _C, __version__
from simclr_kernels.report import table

OPTIONAL = {
    "triton": "GPU kernels",
    "pyarrow": "Parquet data sets, pip install simclr-kernels[hf]",
}
# of `train --pipeline`: the module that it needs, and what it is
PIPELINES = {
    "fused": (None, "Pillow decodes in threads; views by our kernels"),
    "dali": ("nvidia.dali", "DALI decodes, on the GPU where there is one; views by our kernels"),
    "kornia": ("kornia", "Pillow decodes in threads; views by Kornia's operators"),
}


def doctor() -> str:
    """The report as text."""
    lines = [
        f"simclr_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
    ]
    for package, purpose in OPTIONAL.items():
        lines.append(f"{package}: {_version(package)} ({purpose})")
    lines.append(_gpus())
    lines += ["", table(_operations(), ["operation", "tensors on", "runs", "because"])]
    lines += ["", table(_pipelines(), ["pipeline", "here", "what it is"])]
    return "\n".join(lines)


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _pipelines() -> list[list[str]]:
    rows = []
    for name, (module, what) in PIPELINES.items():
        here = module is None or is_installed(module)
        rows.append([name, "yes" if here else f"pip install simclr-kernels[{name}]", what])
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch was built without CUDA or ROCm" if not built else "no GPU answers"
        return f"GPU: none usable ({reason})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "GPU: " + ", ".join(names)


def _operations() -> list[list[str]]:
    instructions = _C.instruction_sets()[0]
    gpu = "no GPU here" if not torch.cuda.is_available() else "a GPU is here"
    triton = _version("triton")
    if triton == "not installed":
        gpu += ", and triton is missing"
    return [
        ["fused_nt_xent", "cpu", f"C++, {instructions}", "the best that this CPU can run"],
        ["fused_nt_xent", "cuda", "Triton", gpu],
        ["fused_nt_xent", "others, float64", "torch, in row blocks", "no kernel for them"],
        ["views", "cpu", f"C++, {instructions}", "the best that this CPU can run"],
        ["views", "cuda", "Triton", gpu],
        ["views", "others, float64", "torch, in pieces", "no kernel for them"],
        ["views of studies", "all", "torch, in pieces", "cutout, rotation, Sobel, noise: rare"],
        ["encoder", "all", "torch", "bfloat16 and torch.compile by default on a GPU"],
    ]
