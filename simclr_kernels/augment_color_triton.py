"""GPU colour operations of a pixel, and the pass that applies contrast and what follows it.

The four operations come in the order of each image. Contrast needs the mean of each channel over
the image: what comes before it is done where the pixels are made (augment_crop_triton.py), which
also sums the channels; the rest here. The formulas are in reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simclr_kernels.augment_blur_triton import blur_rows, taps_of
from simclr_kernels.augment_store_triton import clip, keep, kept, write
from simclr_kernels.reference import GRAY_WEIGHTS, SPAN_FLOOR

BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(code) for code in range(4))
FLOOR = tl.constexpr(SPAN_FLOOR)
GRAY_R, GRAY_G, GRAY_B = (tl.constexpr(weight) for weight in GRAY_WEIGHTS)


@triton.jit
def _ramp(sixths, centre, offset, slope):
    return clip(tl.abs(sixths - centre) * slope + offset)


@triton.jit
def _hue(r, g, b, turns):
    high = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    span = high - low
    per_span = 1.0 / tl.maximum(span, FLOOR)
    sixths = tl.where(g == high, (b - r) * per_span + 2.0, (r - g) * per_span + 4.0)
    sixths = tl.where(r == high, (g - b) * per_span, sixths) + 6.0 * turns
    sixths -= 6.0 * tl.floor(sixths * (1 / 6))
    r = low + span * _ramp(sixths, 3.0, -1.0, 1.0)
    g = low + span * _ramp(sixths, 2.0, 2.0, -1.0)
    b = low + span * _ramp(sixths, 4.0, 2.0, -1.0)
    return r, g, b


@triton.jit
def _saturation(r, g, b, factor):
    high = tl.maximum(tl.maximum(r, g), b)
    span = high - tl.minimum(tl.minimum(r, g), b)
    shrink = tl.minimum(tl.maximum(high, 0.0) / tl.maximum(span, FLOOR), factor)
    return (r - high) * shrink + high, (g - high) * shrink + high, (b - high) * shrink + high


@triton.jit
def contrast_position(order, contrast):
    """Where contrast stands among the operations; 4 if it is off."""
    position = 4
    for i in tl.static_range(4):
        if ((order >> (8 * i)) & 0xFF) == CONTRAST:
            position = i
    return tl.where(contrast != 1.0, position, 4)


@triton.jit
def jitter(
    r,
    g,
    b,
    first,
    last,
    order,
    brightness,
    contrast,
    saturation,
    hue,
    means,  # of the channels, three
    ADD: tl.constexpr,
):
    """The operations at positions [first, last) in the order of the image, each clipped."""
    for i in range(first, last):
        code = (order >> (8 * i)) & 0xFF
        if code == BRIGHTNESS:
            if ADD:
                if brightness != 0.0:
                    r, g, b = clip(r + brightness), clip(g + brightness), clip(b + brightness)
            else:
                if brightness != 1.0:
                    r, g, b = clip(r * brightness), clip(g * brightness), clip(b * brightness)
        elif code == CONTRAST:
            if contrast != 1.0:
                r = clip((r - means[0]) * contrast + means[0])
                g = clip((g - means[1]) * contrast + means[1])
                b = clip((b - means[2]) * contrast + means[2])
        elif code == SATURATION:
            if saturation != 1.0:
                r, g, b = _saturation(r, g, b, saturation)
                r, g, b = clip(r), clip(g), clip(b)
        else:
            if hue != 0.0:
                r, g, b = _hue(r, g, b, hue)
                r, g, b = clip(r), clip(g), clip(b)
    return r, g, b


@triton.jit
def gray_and_clip(r, g, b, gray):
    """Grayscale where asked, and the clip before the blur."""
    if gray:
        r = r * GRAY_R + g * GRAY_G + b * GRAY_B
        g = r
        b = r
    return clip(r), clip(g), clip(b)


@triton.jit
def _color_kernel(
    stage_ptr,  # (views, 3, SIZE, SIZE) int16 or float32: kept by the crop pass
    scratch_ptr,  # memory of the output in the same dtype
    views_ptr,  # (views, 3, SIZE, SIZE) out, in its memory format
    partial_ptr,  # (views, 3, TILES) float32: sums of the channels
    order_ptr,  # (views,) int32: four int8
    brightness_ptr,
    contrast_ptr,
    saturation_ptr,
    hue_ptr,
    gray_ptr,
    sigma_ptr,
    solarize_ptr,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ADD: tl.constexpr,
    RADIUS: tl.constexpr,
    FINISHED: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLUR_BLOCK: tl.constexpr,
):
    """Contrast and what follows it, for ROWS rows of a view, BLOCK pixels at a time.

    A view without blur is written; of one with blur the rows are blurred along x and kept, for
    the pass that blurs along y. Neighbours along x come through the output's memory, of which the
    program owns as many values as it has pixels.
    """
    STRIPS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    PLANE: tl.constexpr = SIZE * SIZE
    view = tl.program_id(0) // STRIPS
    strip = tl.program_id(0) % STRIPS
    contrast = tl.load(contrast_ptr + view)
    sigma = tl.load(sigma_ptr + view)
    done = contrast == 1.0
    if FINISHED:
        done = True
    blurred = sigma > 0.0
    if RADIUS == 0:
        blurred = False
    if done & (not blurred):
        return
    first_pixel = strip * ROWS * SIZE
    pixels = tl.minimum(ROWS * SIZE, PLANE - first_pixel)
    stage_ptr += view.to(tl.int64) * (3 * PLANE)
    scratch_ptr += view.to(tl.int64) * (3 * PLANE)
    views_ptr += view.to(tl.int64) * (3 * PLANE)
    # planes of the strip within the output's memory
    scratch_plane = PLANE
    scratch_ptr += first_pixel
    if CHANNELS_LAST:
        scratch_ptr += 2 * first_pixel
        scratch_plane = pixels
    order = tl.load(order_ptr + view)
    brightness = tl.load(brightness_ptr + view)
    saturation = tl.load(saturation_ptr + view)
    hue = tl.load(hue_ptr + view)
    gray = tl.load(gray_ptr + view) != 0
    solarize = tl.load(solarize_ptr + view)
    first = contrast_position(order, contrast)
    if not FINISHED:
        tile = tl.arange(0, TILES_PADDED)
        partial_ptrs = partial_ptr + view.to(tl.int64) * (3 * TILES) + tile
        mean_r = tl.sum(tl.load(partial_ptrs, mask=tile < TILES, other=0.0)) / PLANE
        mean_g = tl.sum(tl.load(partial_ptrs + TILES, mask=tile < TILES, other=0.0)) / PLANE
        mean_b = tl.sum(tl.load(partial_ptrs + 2 * TILES, mask=tile < TILES, other=0.0)) / PLANE
        means = (mean_r, mean_g, mean_b)
    else:
        means = (0.0, 0.0, 0.0)
    for start in range(0, pixels, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < pixels
        stage_ptrs = stage_ptr + first_pixel + offs
        r = kept(stage_ptrs, mask)
        g = kept(stage_ptrs + PLANE, mask)
        b = kept(stage_ptrs + 2 * PLANE, mask)
        if not done:
            r, g, b = jitter(
                r, g, b, first, 4, order, brightness, contrast, saturation, hue, means, ADD
            )
            r, g, b = gray_and_clip(r, g, b, gray)
        if blurred:
            keep(scratch_ptr + offs, r, mask)
            keep(scratch_ptr + scratch_plane + offs, g, mask)
            keep(scratch_ptr + 2 * scratch_plane + offs, b, mask)
        else:
            write(
                views_ptr,
                first_pixel + offs,
                mask,
                r,
                g,
                b,
                solarize,
                (scale_r, scale_g, scale_b),
                (shift_r, shift_g, shift_b),
                SIZE,
                CHANNELS_LAST,
            )
    if blurred:
        tl.debug_barrier()
        taps = taps_of(sigma, RADIUS)
        for channel in range(3):
            blur_rows(
                scratch_ptr + channel * scratch_plane,
                stage_ptr + first_pixel + channel * PLANE,
                pixels // SIZE,
                taps,
                SIZE,
                RADIUS,
                BLUR_BLOCK,
            )
