"""SimCLR at full speed: fused NT-Xent loss, exact augmentation, a slim trainer (arXiv 2002.05709)."""

__version__ = "0.1.0"
