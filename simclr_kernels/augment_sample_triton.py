"""GPU kernel that draws the params of views: one lane an image, the bits of params.py.

Every step is one IEEE operation (division and square root rounded to nearest, no fused
multiply-add), so that the values equal those of the torch code, which defines them. Samplers that
need a logarithm ("torchvision") are not drawn here.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.crop_samplers import TENSORFLOW_ATTEMPTS
from simclr_kernels.params import (
    FIRST_VALUE_DRAW,
    KERNEL_ARRAYS,
    SOLARIZE_THRESHOLD,
    AugmentParams,
)
from simclr_kernels.philox import PHILOX_MULTIPLIERS, PHILOX_WEYL

BLOCK = 64  # images of a program: few, since all wait for the one that is drawn most often
WARPS = 1

VALUE_DRAW = tl.constexpr(FIRST_VALUE_DRAW)
ATTEMPTS = tl.constexpr(TENSORFLOW_ATTEMPTS)
MULTIPLIER_0 = tl.constexpr(PHILOX_MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(PHILOX_MULTIPLIERS[1])
WEYL_0 = tl.constexpr(PHILOX_WEYL[0])
WEYL_1 = tl.constexpr(PHILOX_WEYL[1])
SOLARIZED = tl.constexpr(SOLARIZE_THRESHOLD)
WHOLE_NUMBERS = tl.constexpr(2.0**23)  # from here on every float32 is one


@triton.jit
def _philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10 on uint32."""
    first = tl.zeros_like(c1) + MULTIPLIER_0
    second = tl.zeros_like(c1) + MULTIPLIER_1
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(c0, first), c0 * first
        high_1, low_1 = tl.umulhi(c2, second), c2 * second
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """float32 in [0, 1)."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _below(word, n):
    """int64 in [0, n), n >= 0."""
    return tl.umulhi(word, n.to(tl.uint32)).to(tl.int64)


@triton.jit
def _rounded(x):
    """int64, ties to even; x >= 0."""
    return tl.where(x < WHOLE_NUMBERS, (x + WHOLE_NUMBERS) - WHOLE_NUMBERS, x).to(tl.int64)


@triton.jit
def _crop_attempt(H, W, w0, w1, w2, w3, aspect_low, aspect_span, area_low, area_high, covered):
    """(accepted, y, x, height, width): crop_samplers.tensorflow_crop, step by step."""
    aspect = _uniform(w0) * aspect_span + aspect_low
    H_float, W_float = H.to(tl.float32), W.to(tl.float32)
    min_area = area_low * W_float * H_float
    max_area = area_high * W_float * H_float
    height = _rounded(tl.sqrt_rn(tl.div_rn(min_area, aspect)))
    most = _rounded(tl.sqrt_rn(tl.div_rn(max_area, aspect)))
    fitting = tl.div_rn(W_float + 0.5 - 1e-7, aspect).to(tl.int64)
    fitting -= (_rounded(fitting.to(tl.float32) * aspect) > W).to(tl.int64)
    most = tl.where(_rounded(most.to(tl.float32) * aspect) > W, fitting, most)
    most = tl.minimum(most, H)
    height = tl.minimum(height, most)
    height += _below(w1, most - height + 1)
    area = height * _rounded(height.to(tl.float32) * aspect)
    height += (area.to(tl.float32) < min_area).to(tl.int64)
    area = height * _rounded(height.to(tl.float32) * aspect)
    height -= (area.to(tl.float32) > max_area).to(tl.int64)
    width = _rounded(height.to(tl.float32) * aspect)
    area_float = (height * width).to(tl.float32)
    accepted = (area_float >= min_area) & (area_float <= max_area)
    accepted &= (width <= W) & (height <= H) & (width > 0) & (height > 0)
    accepted &= tl.div_rn(area_float, (H * W).to(tl.float32)) >= covered
    y = _below(w2, tl.maximum(H - height, 0))
    x = _below(w3, tl.maximum(W - width, 0))
    return accepted, y, x, height, width


@triton.jit
def _value(word, jitter, low, span, neutral):
    return tl.where(jitter, _uniform(word) * span + low, neutral)


# one machine code for all batches: another would be compiled in the middle of a run
@triton.jit(
    do_not_specialize=[
        *("one_height", "one_width", "epoch", "seed_low", "seed_high"),
        *("first_view", "images", "rows"),
    ],
    do_not_specialize_on_alignment=["index_ptr", "sizes_ptr"],
)
def _sample_kernel(
    index_ptr,  # (images,) int64
    sizes_ptr,  # (images, 2) int32 or int64, or None: all images are of one size
    one_height,
    one_width,
    epoch,  # a number, or a pointer to one int64
    seed_low,  # the two words of the seed, as int32
    seed_high,
    first_view,
    images,
    rows,  # images, or twice as many: of two views, one after the other
    crop_ptr,  # (rows, 4) int32, out; the others too
    flip_ptr,  # (rows,) uint8, also grayscale
    gray_ptr,
    order_ptr,  # (rows,) int32: four int8
    brightness_ptr,  # (rows,) float32, also all that follow
    contrast_ptr,
    saturation_ptr,
    hue_ptr,
    sigma_ptr,
    solarize_ptr,
    aspect_low,
    aspect_span,
    area_low,
    area_high,
    covered,
    flip_below,
    jitter_below,
    gray_below,
    blur_below_even,
    blur_below_odd,
    solarize_below_even,
    solarize_below_odd,
    brightness_low,
    brightness_span,
    brightness_off,
    contrast_low,
    contrast_span,
    saturation_low,
    saturation_span,
    hue_low,
    hue_span,
    sigma_low,
    sigma_span,
    CROP: tl.constexpr,
    EPOCH_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draws the params of BLOCK views. See params.py for which random word is which value."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    second = (row >= images).to(tl.int32)
    image = row - second * images
    view = (second + first_view).to(tl.uint32)
    sample = tl.load(index_ptr + image, mask=inside, other=0).to(tl.uint32)
    if EPOCH_ON_DEVICE:
        epoch = tl.load(epoch)
    turn = tl.zeros((BLOCK,), tl.uint32) + epoch.to(tl.uint32)
    k0 = tl.zeros((BLOCK,), tl.uint32) + seed_low.to(tl.uint32)
    k1 = tl.zeros((BLOCK,), tl.uint32) + seed_high.to(tl.uint32)
    draw = tl.zeros((BLOCK,), tl.uint32)
    if sizes_ptr is None:
        H = tl.zeros((BLOCK,), tl.int64) + one_height
        W = tl.zeros((BLOCK,), tl.int64) + one_width
    else:
        H = tl.load(sizes_ptr + 2 * image, mask=inside, other=1).to(tl.int64)
        W = tl.load(sizes_ptr + 2 * image + 1, mask=inside, other=1).to(tl.int64)

    y, x = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    height, width = H, W
    if CROP:
        waiting = inside
        attempt = 0
        while (attempt < ATTEMPTS) & (tl.max(waiting.to(tl.int32), 0) > 0):
            w0, w1, w2, w3 = _philox(k0, k1, turn, sample, view, draw + attempt.to(tl.uint32))
            accepted, y_new, x_new, height_new, width_new = _crop_attempt(
                H, W, w0, w1, w2, w3, aspect_low, aspect_span, area_low, area_high, covered
            )
            found = waiting & accepted
            y, x = tl.where(found, y_new, y), tl.where(found, x_new, x)
            height = tl.where(found, height_new, height)
            width = tl.where(found, width_new, width)
            waiting &= ~accepted
            attempt += 1
    tl.store(crop_ptr + 4 * row, y.to(tl.int32), mask=inside)
    tl.store(crop_ptr + 4 * row + 1, x.to(tl.int32), mask=inside)
    tl.store(crop_ptr + 4 * row + 2, height.to(tl.int32), mask=inside)
    tl.store(crop_ptr + 4 * row + 3, width.to(tl.int32), mask=inside)

    w0, w1, w2, w3 = _philox(k0, k1, turn, sample, view, draw + VALUE_DRAW)
    tl.store(flip_ptr + row, (_uniform(w0) < flip_below).to(tl.uint8), mask=inside)
    tl.store(gray_ptr + row, (_uniform(w3) < gray_below).to(tl.uint8), mask=inside)
    jitter = _uniform(w1) < jitter_below
    # the permutation of that number, in lexicographic order
    number = tl.umulhi(w2, tl.zeros_like(w2) + 24).to(tl.int32)
    first = number // 6
    then = number % 6 // 2
    then += (then >= first).to(tl.int32)
    third = number % 2
    third += (third >= tl.minimum(first, then)).to(tl.int32)
    third += (third >= tl.maximum(first, then)).to(tl.int32)
    order = first | (then << 8) | (third << 16) | ((6 - first - then - third) << 24)
    tl.store(order_ptr + row, order, mask=inside)

    w0, w1, w2, w3 = _philox(k0, k1, turn, sample, view, draw + (VALUE_DRAW + 1))
    value = _value(w0, jitter, brightness_low, brightness_span, brightness_off)
    tl.store(brightness_ptr + row, value, mask=inside)
    value = _value(w1, jitter, contrast_low, contrast_span, 1.0)
    tl.store(contrast_ptr + row, value, mask=inside)
    value = _value(w2, jitter, saturation_low, saturation_span, 1.0)
    tl.store(saturation_ptr + row, value, mask=inside)
    value = _value(w3, jitter, hue_low, hue_span, 0.0)
    tl.store(hue_ptr + row, value, mask=inside)

    w0, w1, w2, w3 = _philox(k0, k1, turn, sample, view, draw + (VALUE_DRAW + 2))
    odd = view % 2 == 1
    blurred = _uniform(w0) < tl.where(odd, blur_below_odd, blur_below_even)
    tl.store(sigma_ptr + row, _value(w1, blurred, sigma_low, sigma_span, 0.0), mask=inside)
    inverted = _uniform(w2) < tl.where(odd, solarize_below_odd, solarize_below_even)
    tl.store(solarize_ptr + row, tl.where(inverted, SOLARIZED, 1.0), mask=inside)


def launch_sample(
    config: AugmentConfig,
    sizes: Tensor | tuple[int, int],
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
    first_view: int,
    views: int,
) -> AugmentParams:
    """Params of `views` views of each image, view by view. See params.sample_params.

    sizes are (B, 2), or one height and width; epoch may be one int64 on the device.
    """
    B = len(index)
    params = AugmentParams(
        **{
            name: torch.empty(views * B, *rest, dtype=dtype, device=index.device)
            for name, (dtype, *rest) in KERNEL_ARRAYS.items()
        }
    )
    one_height, one_width = (0, 0) if isinstance(sizes, Tensor) else sizes
    add = config.brightness_mode == "add"
    _sample_kernel[(triton.cdiv(views * B, BLOCK),)](
        index.contiguous(),
        sizes.contiguous() if isinstance(sizes, Tensor) else None,
        one_height,
        one_width,
        epoch if isinstance(epoch, Tensor) else _as_int32(epoch),
        _as_int32(seed & 0xFFFFFFFF),
        _as_int32(seed >> 32),
        first_view,
        B,
        views * B,
        params.crop,
        params.flip.view(torch.uint8),
        params.grayscale.view(torch.uint8),
        params.order.view(torch.int32),
        params.brightness,
        params.contrast,
        params.saturation,
        params.hue_turns,
        params.sigma_px,
        params.solarize,
        *_low_and_span(*config.aspect),
        *config.area,
        config.min_covered,
        config.flip,
        config.jitter,
        config.grayscale,
        *config.blur,
        *config.solarize,
        *_low_and_span(
            -config.brightness if add else max(1 - config.brightness, 0.0),
            config.brightness if add else 1 + config.brightness,
        ),
        0.0 if add else 1.0,
        *_low_and_span(1 - config.contrast, 1 + config.contrast),
        *_low_and_span(1 - config.saturation, 1 + config.saturation),
        *_low_and_span(-config.hue, config.hue),
        *_low_and_span(*config.sigma_px),
        CROP=config.crop,
        EPOCH_ON_DEVICE=isinstance(epoch, Tensor),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return params


def _low_and_span(low: float, high: float) -> tuple[float, float]:
    """As float32: the span is rounded once more, as in params.py."""
    return float(np.float32(low)), float(np.float32(high) - np.float32(low))


def _as_int32(word: int) -> int:
    """The same 32 bits with a sign: launches then have one signature whatever the number."""
    return word - (1 << 32) if word >> 31 else word
