"""What an epoch costs once the constant part is computed: resnet18, frozen up to `layer3.0`.

    python benchmarks/live_part.py

Beside each other, in turns: an epoch of `regraft.fit`; the live part alone, by hand, on tensors in memory, without an
optimizer; and an epoch of the plain loop (the tutorial's), which decodes every photo and runs the whole network. An
epoch is forward and backward over the photos to learn from, and a forward pass over those to measure on.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn
from torchvision import datasets, models, transforms

import regraft
from regraft import fit, partition

HERE = Path(__file__).parent
UNTIL, BATCH, EPOCHS = "layer3.0", 32, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIDDLE: list[Any] = [transforms.Resize(256), transforms.CenterCrop(224)]


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared/data/hymenoptera")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = {"regraft": [], "live part by hand": [], "plain loop": []}
    for seed in range(arguments.repeats):
        measured["regraft"].append(of_regraft(arguments.data, seed))
        measured["live part by hand"].append(by_hand(arguments.data, seed))
        measured["plain loop"].append(of_plain_loop(arguments.data, seed))
    medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
    for name, seconds in medians.items():
        print(f"{name:20} {seconds:6.2f} s an epoch")
    print(f"regraft / live part by hand: {medians['regraft'] / medians['live part by hand']:.2f}")
    print(f"plain loop / regraft:        {medians['plain loop'] / medians['regraft']:.2f}")
    (HERE / "results").mkdir(exist_ok=True)
    found = {"machine": machine.describe(), "seconds": measured, "medians": medians}
    (HERE / "results/live_part.json").write_text(json.dumps(found, indent=1))


def of_regraft(data: Path, seed: int) -> float:
    """Return the seconds of an epoch of `fit`."""
    model = network(seed)
    regraft.freeze(model, until=UNTIL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = folder
        result = fit(model, data, epochs=EPOCHS, batch_size=BATCH, augment="none", lr=1e-3, seed=seed)
    return statistics.mean(record.seconds for record in result.history)


def by_hand(data: Path, seed: int) -> float:
    """Return the seconds that the live part takes for all photos."""
    model = network(seed)
    regraft.freeze(model, until=UNTIL)
    parts = partition(model, torch.empty(1, 3, 224, 224))
    with torch.no_grad():
        kept, measured = (
            [(parts.prefix(inputs), targets) for inputs, targets in batches(data / part, MIDDLE)]
            for part in ("train", "val")
        )
    suffix = parts.suffix
    seconds = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        suffix.train()
        for tensors, targets in kept:
            loss = nn.functional.cross_entropy(suffix(*tensors), targets)
            loss.backward()
            suffix.zero_grad()
        suffix.eval()
        with torch.no_grad():
            for tensors, _ in measured:
                suffix(*tensors)
        seconds.append(time.perf_counter() - began)
    return statistics.mean(seconds)


def of_plain_loop(data: Path, seed: int) -> float:
    """Return the seconds of an epoch of the tutorial's loop."""
    model = network(seed)
    for layer in (model.conv1, model.bn1, model.layer1, model.layer2, model.layer3[0]):
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    learned = batches(data / "train", [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()])
    measured = batches(data / "val", MIDDLE)
    began = time.perf_counter()
    model.train()
    for inputs, targets in learned:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for inputs, _ in measured:
            model(inputs)
    return time.perf_counter() - began


def network(seed: int) -> Any:
    """Build a resnet18 for two classes; its weights change no timing."""
    torch.manual_seed(seed)
    return models.resnet18(num_classes=2)


def batches(photos: Path, change: list[Any]) -> Any:
    """Load the photos of a folder."""
    steps = [*change, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset = datasets.ImageFolder(photos, transforms.Compose(steps))
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=2)


if __name__ == "__main__":
    main()
