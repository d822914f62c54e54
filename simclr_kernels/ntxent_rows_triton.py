"""GPU kernels of NT-Xent that go row by row: normalisation and, in backward, its Jacobian.

The formulas are in ntxent.py, the sweeps over columns in ntxent_triton.py. Everything here is
float32 inside. Each kernel reads every row twice, as itself and as a positive.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_FLOOR = tl.constexpr(1e-12)

# elements of a program in the two row-by-row kernels
ROWS_ELEMENTS = 2048


@triton.jit
def positive_row(offs, M, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        return offs ^ 1
    return (offs + M // 2) % M


@triton.jit
def inverse_tau(tau_ptr):
    """1 / tau, NaN unless tau > 0: the device cannot raise."""
    tau = tl.load(tau_ptr).to(tl.float32)
    return tl.where(tau > 0, 1.0 / tau, float("nan"))


@triton.jit
def _unit_row(z_ptr, offs_m, mask, D: tl.constexpr, offs_d, NORMALIZE: tl.constexpr):
    """Rows in float32, normalised if asked; 1 / norm; whether a row is above the norm's floor."""
    offs = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        square = tl.sum(z * z, 1)
        # as a comparison, so that NaN stays
        inv_norm = tl.rsqrt(tl.where(square < NORM_FLOOR, NORM_FLOOR, square))
        return z * inv_norm[:, None], inv_norm, tl.where(square < NORM_FLOOR, 0.0, 1.0)
    return z, tl.full(offs_m.shape, 1.0, tl.float32), tl.zeros(offs_m.shape, tl.float32)


@triton.jit
def _rounded_row(row, z_ptr, ROUNDED: tl.constexpr):
    """Rows as tl.dot reads them, in float32, and the factor that gives them back their length."""
    if ROUNDED:
        if z_ptr.dtype.element_ty == tl.float32:
            # to TF32, which keeps 10 bits of the fraction: a GPU would cut the others off
            bits = row.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            # the carry could make another number of NaN
            rounded = tl.where(row == row, rounded, row)
        else:
            rounded = row.to(z_ptr.dtype.element_ty).to(tl.float32)
        square = tl.sum(rounded * rounded, 1)
        stretch = tl.sqrt(tl.where(square == 0, 1.0, tl.sum(row * row, 1) / square))
        return rounded, stretch
    return row, tl.full((row.shape[0],), 1.0, tl.float32)


