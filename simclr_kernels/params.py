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
    2^16 + 3        cutout   y        x        rotation    only where the config has
    2^16 + 4        turns    sobel    noise    unused      study operations
    2^16 + 5        key of the noise: 2 words, 2 unused

How a word becomes a number: philox.py. An event of probability p happens where u < p.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from simclr_kernels import _C
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.crop_samplers import (
    TENSORFLOW_ATTEMPTS,
    TORCHVISION_ATTEMPTS,
    centre_crop,
    first_accepted,
    tensorflow_crop,
    torchvision_crop,
    whole_image,
)
from simclr_kernels.philox import WORD, below, between, philox, uniform
from simclr_kernels.study_params import STUDY_DRAWS, StudyParams, study_of

FIRST_VALUE_DRAW = 1 << 16
FIRST_STUDY_DRAW = FIRST_VALUE_DRAW + 3
# the tensors of AugmentParams as kernels take them: dtype, and shape behind B
KERNEL_ARRAYS = {
    "crop": (torch.int32, 4),
    "flip": (torch.bool,),
    "brightness": (torch.float32,),
    "contrast": (torch.float32,),
    "saturation": (torch.float32,),
    "hue_turns": (torch.float32,),
    "order": (torch.int8, 4),
    "grayscale": (torch.bool,),
    "sigma_px": (torch.float32,),
    "solarize": (torch.float32,),
}
SOLARIZE_THRESHOLD = 0.5
ORDERS = tuple(permutations(range(4)))  # lexicographic; word 2 of draw 2^16 picks one of the 24


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
    study: StudyParams | None = None  # operations beyond the recipe; None: none of them

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
        study = self.study and self.study.map(change)
        values = {f.name: change(getattr(self, f.name)) for f in _own_tensors()}
        return AugmentParams(**values, study=study)

    @classmethod
    def concatenate(cls, parts: list[AugmentParams]) -> AugmentParams:
        """The images of all parts, in their order."""
        study = None
        if any(part.study for part in parts):
            study = StudyParams.concatenate(
                [part.study or StudyParams.identity(len(part), part.crop.device) for part in parts]
            )
        values = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in _own_tensors()}
        return cls(**values, study=study)

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
            crop=whole_image(sizes),
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
        if one.study:
            words += one.study.turn_words(0)
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
        if one.study:
            words += one.study.last_words(0)
        return ", ".join(words)


def _own_tensors():
    """The fields of AugmentParams but for study."""
    return fields(AugmentParams)[:-1]


