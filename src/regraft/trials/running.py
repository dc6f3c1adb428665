"""Run one cell: draw its photos, train on them as its way says, and measure the last epoch."""

import time
from collections.abc import Sequence
from typing import Any

from regraft.data.photos import Photos
from regraft.training.config import TrainConfig
from regraft.training.fitting import fit
from regraft.training.result import FitResult
from regraft.trials.advised import advised_stages
from regraft.trials.bench import Bench
from regraft.trials.cells import Cell, CellResult, draw
from regraft.trials.ways import ADVISED, Options, stage_config

EXTRA_PHASES = ("setup", "training")


def run_cell(bench: Bench, cell: Cell, stages: Sequence[Options]) -> CellResult:
    """Train on the photos of a cell, and measure the last epoch on the validation photos.

    Args:
        bench: What all cells share.
        cell: The cell.
        stages: Options of its runs; each goes on from the weights of the one before.

    Raises:
        RegraftError: As from `fit`.
        Interrupted: Ctrl-C or SIGTERM.
    """
    began = time.perf_counter()
    few = bench.train.subset(draw(bench.targets, cell.images, cell.seed))
    advising_s = 0.0
    if ADVISED in stages[0]:
        stages, advising_s = advised_stages(bench, few, stages[0]["epochs"], cell.seed)
    configs = [stage_config(bench.config, stage, cell.seed) for stage in stages]
    model: Any = bench.network(configs[0]).model
    results: list[FitResult] = []
    for config in configs:
        results.append(_fit(model, few, bench.validation, config, bench))
        model = results[-1].model
    last = results[-1]
    right = "".join(map(str, (last.outputs.argmax(1) == last.targets).int().tolist()))
    before = {"decoding": bench.decode_s * len(few), **({"advising": advising_s} if advising_s else {})}
    seconds = {**before, **{phase: sum(_seconds(result)[phase] for result in results) for phase in _seconds(last)}}
    return CellResult(
        cell=cell,
        count=len(few),
        stages=tuple(dict(stage) for stage in stages),
        accuracy=last.validation.accuracy or 0.0,
        loss=last.validation.loss,
        right=right,
        curve=tuple(_curve(results, sum(before.values()))),
        seconds=seconds,
        validation_s=sum(result.seconds.get("validation", 0.0) for result in results),
        measured_s=time.perf_counter() - began,
    )


def _fit(model: Any, few: Photos, validation: Photos, config: TrainConfig, bench: Bench) -> FitResult:
    return fit(model, (few, validation), config=config, progress=False, trust_code=bench.trust_code)


def _seconds(result: FitResult) -> dict[str, float]:
    """Return the seconds of the phases that the run would need alone: features at their cost, found or not."""
    once = result.computed_once
    features = once.train_cost_s if once is not None else 0.0
    return {"features": features, **{phase: result.seconds.get(phase, 0.0) for phase in EXTRA_PHASES}}


def _curve(results: Sequence[FitResult], before_s: float) -> list[tuple[float, float]]:
    """Return (seconds, accuracy) after each validated epoch of all runs, without the time of the validation.

    The seconds of training are known for a whole run, whose epochs are alike.
    """
    points: list[tuple[float, float]] = []
    for result in results:
        seconds = _seconds(result)
        training, epochs = seconds.pop("training"), result.history[-1].epoch
        begin = before_s + sum(seconds.values())
        points += [
            (begin + training * record.epoch / epochs, record.validation.accuracy or 0.0) for record in result.history
        ]
        before_s = points[-1][0]
    return points
