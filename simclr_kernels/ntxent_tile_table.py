"""Launch configurations of the sweeping kernels of NT-Xent, by the GPU they run on.

All are free of spills in the machine code of that GPU (python -m benchmarks.codegen). Rows of a
tile are streamed or owned, columns held or streamed: see the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# each view is padded to a multiple of it: of every tile below
PADDING = 128


class Tiles(NamedTuple):
    """BLOCK_D is the features of a chunk; 0 takes whole rows, and lets tiles of them be kept."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def architecture_of(device: torch.device) -> str:
    """The key of this table: "sm_80", "sm_90" or "sm_100", "gfx942", or "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "sm_80")


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """What tl.dot multiplies: "half", "tf32" or "ieee"."""
    return "half" if dtype != torch.float32 else precision


# small, so that few rows make many tiles
INTERPRETED = Tiles(16, 32, 16, 4, 1)


def triangle_tiles(architecture: str, dtype: torch.dtype, precision: str, width: int) -> Tiles:
    if architecture == "interpreter":
        return _whole_rows(INTERPRETED, width, 64)
    return Tiles(64, 128, width, 4, 3)


def rows_tiles(architecture: str, dtype: torch.dtype, precision: str, width: int) -> Tiles:
    if architecture == "interpreter":
        return INTERPRETED
    return Tiles(64, 64, 64, 4, 2)


def backward_tiles(
    architecture: str, dtype: torch.dtype, precision: str, width: int
) -> Tiles | None:
    """None if the rows are too wide to be kept in registers: they go through matrix products."""
    if architecture == "interpreter":
        return INTERPRETED if width <= 128 else None
    return Tiles(128, 64, 0, 8, 3)


def weights_tiles(architecture: str, dtype: torch.dtype, precision: str) -> Tiles:
    if architecture == "interpreter":
        return INTERPRETED
    return Tiles(128, 128, 64, 8, 3)


def _whole_rows(tiles: Tiles, width: int, widest: int) -> Tiles:
    return tiles._replace(BLOCK_D=width) if width <= widest else tiles
