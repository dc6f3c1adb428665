"""A stitch whose adapter was fitted in closed form against the same stitch with a random one, after equal training.

    python benchmarks/stitching.py --data ../shared/data/car_vs_bike --weights ../shared/weights

The front of one trained network and the back of another, in both directions: MobileNetV1 × 0.25 (ImageNet, images of
224 × 224 pixels) and ResNet-56 (CIFAR-10, 32 × 32). Front and back stay frozen; a new head alone, or the adapter and
the head, are trained on the photos, with the same options, seeds and first weights of the head. `--weights` holds the
checkpoints
`mobilenetV1X0.25_pretrain.tar` (bubbliiiing/retinaface-pytorch) and `resnet56-4bfd9763.th`
(akamaster/pytorch_resnet_cifar10).
"""

import argparse
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regraft
from regraft.data.folders import list_data
from regraft.data.photos import loader, read_photos
from regraft.zoo import preprocessing_of

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 2


def main() -> None:
    """Run both directions with both adapters on every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/car_vs_bike")
    parser.add_argument("--weights", type=Path, default=ROOT.parent / "shared/weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    mobilenet = trained("mobilenet_v1.py:MobileNetV1", arguments.weights / "mobilenetV1X0.25_pretrain.tar")
    resnet = trained("resnet_cifar.py:ResNet56", arguments.weights / "resnet56-4bfd9763.th")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{arguments.data.name}, {arguments.epochs} epochs; accuracy of the last epoch, seeds 0-{arguments.seeds - 1}"
    )
    print(f"{'front → back':40}{'trained':16}{'adapter':14}{'accuracy':24}{'mean':>6}")
    for title, front, back, cut in (
        ("MobileNetV1.stage2 → ResNet-56.layer2", mobilenet, resnet, ("stage2", "layer2")),
        ("ResNet-56.layer2 → MobileNetV1.stage2", resnet, mobilenet, ("layer2", "stage2")),
    ):
        for trains_adapter in (False, True):
            for is_fitted in (False, True):
                run = Run(front, back, cut, arguments.data, arguments.epochs, trains_adapter, is_fitted)
                scores = [accuracy(run, seed) for seed in range(arguments.seeds)]
                names = ("head, adapter" if trains_adapter else "head", "closed form" if is_fitted else "random")
                shown = ", ".join(f"{score:.3f}" for score in scores)
                print(f"{title:40}{names[0]:16}{names[1]:14}{shown:24}{statistics.mean(scores):>6.3f}", flush=True)


@dataclass(frozen=True)
class Run:
    """One way to stitch and to train."""

    front: nn.Module
    back: nn.Module
    cut: tuple[str, str]
    data: Path
    epochs: int
    trains_adapter: bool
    is_fitted: bool


def trained(name: str, weights: Path) -> nn.Module:
    """Load one of the trained networks."""
    return regraft.create_model(f"py:{ROOT / 'examples' / name}", weights=weights, trust_code=True).eval()


def accuracy(run: Run, seed: int) -> float:
    """Stitch, train, and return the accuracy of the last epoch."""
    torch.manual_seed(seed)
    batches = photos(run.data, run.front) if run.is_fitted else None
    stitched = regraft.stitch(run.front, run.back, cut=run.cut, batches=batches)
    torch.manual_seed(seed)
    model = regraft.replace_head(stitched, CLASSES)
    regraft.freeze(model)
    regraft.unfreeze(model, *regraft.select(model, "type:Linear")[-1:], *(["adapter"] if run.trains_adapter else []))
    result = regraft.fit(model, run.data, epochs=run.epochs, seed=seed, lr=1e-3, augment="none")
    return result.history[-1].validation.accuracy or 0.0


def photos(data: Path, model: nn.Module) -> Any:
    """Return batches of the photos to learn from, as `model` takes them."""
    found, _ = read_photos(list_data(data).train, preprocessing_of(model))
    return loader(found, 32)


if __name__ == "__main__":
    main()
