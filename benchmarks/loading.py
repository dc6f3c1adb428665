"""Loading a network beside what people use instead: resnet50 and ViT-B/16, from the file to a network that is ready.

    python benchmarks/loading.py

Every way builds the network and fills it, in one process, in turns, with files that the system has in memory. What is
timed is `load` against `torch.load` (a pickled state dict, weights only) and `load_state_dict` on a network of
torchvision. `load` also verifies the SHA-256 of every tensor, which none of the others does. The last way maps the file
into memory and lets the network use the mapping itself (`assign=True`): it copies nothing, and whoever changes the file
later changes the network.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from torch import nn
from torchvision import models

import regraft

HERE = Path(__file__).parent
NETWORKS = ("resnet50", "vit_b_16")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(machine.describe())
    measured: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            measured[name] = of_network(name, Path(folder), arguments.repeats)
    medians = {name: {way: statistics.median(s) for way, s in ways.items()} for name, ways in measured.items()}
    for name, ways in medians.items():
        print(name)
        for way, seconds in ways.items():
            spread = f"({min(measured[name][way]):.3f}-{max(measured[name][way]):.3f})"
            print(f"  {way:44} {seconds:6.3f} s {spread}  regraft / this: {ways['regraft.load'] / seconds:.2f}")
    (HERE / "results").mkdir(exist_ok=True)
    found = {"machine": machine.describe(), "seconds": measured, "medians": medians}
    (HERE / "results/loading.json").write_text(json.dumps(found, indent=1))


def of_network(name: str, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way to load one network, measured in turns."""
    model = regraft.create_model(name, weights="none").eval()
    ours = regraft.save(model, folder / f"{name}.safetensors")
    theirs = folder / f"{name}.pth"
    torch.save(model.state_dict(), theirs)

    def plain() -> nn.Module:
        again = models.get_model(name)
        again.load_state_dict(torch.load(theirs, weights_only=True))
        return again.eval()

    def mapped() -> nn.Module:
        again = models.get_model(name)
        again.load_state_dict(torch.load(theirs, weights_only=True, mmap=True))
        return again.eval()

    def assigned() -> nn.Module:
        again = models.get_model(name)
        again.load_state_dict(torch.load(theirs, weights_only=True, mmap=True), assign=True)
        return again.eval()

    ways: dict[str, Callable[[], nn.Module]] = {
        "regraft.load": lambda: regraft.load(ours),
        "torch.load + load_state_dict": plain,
        "torch.load(mmap=True) + load_state_dict": mapped,
        "torch.load(mmap=True) + assign=True": assigned,
    }
    for way in ways.values():  # once before, for imports and the files; and all of them load the same
        state = way().state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
