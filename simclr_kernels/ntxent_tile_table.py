"""Launch configurations of the sweeping kernels of NT-Xent, by the GPU they run on.

Chosen in the machine code: free of spills, and by the clocks that each pipe needs for a tile
(python -m benchmarks.codegen); not yet timed on a GPU. Two blocks on a multiprocessor, or two
groups of warps in one, let one take exponentials while the other multiplies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# each view is padded to a multiple of it: of every tile below
PADDING = 128


class Tiles(NamedTuple):
    """BLOCK_D is the features of a chunk; WHOLE takes whole rows, and keeps those that stay."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


WHOLE = 0
ANY = 1 << 30

# of one kernel: what tl.dot multiplies ("half", "tf32" or "ieee") -> (widest row, tiles), in order
Choices = dict[str, list[tuple[int, Tiles]]]


class Table(NamedTuple):
    triangle: Choices
    rows: Choices
    backward: Choices  # wider rows go through matrix products
    weights: Choices


TABLES = {
    "sm_90": Table(
        triangle={
            "half": [
                (128, Tiles(64, 128, WHOLE, 4, 3)),
                (256, Tiles(64, 128, WHOLE, 4, 2)),
                (ANY, Tiles(128, 128, 64, 8, 3)),
            ],
            "tf32": [(128, Tiles(64, 128, WHOLE, 4, 2)), (ANY, Tiles(128, 128, 32, 8, 3))],
            "ieee": [(ANY, Tiles(64, 64, 16, 4, 1))],
        },
        rows={
            "half": [
                (128, Tiles(128, 64, WHOLE, 8, 3)),
                (256, Tiles(128, 64, WHOLE, 8, 2)),
                (ANY, Tiles(64, 64, 64, 4, 3)),
            ],
            "tf32": [(128, Tiles(128, 64, WHOLE, 8, 2)), (ANY, Tiles(64, 64, 32, 4, 3))],
            "ieee": [(ANY, Tiles(64, 32, 32, 4, 1))],
        },
        backward={
            "half": [(128, Tiles(128, 64, WHOLE, 8, 3)), (256, Tiles(128, 32, WHOLE, 8, 2))],
            "tf32": [(64, Tiles(128, 64, WHOLE, 8, 2)), (128, Tiles(128, 32, WHOLE, 8, 2))],
            "ieee": [],
        },
        weights={
            "half": [(ANY, Tiles(128, 128, 64, 8, 3))],
            "tf32": [(ANY, Tiles(128, 128, 32, 8, 3))],
            "ieee": [(ANY, Tiles(64, 64, 16, 8, 1))],
        },
    ),
}
TABLES["sm_80"] = TABLES["sm_90"]._replace(
    triangle={
        "half": [
            (128, Tiles(64, 128, WHOLE, 4, 3)),
            (256, Tiles(64, 64, WHOLE, 4, 2)),
            (ANY, Tiles(64, 64, 32, 4, 3)),
        ],
        "tf32": [(128, Tiles(64, 64, WHOLE, 4, 2)), (ANY, Tiles(64, 64, 16, 4, 3))],
        "ieee": TABLES["sm_90"].triangle["ieee"],
    },
    rows={
        "half": [(128, Tiles(64, 64, WHOLE, 4, 3)), (ANY, Tiles(64, 64, 64, 4, 3))],
        "tf32": [(ANY, Tiles(64, 64, 32, 4, 3))],
        "ieee": TABLES["sm_90"].rows["ieee"],
    },
    backward={
        "half": [(128, Tiles(64, 64, WHOLE, 4, 3)), (256, Tiles(64, 64, WHOLE, 8, 2))],
        "tf32": [(64, Tiles(64, 64, WHOLE, 4, 2)), (128, Tiles(64, 64, WHOLE, 8, 2))],
        "ieee": [],
    },
    weights={
        "half": [(ANY, Tiles(64, 128, 32, 4, 3))],
        "tf32": [(ANY, Tiles(64, 64, 32, 4, 3))],
        "ieee": TABLES["sm_90"].weights["ieee"],
    },
)
TABLES["sm_100"] = TABLES["sm_90"]._replace(
    triangle={
        "half": [
            (128, Tiles(128, 64, WHOLE, 8, 3)),
            (256, Tiles(64, 64, WHOLE, 4, 2)),
            (ANY, Tiles(64, 64, 64, 4, 3)),
        ],
        "tf32": [(128, Tiles(64, 64, WHOLE, 4, 2)), (ANY, Tiles(128, 64, 32, 8, 3))],
        "ieee": TABLES["sm_90"].triangle["ieee"],
    },
    backward={
        "half": TABLES["sm_90"].backward["half"],
        "tf32": [(64, Tiles(128, 64, WHOLE, 8, 2)), (128, Tiles(64, 64, WHOLE, 8, 2))],
        "ieee": [],
    },
    weights={
        "half": [(ANY, Tiles(64, 128, 64, 4, 3))],
        "tf32": [(ANY, Tiles(128, 64, 32, 8, 3))],
        "ieee": TABLES["sm_90"].weights["ieee"],
    },
)
# a block has 64 KiB of local memory, and a wavefront 64 lanes
_GFX942 = Table(
    triangle={"half": [(128, Tiles(64, 64, WHOLE, 4, 1)), (ANY, Tiles(64, 64, 64, 4, 2))]},
    rows={"half": [(128, Tiles(64, 64, WHOLE, 4, 1)), (ANY, Tiles(64, 64, 64, 4, 2))]},
    backward={"half": [(128, Tiles(64, 32, WHOLE, 4, 1)), (256, Tiles(64, 32, WHOLE, 8, 1))]},
    weights={"half": [(ANY, Tiles(64, 64, 64, 4, 2))]},
)
for _kernel, _choices in _GFX942._asdict().items():
    # not every AMD GPU has TF32: it is never asked for there
    _choices["ieee"] = getattr(TABLES["sm_90"], _kernel)["ieee"]
TABLES["gfx942"] = _GFX942

# small, so that few rows make many tiles
_SMALL = Tiles(16, 32, 64, 4, 1)
_SMALL_WHOLE = (128, _SMALL._replace(BLOCK_D=WHOLE))
_EVERY_KIND = ("half", "tf32", "ieee")
TABLES["interpreter"] = Table(
    triangle={kind: [_SMALL_WHOLE, (ANY, _SMALL)] for kind in _EVERY_KIND},
    rows={kind: [_SMALL_WHOLE, (ANY, _SMALL)] for kind in _EVERY_KIND},
    backward={kind: [_SMALL_WHOLE] for kind in _EVERY_KIND},
    weights={kind: [(ANY, _SMALL)] for kind in _EVERY_KIND},
)


def architecture_of(device: torch.device) -> str:
    """The key of TABLES: "sm_80", "sm_90" or "sm_100", "gfx942", or "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def choose(choices: Choices, dtype: torch.dtype, precision: str, width: int) -> Tiles | None:
    """The tiles for rows of this width; None if all are for narrower ones."""
    kind = "half" if dtype != torch.float32 else precision
    for widest, tiles in choices[kind]:
        if width <= widest:
            return tiles._replace(BLOCK_D=min(tiles.BLOCK_D or width, width))
    return None
