"""GPU kernels of NT-Xent. The formulas are in ntxent.py; here, in base 2, with c = log2(e) / tau:

    forward     L_i = sum_j 2^(c s_ij - m_i)              over the negatives j of row i
    backward    sum_w_i = sum_j w_ij z^_j                 over the negatives; then, row by row,
                sum_w_i += w_ip (z^_p - z^_i)             and the Jacobian of the normalisation

Rows rounded to 16 bits or TF32 are stretched back to their length: see ntxent_rows_triton.py.
Unit rows are at most 1 in similarity, so from tau = 0.0128 on m_i is the constant max(c - 100, 0):
then c s - m lies in [-126, 100] and neither a term nor a sum of 2^27 of them leaves float32.
Otherwise m_i is a running maximum. A program owns BLOCK_M rows, sweeps the columns in tiles of
BLOCK_N, and is the only writer of its rows: no atomics, the same bits in every run. Similarities
exist as tiles only. Besides its operands a call allocates the unit rows, and in backward (M, D)
float32.

Forward reads every row M / BLOCK_M times as a column, and a program its own rows again with every
tile. A program of backward owns one chunk of BLOCK_D features, and recomputes all similarities for
it: with C = D / BLOCK_D chunks, C times the reads and 2 M^2 D FLOPs of forward, and each row once
more for the product, M / BLOCK_M times. BLOCK_D is at most 32 in "ieee": C is 4 at D = 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.ntxent_rows_triton import (
    inverse_tau,
    launch_finish,
    launch_unit_rows,
    positive_row,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SMALLEST_BOUNDED_TAU = 0.0128


class Tiles(NamedTuple):
    """A launch configuration of the two sweeping kernels. Rows and columns: tile by tile."""

    BLOCK_M: int
    BLOCK_N: int
    max_block_d: int
    num_warps: int
    num_stages: int


# free of spills on sm_90, and where checked on sm_80, sm_100 and gfx942; not yet timed on a GPU
IEEE_TILES = Tiles(64, 32, 32, 8, 1)
TF32_TILES = Tiles(64, 64, 64, 8, 2)
HALF_TILES = Tiles(64, 32, 128, 8, 2)


@triton.jit
def _shift(inv_tau):
    """The constant maximum m of bounded logits, in base 2."""
    return tl.maximum(inv_tau * LOG2E - 100.0, 0.0)


@triton.jit
def _similarity(
    z_ptr,
    stretch_ptr,
    offs_m,
    offs_n,
    M,
    D: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of similarities, by chunks of BLOCK_D features; the rows not yet stretched."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < D
        m_ptrs = z_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        n_ptrs = z_ptr + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
        z_m = tl.load(m_ptrs, mask=(offs_m < M)[:, None] & mask_d, other=0.0)
        z_n = tl.load(n_ptrs, mask=(offs_n < M)[:, None] & mask_d, other=0.0)
        s = tl.dot(z_m, tl.trans(z_n), s, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if ROUNDED:
        s *= tl.load(stretch_ptr + offs_n, mask=offs_n < M, other=0.0)[None, :]
    return s


@triton.jit
def _row_scale(stretch_ptr, offs_m, M, inv_tau, ROUNDED: tl.constexpr):
    """What makes logits in base 2 of a row's similarities, and stretches the row."""
    scale = tl.zeros(offs_m.shape, tl.float32) + inv_tau * LOG2E
    if ROUNDED:
        scale *= tl.load(stretch_ptr + offs_m, mask=offs_m < M, other=0.0)
    return scale[:, None]


