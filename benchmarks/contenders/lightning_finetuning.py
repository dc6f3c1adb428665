"""Lightning: a LightningModule with its `BackboneFinetuning` callback, which never thaws within these epochs.

Source: https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.callbacks.BackboneFinetuning.html
"""

import logging
import warnings
from typing import Any

import lightning
import task
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torchvision import datasets, transforms


class Classifier(lightning.LightningModule):
    """A backbone, a head, and what to do in a step."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.head, network.fc = network.fc, nn.Identity()
        self.backbone = network
        self.accuracies: list[float] = []
        self._correct = self._count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) to scores (N, 2)."""
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        """Count what is right."""
        self._correct += int((self(batch[0]).argmax(1) == batch[1]).sum())
        self._count += len(batch[1])

    def on_validation_epoch_end(self) -> None:
        """Keep the accuracy."""
        self.accuracies.append(self._correct / self._count)
        self._correct = self._count = 0

    def configure_optimizers(self) -> Any:
        """Return the tutorial's optimizer and schedule."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=task.LR, momentum=task.MOMENTUM)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, task.STEP, task.GAMMA)]


def main() -> None:
    """Train once."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options = task.read_options()
    classifier = Classifier(task.build(options))
    watch = task.Stopwatch()
    ending = [transforms.ToTensor(), transforms.Normalize(task.MEAN, task.STD)]
    learned = transforms.Compose([transforms.RandomResizedCrop(task.SIZE), transforms.RandomHorizontalFlip(), *ending])
    measured = transforms.Compose([transforms.Resize(task.RESIZE), transforms.CenterCrop(task.SIZE), *ending])
    loading = {"batch_size": options.batch_size, "num_workers": options.workers}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=options.epochs + 1)],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        classifier,
        torch.utils.data.DataLoader(datasets.ImageFolder(options.data / "train", learned), shuffle=True, **loading),
        torch.utils.data.DataLoader(datasets.ImageFolder(options.data / "val", measured), **loading),
    )
    watch.report(classifier.accuracies)


if __name__ == "__main__":
    main()
