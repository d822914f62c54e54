"""What is random about a view: AugmentParams, and how they are drawn from an AugmentConfig.

Random numbers are Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words as a function of
the seed and of (epoch, sample index, view, draw), so that an image's values depend on nothing else:
not on batch, order, worker, rank, device or restart.

    draw            word 0   word 1   word 2   word 3
    0 .. 99         aspect   height   y        x           attempts at a crop ("tensorflow")
    0 .. 9          aspect   area     y        x           attempts at a crop ("torchvision")
    2^16            flip     jitter   order    grayscale
    2^16 + 1        brightness, contrast, saturation, hue
    2^16 + 2        blur     sigma    solarize unused

A word becomes a uniform float32 in [0, 1) as (word >> 8) 2^-24, a uniform integer in [0, n) as
(word n) >> 32. The range [lo, hi) of a float32 is u (hi - lo) + lo, each step rounded: a kernel
without fused multiply-adds draws the same bits. An event of probability p happens where u < p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from simclr_kernels import _C
from simclr_kernels.augment_config import AugmentConfig

FIRST_VALUE_DRAW = 1 << 16
TENSORFLOW_ATTEMPTS = 100
TORCHVISION_ATTEMPTS = 10
FLOAT_VALUES = ("brightness", "contrast", "saturation", "hue_turns", "sigma_px", "solarize")
KERNEL_ARRAYS = ("crop", "flip", *FLOAT_VALUES[:4], "order", "grayscale", *FLOAT_VALUES[4:])
ATTEMPTS_AT_ONCE = 4  # most images need one or two
SOLARIZE_THRESHOLD = 0.5
ORDERS = tuple(permutations(range(4)))  # lexicographic; word 2 of draw 2^16 picks one of the 24

WORD = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class AugmentParams:
    """Everything random about one view of B images.

    Off is a neutral value, not a flag; an exactly neutral operation is skipped, clip included.
    Applying it is deterministic: it can be stored, shown, replayed and handed to any backend.
    """

    crop: Tensor  # (B, 4) int32: y, x, height, width, in source pixels
    flip: Tensor  # (B,) bool
    brightness: Tensor  # (B,) float32 factor, neutral 1; with brightness_mode "add" addend, 0
    contrast: Tensor  # (B,) float32 factor
    saturation: Tensor  # (B,) float32 factor
    hue_turns: Tensor  # (B,) float32 in [-0.5, 0.5]
    order: Tensor  # (B, 4) int8: colour operation at each position (0 b, 1 c, 2 s, 3 h)
    grayscale: Tensor  # (B,) bool
    sigma_px: Tensor  # (B,) float32 blur, in output pixels; 0 is off
    solarize: Tensor  # (B,) float32 threshold; 1 is off

    def __len__(self) -> int:
        return len(self.crop)

    def __getitem__(self, index: int | slice | Tensor) -> AugmentParams:
        """The images of an index, a slice, or a tensor of indices; an int keeps B = 1."""
        if isinstance(index, int):
            index = range(len(self))[index]
            index = slice(index, index + 1)
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> AugmentParams:
        return self._map(lambda value: value.to(device))

    def _map(self, change) -> AugmentParams:
        return AugmentParams(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: list[AugmentParams]) -> AugmentParams:
        """The images of all parts, in their order."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    @classmethod
    def identity(
        cls, sizes: Tensor, brightness_mode: Literal["multiply", "add"] = "multiply"
    ) -> AugmentParams:
        """The whole image and nothing else.

        Args:
            sizes: (B, 2) integer, height and width of each image.
            brightness_mode: of the config it is used with.
        """
        B, device = len(sizes), sizes.device
        off = torch.zeros(B, dtype=torch.bool, device=device)
        zero = torch.zeros(B, dtype=torch.float32, device=device)
        one = torch.ones_like(zero)
        return cls(
            crop=_whole_image(sizes),
            flip=off,
            brightness=one if brightness_mode == "multiply" else zero,
            contrast=one,
            saturation=one,
            hue_turns=zero,
            order=torch.arange(4, dtype=torch.int8, device=device).repeat(B, 1),
            grayscale=off,
            sigma_px=zero,
            solarize=one,
        )

    def describe(self, i: int, brightness_mode: Literal["multiply", "add"] = "multiply") -> str:
        """What happens to image i, in order and without neutral values, for people to read."""
        one = self[i]
        y, x, height, width = one.crop[0].tolist()
        words = [f"crop {height}x{width} at ({y}, {x})"]
        if one.flip:
            words.append("flip")
        value = one.brightness.item()
        multiply = brightness_mode == "multiply"
        color = (
            (f"brightness x{value:.2f}", value != 1)
            if multiply
            else (f"brightness {value:+.2f}", value != 0),
            (f"contrast x{one.contrast.item():.2f}", one.contrast.item() != 1),
            (f"saturation x{one.saturation.item():.2f}", one.saturation.item() != 1),
            (f"hue {one.hue_turns.item() * 360:+.0f} deg", one.hue_turns.item() != 0),
        )
        words += [color[code][0] for code in one.order[0].tolist() if color[code][1]]
        if one.grayscale:
            words.append("grayscale")
        if one.sigma_px > 0:
            words.append(f"blur {one.sigma_px.item():.2f} px")
        if one.solarize < 1:
            words.append(f"solarize above {one.solarize.item():.2f}")
        return ", ".join(words)


