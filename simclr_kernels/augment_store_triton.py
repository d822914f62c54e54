"""How the GPU passes keep a view between them, and how they write it.

Between passes a view of 16-bit output is 16 bits a value too, but in fixed point: steps of 2^-15
from -0.5 on, which holds what bicubic resizing makes of [0, 1] (-0.29 to 1.29) sixteen times as
finely as float16 would near 1. A view of float32 output is kept in float32. Kept planes are always
channel by channel, whatever the memory format of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEPS = tl.constexpr(32768.0)  # in a unit of 1.0
# with these bits on top a whole number under 2^23 is the float32 that exceeds it by 2^23: a bit
# operation and a subtraction convert it, which are cheaper than a conversion
MAGIC = tl.constexpr(8388608.0)
MAGIC_BITS = tl.constexpr(0x4B000000)
ZERO_CODE = tl.constexpr(16384)


@triton.jit
def keep(ptrs, value, mask):
    """Stores values in [-0.5, 1.5) to be loaded by `kept`."""
    if ptrs.dtype.element_ty == tl.int16:
        value = value * STEPS
    keep_steps(ptrs, value, mask)


@triton.jit
def keep_steps(ptrs, steps, mask):
    """The same, of values in steps."""
    if ptrs.dtype.element_ty == tl.int16:
        code = (steps + (MAGIC + ZERO_CODE)).to(tl.int32, bitcast=True)
        tl.store(ptrs, code.to(tl.int16), mask=mask)
    else:
        tl.store(ptrs, steps, mask=mask)


@triton.jit
def kept(ptrs, mask):
    """float32 that `keep` stored, 0 where masked off."""
    return kept_steps(ptrs, mask) * a_step(ptrs)


@triton.jit
def a_step(ptrs):
    """What one step of `kept_steps` is."""
    if ptrs.dtype.element_ty == tl.int16:
        return 1 / STEPS
    else:
        return 1.0


@triton.jit
def kept_steps(ptrs, mask):
    """The same in steps, as float32."""
    if ptrs.dtype.element_ty == tl.int16:
        code = tl.load(ptrs, mask=mask, other=ZERO_CODE).to(tl.int32) & 0xFFFF
        return (code | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + ZERO_CODE)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def two_kept_steps(ptrs, mask, other_ptrs, other_mask):
    """The sum of two, in steps: of whole numbers, which takes one conversion."""
    if ptrs.dtype.element_ty == tl.int16:
        code = tl.load(ptrs, mask=mask, other=ZERO_CODE).to(tl.int32) & 0xFFFF
        code += tl.load(other_ptrs, mask=other_mask, other=ZERO_CODE).to(tl.int32) & 0xFFFF
        return (code + MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + 2 * ZERO_CODE)
    else:
        total = tl.load(ptrs, mask=mask, other=0.0)
        return total + tl.load(other_ptrs, mask=other_mask, other=0.0)


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _last_steps(x, solarize, scale, shift):
    """Solarize and mean/std: scale is 1 / std, shift is -mean / std."""
    x = tl.where(x >= tl.where(solarize < 1.0, solarize, float("inf")), 1.0 - x, x)
    return x * scale + shift


@triton.jit
def write(
    view_ptr,  # of one view
    pixel,  # y * SIZE + x
    mask,
    r,
    g,
    b,
    solarize,
    scales,  # three, also shifts: see _last_steps
    shifts,
    SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Finishes clipped pixels and writes them to the output, in its dtype."""
    dtype: tl.constexpr = view_ptr.dtype.element_ty
    r = _last_steps(r, solarize, scales[0], shifts[0]).to(dtype)
    g = _last_steps(g, solarize, scales[1], shifts[1]).to(dtype)
    b = _last_steps(b, solarize, scales[2], shifts[2]).to(dtype)
    if CHANNELS_LAST:
        tl.store(view_ptr + 3 * pixel, r, mask=mask)
        tl.store(view_ptr + 3 * pixel + 1, g, mask=mask)
        tl.store(view_ptr + 3 * pixel + 2, b, mask=mask)
    else:
        tl.store(view_ptr + pixel, r, mask=mask)
        tl.store(view_ptr + SIZE * SIZE + pixel, g, mask=mask)
        tl.store(view_ptr + 2 * SIZE * SIZE + pixel, b, mask=mask)
