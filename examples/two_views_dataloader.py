"""Anybody's data set and DataLoader; the views are made of its batches, on the model's device.

python examples/two_views_dataloader.py FOLDER --epochs 10 --size 224 --device cuda

The data set gives PIL images of any sizes and its own labels, as those of torchvision and Hugging
Face do; nothing is resized or converted before the views are made. It also gives each image's
number, so that the views of an image depend on seed, epoch and that number only. Where a data set
has no numbers leave them out: `make_views(images)`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from simclr_kernels import AugmentConfig, TwoViews, fused_nt_xent, pack_collate
from simclr_kernels.models import SimCLR, build_encoder, projection_head


class Photos(Dataset):
    """PIL image, label, number."""

    def __init__(self, root):
        self.paths = sorted(path for path in Path(root).rglob("*.*") if path.is_file())
        self.classes = sorted({path.parent.name for path in self.paths})

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        return Image.open(path), self.classes.index(path.parent.name), i


parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=128)
parser.add_argument("--size", type=int, default=24)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

loader = DataLoader(
    Photos(args.folder),
    batch_size=args.batch_size,
    shuffle=True,
    drop_last=True,
    num_workers=args.workers,
    collate_fn=pack_collate,
    pin_memory=args.device != "cpu",
)
make_views = TwoViews(AugmentConfig.simclr(size=args.size), seed=0).to(args.device)
torch.manual_seed(0)
encoder = build_encoder("small")
model = SimCLR(encoder, projection_head("nonlinear", encoder.feature_dim, out_dim=64))
model.to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(args.epochs):
    make_views.set_epoch(epoch)
    total = 0.0
    for images, _, index in loader:
        views = make_views(images, index)  # (2N, 3, S, S); view0, view1 = views.chunk(2)
        loss = fused_nt_xent(model(views), tau=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch} loss {total / len(loader):.3f}")