def philox(key: tuple[int, int], counter: Tensor) -> Tensor:
    """Philox4x32-10: the four random words of each counter.

    Args:
        key: two 32-bit words.
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


def sample_params(
    config: AugmentConfig, sizes: Tensor, *, seed: int, epoch: int, index: Tensor, view: int
) -> AugmentParams:
    """Draws one view of B images; see the module for which random word is which value.

    Args:
        config: the recipe.
        sizes: (B, 2) int32 or int64, height and width of each image in pixels, at least 1.
        seed: of the run, 0 <= seed < 2^64.
        epoch: 0 <= epoch < 2^32.
        index: (B,) int64, number of each image in its data set, 0 <= index < 2^32. The ranges of
            sizes and index are checked on the CPU only: on a GPU it would wait for the device.
        view: >= 0; 0 and 1 for the two views of SimCLR.

    Returns:
        AugmentParams on the device of index.

    Raises:
        ValueError: a number is out of its range, or shapes disagree.
        TypeError: sizes or index are not integer tensors.
    """
    check_counters(seed, epoch, index, view)
    if sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sizes must be int32 or int64, got {sizes.dtype}")
    if sizes.shape != (len(index), 2):
        raise ValueError(
            "index must be (B,) and sizes (B, 2), "
            f"got {tuple(index.shape)} and {tuple(sizes.shape)}"
        )
    _check_range("sizes", sizes, 1, 31)

    sizes = sizes.to(index.device, torch.int64)
    if index.is_cpu and kernel_draws(config):
        return _sample_in_cpp(config, sizes, seed, epoch, index, view)
    return sample_params_in_torch(config, sizes, seed, epoch, index, view)


def check_counters(seed: int, epoch: int, index: Tensor, view: int = 0) -> None:
    """Refuses what is not a counter of a random number. See sample_params."""
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 32), ("view", view, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must be (B,), got {tuple(index.shape)}")
    _check_range("index", index, 0, 32)


def _check_range(name: str, values: Tensor, first: int, bits: int) -> None:
    if values.is_cpu and values.numel():
        low, high = values.aminmax()
        if low < first or high >= 1 << bits:
            raise ValueError(f"{name} must be in [{first}, 2^{bits}), got {low} .. {high}")


def kernel_draws(config: AugmentConfig) -> bool:
    """Whether kernels draw the params: not where the crop takes logarithms."""
    return config.sampler == "tensorflow" or not config.crop


def kernel_ranges(config: AugmentConfig) -> tuple[float, ...]:
    """What a kernel that draws needs to know, in the order of ViewRanges in csrc/augment.h."""
    return (
        config.crop,
        *config.area,
        *config.aspect,
        config.min_covered,
        config.flip,
        config.jitter,
        config.brightness,
        config.contrast,
        config.saturation,
        config.hue,
        config.grayscale,
        config.brightness_mode == "add",
        *config.blur,
        *config.solarize,
        *config.sigma_px,
    )


def kernel_arrays(params: AugmentParams) -> list[Tensor]:
    """The tensors of params, contiguous, in the order of ParamArrays in csrc/augment.h."""
    return [getattr(params, name).contiguous() for name in KERNEL_ARRAYS]


def _sample_in_cpp(
    config: AugmentConfig, sizes: Tensor, seed: int, epoch: int, index: Tensor, view: int
) -> AugmentParams:
    """The draws of sample_params_in_torch on a CPU, bit for bit."""
    sizes, index = sizes.contiguous(), index.contiguous()
    B = len(index)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(B, *shape, dtype=dtype, device="cpu")

    params = AugmentParams(
        crop=empty(torch.int32, 4),
        flip=empty(torch.bool),
        order=empty(torch.int8, 4),
        grayscale=empty(torch.bool),
        **{name: empty(torch.float32) for name in FLOAT_VALUES},
    )
    _C.sample_params(
        kernel_ranges(config),
        seed,
        epoch,
        view,
        index.data_ptr(),
        sizes.data_ptr(),
        B,
        [array.data_ptr() for array in kernel_arrays(params)],
    )
    return params


def sample_params_in_torch(
    config: AugmentConfig, sizes: Tensor, seed: int, epoch: int, index: Tensor, view: int
) -> AugmentParams:
    """The definition of the draws, on any device. See sample_params, which checks.

    sizes are int64, on the device of index.
    """

    def draw(numbers: Tensor, rows: Tensor) -> Tensor:
        """(len(rows), len(numbers), 4) words of those draws for those index entries."""
        counter = torch.empty(len(rows), len(numbers), 4, dtype=torch.int64, device=rows.device)
        counter[..., 0] = epoch
        counter[..., 1] = rows[:, None]
        counter[..., 2] = view
        counter[..., 3] = numbers
        return philox((seed & WORD, seed >> 32), counter)

    if not config.crop:
        crop = _whole_image(sizes)
    elif config.sampler == "tensorflow":
        crop = _first_accepted(config, _tensorflow_crop, TENSORFLOW_ATTEMPTS, sizes, index, draw)
        crop = torch.where(crop[:, 2:3] > 0, crop, _whole_image(sizes))
    else:
        sizes_cpu, index_cpu = sizes.cpu(), index.cpu()
        crop = _first_accepted(
            config, _torchvision_crop, TORCHVISION_ATTEMPTS, sizes_cpu, index_cpu, draw
        )
        crop = torch.where(crop[:, 2:3] > 0, crop, _centre_crop(config, sizes_cpu))
        crop = crop.to(index.device)

    words = draw(torch.arange(3, device=index.device) + FIRST_VALUE_DRAW, index)
    flip, jitter, _, grayscale = _uniform(words[:, 0]).unbind(1)
    jitter = jitter < config.jitter
    orders = torch.tensor(ORDERS, dtype=torch.int8, device=index.device)
    b, c, s, h = _uniform(words[:, 1]).unbind(1)
    if config.brightness_mode == "multiply":
        brightness_range = (max(1 - config.brightness, 0.0), 1 + config.brightness)
        neutral_brightness = 1.0
    else:
        brightness_range, neutral_brightness = (-config.brightness, config.brightness), 0.0
    blur, sigma, solarize, _ = _uniform(words[:, 2]).unbind(1)

    def jittered(u: Tensor, low: float, high: float, neutral: float) -> Tensor:
        return torch.where(jitter, _between(u, low, high), neutral)

    return AugmentParams(
        crop=crop,
        flip=flip < config.flip,
        brightness=jittered(b, *brightness_range, neutral_brightness),
        contrast=jittered(c, 1 - config.contrast, 1 + config.contrast, 1.0),
        saturation=jittered(s, 1 - config.saturation, 1 + config.saturation, 1.0),
        hue_turns=jittered(h, -config.hue, config.hue, 0.0),
        order=orders[_below(words[:, 0, 2], len(ORDERS))],
        grayscale=grayscale < config.grayscale,
        sigma_px=torch.where(blur < config.blur[view % 2], _between(sigma, *config.sigma_px), 0.0),
        solarize=1 - (1 - SOLARIZE_THRESHOLD) * (solarize < config.solarize[view % 2]).float(),
    )


def _uniform(word: Tensor) -> Tensor:
    """float32 in [0, 1)."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def _between(u: Tensor, low: float, high: float) -> Tensor:
    """float32 in [low, high), each step rounded to float32."""
    low, high = torch.tensor((low, high), dtype=torch.float32)
    return u * (high - low) + low


