"""Makes torchvision importable beside a build of torch that is not its own.

Its import dies there for want of two operators, and with it that of lightly and Lightning, which
use nothing of them here. `python -m benchmarks.torchvision_operators PROGRAM ...` runs another.
"""

import runpy
import sys

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
