"""The loop of PyTorch's transfer learning tutorial, its fixed feature extractor.

`--variant eval`: what a careful reader makes of it: the frozen part in evaluation mode and without gradients.

Source: https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

import tempfile
from pathlib import Path

import task
import torch
from torch import nn
from torch.optim import lr_scheduler
from torchvision import datasets, transforms


def main() -> None:
    """Train once."""
    options = task.read_options(variant="tutorial")
    network = task.build(options)
    task.freeze(network, options.until)
    watch = task.Stopwatch()
    changes = {
        "train": [transforms.RandomResizedCrop(task.SIZE), transforms.RandomHorizontalFlip()],
        "val": [transforms.Resize(task.RESIZE), transforms.CenterCrop(task.SIZE)],
    }
    loaders = {
        part: torch.utils.data.DataLoader(
            datasets.ImageFolder(
                options.data / part,
                transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(task.MEAN, task.STD)]),
            ),
            batch_size=options.batch_size,
            shuffle=True,
            num_workers=options.workers,
        )
        for part, steps in changes.items()
    }
    criterion = nn.CrossEntropyLoss()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=task.LR, momentum=task.MOMENTUM)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=task.STEP, gamma=task.GAMMA)
    forward = Careful(network) if options.variant == "eval" else network
    accuracies = []
    with tempfile.TemporaryDirectory() as folder:
        best_file, best = Path(folder, "best.pt"), -1.0
        for _ in range(options.epochs):
            for phase in ("train", "val"):
                forward.train(phase == "train")
                correct = 0
                for inputs, labels in loaders[phase]:
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        outputs = forward(inputs)
                        loss = criterion(outputs, labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                    correct += int((outputs.argmax(1) == labels).sum())
                if phase == "train":
                    scheduler.step()
            accuracies.append(correct / len(loaders["val"].dataset))
            if accuracies[-1] > best:
                best = accuracies[-1]
                torch.save(network.state_dict(), best_file)
            watch.lap()
        network.load_state_dict(torch.load(best_file, weights_only=True))
    watch.report(accuracies)


class Careful(nn.Module):
    """A network whose frozen part, all but its head, stays in evaluation mode and records no gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = network, network.fc
        network.fc = nn.Identity()

    def train(self, mode: bool = True) -> "Careful":
        """Leave the frozen part in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) to scores (N, 2)."""
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


if __name__ == "__main__":
    main()