def _below(word: Tensor, n: int | Tensor) -> Tensor:
    """int64 in [0, n); n < 2^31."""
    return (word * n) >> 32


def _whole_image(sizes: Tensor) -> Tensor:
    """(B, 4) int32."""
    return torch.cat([torch.zeros_like(sizes), sizes], 1).to(torch.int32)


def _first_accepted(config, sampler, attempts: int, sizes: Tensor, index: Tensor, draw) -> Tensor:
    """(B, 4) int32: the first box of each image that the sampler accepts; zeros where none is."""
    crop = torch.zeros(len(index), 4, dtype=torch.int32, device=index.device)
    waiting = torch.arange(len(index), device=index.device)
    for first in range(0, attempts, ATTEMPTS_AT_ONCE):
        if not len(waiting):
            break
        numbers = torch.arange(first, min(first + ATTEMPTS_AT_ONCE, attempts), device=index.device)
        height, width = sizes[waiting, :, None].unbind(1)
        boxes, accepted = sampler(config, height, width, draw(numbers, index[waiting]))
        found, attempt = accepted.max(1)  # the first of equals
        chosen = boxes[torch.arange(len(waiting), device=index.device), attempt]
        crop[waiting[found]] = chosen[found].to(torch.int32)
        waiting = waiting[~found]
    return crop


