"""The network of hrnet_training.py in Lightning, whose callback replaces its OCR modules before any strategy wraps it.

python examples/lightning_training.py 60   (steps; needs lightning and scikit-learn)
"""

from __future__ import annotations

import sys

import lightning
import torch
from hrnet_training import HighResolutionNet, batch, loss_of, mean_iou
from torch import Tensor
from torch.utils.data import DataLoader

import ocr_kernels


class ReplaceOCRModules(lightning.Callback):
    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        print(ocr_kernels.replace_ocr_modules(pl_module))


class Segmentation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = HighResolutionNet()

    def training_step(self, pictures_and_masks: list[Tensor]) -> Tensor:
        return loss_of(self.model, *pictures_and_masks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int) -> None:
    lightning.seed_everything(0)
    segmentation = Segmentation()
    data = DataLoader([batch(4, step, training=True) for step in range(steps)], batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[ReplaceOCRModules()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(segmentation, data)
    print(f"{steps} steps, mean IoU {mean_iou(segmentation.model):.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
