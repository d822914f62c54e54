"""GPU kernel of NT-Xent that makes unit rows and the positives' logits, and what all kernels share.

The formulas are in ntxent.py. Everything here is float32 inside.

Rows are kept as unit rows view by view: view v of image k is row v * padded + k, with `padded` a
multiple of every tile and zero rows behind the last image, so that the sweeps load without masks,
and a row and its positive stand at the same place of the two views. Where a row came from depends
on `half`, the images of a group (see source_row). Numbers of a row (stretch, stats) have the same
layout; what goes in or out of a public function is in source order.

The sweeps multiply the rows z^ rounded, to r, in 16 bits or TF32; "ieee" float32 has r = z^. Two
rules make equal rows have equal logits, and collapsed rows no gradient, for any r:
    negatives   s_ij = h_i . h_j with h = r |z^| / |r|, r at its length before rounding; backward
                projects their sum along h, and then along z^
    positives   from z^ in float32
Positives from r as well would be consistent too, but of a close pair r keeps mostly rounding. With
float16 rows and all else in float64 (M = 1024, D = 128, pairs 0.5 and 0.001 apart, tau 0.1 and 0.5)
that has 17 to 39 times the error in the gradient. The price of h: where all rows lie within a tenth
of one direction the error is 0.0018, for 0.0001 with z^ alone; 0.0084 is that of eager float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_tile_table import PADDING, TABLES, Tiles, architecture_of, choose
from simclr_kernels.ntxent_tiles import SMALLEST_BOUNDED_TAU

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NORM_FLOOR = tl.constexpr(1e-12)

LARGEST_BOUNDED = tl.constexpr(LOG2E.value / SMALLEST_BOUNDED_TAU)

# what is known of the logits when a kernel is launched: that one constant is no less than any of
# them, and near enough; that a running maximum is needed; or neither, since tau is on the device
BOUNDED, RUNNING, UNKNOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# elements of a program in the kernels that read whole rows
ROWS_ELEMENTS = 2048


@triton.jit
def source_row(image, view, half):
    """The row of z that holds this view: groups of `half` images, view 0 of all, then view 1."""
    return image + (image // half + view) * half


@triton.jit
def logits_per_similarity(tau, TAU_ON_DEVICE: tl.constexpr):
    """c = log2(e) / tau, NaN unless tau > 0: the device cannot raise. tau is a number or a pointer.

    All logits are c s, in base 2, of this one c: its rounding is that of tau.
    """
    if TAU_ON_DEVICE:
        tau = tl.load(tau).to(tl.float32)
    return tl.where(tau > 0, LOG2E / tau, float("nan"))


@triton.jit
def is_bounded(c):
    """Whether the constant maximum holds, where only the device knows tau; so does NaN."""
    return (c <= LARGEST_BOUNDED) | (c != c)


@triton.jit
def constant_top(c):
    """The constant maximum of bounded logits, in base 2."""
    # as a comparison, so that NaN stays
    return tl.where(c < 100.0, 0.0, c - 100.0)


@triton.jit
def load_tile(unit_ptr, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Whole rows [row, row + BLOCK) of the padded unit rows."""
    offs = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(unit_ptr + tl.cast(row, tl.int64) * WIDTH + offs)


