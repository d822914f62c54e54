"""Philox4x32-10, and how its words become numbers.

A word becomes a uniform float32 in [0, 1) as (word >> 8) 2^-24, a uniform integer in [0, n) as
(word n) >> 32. The range [lo, hi) of a float32 is u (hi - lo) + lo, each step rounded: a kernel
without fused multiply-adds draws the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key: tuple[int, int] | tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """Philox4x32-10: the four random words of each counter.

    Args:
        key: two 32-bit words, or two int64 tensors of them that broadcast against (...).
        counter: (..., 4) int64, 32-bit words.

    Returns:
        (..., 4) int64, 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits right
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & WORD) ^ c1 ^ k0, ((p0 >> 32) & WORD) ^ c3 ^ k1
        c1, c3 = p1 & WORD, p0 & WORD
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return torch.stack([c0, c1, c2, c3], -1)


def uniform(word: Tensor) -> Tensor:
    """float32 in [0, 1)."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def between(u: Tensor, low: float, high: float) -> Tensor:
    """float32 in [low, high), each step rounded to float32."""
    low, high = torch.tensor((low, high), dtype=torch.float32)
    return u * (high - low) + low


def below(word: Tensor, n: int | Tensor) -> Tensor:
    """int64 in [0, n); n < 2^31."""
    return (word * n) >> 32
