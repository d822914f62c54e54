"""The recipe of a view: ranges and probabilities, and the published recipes by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STUDY_OPERATIONS = ("cutout", "rotation", "sobel", "noise")


@dataclass(frozen=True)
class AugmentConfig:
    """The recipe of a view: ranges and probabilities. The defaults are SimCLR v2 at 224 pixels.

    Attributes:
        size: side of the view in pixels.
        sampler: of the crop: "tensorflow" (the original: aspect ratio and height uniform) or
            "torchvision" (area uniform, aspect ratio log-uniform).
        crop: False resizes the whole image.
        area: smallest and largest crop, as fractions of the image's area.
        aspect: smallest and largest width / height of the crop.
        min_covered: with the tensorflow sampler a crop under this fraction of the image is drawn
            again. The original's 0.1 overrides its smallest area of 0.08.
        flip: probability of a left-right flip.
        jitter: probability of the colour jitter.
        brightness: half-range: the factor is uniform in [max(1 - b, 0), 1 + b), or the addend in
            [-b, b) with brightness_mode "add".
        contrast: half-range <= 1 of the factor.
        saturation: half-range <= 1 of the factor.
        hue: half-range <= 0.5 in turns of the colour circle.
        brightness_mode: "multiply" (SimCLR v2) or "add" (SimCLR v1, BYOL).
        grayscale: probability of dropping colour.
        blur: probabilities of a Gaussian blur in view 0 and view 1 (any even and odd view).
        solarize: probabilities of inverting what is above 0.5, in view 0 and view 1.
        sigma_px: smallest and largest standard deviation of the blur in output pixels.
        mean: per channel, subtracted last, in units of 1.0 = white; None leaves [0, 1].
        std: per channel, divided by last; given where mean is given.
        cutout: probability of masking a square, one for both views or two: of view 0 and view 1
            (any even and odd view). This and what follows is not in SimCLR's recipe but in its
            paper's study of compositions: see reference_study.
        rotation: the same of a rotation by 90, 180 or 270 degrees, equally likely.
        sobel: the same of a Sobel filter.
        noise: the same of Gaussian noise.
        cutout_side: side of the square over that of the view, rounded down to whole pixels around
            its centre, which is uniform over the view: the square may reach beyond the border.
        noise_sigma: standard deviation of the noise, in units of 1.0 = white.

    Raises:
        ValueError: a value breaks its rule; the message names both.
    """

    size: int = 224
    sampler: Literal["tensorflow", "torchvision"] = "tensorflow"
    crop: bool = True
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    min_covered: float = 0.1
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    brightness_mode: Literal["multiply", "add"] = "multiply"
    grayscale: float = 0.2
    blur: tuple[float, float] = (0.5, 0.5)
    solarize: tuple[float, float] = (0.0, 0.0)
    sigma_px: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    cutout: float | tuple[float, float] = 0.0
    rotation: float | tuple[float, float] = 0.0
    sobel: float | tuple[float, float] = 0.0
    noise: float | tuple[float, float] = 0.0
    cutout_side: float = 0.5
    noise_sigma: float = 0.1

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be a whole number >= 1, got {self.size!r}")
        _check_choice("sampler", self.sampler, ("tensorflow", "torchvision"))
        _check_choice("brightness_mode", self.brightness_mode, ("multiply", "add"))
        of_both = [n for n in STUDY_OPERATIONS if isinstance(getattr(self, n), int | float)]
        for name in ("flip", "jitter", "grayscale", *of_both):
            _check_probability(name, getattr(self, name))
        of_each = [name for name in STUDY_OPERATIONS if name not in of_both]
        for name in ("blur", "solarize", *of_each):
            if len(getattr(self, name)) != 2:
                raise ValueError(
                    f"{name} must be two probabilities (one per view), got {getattr(self, name)!r}"
                )
            for view, probability in enumerate(getattr(self, name)):
                _check_probability(f"{name}[{view}]", probability)
        for name, most in (
            ("brightness", math.inf),
            ("contrast", 1.0),
            ("saturation", 1.0),
            ("hue", 0.5),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is a half-range and must be in [0, {most}], got {getattr(self, name)}"
                )
        for name, most in (("area", 1.0), ("aspect", math.inf), ("sigma_px", math.inf)):
            if len(getattr(self, name)) != 2 or not (
                0 < getattr(self, name)[0] <= getattr(self, name)[1] <= most
            ):
                raise ValueError(
                    f"{name} must be (low, high) with 0 < low <= high <= {most}, "
                    f"got {getattr(self, name)!r}"
                )
        if not 0 <= self.min_covered <= self.area[1]:
            raise ValueError(
                f"min_covered must be in [0, largest area {self.area[1]}], got {self.min_covered}"
            )
        if not 0 < self.cutout_side <= 1:
            raise ValueError(
                f"cutout_side is a fraction and must be in (0, 1], got {self.cutout_side}"
            )
        if not 0 < self.noise_sigma < math.inf:
            raise ValueError(f"noise_sigma must be positive and finite, got {self.noise_sigma}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"mean and std must be given together, got mean {self.mean} and std {self.std}"
            )
        if self.mean is not None and (
            len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0
        ):
            raise ValueError(
                "mean and std must have three values each, std above 0, "
                f"got mean {self.mean} and std {self.std}"
            )

    @property
    def has_study_operations(self) -> bool:
        """Whether views may be cut out, rotated, Sobel-filtered or noisy."""
        values = (getattr(self, name) for name in STUDY_OPERATIONS)
        return any(max(p) > 0 if isinstance(p, tuple | list) else p > 0 for p in values)

    @classmethod
    def simclr(cls, size: int = 224, strength: float = 1.0) -> AugmentConfig:
        """SimCLR v2 (google-research/simclr, tf2): brightness multiplies. strength <= 1.25."""
        return cls(size=size, **_strength(strength))

    @classmethod
    def simclr_v1(cls, size: int = 224, strength: float = 1.0) -> AugmentConfig:
        """The paper's recipe: as simclr, but brightness adds. The resize stays that of v2."""
        return cls(size=size, brightness_mode="add", **_strength(strength))

    @classmethod
    def cifar10(cls, size: int = 32) -> AugmentConfig:
        """SimCLR on CIFAR-10: strength 0.5, no blur."""
        return cls(size=size, blur=(0.0, 0.0), **_strength(0.5))

    @classmethod
    def byol(cls, size: int = 224) -> AugmentConfig:
        """BYOL (arXiv 2006.07733, appendix B): the views differ in blur and solarisation."""
        return cls(
            size=size,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            brightness_mode="add",
            blur=(1.0, 0.1),
            solarize=(0.0, 0.2),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    @classmethod
    def moco_v2(cls, size: int = 224) -> AugmentConfig:
        """MoCo v2 (arXiv 2003.04297): crops above 20 %, a weaker jitter, ImageNet mean and std."""
        return cls(
            size=size,
            sampler="torchvision",
            area=(0.2, 1.0),
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    @classmethod
    def torchvision(cls, size: int = 224, strength: float = 1.0) -> AugmentConfig:
        """SimCLR as PyTorch ports draw it: torchvision's crop sampler, ImageNet mean and std."""
        return cls(
            size=size,
            sampler="torchvision",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            **_strength(strength),
        )


def _strength(strength: float) -> dict[str, float]:
    """The half-ranges of SimCLR's colour distortion of that strength."""
    return {
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
    }


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability and must be in [0, 1], got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