@triton.jit
def _unit_rows_kernel(
    z_ptr,  # (M, D)
    tau_ptr,  # ()
    z_hat_ptr,  # (M, D) in the dtype of z, out
    stretch_ptr,  # (M,) float32, out: |row| / |row as rounded in z_hat|
    pos_ptr,  # (M,) float32, out: logit of the positive
    M,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalises rows, and takes the positive logits in float32 before anything is rounded."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_d[None, :] < D)
    positive = positive_row(offs_m, M, INTERLEAVED)
    own, _, own_projected = _unit_row(z_ptr, offs_m, mask, D, offs_d, NORMALIZE)
    other, _, other_projected = _unit_row(z_ptr, positive, mask, D, offs_d, NORMALIZE)

    # between close unit rows through their difference, which keeps its digits
    s = tl.sum(own * other, 1)
    gap = own - other
    close = (own_projected * other_projected > 0) & (s > 0.5)
    s = tl.where(close, 1.0 - 0.5 * tl.sum(gap * gap, 1), s)
    tl.store(pos_ptr + offs_m, s * inverse_tau(tau_ptr), mask=mask_m)
    offs = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    rounded, stretch = _rounded_row(own, z_ptr, ROUNDED)
    tl.store(z_hat_ptr + offs, rounded.to(z_hat_ptr.dtype.element_ty), mask=mask)
    tl.store(stretch_ptr + offs_m, stretch, mask=mask_m)


@triton.jit
def _ntxent_finish_kernel(
    z_ptr,  # (M, D) as given
    tau_ptr,  # ()
    negative_share_ptr,  # (M,) float32
    dloss_ptr,  # (M,) float32
    sum_w_ptr,  # (M, D) float32
    dz_ptr,  # (M, D) in the dtype of z, out
    dtau_ptr,  # (M,) float32, out: what each row adds to the gradient in tau
    M,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the positives and goes back through the normalisation, row by row in float32."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_d[None, :] < D)
    offs = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    positive = positive_row(offs_m, M, INTERLEAVED)
    own, inv_norm, projected = _unit_row(z_ptr, offs_m, mask, D, offs_d, NORMALIZE)
    other, _, _ = _unit_row(z_ptr, positive, mask, D, offs_d, NORMALIZE)

    weight = tl.load(dloss_ptr + offs_m, mask=mask_m, other=0.0) * tl.load(
        negative_share_ptr + offs_m, mask=mask_m, other=0.0
    )
    weight += tl.load(dloss_ptr + positive, mask=mask_m, other=0.0) * tl.load(
        negative_share_ptr + positive, mask=mask_m, other=0.0
    )
    sum_w = tl.load(sum_w_ptr + offs, mask=mask, other=0.0)
    along = tl.zeros((BLOCK_M,), tl.float32)
    if ROUNDED:
        rounded, stretch = _rounded_row(own, z_ptr, ROUNDED)
        rounded *= stretch[:, None]
        along = projected * tl.sum(sum_w * rounded, 1)
        sum_w -= along[:, None] * rounded
    # the difference keeps the digits of a close pair; what it adds along z^ the projection removes
    sum_w -= weight[:, None] * (other - projected[:, None] * own)
    inner = tl.sum(sum_w * own, 1)
    inv_tau = inverse_tau(tau_ptr)
    dz = (sum_w - (projected * inner)[:, None] * own) * (inv_norm * inv_tau)[:, None]
    tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    along += inner - projected * weight
    tl.store(dtau_ptr + offs_m, -0.5 * inv_tau * inv_tau * along, mask=mask_m)


def _row_blocks(features: int) -> tuple[int, int]:
    """Rows of a program in the row-by-row kernels, and their width: whole rows."""
    width = triton.next_power_of_2(features)
    return max(1, ROWS_ELEMENTS // width), width


def launch_unit_rows(
    z: Tensor, tau: Tensor, pairs: str, normalize: bool, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows in the dtype of z, what stretches them, and the positives' logits, in float32."""
    rows, features = z.shape
    z_hat = torch.empty_like(z)
    stretch, pos = (torch.empty(rows, dtype=torch.float32, device=z.device) for _ in range(2))
    height, width = _row_blocks(features)
    _unit_rows_kernel[(triton.cdiv(rows, height),)](
        z,
        tau,
        z_hat,
        stretch,
        pos,
        rows,
        D=features,
        NORMALIZE=normalize,
        INTERLEAVED=pairs == "interleaved",
        ROUNDED=rounded,
        BLOCK_M=height,
        BLOCK_D=width,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return z_hat, stretch, pos


def launch_finish(
    dloss: Tensor,
    z: Tensor,
    tau: Tensor,
    negative_share: Tensor,
    sum_w: Tensor,
    pairs: str,
    normalize: bool,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """dz, and the gradient in tau as a sum yet to be taken over rows."""
    rows, features = z.shape
    dz = torch.empty_like(z)
    dtau = torch.empty_like(dloss)
    height, width = _row_blocks(features)
    _ntxent_finish_kernel[(triton.cdiv(rows, height),)](
        z,
        tau,
        negative_share,
        dloss,
        sum_w,
        dz,
        dtau,
        rows,
        D=features,
        NORMALIZE=normalize,
        INTERLEAVED=pairs == "interleaved",
        ROUNDED=rounded,
        BLOCK_M=height,
        BLOCK_D=width,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dz, dtau
