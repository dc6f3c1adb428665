"""regraft beside what people run instead: the same photos, weights, epochs and batch size, one process after the other.

    python benchmarks/speed.py                     # all scenarios, half an hour on two cores
    python benchmarks/speed.py head --repeats 1    # one of them, once

The contenders are the programs in `benchmarks/contenders/`; they take turns, so that a noisy machine is as noisy for
each. What was measured is written to `benchmarks/results/`, from which `benchmarks/page.py` makes docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Contender:
    """A program that trains once.

    Attributes:
        name: What the table calls it.
        program: Its file and its own options.
        epochs: How many it trains, where that is less than what the table is about: its seconds are scaled up.
        needs_cache: Whether its cache was filled by a run before it.
    """

    name: str
    program: tuple[str, ...]
    epochs: int | None = None
    needs_cache: bool = False


@dataclass(frozen=True)
class Scenario:
    """What all contenders do."""

    title: str
    epochs: int
    options: tuple[str, ...]
    contenders: tuple[Contender, ...]


LIMIT = Contender("limit: decode, and one forward pass", ("limit.py",))
TUTORIAL = Contender("tutorial", ("tutorial.py",))
ONE_VIEW = Contender("regraft, 1 view", ("regraft_fit.py",))
FIVE_VIEWS = Contender("regraft, 5 augmented views", ("regraft_fit.py", "--augment", "standard", "--views", "5"))
SCENARIOS = {
    "head": Scenario(
        "MobileNetV1 × 0.25 with ImageNet weights, frozen but for its head",
        25,
        (),
        (
            LIMIT,
            ONE_VIEW,
            TUTORIAL,
            Contender("tutorial, frozen part in evaluation mode", ("tutorial.py", "--variant", "eval")),
            Contender("fastai, Learner.freeze", ("fastai_learner.py",)),
            Contender("Lightning, BackboneFinetuning", ("lightning_finetuning.py",)),
            Contender("Hugging Face, Trainer", ("hf_trainer.py",)),
            Contender("regraft, 2 views (mirrored; the default)", ("regraft_fit.py", "--augment", "flip")),
            FIVE_VIEWS,
            Contender("regraft, 1 view, again with another rate", ("regraft_fit.py", "--lr", "0.003"), None, True),
        ),
    ),
    "resnet18": Scenario(
        "resnet18, frozen but for its head (random weights: figures of time alone)",
        25,
        ("--model", "resnet18"),
        (LIMIT, ONE_VIEW, Contender("tutorial (2 epochs, scaled to 25)", ("tutorial.py",), 2)),
    ),
    "everything": Scenario(
        "MobileNetV1 × 0.25, nothing frozen, random augmentation",
        4,
        ("--until", "none"),
        (TUTORIAL, Contender("regraft", ("regraft_fit.py", "--augment", "standard"))),
    ),
}


def main() -> None:
    """Run the scenarios, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.scenarios:
        measured = measure(SCENARIOS[name], arguments.repeats)
        (RESULTS / f"{name}.json").write_text(json.dumps(measured, indent=1))


def measure(scenario: Scenario, repeats: int) -> dict[str, Any]:
    """Let the contenders take turns, each with the seeds 0, 1, …, and return all that they said."""
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in scenario.contenders}
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(repeats):
            for contender in scenario.contenders:
                epochs = contender.epochs or scenario.epochs
                options = [*scenario.options, "--seed", str(seed), "--epochs", str(epochs)]
                if contender.needs_cache:
                    options += ["--cache", cache]
                    run(contender, [*options, "--lr", "0.01"])
                found = run(contender, options)
                if epochs < scenario.epochs:
                    found["seconds"] *= scenario.epochs / epochs
                    found["process"] = found["outside"] + found["seconds"]
                runs[contender.name].append(found)
                accuracy = "" if found["accuracy"] is None else f"accuracy {found['accuracy']:.4f}"
                print(
                    f"{contender.name:45} {found['seconds']:8.2f} s of {found['process']:8.2f} s {accuracy}", flush=True
                )
    return {"title": scenario.title, "epochs": scenario.epochs, "machine": machine.describe(), "runs": runs}


def run(contender: Contender, options: list[str]) -> dict[str, Any]:
    """Run one contender as a process of its own, and return what it prints."""
    program, *own = contender.program
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, str(HERE / "contenders" / program), *options, *own],
        capture_output=True,
        text=True,
        env=environment,
    )
    process = time.perf_counter() - began
    if finished.returncode:
        raise SystemExit(f"{contender.name} failed:\n{finished.stderr[-3000:]}")
    found = json.loads(finished.stdout.splitlines()[-1])
    return {**found, "process": process, "outside": process - found["seconds"]}


if __name__ == "__main__":
    main()
