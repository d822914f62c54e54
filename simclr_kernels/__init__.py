"""SimCLR at full speed: fused NT-Xent, exact views, a slim trainer (arXiv 2002.05709)."""

from simclr_kernels.augment import augment, two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.augment_modules import TwoViews, pack_collate
from simclr_kernels.ntxent import fused_nt_xent
from simclr_kernels.ntxent_metrics import NTXentMetrics
from simclr_kernels.ntxent_modules import LearnableTemperature, NegativeQueue, NTXentLoss
from simclr_kernels.optim import LARS
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params

__version__ = "0.1.0"

__all__ = [
    "AugmentConfig",
    "AugmentParams",
    "LARS",
    "LearnableTemperature",
    "NTXentLoss",
    "NTXentMetrics",
    "NegativeQueue",
    "PackedImages",
    "TwoViews",
    "augment",
    "fused_nt_xent",
    "pack_collate",
    "sample_params",
    "two_views",
]
