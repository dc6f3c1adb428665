"""The advice against training every depth: accuracy lost by following it, beside that of rules that look at nothing.

    python benchmarks/advice.py --train           # trains every depth on every set: half an hour to hours, resumable
    python benchmarks/advice.py --train --part mobilenet
    python benchmarks/advice.py                   # asks `advise` on every set, and writes the table of docs/advice.md

Sets: digits (a network trained on 0-4 learns 5-9 from 1, 2, 5, 10 and 20 images a class, 5 seeds, as `regraft demo`
does), and the sets of photos in `../shared/data` with two networks that know ImageNet. The advice sees the photos to
learn from alone; the accuracies are those of the held-out photos after the last epoch, so nothing is chosen on them.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regraft
from regraft.anatomy.modes import preserved_randomness
from regraft.data.digits import PREPROCESSING, write_digits
from regraft.demo import run as demo

sys.path.insert(0, str(Path(__file__).resolve().parent))
from contenders import task
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks/results"
SETS = ("car_vs_bicycle_mini", "clothing10", "hymenoptera", "car_vs_bike")
HEAD, EVERYTHING = "head only", "everything"
# The layers up to which a network is frozen: about a quarter, a half and three quarters of its blocks.
LAYERS = {
    "digits": ("2", "5"),
    "mobilenet": ("stage1.2", "stage1.5", "stage2.3"),
    "lite0": ("blocks.4.0", "blocks.5.1"),
}
IMAGES = {"car_vs_bicycle_mini": 10, "car_vs_bike": 60, "hymenoptera": 122, "clothing10": 40}  # a class
FEW, MANY = 20, 100  # images a class of the fixed list: below, the head only; below, the second half; else everything
RULES = ("advice", HEAD, EVERYTHING, "half", "fixed list")
PAGE, BEGIN, END = ROOT / "docs/advice.md", "<!-- begin of the regrets -->", "<!-- end of the regrets -->"
SIDE, EPOCHS = 112, 12  # of the sets of photos


@dataclass(frozen=True)
class Task:
    """One set with one network: what is trained, and what the advice is asked about.

    Attributes:
        name: As in `lite0 hymenoptera`; for digits with the images a class.
        seed: Seed of the photos drawn, the new head and the order.
        network: Name of the network, which has the layers of `LAYERS`.
        build: Returns the network with a head for the classes; everything is trainable.
        data: A folder, or a pair of photos.
        options: Of `fit`.
    """

    name: str
    seed: int
    network: str
    build: Callable[[], nn.Module]
    data: Any
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Name and seed."""
        return f"{self.name}, seed {self.seed}"

    @property
    def depths(self) -> tuple[str, ...]:
        """The depths to train: everything, the layers, head only."""
        return (EVERYTHING, *LAYERS[self.network], HEAD)


