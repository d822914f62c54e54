"""A PyTorch loop of one's own over a pipeline.

python examples/plain_loop.py --data PATH --epochs 10 --size 224 --device cuda
"""

import argparse

import torch

from simclr_kernels import AugmentConfig, fused_nt_xent
from simclr_kernels.data import open_source
from simclr_kernels.models import SimCLR, build_encoder, projection_head
from simclr_kernels.pipelines.fused_views import FusedViews

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="shapes10", help="image folder, Parquet file, .npz")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=128)
parser.add_argument("--size", type=int, default=24)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

pipeline = FusedViews(
    open_source(args.data),
    AugmentConfig.simclr(size=args.size),
    args.batch_size,
    seed=0,
    device=args.device,
)
torch.manual_seed(0)
encoder = build_encoder("small")
model = SimCLR(encoder, projection_head("nonlinear", encoder.feature_dim, out_dim=64))
model.to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(args.epochs):
    pipeline.set_epoch(epoch)  # another order, other views
    total = 0.0
    for batch in pipeline:  # batch.views (2N, 3, S, S), batch.index (N,), batch.label (N,)
        loss = fused_nt_xent(model(batch.views), tau=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch} loss {total / len(pipeline):.3f}")
