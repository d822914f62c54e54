"""GPU pass that makes the pixels of a view: crop, bicubic resize, flip, and first colours.

A pixel is the weighted sum of 4 x 4 source pixels, of which the four of a row are 12 consecutive
bytes: read as aligned 32-bit words and shifted, 4 loads a row instead of 12. Positions are whole
numbers of 1/1024 pixel, as in reference.resize_taps: every backend rounds them alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simclr_kernels.augment_color_triton import contrast_position, gray_and_clip, jitter
from simclr_kernels.augment_store_triton import MAGIC, MAGIC_BITS, keep, write
from simclr_kernels.reference import KEYS_A, POSITION_BITS

BITS = tl.constexpr(POSITION_BITS)
ONE = tl.constexpr(1 << POSITION_BITS)
A = tl.constexpr(KEYS_A)


@triton.jit
def _position(x, length, SIZE: tl.constexpr):
    """Of output pixel x in a crop of `length` pixels, in 1/1024 pixel, ties to even.

    ((2x + 1) length - SIZE) 1024 / (2 SIZE), in 32 bits: whole pixels first, then the rest.
    """
    doubled = (2 * x + 1) * length + SIZE
    whole = doubled // (2 * SIZE)
    rest = (doubled - whole * (2 * SIZE)) * (2 * ONE) + 2 * SIZE
    steps = rest // (4 * SIZE)
    tie = (rest == steps * (4 * SIZE)) & (steps % 2 == 1)
    return (whole - 1) * ONE + steps - tie.to(tl.int32)


@triton.jit
def _weight(distance):
    """Keys' cubic at a distance of so many 1/1024 pixels; 0 from two pixels on."""
    d = tl.abs(distance).to(tl.float32) * (1 / ONE)
    near = (d * (A + 2) - (A + 3)) * d * d + 1.0
    far = ((d * A - 5 * A) * d + 8 * A) * d - 4 * A
    return tl.where(d < 1.0, near, tl.where(d < 2.0, far, 0.0))


@triton.jit
def _tap(position, first, i: tl.constexpr, length):
    """Weight of crop pixel first + i, not yet normalised; 0 outside of the crop."""
    pixel = first + i
    return tl.where((pixel >= 0) & (pixel < length), _weight(pixel * ONE - position), 0.0)


@triton.jit
def _taps(position, first, length):
    """The weights of crop pixels first .. first + 3."""
    w0 = _tap(position, first, 0, length)
    w1 = _tap(position, first, 1, length)
    w2 = _tap(position, first, 2, length)
    w3 = _tap(position, first, 3, length)
    scale = 1.0 / (w0 + w1 + w2 + w3)
    return w0 * scale, w1 * scale, w2 * scale, w3 * scale


@triton.jit
def _shifted(low, high, shift):
    """The 32 bits from bit `shift` < 32 on, of two words."""
    both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (both >> shift).to(tl.uint32)


@triton.jit
def _words(word_ptr, offs):
    """The 12 bytes from byte `offs` on, as three words; reads no word without such a byte."""
    word_ptrs = word_ptr + (offs >> 2)
    w0 = tl.load(word_ptrs)
    w1 = tl.load(word_ptrs + 1)
    w2 = tl.load(word_ptrs + 2)
    w3 = tl.load(word_ptr + ((offs + 11) >> 2))
    shift = ((offs & 3) * 8).to(tl.uint64)
    return _shifted(w0, w1, shift), _shifted(w1, w2, shift), _shifted(w2, w3, shift)