def _tensorflow_crop(
    config: AugmentConfig, H: Tensor, W: Tensor, words: Tensor
) -> tuple[Tensor, Tensor]:
    """One attempt of TensorFlow's sample_distorted_bounding_box, for each of many words.

    Args:
        config: area, aspect and min_covered are read.
        H: (B, 1) int64, height of the image.
        W: (B, 1) int64, width.
        words: (B, A, 4) random words.

    Returns:
        (B, A, 4) int64 boxes (y, x, height, width) and (B, A) bool: whether they are accepted.
    """
    float32 = torch.float32
    aspect = _between(_uniform(words[..., 0]), *config.aspect)
    area_low, area_high = torch.tensor(config.area, dtype=float32)
    min_area = area_low * W.to(float32) * H.to(float32)
    max_area = area_high * W.to(float32) * H.to(float32)

    def width_of(height: Tensor) -> Tensor:
        return (height.to(float32) * aspect).round().long()

    height = (min_area / aspect).sqrt().round().long()
    most = (max_area / aspect).sqrt().round().long()
    # the largest height whose width still fits
    fitting = ((W.to(float32) + 0.5 - 1e-7) / aspect).long()
    fitting = fitting - (width_of(fitting) > W).long()
    most = torch.where(width_of(most) > W, fitting, most).minimum(H)
    height = height.minimum(most)
    height = height + _below(words[..., 1], most - height + 1)
    # rounding may leave the range of areas by one pixel of height
    height = height + (height * width_of(height) < min_area).long()
    height = height - (height * width_of(height) > max_area).long()
    width = width_of(height)
    area = height * width
    accepted = (area >= min_area) & (area <= max_area)
    accepted &= (width <= W) & (height <= H) & (width > 0) & (height > 0)
    accepted &= area.to(float32) / (H * W).to(float32) >= config.min_covered
    # an offset of H - height, the last one possible, is never drawn
    y = _below(words[..., 2], (H - height).clamp_min(0))
    x = _below(words[..., 3], (W - width).clamp_min(0))
    return torch.stack([y, x, height, width], -1), accepted


def _torchvision_crop(
    config: AugmentConfig, H: Tensor, W: Tensor, words: Tensor
) -> tuple[Tensor, Tensor]:
    """One attempt of torchvision's RandomResizedCrop, in float64. See _tensorflow_crop."""
    log_low, log_high = (math.log(ratio) for ratio in config.aspect)
    aspect = (_uniform(words[..., 0]).double() * (log_high - log_low) + log_low).exp()
    low, high = config.area
    area = (_uniform(words[..., 1]).double() * (high - low) + low) * (H * W)
    height = (area / aspect).sqrt().round().long()
    width = (area * aspect).sqrt().round().long()
    accepted = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    y = _below(words[..., 2], (H - height).clamp_min(0) + 1)
    x = _below(words[..., 3], (W - width).clamp_min(0) + 1)
    return torch.stack([y, x, height, width], -1), accepted


def _centre_crop(config: AugmentConfig, sizes: Tensor) -> Tensor:
    """(B, 4) int32: torchvision's fallback, the largest centred box of an allowed aspect ratio."""
    H, W = sizes.unbind(1)
    low, high = config.aspect
    height = torch.where(W / H < low, (W.double() / low).round().long(), H)
    width = torch.where(W / H > high, (H.double() * high).round().long(), W)
    height, width = height.clamp_min(1), width.clamp_min(1)
    box = [(H - height) // 2, (W - width) // 2, height, width]
    return torch.stack(box, 1).to(torch.int32)
