"""A loop written for lightly, fed by a pipeline: batches ((view0, view1), label, index).

python examples/lightly_loop.py --data PATH --epochs 10 --size 224 --device cuda

lightly's third entry is the file's name; `pipeline.source.name(i)` gives it for the number i.
"""

import argparse

import torch
from lightly.loss import NTXentLoss

from simclr_kernels import AugmentConfig
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
    device=args.device,
)
dataloader = pipeline.pairs(with_index=True)
torch.manual_seed(0)
encoder = build_encoder("small")
model = SimCLR(encoder, projection_head("nonlinear", encoder.feature_dim, out_dim=64))
model.to(args.device)
criterion = NTXentLoss(temperature=0.2)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(args.epochs):
    dataloader.set_epoch(epoch)
    total = 0.0
    for (view0, view1), _, _ in dataloader:
        loss = criterion(model(view0), model(view1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch} loss {total / len(dataloader):.3f}")
