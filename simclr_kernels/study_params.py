"""What is random about the operations beyond SimCLR's recipe: StudyParams, and how they are drawn.

Their random words are in the table of params.py, their meaning is in reference_study.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.philox import below, uniform

STUDY_DRAWS = (0, 1, 2)  # after the first of them


@dataclass(frozen=True)
class StudyParams:
    """The operations of the paper's composition study on one view of B images.

    As in AugmentParams off is a neutral value, and applying it is deterministic.
    """

    quarter_turns: Tensor  # (B,) int8: counter-clockwise; 0 is off
    sobel: Tensor  # (B,) bool
    noise_sigma: Tensor  # (B,) float32 standard deviation in units of 1.0 = white; 0 is off
    noise_key: Tensor  # (B, 2) int64: two 32-bit words, from which every pixel of the noise follows
    cutout: Tensor  # (B, 4) int32: y, x, height, width, in view pixels, inside it; height 0 is off

    def map(self, change) -> StudyParams:
        """Each tensor, changed."""
        return StudyParams(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: list[StudyParams]) -> StudyParams:
        """The images of all parts, in their order."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    @classmethod
    def identity(cls, B: int, device: torch.device | str = "cpu") -> StudyParams:
        """None of the operations, for B images."""
        off = torch.zeros(B, dtype=torch.int64, device=device)
        return cls(
            quarter_turns=off.to(torch.int8),
            sobel=off.bool(),
            noise_sigma=off.to(torch.float32),
            noise_key=off[:, None].repeat(1, 2),
            cutout=off[:, None].repeat(1, 4).to(torch.int32),
        )

    def turn_words(self, i: int) -> list[str]:
        """What AugmentParams.describe says of image i where rotation stands."""
        turns = self.quarter_turns[i].item()
        return [f"rotate {turns * 90} deg"] * (turns != 0)

    def last_words(self, i: int) -> list[str]:
        """What it says of the operations after the recipe's."""
        y, x, height, width = self.cutout[i].tolist()
        sigma = self.noise_sigma[i].item()
        return (
            ["sobel"] * self.sobel[i].item()
            + [f"noise {sigma:.2f}"] * (sigma > 0)
            + [f"cutout {height}x{width} at ({y}, {x})"] * (height > 0)
        )


def study_of(config: AugmentConfig, words: Tensor, view: int) -> StudyParams:
    """StudyParams of B images from their random words (B, 3, 4). See sample_params."""

    def happens(word: Tensor, probability: float | tuple[float, float]) -> Tensor:
        both = isinstance(probability, int | float)
        return uniform(word) < (probability if both else probability[view % 2])

    cut, y, x, rotated = words[:, 0].unbind(1)
    turns, sobel, noisy, _ = words[:, 1].unbind(1)
    half = int(config.cutout_side * config.size / 2)
    centre = torch.stack([below(y, config.size), below(x, config.size)], 1)
    start, end = (centre - half).clamp_min(0), (centre + half).clamp_max(config.size)
    box = torch.cat([start, end - start], 1)
    return StudyParams(
        quarter_turns=((1 + below(turns, 3)) * happens(rotated, config.rotation)).to(torch.int8),
        sobel=happens(sobel, config.sobel),
        noise_sigma=happens(noisy, config.noise).to(torch.float32) * config.noise_sigma,
        noise_key=words[:, 2, :2].clone(),
        cutout=(box * happens(cut, config.cutout)[:, None]).to(torch.int32),
    )