@triton.jit
def _is_negative(offs_m, offs_n, M, INTERLEAVED: tl.constexpr):
    positive = positive_row(offs_m, M, INTERLEAVED)
    other_image = (offs_n[None, :] != offs_m[:, None]) & (offs_n[None, :] != positive[:, None])
    return other_image & (offs_n < M)[None, :]


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 to float32 rounding: 2 artanh(x / (2 + x)) as a series."""
    t = x / (2.0 + x)
    y = t * t
    tail = 1.0 / 7 + y * (1.0 / 9 + y * (1.0 / 11 + y * (1.0 / 13)))
    return 2.0 * t * (1.0 + y * (1.0 / 3 + y * (1.0 / 5 + y * tail)))


@triton.jit
def _ntxent_fwd_kernel(
    z_ptr,  # (M, D) unit rows, contiguous
    stretch_ptr,  # (M,) float32: of the rows, if ROUNDED
    tau_ptr,  # ()
    pos_ptr,  # (M,) float32: logit of the positive
    loss_ptr,  # (M,) float32, out
    top_ptr,  # (M,) float32, out
    mass_ptr,  # (M,) float32, out: mass 2^top sums exp(logit) over all M - 1 candidates
    negative_share_ptr,  # (M,) float32, out
    M,
    D: tl.constexpr,
    BOUNDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_M rows and sums the negatives of all columns, in base 2."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inv_tau = inverse_tau(tau_ptr)
    scale = _row_scale(stretch_ptr, offs_m, M, inv_tau, ROUNDED)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if BOUNDED:
        m_i = tl.zeros((BLOCK_M,), tl.float32) + _shift(inv_tau)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(0, M, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        s = _similarity(
            z_ptr, stretch_ptr, offs_m, offs_n, M, D, ROUNDED, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )
        negative = _is_negative(offs_m, offs_n, M, INTERLEAVED)
        logits = tl.where(negative, s * scale, float("-inf"))
        if not BOUNDED:
            # finite, so that a row without negatives so far does not subtract infinities
            m_new = tl.maximum(tl.maximum(m_i, tl.max(logits, 1)), -3.4e38)
            l_i *= tl.exp2(m_i - m_new)
            m_i = m_new
        l_i += tl.sum(tl.exp2(logits - m_i[:, None]), 1)

    mask_m = offs_m < M
    pos = tl.load(pos_ptr + offs_m, mask=mask_m, other=0.0)
    pos *= LOG2E
    excess = (m_i - pos + tl.log2(l_i)) * LN2
    # softplus; the comparison keeps NaN, and an excess of -inf (no negatives) gives 0
    grown = tl.exp(-tl.abs(excess))
    loss = tl.where(excess < 0, 0.0, excess) + _log1p(grown)
    tl.store(loss_ptr + offs_m, loss, mask=mask_m)
    top = m_i
    if not BOUNDED:
        top = tl.maximum(m_i, pos)
    negatives = l_i * tl.exp2(m_i - top)
    mass = negatives + tl.exp2(pos - top)
    tl.store(top_ptr + offs_m, top, mask=mask_m)
    tl.store(mass_ptr + offs_m, mass, mask=mask_m)
    tl.store(negative_share_ptr + offs_m, negatives / mass, mask=mask_m)


@triton.jit
def _power_of_two(g_max_ptr):
    """2^k that brings max |dloss| into [1, 2), and 2^-k; by exponent bits alone."""
    exponent = (tl.load(g_max_ptr).to(tl.int32, bitcast=True) >> 23) & 0xFF
    # a maximum of 0, or near the ends of float32, is scaled by less
    exponent = tl.minimum(tl.maximum(exponent, 30), 224)
    up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _ntxent_bwd_kernel(
    z_ptr,  # (M, D) unit rows, contiguous
    stretch_ptr,  # (M,) float32: of the rows, if ROUNDED
    tau_ptr,  # ()
    top_ptr,  # (M,) float32
    mass_ptr,  # (M,) float32
    dloss_ptr,  # (M,) float32
    g_max_ptr,  # () float32: max |dloss|
    sum_w_ptr,  # (M, D) float32, out: sum over the negatives of w_ij z^_j
    M,
    D: tl.constexpr,
    BOUNDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    W_EXPONENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_M rows and BLOCK_D features of the gradient, recomputing the tiles."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_d = offs_d[None, :] < D
    inv_tau = inverse_tau(tau_ptr)
    shift = _shift(inv_tau)
    scale = _row_scale(stretch_ptr, offs_m, M, inv_tau, ROUNDED)
    up, down = _power_of_two(g_max_ptr)
    top_m = tl.load(top_ptr + offs_m, mask=mask_m, other=0.0)
    r_m = tl.load(dloss_ptr + offs_m, mask=mask_m, other=0.0) * up
    r_m /= tl.load(mass_ptr + offs_m, mask=mask_m, other=1.0)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, M, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < M
        r_n = tl.load(dloss_ptr + offs_n, mask=mask_n, other=0.0) * up
        r_n /= tl.load(mass_ptr + offs_n, mask=mask_n, other=1.0)
        s = _similarity(
            z_ptr, stretch_ptr, offs_m, offs_n, M, D, ROUNDED, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )
        logits = s * scale + W_EXPONENT
        if BOUNDED:
            w = tl.exp2(logits - shift) * (r_m[:, None] + r_n[None, :])
        else:
            top_n = tl.load(top_ptr + offs_n, mask=mask_n, other=0.0)
            w = tl.exp2(logits - top_m[:, None]) * r_m[:, None]
            w += tl.exp2(logits - top_n[None, :]) * r_n[None, :]
        w = tl.where(_is_negative(offs_m, offs_n, M, INTERLEAVED), w, 0.0)
        if ROUNDED:
            w *= tl.load(stretch_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        z_ptrs = z_ptr + offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
        z_n = tl.load(z_ptrs, mask=mask_n[:, None] & mask_d, other=0.0)
        acc = tl.dot(w.to(z_n.dtype), z_n, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]

    out_ptrs = sum_w_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    down *= 1.0 / (1 << W_EXPONENT)
    tl.store(out_ptrs, acc * down, mask=mask_m[:, None] & mask_d)


def _tiles(dtype: torch.dtype, precision: str, features: int) -> tuple[Tiles, int]:
    """Tiles of the sweeping kernels, and the features in a chunk: 16, tl.dot's least, or more."""
    if dtype != torch.float32:
        tiles = HALF_TILES
    else:
        tiles = IEEE_TILES if precision == "ieee" else TF32_TILES
    return tiles, min(max(triton.next_power_of_2(features), 16), tiles.max_block_d)


