"""What every contender is given: the same network with the same weights, the same photos, and a stopwatch.

Each contender is a program of its own (`python contenders/tutorial.py --help`) that trains once and prints one line of
JSON. `benchmarks/speed.py` runs them one after the other.
"""

import argparse
import importlib.util
import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, RESIZE = 224, 256
LR, MOMENTUM, STEP, GAMMA = 0.008, 0.9, 7, 0.1  # the tutorial's, for batches of 32 instead of 4


def read_options(**more: Any) -> argparse.Namespace:
    """Parse what all contenders understand; `more` are options of one of them with their defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/hymenoptera")
    parser.add_argument("--weights", type=Path, default=ROOT.parent / "shared/weights/mobilenetV1X0.25_pretrain.tar")
    parser.add_argument("--model", choices=("mobilenet", "resnet18"), default="mobilenet")
    parser.add_argument("--until", help="freeze up to this layer; default: all but the head; none: nothing")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def build(options: argparse.Namespace) -> nn.Module:
    """Build the network with its weights and a new head for two classes; everything is trainable."""
    torch.manual_seed(options.seed)
    if options.model == "resnet18":
        from torchvision.models import resnet18

        network: Any = resnet18(weights=None)  # its weights cannot be had offline; they change no timing
    else:
        network = _example("mobilenet_v1").MobileNetV1()
        stored = torch.load(options.weights, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    network.fc = nn.Linear(network.fc.in_features, 2)
    return network


def freeze(network: Any, until: str | None) -> None:
    """Freeze as the tutorial does, by flags alone."""
    if until == "none":
        return
    if until is None:
        network.requires_grad_(False)
        network.fc.requires_grad_(True)
        return
    assert until == "layer3.0", until
    for layer in (network.conv1, network.bn1, network.layer1, network.layer2, network.layer3[0]):
        layer.requires_grad_(False)


@dataclass
class Stopwatch:
    """Seconds since it was made, and those of each epoch."""

    began: float = field(default_factory=time.perf_counter)
    epochs: list[float] = field(default_factory=list)

    def lap(self) -> None:
        """End an epoch."""
        self.epochs.append(time.perf_counter() - self.began - sum(self.epochs))

    def report(self, accuracies: list[float], **more: Any) -> None:
        """Print what was measured as one line of JSON."""
        peak_kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        found = {
            "seconds": time.perf_counter() - self.began,
            "epochs": self.epochs,
            "accuracy": accuracies[-1] if accuracies else None,
            "best": max(accuracies, default=None),
            "peak_mib": peak_kib / 1024,
            **more,
        }
        print(json.dumps(found), flush=True)


def _example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
