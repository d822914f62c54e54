"""A pipeline in a PyTorch Lightning Trainer, as it is: `trainer.fit(module, pipeline)`.

python examples/lightning_module.py --data PATH --epochs 10 --size 224 --device cuda

Lightning tells the pipeline the epoch (it calls `sampler.set_epoch` of what it trains on), and its
checkpoints hold the pipeline's position: a continued run shows the images that were still to come.
"""

import argparse

import lightning
import torch

from simclr_kernels import AugmentConfig, fused_nt_xent
from simclr_kernels.data import open_source
from simclr_kernels.models import SimCLR, build_encoder, projection_head
from simclr_kernels.pipelines.fused_views import FusedViews


class Contrastive(lightning.LightningModule):
    """SimCLR; its batches are those of a pipeline."""

    def __init__(self):
        super().__init__()
        encoder = build_encoder("small")
        self.model = SimCLR(encoder, projection_head("nonlinear", encoder.feature_dim, out_dim=64))

    def training_step(self, batch, _):
        loss = fused_nt_xent(self.model(batch.views), tau=0.2)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.index))
        return loss

    def on_train_epoch_end(self):
        loss = self.trainer.callback_metrics["loss"]
        print(f"epoch {self.current_epoch} loss {loss.item():.3f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
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
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="gpu" if args.device == "cuda" else args.device,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Contrastive(), pipeline)