def _is_rounded(dtype: torch.dtype, precision: str) -> bool:
    """Whether tl.dot multiplies rows of fewer digits than float32 has."""
    return dtype != torch.float32 or precision == "tf32"


def _operands(z: Tensor, tau: Tensor, normalize: bool) -> tuple[Tensor, Tensor, bool]:
    """z contiguous, tau on its device, and whether the constant maximum holds for this tau."""
    # a tensor on the device is not read: that would wait for it
    bounded = normalize and tau.device.type == "cpu" and tau.item() >= SMALLEST_BOUNDED_TAU
    if tau.device != z.device:
        tau = torch.full((), tau.item(), dtype=torch.float32, device=z.device)
    return z.detach().contiguous(), tau.detach(), bounded


def forward(
    z: Tensor, tau: Tensor, pairs: str, normalize: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, top, mass, negative_share) of each row: the operator `ntxent`. See fused_nt_xent."""
    z, tau, bounded = _operands(z, tau, normalize)
    rounded = _is_rounded(z.dtype, precision)
    z_hat, stretch, pos = launch_unit_rows(z, tau, pairs, normalize, rounded)
    rows, features = z.shape
    tiles, chunk = _tiles(z.dtype, precision, features)
    loss, top, mass, negative_share = (torch.empty_like(pos) for _ in range(4))
    _ntxent_fwd_kernel[(triton.cdiv(rows, tiles.BLOCK_M),)](
        z_hat,
        stretch,
        tau,
        pos,
        loss,
        top,
        mass,
        negative_share,
        rows,
        D=features,
        BOUNDED=bounded,
        INTERLEAVED=pairs == "interleaved",
        ROUNDED=rounded,
        PRECISION=precision,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_D=chunk,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return loss, top, mass, negative_share


def backward(
    dloss: Tensor,
    z: Tensor,
    tau: Tensor,
    top: Tensor,
    mass: Tensor,
    negative_share: Tensor,
    pairs: str,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(dz, dtau): the operator `ntxent_backward`. See fused_nt_xent."""
    tau_operand = tau
    z, tau, bounded = _operands(z, tau, normalize)
    rounded = _is_rounded(z.dtype, precision)
    z_hat, stretch, _ = launch_unit_rows(z, tau, pairs, normalize, rounded)
    rows, features = z.shape
    tiles, chunk = _tiles(z.dtype, precision, features)
    sum_w = torch.empty(rows, features, dtype=torch.float32, device=z.device)
    _ntxent_bwd_kernel[(triton.cdiv(rows, tiles.BLOCK_M), triton.cdiv(features, chunk))](
        z_hat,
        stretch,
        tau,
        top,
        mass,
        dloss,
        torch.linalg.vector_norm(dloss, float("inf")),
        sum_w,
        rows,
        D=features,
        BOUNDED=bounded,
        INTERLEAVED=pairs == "interleaved",
        ROUNDED=rounded,
        PRECISION=precision,
        # with dloss scaled to 2 at most a weight is at most 4; times 2^13 it fits float16, and the
        # weights of negatives do not vanish there
        W_EXPONENT=13 if z.dtype == torch.float16 else 0,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_D=chunk,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    dz, dtau = launch_finish(dloss, z, tau, negative_share, sum_w, pairs, normalize, rounded)
    if tau_operand.device != z.device:
        # tau came as a number: nobody asks, and to answer would wait for the device
        return dz, torch.full_like(tau_operand, float("nan"))
    return dz, dtau.sum().to(tau_operand.dtype)
