"""Encoders and projection heads of SimCLR.

`ResNet` follows torchvision's state-dict keys and shapes (without `fc`), so its checkpoints load
in both directions. From google-research/simclr (tf2/resnet.py, tf2/model.py) come the width
multiplier, the CIFAR stem, the zero gain of the last batch norm of each residual block and the
projection heads. Two differences to that code remain, both torchvision's: max-pool pads one pixel
on every side, and the first group of ResNet-18/34 has no projection shortcut. Batch norm is
torch's: running variances are those of the unbiased batch variance.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.init import kaiming_normal_, normal_, zeros_

BLOCKS = {  # depth: blocks of each group
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STEMS = ("imagenet", "cifar")
HEADS = ("identity", "linear", "nonlinear", "v2")


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias; a batch norm follows."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The projection beside a residual branch, or None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride)
        zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut: ResNet-50, 101 and 152."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x + identity)


def _group(
    block: type[nn.Module], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    """`blocks` residual blocks in a row, the first of which has the stride."""
    layers = [block(in_channels, channels, stride)]
    layers += [block(channels * block.expansion, channels) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


def _init_convolutions(model: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852) by fan-out, as torchvision; batch norms stay at 1, 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """ResNet (arXiv 1512.03385) up to the pooled features; no classifier.

    Bottlenecks have their stride on the 3x3 convolution, as in torchvision and in the original
    SimCLR. A torchvision checkpoint loads strictly once its `fc.*` entries are dropped.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: multiplies every channel count: 1, 2 or 4 in the paper.
        stem: "imagenet" (7x7 convolution of stride 2, then max-pool) or "cifar" (3x3, stride 1).

    Attributes:
        feature_dim: C, the length of a feature vector: 512 * width (18, 34) or 2048 * width.

    Raises:
        ValueError: depth, width or stem is none of these.
    """

    def __init__(self, depth: int = 50, width: int = 1, stem: str = "imagenet"):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if stem not in STEMS:
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        block = BasicBlock if depth < 50 else Bottleneck
        w = 64 * width
        if stem == "imagenet":
            self.conv1 = _conv(3, w, 7, stride=2)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = _conv(3, w, 3)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(w)
        self.relu = nn.ReLU(inplace=True)
        n1, n2, n3, n4 = BLOCKS[depth]
        self.layer1 = _group(block, w, w, n1, stride=1)
        self.layer2 = _group(block, w * block.expansion, 2 * w, n2, stride=2)
        self.layer3 = _group(block, 2 * w * block.expansion, 4 * w, n3, stride=2)
        self.layer4 = _group(block, 4 * w * block.expansion, 8 * w, n4, stride=2)
        self.feature_dim = 8 * w * block.expansion
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to features (B, feature_dim), in any memory format."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))


class SmallResNet(nn.Module):
    """Three basic blocks of widths w, 2w, 4w behind a CIFAR stem: minutes instead of days on a CPU.

    Args:
        width: w. 24 gives 0.17 M parameters, 32 gives 0.31 M.

    Attributes:
        feature_dim: 4 * width.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.conv1 = _conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, stride=2)
        self.layer3 = BasicBlock(2 * width, 4 * width, stride=2)
        self.feature_dim = 4 * width
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to features (B, feature_dim)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean((2, 3))


def _encoders() -> dict[str, tuple[type[nn.Module], dict]]:
    encoders = {"small": (SmallResNet, {"width": 24}), "small-w32": (SmallResNet, {"width": 32})}
    for depth in BLOCKS:
        for width, suffix in ((1, ""), (2, "x2"), (4, "x4")):
            name = f"resnet{depth}{suffix}"
            encoders[name] = (ResNet, {"depth": depth, "width": width})
            encoders[f"{name}-cifar"] = (ResNet, {"depth": depth, "width": width, "stem": "cifar"})
    return encoders


ENCODERS = _encoders()


def build_encoder(name: str) -> nn.Module:
    """The encoder of that name, freshly initialised from torch's random state.

    Args:
        name: "small", "small-w32", or "resnet" + depth, then "x2" or "x4" for a wider one, then
            "-cifar" for the CIFAR stem: "resnet50", "resnet50x4", "resnet18-cifar".

    Returns:
        A module from images (B, 3, S, S) to features (B, C), with C as its attribute `feature_dim`.

    Raises:
        ValueError: there is no encoder of that name; the message lists all.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {name!r}")
    encoder, arguments = ENCODERS[name]
    return encoder(**arguments)


def _dense(in_dim: int, out_dim: int, shift: bool) -> list[nn.Module]:
    """A linear layer without bias, drawn from normal(0, 0.01), and its batch norm."""
    linear = nn.Linear(in_dim, out_dim, bias=False)
    normal_(linear.weight, std=0.01)
    norm = nn.BatchNorm1d(out_dim)
    if not shift:
        # not every supported torch knows BatchNorm1d(bias=False)
        norm.register_parameter("bias", None)
    return [linear, norm]


def projection_head(
    kind: str, in_dim: int, hidden_dim: int | None = None, out_dim: int = 128
) -> nn.Module:
    """The projection g from features h to z, as in google-research/simclr (tf2/model.py).

    Every linear layer has no bias and is followed by batch norm; hidden layers add ReLU, and the
    last batch norm scales but does not shift.

    Args:
        kind: "identity" (z is h; hidden_dim and out_dim are not used), "linear", "nonlinear" (2
            layers: the paper) or "v2" (3 layers: SimCLRv2, arXiv 2006.10029, and the default of
            the original code).
        in_dim: C, the encoder's feature_dim.
        hidden_dim: width of the hidden layers; None takes in_dim, as the original.
        out_dim: D, the width of z.

    Returns:
        A module from (M, in_dim) to (M, out_dim).

    Raises:
        ValueError: kind is none of these.
    """
    hidden_dim = in_dim if hidden_dim is None else hidden_dim
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Sequential(*_dense(in_dim, out_dim, shift=False))
    if kind == "nonlinear":
        return nn.Sequential(
            *_dense(in_dim, hidden_dim, shift=True),
            nn.ReLU(inplace=True),
            *_dense(hidden_dim, out_dim, shift=False),
        )
    if kind == "v2":
        return nn.Sequential(
            *_dense(in_dim, hidden_dim, shift=True),
            nn.ReLU(inplace=True),
            *_dense(hidden_dim, hidden_dim, shift=True),
            nn.ReLU(inplace=True),
            *_dense(hidden_dim, out_dim, shift=False),
        )
    raise ValueError(f"head must be one of {', '.join(HEADS)}, got {kind!r}")


class SimCLR(nn.Module):
    """An encoder and its projection head: z = head(encoder(x)).

    Args:
        encoder: module from images (M, 3, S, S) to features (M, C).
        head: module from (M, C) to (M, D); see projection_head.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Images (M, 3, S, S) to embeddings z (M, D), for the loss; both views in one batch."""
        return self.head(self.encoder(x))

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to features (B, C), for everything after pre-training."""
        return self.encoder(x)
