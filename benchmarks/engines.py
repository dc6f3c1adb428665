"""The engines that decode photos, beside each other: rates, pixels, and the accuracy of what is trained on them.

`python benchmarks/engines.py` takes the photos in `../shared/data` and prints three tables. A head is trained on the
features of a frozen network, MobileNetV1 × 0.25 and, with `--lite0`, EfficientNet-lite0, both with ImageNet weights.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

import regraft
from regraft.card import Preprocessing
from regraft.data.decoding.engines import usable_engine
from regraft.data.decoding.files import Unreadable, decode_all

sys.path.insert(0, str(Path(__file__).parent / "contenders"))
import task

SHARED = Path(__file__).resolve().parents[2] / "shared"
SETS = ("hymenoptera", "clothing10", "car_vs_bike", "car_vs_bicycle_mini")
LITE0 = SHARED / "weights/efficientnet-lite0-57934424.pth"
SEEDS = (0, 1, 2)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lite0", action="store_true", help="measure EfficientNet-lite0 as well")
    options = parser.parse_args()
    device = torch.device(options.device)
    names: tuple[Any, ...] = ("pillow", "native", "nvjpeg")
    engines = [engine for engine in names if usable_engine(engine, Preprocessing(), device) == engine]
    print(machine.describe())
    compare_pixels(engines, options.repeats)
    compare_accuracies("mobilenet", engines, options.device)
    if options.lite0:
        compare_accuracies("lite0", engines, options.device)


def compare_pixels(engines: list[str], repeats: int) -> None:
    """Print the rate of each engine, and by how much its pixels differ from Pillow's, in steps of 255."""
    print(f"\n{'set':<20} {'engine':<8} {'photos/s':>9} {'equal':>7} {'within 1':>9} {'mean':>8} {'largest':>8}")
    for name in SETS:
        paths = sorted((SHARED / "data" / name).glob("*/*/*"))
        times: dict[str, list[float]] = {engine: [] for engine in engines}
        photos: dict[str, list[Any]] = {}
        for _ in range(repeats):
            for engine in engines:  # in turns
                began = time.perf_counter()
                photos[engine] = list(decode_all(paths, Preprocessing(decoder=engine)))  # type: ignore[arg-type]
                times[engine].append(time.perf_counter() - began)
        for engine in engines:
            distances = [
                (ours.cpu().int() - theirs.int()).abs().float()
                for ours, theirs in zip(photos[engine], photos["pillow"], strict=True)
                if not isinstance(ours, Unreadable)
            ]
            largest = [float(distance.max()) for distance in distances]
            print(
                f"{name:<20} {engine:<8} {len(paths) / statistics.median(times[engine]):>9.0f} "
                f"{sum(value == 0 for value in largest) / len(largest):>7.1%} "
                f"{sum(value <= 1 for value in largest) / len(largest):>9.1%} "
                f"{statistics.mean(float(distance.mean()) for distance in distances):>8.4f} {max(largest):>8.0f}"
            )


def compare_accuracies(network: str, engines: list[str], device: str) -> None:
    """Print the accuracy of heads by engine and precision, and their distance to Pillow in fp32, in photos."""
    ways = [(engine, precision, "auto") for engine in engines for precision in ("fp32", "bf16")]
    ways += [(engines[-1], "fp32", "solved")]
    print(f"\n{network}: accuracy, the mean of {len(SEEDS)} seeds; in brackets, photos more than Pillow in fp32")
    print(f"{'engine, precision, head':<30}" + "".join(f"{name:>24}" for name in SETS) + f"{'mean':>10}")
    reference: dict[str, float] = {}
    for engine, precision, head in ways:
        cells, differences = [], []
        for name in SETS:
            right, count = correct(network, SHARED / "data" / name, engine, precision, head, device)
            reference.setdefault(name, right)
            differences.append(right - reference[name])
            cells.append(f"{right / count:>15.4f} ({differences[-1]:+.1f})")
        row = "".join(f"{cell:>24}" for cell in cells)
        print(f"{f'{engine}, {precision}, {head}':<30}{row}{statistics.mean(differences):>+10.2f}", flush=True)


def correct(network: str, data: Path, engine: str, precision: str, head: str, device: str) -> tuple[float, int]:
    """Return how many validation photos are right, the mean over the seeds, and how many there are."""
    rights, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = folder
        for seed in SEEDS:
            result = regraft.fit(
                build(network, len(list((data / "train").iterdir())), seed),
                data,
                decoder=engine,
                precision=precision,
                head=head,
                device=device,
                seed=seed,
                progress=False,
            )
            count = result.validation.count
            rights.append((result.validation.accuracy or 0.0) * count)
    return statistics.mean(rights), count


def build(network: str, classes: int, seed: int) -> nn.Module:
    """Build a frozen network with its weights and a new head."""
    torch.manual_seed(seed)
    if network == "mobilenet":
        weights = SHARED / "weights/mobilenetV1X0.25_pretrain.tar"
        model = task.build(argparse.Namespace(seed=seed, model="mobilenet", weights=weights))
    else:
        model = regraft.create_model("timm/tf_efficientnet_lite0", weights=str(LITE0), accept="likely")
    model = regraft.replace_head(model, classes)
    regraft.freeze(model)
    regraft.unfreeze(model, "fc" if network == "mobilenet" else "classifier")
    return model


if __name__ == "__main__":
    main()
