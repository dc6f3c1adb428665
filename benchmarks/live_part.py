"""What an epoch costs once the constant part is computed: resnet18, frozen up to `layer3.0`.

    python benchmarks/live_part.py

Beside each other, in turns: an epoch of `regraft.fit`; forward and backward of the live part alone, by hand, on tensors
in memory; and an epoch of the plain loop (the tutorial's), which decodes every photo and runs the whole network.
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
    """Return the seconds of the training phase of an epoch of `fit`."""
    model = network(seed)
    regraft.freeze(model, until=UNTIL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = folder
        result = fit(model, data, epochs=EPOCHS, batch_size=BATCH, augment="none", lr=1e-3, seed=seed)
    return result.seconds["training"] / EPOCHS


def by_hand(data: Path, seed: int) -> float:
    """Return the seconds of forward and backward of the live part over all photos."""
    model = network(seed)
    regraft.freeze(model, until=UNTIL)
    parts = partition(model, torch.empty(1, 3, 224, 224))
    change = [transforms.Resize(256), transforms.CenterCrop(224)]
    with torch.no_grad():
        kept = [(parts.prefix(inputs), targets) for inputs, targets in batches(data, change, workers=2)]
    suffix = parts.suffix.train()
    seconds = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        for tensors, targets in kept:
            loss = nn.functional.cross_entropy(suffix(*tensors), targets)
            loss.backward()
            suffix.zero_grad()
        seconds.append(time.perf_counter() - began)
    return statistics.mean(seconds)


def of_plain_loop(data: Path, seed: int) -> float:
    """Return the seconds of the training phase of an epoch of the tutorial's loop."""
    model = network(seed)
    for layer in (model.conv1, model.bn1, model.layer1, model.layer2, model.layer3[0]):
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    change = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    began = time.perf_counter()
    model.train()
    for inputs, targets in batches(data, change, workers=2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return time.perf_counter() - began


def network(seed: int) -> Any:
    """Build a resnet18 for two classes; its weights change no timing."""
    torch.manual_seed(seed)
    return models.resnet18(num_classes=2)


def batches(data: Path, change: list[Any], *, workers: int) -> Any:
    """Load the photos to learn from."""
    steps = [*change, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    photos = datasets.ImageFolder(data / "train", transforms.Compose(steps))
    return torch.utils.data.DataLoader(photos, BATCH, shuffle=True, num_workers=workers)


if __name__ == "__main__":
    main()