@triton.jit
def held_rows(unit_ptr, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """What similarity takes of rows that it will meet again: nothing where rows go by chunks."""
    if BLOCK_D == WIDTH:
        return load_tile(unit_ptr, row, WIDTH, BLOCK)
    else:
        return row


@triton.jit
def similarity(
    z_m,  # held_rows of m
    m_ptr,
    row_m,
    n_ptr,
    row_n,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N]; by chunks of BLOCK_D features where whole rows do not fit."""
    if BLOCK_D == WIDTH:
        z_n = load_tile(n_ptr, row_n, WIDTH, BLOCK_N)
        return tl.dot(z_m, tl.trans(z_n), input_precision=PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        m_ptrs = m_ptr + tl.cast(row_m, tl.int64) * WIDTH
        n_ptrs = n_ptr + tl.cast(row_n, tl.int64) * WIDTH
        m_ptrs += tl.arange(0, BLOCK_M)[:, None] * WIDTH + offs_d
        n_ptrs += tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_d
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in range(0, WIDTH, BLOCK_D):
            s = tl.dot(tl.load(m_ptrs), tl.trans(tl.load(n_ptrs)), s, input_precision=PRECISION)
            m_ptrs += BLOCK_D
            n_ptrs += BLOCK_D
        return s


@triton.jit
def own_tiles(image, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The range of tiles of a view that may hold one of the images [image, image + BLOCK_M)."""
    return image // BLOCK_N, tl.minimum((image + BLOCK_M + BLOCK_N - 1) // BLOCK_N, tiles)


@triton.jit
def other_tile(k, others, first, last):
    """(view, tile) of the k-th of the `others` tiles of each view outside [first, last)."""
    view = tl.where(k >= others, 1, 0)
    tile = k - view * others
    return view, tile + tl.where(tile >= first, last - first, 0)


@triton.jit
def _unit_row(z_ptr, rows, mask, D: tl.constexpr, offs_d, NORMALIZE: tl.constexpr):
    """Rows in float32, normalised if asked; 1 / norm; whether a row is above the norm's floor."""
    offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        square = tl.sum(z * z, 1)
        # as a comparison, so that NaN stays
        inv_norm = tl.rsqrt(tl.where(square < NORM_FLOOR, NORM_FLOOR, square))
        return z * inv_norm[:, None], inv_norm, tl.where(square < NORM_FLOOR, 0.0, 1.0)
    return z, tl.full(rows.shape, 1.0, tl.float32), tl.zeros(rows.shape, tl.float32)


@triton.jit
def to_tf32(x):
    """Rounded to the 10 bits of fraction that TF32 has: a GPU would cut the others off."""
    bits = x.to(tl.int32, bitcast=True)
    # the carry could make another number of NaN
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def _rounded_row(row, unit_ptr, ROUNDED: tl.constexpr):
    """Rows as tl.dot reads them, in float32, and the factor that gives them back their length."""
    if ROUNDED:
        if unit_ptr.dtype.element_ty == tl.float32:
            rounded = to_tf32(row)
        else:
            rounded = row.to(unit_ptr.dtype.element_ty).to(tl.float32)
        square = tl.sum(rounded * rounded, 1)
        stretch = tl.sqrt(tl.where(square == 0, 1.0, tl.sum(row * row, 1) / square))
        return rounded, stretch
    return row, tl.full((row.shape[0],), 1.0, tl.float32)


@triton.jit
def _store_unit(
    row,
    inv_norm,
    projected,
    unit_ptr,
    stretch_ptr,
    inv_norm_ptr,
    at,
    inside,
    mask,
    offs_d,
    WIDTH: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    rounded, stretch = _rounded_row(row, unit_ptr, ROUNDED)
    offs = at.to(tl.int64)[:, None] * WIDTH + offs_d[None, :]
    keep = mask[:, None] & (offs_d < WIDTH)[None, :]
    tl.store(unit_ptr + offs, rounded.to(unit_ptr.dtype.element_ty), mask=keep)
    tl.store(stretch_ptr + at, tl.where(inside, stretch, 0.0), mask=mask)
    tl.store(inv_norm_ptr + at, tl.where(projected > 0, inv_norm, -inv_norm), mask=mask)


@triton.jit
def _unit_rows_kernel(
    z_ptr,  # (VIEWS * images, D)
    tau,
    unit_ptr,  # (VIEWS * padded, WIDTH) in the dtype of z, out
    stretch_ptr,  # (VIEWS * padded,) float32, out: |row| / |row as rounded in unit|
    inv_norm_ptr,  # (VIEWS * padded,) float32, out: 1 / |z|; negative where not projected
    pos_ptr,  # (padded,) float32, out: logit of the positive in base 2, with two views
    arrived_ptr,  # () int32, out: 0
    images,
    padded,
    half,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    VIEWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUNDED: tl.constexpr,
    TAU_ON_DEVICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalises rows, and takes the positive logits in float32 before anything is rounded."""
    image = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (image < images)[:, None] & (offs_d < D)[None, :]
    stored = image < padded
    rows = source_row(image, 0, half)
    own, own_inv_norm, own_projected = _unit_row(z_ptr, rows, mask, D, offs_d, NORMALIZE)
    # fmt: off
    _store_unit(
        own, own_inv_norm, own_projected, unit_ptr, stretch_ptr, inv_norm_ptr, image,
        image < images, stored, offs_d, WIDTH, ROUNDED
    )
    if VIEWS == 2:
        other, inv_norm, other_projected = _unit_row(
            z_ptr, rows + half, mask, D, offs_d, NORMALIZE
        )
        _store_unit(
            other, inv_norm, other_projected, unit_ptr, stretch_ptr, inv_norm_ptr, padded + image,
            image < images, stored, offs_d, WIDTH, ROUNDED
        )
        # fmt: on
        # between close unit rows through their difference, which keeps its digits
        s = tl.sum(own * other, 1)
        gap = own - other
        close = (own_projected * other_projected > 0) & (s > 0.5)
        s = tl.where(close, 1.0 - 0.5 * tl.sum(gap * gap, 1), s)
        tl.store(pos_ptr + image, s * logits_per_similarity(tau, TAU_ON_DEVICE), mask=stored)
        if tl.program_id(0) == 0:
            tl.store(arrived_ptr, 0)


class UnitRows(NamedTuple):
    """Unit rows, view by view, each view padded by zero rows; see the module."""

    unit: Tensor  # (views * padded + PADDING, width) in the dtype of z; the last rows are not set
    lengths: Tensor  # (2, views * padded + PADDING) float32: stretch, inverse norm
    images: int
    padded: int

    @property
    def stretch(self) -> Tensor:
        return self.lengths[0]

    @property
    def inv_norm(self) -> Tensor:
        return self.lengths[1]

    @property
    def width(self) -> int:
        return self.unit.shape[1]


class Batch(NamedTuple):
    """What the launchers of one call share."""

    z: Tensor  # (2 * images, D) contiguous, as given
    tau: float | Tensor  # a number, or a scalar on the device
    logits: int  # BOUNDED, RUNNING or UNKNOWN
    half: int  # images of a group: see source_row
    first_image: int  # the images whose rows are asked for
    count: int
    normalize: bool
    precision: str  # of float32 products: "ieee" or "tf32"
    rows: UnitRows
    pos: Tensor | None  # (padded,) float32: logits of the positives
    negatives: UnitRows | None

    @property
    def rounded(self) -> bool:
        """Whether tl.dot multiplies rows of fewer digits than float32 has."""
        return is_rounded(self.z.dtype, self.precision)

    @property
    def tau_on_device(self) -> bool:
        return isinstance(self.tau, Tensor)

    def tiles(self, kernel: str) -> Tiles | None:
        """The configuration of a kernel, a field of Table; None if the rows are too wide for it."""
        choices = getattr(TABLES[architecture_of(self.z.device)], kernel)
        return choose(choices, self.z.dtype, self.precision, self.rows.width)


def is_rounded(dtype: torch.dtype, precision: str) -> bool:
    return dtype != torch.float32 or precision == "tf32"


def row_blocks(width: int) -> tuple[int, int]:
    """Rows of a program that reads whole rows, and their width as a power of two."""
    block = triton.next_power_of_2(width)
    return max(1, ROWS_ELEMENTS // block), block


def padded_width(features: int) -> int:
    """Features of a padded row: from 16 up to 256 a power of two, else a multiple of 64."""
    features = int(features)
    return max(16, triton.next_power_of_2(features)) if features <= 256 else -(-features // 64) * 64


def padded_images(images: int) -> int:
    return -(-images // PADDING) * PADDING


def launch_unit_rows(
    z: Tensor,
    tau: float | Tensor,
    views: int,
    half: int,
    normalize: bool,
    rounded: bool,
    arrived: Tensor | None = None,
) -> tuple[UnitRows, Tensor | None]:
    """Unit rows of z (views * images, D), and of two views the logits of the positives.

    Sets arrived, an int32 on the device, to 0, for the kernel after the next.
    """
    images, features = z.shape[0] // views, z.shape[1]
    padded, width = padded_images(images), padded_width(features)
    unit = z.new_empty(views * padded + PADDING, width)
    lengths = z.new_empty(2, views * padded + PADDING, dtype=torch.float32)
    pos = z.new_empty(padded, dtype=torch.float32) if views == 2 else None
    block_m, block_d = row_blocks(width)
    _unit_rows_kernel[(triton.cdiv(padded, block_m),)](
        z,
        tau,
        unit,
        lengths[0],
        lengths[1],
        pos,
        arrived,
        images,
        padded,
        half,
        D=features,
        WIDTH=width,
        VIEWS=views,
        NORMALIZE=normalize,
        ROUNDED=rounded,
        TAU_ON_DEVICE=isinstance(tau, Tensor),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return UnitRows(unit, lengths, images, padded), pos