def main() -> None:
    """Train every depth, or ask the advice and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train every depth of every set that has no result yet")
    parser.add_argument("--part", choices=tuple(LAYERS), help="one network alone")
    parser.add_argument("--seeds", type=int, default=1, help="of the sets of photos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    answers: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = f"{folder}/cache"
        for entry in tasks(Path(folder), arguments.part, arguments.seeds):
            if arguments.train:
                train_every_depth(entry)
            elif set(entry.depths) <= results_of(entry).keys():
                answers[entry.key] = ask(entry)
                print(f"{entry.key}: {answers[entry.key]}", flush=True)
    if not arguments.train:
        write_table(answers, arguments.part)


def tasks(folder: Path, part: str | None, seeds: int) -> Iterator[Task]:
    """Yield the sets with their networks."""
    if part in (None, "digits"):
        yield from digit_tasks(folder)
    for seed in range(seeds):
        for name in SETS:
            for network in ("mobilenet", "lite0"):
                if part in (None, network):
                    yield photo_task(network, name, seed)


def digit_tasks(folder: Path) -> Iterator[Task]:
    """Yield the tasks of the demonstration: with its learning rate, and with that which `fit` chooses."""
    source, target = (
        write_digits(folder / "source", demo.SOURCE_DIGITS),
        write_digits(folder / "target", demo.TARGET_DIGITS),
    )
    with preserved_randomness(0):
        fresh = regraft.card.attach(demo.digit_network(), preprocessing=PREPROCESSING)
    learned = regraft.fit(fresh, source, epochs=demo.SOURCE_EPOCHS, augment="none", progress=False)
    checkpoint = regraft.save(learned.model, folder / "source.safetensors")
    train, held_out = demo._read(target)
    for lr in (demo.LR, None):
        for count in demo.SHOTS:
            for seed in range(demo.SEEDS):
                options = {"epochs": demo.TARGET_EPOCHS, "augment": "none", **({"lr": lr} if lr else {})}
                name = f"digits {count}" + ("" if lr else ", lr of fit")
                few = train.subset(demo._draw(train, count, seed))

                def build(seed: int = seed) -> nn.Module:
                    with preserved_randomness(seed):
                        return regraft.replace_head(regraft.load(checkpoint), len(demo.TARGET_DIGITS))

                yield Task(name, seed, "digits", build, (few, held_out), options)


def photo_task(network: str, name: str, seed: int) -> Task:
    """Return the task of one set of photos."""
    data = SHARED / "data" / name
    classes = len(list((data / "train").iterdir()))

    def build() -> nn.Module:
        with preserved_randomness(seed):
            if network == "mobilenet":
                weights = SHARED / "weights/mobilenetV1X0.25_pretrain.tar"
                model = task.build(argparse.Namespace(seed=seed, model="mobilenet", weights=weights))
            else:
                weights = str(SHARED / "weights/efficientnet-lite0-57934424.pth")
                model = regraft.create_model("timm/tf_efficientnet_lite0", weights=weights, accept="likely")
            return regraft.replace_head(model, classes)

    return Task(f"{network} {name}", seed, network, build, data, {"epochs": EPOCHS, "image_size": SIDE})


def results_of(entry: Task) -> dict[str, dict[str, float]]:
    """Return what was measured by depth."""
    file = RESULTS / f"advice_{entry.network}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    return {depth: known[key] for depth in entry.depths if (key := f"{entry.key}, {depth}") in known}


def train_every_depth(entry: Task) -> None:
    """Train the depths that have no result yet, and keep the accuracy of each."""
    for depth in entry.depths:
        if depth in results_of(entry):
            continue
        began = time.perf_counter()
        accuracies = train(entry, depth)
        file = RESULTS / f"advice_{entry.network}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        known[f"{entry.key}, {depth}"] = {**accuracies, "seconds": round(time.perf_counter() - began, 2)}
        file.write_text(json.dumps(known, indent=0) + "\n")
        print(f"{entry.key}, {depth}", accuracies, flush=True)


def train(entry: Task, depth: str) -> dict[str, float]:
    """Train from one depth on, and return the accuracy after the last epoch, and that of the best."""
    model = entry.build()
    if depth == HEAD:
        regraft.freeze(model)
        regraft.unfreeze(model, "head")
    elif depth != EVERYTHING:
        regraft.freeze(model, until=depth)
    result = regraft.fit(model, entry.data, seed=entry.seed, progress=False, **entry.options)
    accuracies = [epoch.validation.accuracy or 0.0 for epoch in result.history]
    return {"last": accuracies[-1], "best": max(accuracies)}


def ask(entry: Task) -> str:
    """Return the depth that the advice recommends."""
    options = {name: value for name, value in entry.options.items() if name != "lr"}
    model, layers = entry.build(), LAYERS[entry.network]
    advice = regraft.advise(model, entry.data, layers=layers, seed=entry.seed, progress=False, **options)
    if advice.recommended is None:
        return HEAD
    return advice.recommended.layer if advice.recommended.layer in layers else advice.recommended.name


def fixed(entry: str, depths: list[str]) -> dict[str, str]:
    """Return what rules recommend that look at nothing but the number of images a class."""
    name = entry.rpartition(", seed")[0]
    images = int(name.split()[1].rstrip(",")) if name.startswith("digits") else IMAGES[name.split()[1]]
    half = depths[len(depths) // 2]
    by_list = HEAD if images < FEW else half if images < MANY else EVERYTHING
    return {HEAD: HEAD, EVERYTHING: EVERYTHING, "half": half, "fixed list": by_list}


def write_table(answers: dict[str, str], part: str | None) -> None:
    """Print the regrets, and write them into the page where all networks were asked."""
    rows: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for entry, answer in answers.items():
        network = entry.split()[0]
        known = json.loads((RESULTS / f"advice_{network}.json").read_text())
        accuracies = {depth: known[f"{entry}, {depth}"]["last"] for depth in (EVERYTHING, *LAYERS[network], HEAD)}
        best = max(accuracies.values())
        choices = {"advice": answer, **fixed(entry, list(accuracies))}
        regrets = {rule: 100 * (best - accuracies[depth]) for rule, depth in choices.items()}
        rows.setdefault(entry.rpartition(", seed")[0], []).append((best, regrets))
    lines = ["| set | best | " + " | ".join(RULES) + " |", "|---|" + "---|" * (1 + len(RULES))]
    for name, entries in rows.items():
        best = statistics.mean(best for best, _ in entries)
        cells = [f"{statistics.mean(regrets[rule] for _, regrets in entries):.1f}" for rule in RULES]
        lines.append(f"| {name} | {best:.3f} | {' | '.join(cells)} |")
    sets = [{rule: statistics.mean(r[rule] for _, r in entries) for rule in RULES} for entries in rows.values()]
    lines.append(
        "| **mean of the sets** | | "
        + " | ".join(f"**{statistics.mean(s[r] for s in sets):.2f}**" for r in RULES)
        + " |"
    )
    table = "\n".join(lines)
    print(table)
    if part is None:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        note = f"{describe()}; `python benchmarks/advice.py`"
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{note}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