@triton.jit
def _few_bytes(byte_ptr, offs, W):
    """The same 12 bytes where a row has less than four pixels: the last of them repeats."""
    w0 = tl.zeros(offs.shape, tl.uint32)
    w1 = tl.zeros(offs.shape, tl.uint32)
    w2 = tl.zeros(offs.shape, tl.uint32)
    for i in tl.static_range(12):
        pixel = tl.minimum(i // 3, W - 1)
        byte = tl.load(byte_ptr + offs + 3 * pixel + i % 3).to(tl.uint32) << (i % 4 * 8)
        if i < 4:
            w0 |= byte
        elif i < 8:
            w1 |= byte
        else:
            w2 |= byte
    return w0, w1, w2


@triton.jit
def _byte(w0, w1, w2, i: tl.constexpr):
    """Byte i of twelve, as float32."""
    word = w0
    if i >= 8:
        word = w2
    elif i >= 4:
        word = w1
    whole = ((word >> (i % 4 * 8)) & 0xFF) | MAGIC_BITS
    return whole.to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def _row_of_taps(w0, w1, w2, x0, x1, x2, x3, c: tl.constexpr):
    """The sum over a row's four source pixels, of one channel."""
    total = _byte(w0, w1, w2, c) * x0[None, :] + _byte(w0, w1, w2, 3 + c) * x1[None, :]
    return total + _byte(w0, w1, w2, 6 + c) * x2[None, :] + _byte(w0, w1, w2, 9 + c) * x3[None, :]


# one machine code for all batches: another would be compiled in the middle of a run
@triton.jit(
    do_not_specialize=["one_height", "one_width", "images"],
    do_not_specialize_on_alignment=["images_ptr", "offsets_ptr", "sizes_ptr"],
)
def _crop_kernel(
    images_ptr,  # uint8, all images
    offsets_ptr,  # (images,) int64, in bytes, or None: images are HEIGHT x WIDTH, one by one
    sizes_ptr,  # (images, 2) int32 or int64: height, width; None likewise
    one_height,
    one_width,
    images,
    crop_ptr,  # (views, 4) int32: y, x, height, width
    flip_ptr,  # (views,) uint8
    order_ptr,  # (views,) int32: four int8
    brightness_ptr,
    contrast_ptr,
    saturation_ptr,
    hue_ptr,
    gray_ptr,
    sigma_ptr,
    solarize_ptr,
    stage_ptr,  # (views, 3, SIZE, SIZE) int16 or float32, out
    views_ptr,  # (views, 3, SIZE, SIZE) out, in its memory format
    partial_ptr,  # (views, 3, TILES) float32, out: sums of the channels
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
    WHOLE: tl.constexpr,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Makes STRIP rows of COLUMNS pixels of a view, ROWS at a time, up to its contrast.

    A view without contrast is made up to its blur, and written if it has none. So is every view if
    a program owns all of it (WHOLE): it then knows the mean of its channels.
    """
    ACROSS: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    DOWN: tl.constexpr = (SIZE + STRIP - 1) // STRIP
    PLANE: tl.constexpr = SIZE * SIZE
    tile = tl.program_id(0) % (ACROSS * DOWN)
    view = tl.program_id(0) // (ACROSS * DOWN)
    image = view % images
    H, W = one_height, one_width
    if sizes_ptr is not None:
        H = tl.load(sizes_ptr + 2 * image).to(tl.int32)
        W = tl.load(sizes_ptr + 2 * image + 1).to(tl.int32)
    if offsets_ptr is None:
        image_ptr = images_ptr + image.to(tl.int64) * H * W * 3
    else:
        image_ptr = images_ptr + tl.load(offsets_ptr + image)
    misaligned = (image_ptr.to(tl.int64) & 3).to(tl.int32)
    word_ptr = (image_ptr - misaligned).to(tl.pointer_type(tl.uint32), bitcast=True)

    crop_y = tl.load(crop_ptr + 4 * view)
    crop_x = tl.load(crop_ptr + 4 * view + 1)
    height = tl.load(crop_ptr + 4 * view + 2)
    width = tl.load(crop_ptr + 4 * view + 3)
    order = tl.load(order_ptr + view)
    brightness = tl.load(brightness_ptr + view)
    contrast = tl.load(contrast_ptr + view)
    saturation = tl.load(saturation_ptr + view)
    hue = tl.load(hue_ptr + view)
    solarize = tl.load(solarize_ptr + view)
    gray = tl.load(gray_ptr + view) != 0
    blurred = tl.load(sigma_ptr + view) > 0.0
    if RADIUS == 0:
        blurred = False
    last = contrast_position(order, contrast)
    done = contrast == 1.0
    stage_ptr += view.to(tl.int64) * (3 * PLANE)
    views_ptr += view.to(tl.int64) * (3 * PLANE)

    x = tile % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    flipped = tl.load(flip_ptr + view) != 0
    position = _position(tl.where(flipped, SIZE - 1 - x, x), width, SIZE)
    # four neighbours within the image, whatever the crop: those outside of it have no weight
    window = tl.maximum(tl.minimum(crop_x + (position >> BITS) - 1, W - 4), 0)
    x0, x1, x2, x3 = _taps(position, window - crop_x, width)
    column_offs = misaligned + 3 * window

    sum_r = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_g = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_b = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_y = tile // ACROSS * STRIP
    for start_y in range(first_y, tl.minimum(first_y + STRIP, SIZE), ROWS):
        y = start_y + tl.arange(0, ROWS)
        down = _position(y, height, SIZE)
        first = (down >> BITS) - 1
        y0, y1, y2, y3 = _taps(down, first, height)
        r = tl.zeros((ROWS, COLUMNS), tl.float32)
        g = tl.zeros((ROWS, COLUMNS), tl.float32)
        b = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(4):
            source_y = crop_y + tl.minimum(tl.maximum(first + i, 0), height - 1)
            # nobody checked the crop: to do so would wait for the device
            source_y = tl.minimum(tl.maximum(source_y, 0), H - 1)
            offs = (source_y * (3 * W))[:, None] + column_offs[None, :]
            if W >= 4:
                w0, w1, w2 = _words(word_ptr, offs)
            else:
                w0, w1, w2 = _few_bytes(image_ptr - misaligned, offs, W)
            if i == 0:
                weight = y0
            elif i == 1:
                weight = y1
            elif i == 2:
                weight = y2
            else:
                weight = y3
            weight = (weight * (1 / 255))[:, None]
            r += _row_of_taps(w0, w1, w2, x0, x1, x2, x3, 0) * weight
            g += _row_of_taps(w0, w1, w2, x0, x1, x2, x3, 1) * weight
            b += _row_of_taps(w0, w1, w2, x0, x1, x2, x3, 2) * weight

        inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
        pixel = (y * SIZE)[:, None] + x[None, :]
        none = (0.0, 0.0, 0.0)
        r, g, b = jitter(r, g, b, 0, last, order, brightness, contrast, saturation, hue, none, ADD)
        if WHOLE:
            if not done:
                means = (
                    tl.sum(tl.where(inside, r, 0.0)) / PLANE,
                    tl.sum(tl.where(inside, g, 0.0)) / PLANE,
                    tl.sum(tl.where(inside, b, 0.0)) / PLANE,
                )
                r, g, b = jitter(
                    r, g, b, last, 4, order, brightness, contrast, saturation, hue, means, ADD
                )
        if done | WHOLE:
            r, g, b = gray_and_clip(r, g, b, gray)
        else:
            sum_r += tl.where(inside, r, 0.0)
            sum_g += tl.where(inside, g, 0.0)
            sum_b += tl.where(inside, b, 0.0)
        if (done | WHOLE) & (not blurred):
            write(
                views_ptr,
                pixel,
                inside,
                r,
                g,
                b,
                solarize,
                (scale_r, scale_g, scale_b),
                (shift_r, shift_g, shift_b),
                SIZE,
                CHANNELS_LAST,
            )
        else:
            keep(stage_ptr + pixel, r, inside)
            keep(stage_ptr + PLANE + pixel, g, inside)
            keep(stage_ptr + 2 * PLANE + pixel, b, inside)
    if not WHOLE:
        partial_ptr += view.to(tl.int64) * (3 * ACROSS * DOWN) + tile
        tl.store(partial_ptr, tl.sum(sum_r))
        tl.store(partial_ptr + ACROSS * DOWN, tl.sum(sum_g))
        tl.store(partial_ptr + 2 * ACROSS * DOWN, tl.sum(sum_b))
