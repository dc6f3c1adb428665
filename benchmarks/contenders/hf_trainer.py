"""Hugging Face's Trainer, on a module that returns a loss and logits.

Source: https://huggingface.co/docs/transformers/main_classes/trainer
"""

import tempfile
from typing import Any

import task
import torch
from torch import nn
from torchvision import datasets, transforms
from transformers import Trainer, TrainingArguments
from transformers.utils import logging


class WithLoss(nn.Module):
    """What the Trainer asks of a model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images (N, 3, H, W) and classes (N,) to a loss and scores (N, 2)."""
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Photos(torch.utils.data.Dataset[dict[str, Any]]):
    """A folder of photos, as dicts."""

    def __init__(self, folder: datasets.ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, label = self.folder[index]
        return {"pixel_values": pixels, "labels": label}


def main() -> None:
    """Train once."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = task.read_options()
    network = task.build(options)
    task.freeze(network, options.until)
    watch = task.Stopwatch()
    ending = [transforms.ToTensor(), transforms.Normalize(task.MEAN, task.STD)]
    learned = transforms.Compose([transforms.RandomResizedCrop(task.SIZE), transforms.RandomHorizontalFlip(), *ending])
    measured = transforms.Compose([transforms.Resize(task.RESIZE), transforms.CenterCrop(task.SIZE), *ending])
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=task.LR, momentum=task.MOMENTUM)
    train = Photos(datasets.ImageFolder(options.data / "train", learned))
    steps = -(-len(train) // options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=WithLoss(network),
            args=TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                dataloader_num_workers=options.workers,
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=options.seed,
            ),
            train_dataset=train,
            eval_dataset=Photos(datasets.ImageFolder(options.data / "val", measured)),
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
            optimizers=(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, task.STEP * steps, task.GAMMA)),
        )
        trainer.train()
        accuracies = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    watch.report(accuracies)


if __name__ == "__main__":
    main()
