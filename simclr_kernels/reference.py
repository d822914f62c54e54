"""The meaning of every operation in plain PyTorch: float64-clean, device-free, differentiable.

Tests, benchmarks and devices without a kernel use these functions; the fast backends agree with
them to float rounding. The loss follows SimCLR (arXiv 2002.05709, Eq. 1 and Algorithm 1), the
views google-research/simclr (tf2/data_util.py), whose own outputs the tests compare with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_kernels import reference_study
from simclr_kernels.reference_resize import (  # noqa: F401
    KEYS_A,
    POSITION_BITS,
    crop_resize,
    resize_taps,
)

SQUARED_NORM_FLOOR = 1e-12
TIE = 2.0**-20  # of the size of two logits: closer ones are equal


def positive_index(rows: int, pairs: str = "halves", device: torch.device | None = None) -> Tensor:
    """(M,) int64: for each of M rows the row that holds the other view of the same image."""
    return positive_in_spans(rows, span_of(rows, pairs), device)


def span_of(rows: int, pairs: str) -> int:
    """Rows of a group, of which the first half holds view 0 of its images."""
    if pairs not in ("halves", "interleaved"):
        raise ValueError(f"pairs must be 'halves' or 'interleaved', got {pairs!r}")
    return rows if pairs == "halves" else 2


def positive_in_spans(rows: int, span: int, device: torch.device | None = None) -> Tensor:
    """The same for groups of span rows, each view 0 of span / 2 images and then their view 1."""
    i = torch.arange(rows, device=device)
    return i - i % span + (i % span + span // 2) % span


def unit_rows(z: Tensor) -> Tensor:
    """z / |z| by rows, as the original: z * rsqrt(max(|z|^2, 1e-12)); a zero row stays zero."""
    return z * z.square().sum(1, keepdim=True).clamp_min(SQUARED_NORM_FLOOR).rsqrt()


def nt_xent(
    z: Tensor,
    tau: float | Tensor,
    *,
    pairs: str = "halves",
    normalize: bool = True,
    reduction: str = "mean",
    negatives: Tensor | None = None,
) -> Tensor:
    """NT-Xent over M = 2N rows, by the M x M matrix. See fused_nt_xent for the arguments.

    loss_i = softplus(logsumexp of the negatives of i - logit of its positive): equal to the cross
    entropy of the paper, without the difference p - 1 that cancels where positives dominate.
    Computes in z's own dtype.
    """
    pos, logits = _logits(z, tau, pairs, normalize, negatives)
    if logits.shape[1] == 2:  # no negatives: 0, and 0 times the logits for a zero gradient and NaN
        loss = 0.0 * pos
    else:
        loss = torch.logaddexp(logits.logsumexp(1) - pos, torch.zeros_like(pos))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def _logits(z, tau, pairs, normalize, negatives):
    """Of the positives (M,), and of all columns (M, M + K), -inf where a column is no negative."""
    rows = z.shape[0]
    i = torch.arange(rows, device=z.device)
    positive = positive_index(rows, pairs, z.device)
    columns = z if negatives is None else torch.cat((z, negatives))
    if normalize:
        z, columns = unit_rows(z), unit_rows(columns)
    logits = z @ columns.T / tau
    not_negative = torch.zeros_like(logits, dtype=torch.bool)
    not_negative[i, i] = not_negative[i, positive] = True
    return logits[i, positive], logits.masked_fill(not_negative, float("-inf"))


def nt_xent_metrics(
    z: Tensor,
    tau: float,
    *,
    pairs: str = "halves",
    normalize: bool = True,
    negatives: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NTXentMetrics: means over the M rows, over all 2N - 1 + K candidates of a row."""
    pos, logits = _logits(z, tau, pairs, normalize, negatives)
    right = is_nearest(pos, logits.amax(1), tau, normalize)
    entropy = torch.special.entr(torch.cat((pos[:, None], logits), 1).softmax(1)).sum(1)
    negative = logits[logits > float("-inf")]
    return right.to(z.dtype).mean(), entropy.mean(), pos.mean() * tau, negative.mean() * tau


def is_nearest(pos: Tensor, largest: Tensor, tau: float | Tensor, normalize: bool) -> Tensor:
    """Whether the logit of a positive is at least the largest of the negatives, to rounding."""
    size = torch.maximum(pos.abs(), largest.abs())
    # similarities of unit rows round like 1, however small they are
    return pos + TIE * ((size * tau).clamp_min(1) / tau if normalize else size) >= largest


def original_metrics(z: Tensor, tau: float, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """contrast_acc and contrast_entropy of the original: of view 0 among the N rows of view 1.

    Of equal rows the first counts as the nearest; the entropy is that of p + 1e-8.
    """
    view0, view1 = (unit_rows(z) if normalize else z).chunk(2)
    p = (view0 @ view1.T / tau).softmax(1)
    right = p.argmax(1) == torch.arange(len(p), device=z.device)
    return right.to(z.dtype).mean(), -(p * (p + 1e-8).log()).sum(1).mean()


SPAN_FLOOR = 1e-12  # below it the hue and the saturation of a pixel do not matter
GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)


