"""The time of `advise`, beside one plain forward pass over the same photos, and of the training that follows.

    python benchmarks/advice_time.py

400 photos of clothing, or as many as there are, with resnet18 (weights that nobody trained: they change no timing), in
interleaved repeats on one thread: seconds of the processor, which neighbours on the machine do not change. The forward
pass decodes with Pillow and runs the network in evaluation mode without gradients.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision import datasets, transforms
from torchvision.models import resnet18

import regraft

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import describe

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Time both, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/clothing10")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        times.setdefault("forward", []).append(forward_pass(arguments.data / "train"))
        for augment in ("none", "flip"):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["REGRAFT_CACHE"] = folder
                model = resnet18(weights=None, num_classes=10)
                began = time.process_time()
                advice = regraft.advise(model, arguments.data, augment=augment, progress=False)
                times.setdefault(f"advise, {augment}", []).append(time.process_time() - began)
                print(advice.sentence)
        print({name: [round(value, 1) for value in values] for name, values in times.items()}, flush=True)
    forward = statistics.median(times["forward"])
    print(f"{describe()}, one thread")
    for name, values in times.items():
        print(f"{name:28}{statistics.median(values):8.1f} s{statistics.median(values) / forward:8.2f} forward passes")


def forward_pass(folder: Path) -> float:
    """Return the seconds of one pass over the training photos."""
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    model = resnet18(weights=None, num_classes=10).eval()
    began = time.process_time()
    with torch.inference_mode():
        for images, _ in loader:
            model(images)
    return time.process_time() - began


if __name__ == "__main__":
    main()