def sample_params(
    config: AugmentConfig,
    sizes: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
    view: int,
) -> AugmentParams:
    """Draws one view of B images; see the module for which random word is which value.

    Args:
        config: the recipe.
        sizes: (B, 2) int32 or int64, height and width of each image in pixels, at least 1.
        seed: of the run, 0 <= seed < 2^64.
        epoch: 0 <= epoch < 2^32; or one int64 on the device of index, of any shape and not
            checked there, which a captured graph can advance.
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
    _check_range("index", index, 0, 32)
    _check_range("sizes", sizes, 1, 31)

    if index.is_cuda and kernel_draws(config):
        sizes = sizes.to(index.device)
        return triton_views().sample_params(config, sizes, seed, epoch, index, view)
    sizes = sizes.to(index.device, torch.int64)
    if index.is_cpu and kernel_draws(config):
        return _sample_in_cpp(config, sizes, seed, int(epoch), index, view)
    return sample_params_in_torch(config, sizes, seed, epoch, index, view)


def check_counters(seed: int, epoch: int | Tensor, index: Tensor, view: int = 0) -> None:
    """Refuses what is not a counter of a random number; entries of index are not read."""
    if isinstance(epoch, Tensor):
        if epoch.dtype != torch.int64:
            raise TypeError(f"an epoch that is a tensor must be int64, got {epoch.dtype}")
        if epoch.numel() != 1 or epoch.device != index.device:
            raise ValueError(
                f"an epoch that is a tensor must be one number on {index.device}, "
                f"got shape {tuple(epoch.shape)} on {epoch.device}"
            )
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 32), ("view", view, 32)):
        # to compare a number on a GPU would wait for it
        if isinstance(value, Tensor) and not value.is_cpu:
            continue
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must be (B,), got {tuple(index.shape)}")


def _check_range(name: str, values: Tensor, first: int, bits: int) -> None:
    if values.is_cpu and values.numel():
        # as Python's numbers: 2^31 wraps round in int32
        low, high = (value.item() for value in values.aminmax())
        if low < first or high >= 1 << bits:
            raise ValueError(f"{name} must be in [{first}, 2^{bits}), got {low} .. {high}")


def triton_views():
    """The module augment_triton, which needs triton."""
    try:
        from simclr_kernels import augment_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "views on a GPU need triton, which comes with torch for CUDA and ROCm: "
            "pip install triton"
        ) from error
    return augment_triton


def kernel_draws(config: AugmentConfig) -> bool:
    """Whether kernels draw the params: none of the study, and no crop that takes logarithms."""
    return not config.has_study_operations and (config.sampler == "tensorflow" or not config.crop)


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
    """The tensors of params, contiguous, in the order of ParamArrays in csrc/augment.h.

    Raises:
        ValueError: a tensor has another shape than AugmentParams says.
        TypeError: it has another dtype.
    """
    arrays = []
    for name, (dtype, *rest) in KERNEL_ARRAYS.items():
        array, shape = getattr(params, name), (len(params), *rest)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(array.shape)}")
        arrays.append(array.contiguous())
    return arrays


def _sample_in_cpp(
    config: AugmentConfig, sizes: Tensor, seed: int, epoch: int, index: Tensor, view: int
) -> AugmentParams:
    """The draws of sample_params_in_torch on a CPU, bit for bit."""
    sizes, index = sizes.contiguous(), index.contiguous()
    arrays = {
        name: torch.empty(len(index), *rest, dtype=dtype, device="cpu")
        for name, (dtype, *rest) in KERNEL_ARRAYS.items()
    }
    _C.sample_params(
        kernel_ranges(config),
        seed,
        epoch,
        view,
        index.data_ptr(),
        sizes.data_ptr(),
        len(index),
        [array.data_ptr() for array in arrays.values()],
    )
    return AugmentParams(**arrays)


def sample_params_in_torch(
    config: AugmentConfig, sizes: Tensor, seed: int, epoch: int | Tensor, index: Tensor, view: int
) -> AugmentParams:
    """The definition of the draws, on any device. See sample_params, which checks.

    sizes are int64, on the device of index.
    """

    def draw(numbers: Tensor, rows: Tensor) -> Tensor:
        """(len(rows), len(numbers), 4) words of those draws for those index entries."""
        counter = torch.empty(len(rows), len(numbers), 4, dtype=torch.int64, device=rows.device)
        counter[..., 0] = epoch.reshape(()) if isinstance(epoch, Tensor) else epoch
        counter[..., 1] = rows[:, None]
        counter[..., 2] = view
        counter[..., 3] = numbers
        return philox((seed & WORD, seed >> 32), counter)

    if not config.crop:
        crop = whole_image(sizes)
    elif config.sampler == "tensorflow":
        crop = first_accepted(config, tensorflow_crop, TENSORFLOW_ATTEMPTS, sizes, index, draw)
        crop = torch.where(crop[:, 2:3] > 0, crop, whole_image(sizes))
    else:
        sizes_cpu, index_cpu = sizes.cpu(), index.cpu()
        crop = first_accepted(
            config, torchvision_crop, TORCHVISION_ATTEMPTS, sizes_cpu, index_cpu, draw
        )
        crop = torch.where(crop[:, 2:3] > 0, crop, centre_crop(config, sizes_cpu))
        crop = crop.to(index.device)

    words = draw(torch.arange(3, device=index.device) + FIRST_VALUE_DRAW, index)
    flip, jitter, _, grayscale = uniform(words[:, 0]).unbind(1)
    jitter = jitter < config.jitter
    orders = torch.tensor(ORDERS, dtype=torch.int8, device=index.device)
    b, c, s, h = uniform(words[:, 1]).unbind(1)
    if config.brightness_mode == "multiply":
        brightness_range = (max(1 - config.brightness, 0.0), 1 + config.brightness)
        neutral_brightness = 1.0
    else:
        brightness_range, neutral_brightness = (-config.brightness, config.brightness), 0.0
    blur, sigma, solarize, _ = uniform(words[:, 2]).unbind(1)

    def jittered(u: Tensor, low: float, high: float, neutral: float) -> Tensor:
        return torch.where(jitter, between(u, low, high), neutral)

    params = AugmentParams(
        crop=crop,
        flip=flip < config.flip,
        brightness=jittered(b, *brightness_range, neutral_brightness),
        contrast=jittered(c, 1 - config.contrast, 1 + config.contrast, 1.0),
        saturation=jittered(s, 1 - config.saturation, 1 + config.saturation, 1.0),
        hue_turns=jittered(h, -config.hue, config.hue, 0.0),
        order=orders[below(words[:, 0, 2], len(ORDERS))],
        grayscale=grayscale < config.grayscale,
        sigma_px=torch.where(blur < config.blur[view % 2], between(sigma, *config.sigma_px), 0.0),
        solarize=1 - (1 - SOLARIZE_THRESHOLD) * (solarize < config.solarize[view % 2]).float(),
    )
    if not config.has_study_operations:
        return params
    words = draw(torch.tensor(STUDY_DRAWS, device=index.device) + FIRST_STUDY_DRAW, index)
    return replace(params, study=study_of(config, words, view))