def _per_image(value: Tensor, planes: Tensor) -> Tensor:
    """(B, 1, 1, 1) in the dtype of planes."""
    return value.to(planes.dtype).view(-1, 1, 1, 1)


def brightness(planes: Tensor, factor: Tensor, mode: str = "multiply") -> Tensor:
    """planes * factor, or planes + factor with mode "add" (SimCLR v1); factor (B,), not clipped."""
    factor = _per_image(factor, planes)
    return planes * factor if mode == "multiply" else planes + factor


def contrast(planes: Tensor, factor: Tensor) -> Tensor:
    """(x - m) * factor + m with m the mean of each channel over the image; factor (B,)."""
    mean = planes.mean((2, 3), keepdim=True)
    return (planes - mean).mul_(_per_image(factor, planes)).add_(mean)


def saturation(planes: Tensor, factor: Tensor) -> Tensor:
    """HSV saturation times factor (B,) >= 0, clipped to [0, 1], at the same hue and value.

    With V and m the largest and smallest channel of a pixel and S = (V - m) / V, each channel x
    becomes V - k (V - x) with k = min(factor S, 1) V / (V - m) = min(factor, V / (V - m)), and V
    where V <= 0. Unlike the original's CPU kernel no hue is formed: a pixel whose hue rounds to a
    full turn keeps its colour.
    """
    red, green, blue = planes.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    span = high - torch.minimum(torch.minimum(red, green), blue)
    shrink = high.clamp_min(0).div_(span.clamp_min_(SPAN_FLOOR)).unsqueeze(1)
    shrink = torch.minimum(shrink, _per_image(factor, planes))
    high = high.unsqueeze(1)
    return (planes - high).mul_(shrink).add_(high)


def hue(planes: Tensor, turns: Tensor) -> Tensor:
    """Rotates the HSV hue by turns (B,); the largest and smallest channel of a pixel stay.

    The hue in sixths of a turn is (G - B) / span where red is largest, 2 + (B - R) / span where
    green is, else 4 + (R - G) / span; each channel is m + span * ramp(hue), also outside [0, 1].
    """
    red, green, blue = planes.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    per_span = span.clamp_min(SPAN_FLOOR).reciprocal_()
    # 0 where that channel is the largest, else 1: torch.where would take ten times as long
    not_red, not_green = (high - red).sign_(), (high - green).sign_()
    if_red = (green - blue).mul_(per_span)
    if_green = (blue - red).mul_(per_span).add_(2)
    if_blue = (red - green).mul_(per_span).add_(4)
    sixths = if_red.lerp(if_green.lerp(if_blue, not_green), not_red)
    sixths = sixths.add_(6 * _per_image(turns, planes)[:, 0])
    sixths = sixths.sub((sixths / 6).floor_().mul_(6)).unsqueeze(1)
    # ramps of the channels: |hue - 3| - 1, 2 - |hue - 2|, 2 - |hue - 4|, clipped to [0, 1]
    centre, offset, slope = planes.new_tensor([[3, 2, 4], [-1, 2, 2], [1, -1, -1]]).view(3, 3, 1, 1)
    ramps = (sixths - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
    return torch.addcmul(low.unsqueeze(1), span.unsqueeze(1), ramps)


def color_jitter(planes: Tensor, params, brightness_mode: str = "multiply") -> Tensor:
    """Four colour operations in the order of each image, each followed by a clip to [0, 1].

    Args:
        planes: (B, 3, H, W) float32 or float64.
        params: AugmentParams of the B images: order, brightness, contrast, saturation, hue_turns.
            Where a value is exactly neutral its operation is skipped, clip included.
        brightness_mode: "multiply" (neutral 1) or "add" (neutral 0).
    """
    off = 1.0 if brightness_mode == "multiply" else 0.0
    steps = (
        (lambda x, factor: brightness(x, factor, brightness_mode), params.brightness, off),
        (contrast, params.contrast, 1.0),
        (saturation, params.saturation, 1.0),
        (hue, params.hue_turns, 0.0),
    )
    planes = planes.clone()
    for position in params.order.unbind(1):
        for code, (operation, value, neutral) in enumerate(steps):
            chosen = ((position == code) & (value != neutral)).nonzero()[:, 0]
            if len(chosen):
                changed = operation(planes.index_select(0, chosen), value[chosen]).clamp_(0, 1)
                planes.index_copy_(0, chosen, changed)
    return planes


def grayscale(planes: Tensor) -> Tensor:
    """0.2989 R + 0.5870 G + 0.1140 B in all three channels; (B, 3, H, W)."""
    red, green, blue = [x * w for x, w in zip(planes.unbind(1), GRAY_WEIGHTS, strict=True)]
    return (red + green + blue).unsqueeze(1).expand_as(planes)


def gaussian_blur(planes: Tensor, sigma_px: Tensor) -> Tensor:
    """Separable Gaussian, horizontal first, zero padding; taps to radius (H // 10) // 2.

    Args:
        planes: (B, 3, H, W) float32 or float64.
        sigma_px: (B,) standard deviation in pixels; an image with 0 is left as it is.
    """
    radius = planes.shape[2] // 10 // 2
    chosen = (sigma_px > 0).nonzero()[:, 0]
    if radius == 0 or len(chosen) == 0:
        return planes
    sigma = sigma_px[chosen, None].to(planes.dtype)
    x = torch.arange(-radius, radius + 1, device=planes.device, dtype=planes.dtype)
    taps = torch.exp(-0.5 * (x / sigma).square())
    taps = taps / taps.sum(1, keepdim=True)  # [chosen, 2 radius + 1]
    blurred = F.pad(planes.index_select(0, chosen), (radius, radius))
    blurred = F.pad(_slide(blurred, taps, 3), (0, 0, radius, radius))
    return planes.index_copy(0, chosen, _slide(blurred, taps, 2))


def _slide(padded: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Weighted sum of shifted copies along dim, with the taps (B, K) of each image."""
    out = padded.shape[dim] - taps.shape[1] + 1
    weights = taps[:, :, None, None, None].unbind(1)
    total = padded.narrow(dim, 0, out) * weights[0]
    for k in range(1, len(weights)):
        total.addcmul_(padded.narrow(dim, k, out), weights[k])
    return total


def solarize(planes: Tensor, threshold: Tensor) -> Tensor:
    """1 - x where x >= threshold (B,); an image with threshold 1 is left as it is."""
    threshold = _per_image(threshold, planes)
    return torch.where((planes >= threshold) & (threshold < 1), 1 - planes, planes)


def normalize(planes: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(planes - mean) / std by channel."""
    mean, std = (planes.new_tensor(value).view(3, 1, 1) for value in (mean, std))
    return (planes - mean) / std


def augment(images: Tensor, params, config, dtype: torch.dtype = torch.float32) -> Tensor:
    """One whole view of each image, from uint8 pixels. See simclr_kernels.augment.augment.

    crop, resize, flip -> colour jitter -> grayscale -> clip -> blur, clip -> solarize -> mean/std.

    The operations of params.study, see reference_study, have their places in it too: rotation right
    after the flip, among the geometry; Sobel filter and then noise after solarize, where the recipe
    is complete; cutout after mean/std, so that what it masks is 0 to the encoder, as in its paper.

    Args:
        images: (B, H, W, 3) uint8.
        params: AugmentParams of the B images.
        config: AugmentConfig, of which size, brightness_mode, mean and std are read.
        dtype: float32 or float64, of the arithmetic and the result.

    Returns:
        (B, 3, size, size), in [0, 1] unless the config normalises.
    """
    planes = crop_resize(images, params.crop, config.size, params.flip, dtype)
    study = params.study
    if study is not None:
        planes = reference_study.rotate(planes, study.quarter_turns)
    planes = color_jitter(planes, params, config.brightness_mode)
    gray = params.grayscale.nonzero()[:, 0]
    if len(gray):
        planes.index_copy_(0, gray, grayscale(planes.index_select(0, gray)))
    planes = gaussian_blur(planes.clamp_(0, 1), params.sigma_px).clamp_(0, 1)
    inverted = (params.solarize < 1).nonzero()[:, 0]
    if len(inverted):
        changed = solarize(planes.index_select(0, inverted), params.solarize[inverted])
        planes.index_copy_(0, inverted, changed)
    if study is not None:
        planes = reference_study.sobel(planes, study.sobel)
        planes = reference_study.gaussian_noise(planes, study.noise_sigma, study.noise_key)
    if config.mean is not None:
        planes = normalize(planes, config.mean, config.std)
    return planes if study is None else reference_study.cutout(planes, study.cutout)


def eval_crop(
    height: int, width: int, out_height: int, out_width: int, proportion: float = 0.875
) -> tuple[int, int, int, int]:
    """(y, x, height, width) of the centre crop of the output's aspect, proportion of the image."""
    aspect = out_width / out_height
    if aspect > width / height:
        crop_height, crop_width = round(proportion / aspect * width), round(proportion * width)
    else:
        crop_height, crop_width = round(proportion * height), round(proportion * aspect * height)
    return (height - crop_height + 1) // 2, (width - crop_width + 1) // 2, crop_height, crop_width


def eval_view(
    images: Tensor,
    size: int,
    crop_proportion: float = 0.875,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The view for evaluation: centre crop, resize, clip; no randomness, no mean/std.

    Args:
        images: (B, H, W, 3) uint8.
        size: output side in pixels. Up to 32 the whole image is used, as in the original, and an
            image of that size is only converted.
        crop_proportion: of the image that the crop keeps.
        dtype: float32 or float64.

    Returns:
        (B, 3, size, size) in [0, 1].
    """
    B, H, W, _ = images.shape
    if size <= 32 and H == W == size:
        return images.permute(0, 3, 1, 2).to(dtype).mul_(1 / 255)
    box = (0, 0, H, W) if size <= 32 else eval_crop(H, W, size, size, crop_proportion)
    crop = torch.tensor(box, device=images.device).expand(B, 4)
    return crop_resize(images, crop, size, dtype=dtype).clamp_(0, 1)
