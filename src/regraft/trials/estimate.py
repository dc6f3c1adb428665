"""The time that a grid will take: predicted from one step and one forward pass, corrected by what is done."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from regraft.data.transforms import normalize
from regraft.training.config import TrainConfig
from regraft.training.loop import main_output
from regraft.training.steps.compute import choose_compute
from regraft.trials.bench import Bench
from regraft.trials.cells import Cell
from regraft.trials.ways import ADVISED, CURVE_POINTS, Options

START_S = 1.0  # of a run: building the network, choosing the learning rate of a head
PARTIAL = 0.5  # share of a step where a part of the network is frozen


@dataclass(frozen=True)
class Rates:
    """Seconds per photo of a training step of the whole network, and of a forward pass."""

    step_s: float
    forward_s: float


def measure_rates(bench: Bench) -> Rates:
    """Measure one step and one forward pass of a network with random weights; the second of two counts."""
    config = bench.config
    compute = replace(choose_compute(config.device, config.precision), has_channels_last=config.fast)
    model = bench.network(TrainConfig(seed=config.seed, weights="none", image_size=config.image_size)).model
    model.to(compute.device).train()
    photos = bench.train
    count = max(2, min(config.batch_size, len(photos)))
    indices = [index % len(photos) for index in range(count)]
    pixels = torch.stack([photos.views.of(index, photos.decoded(index), 0) for index in indices])
    inputs = normalize(pixels.to(compute.device), photos.preprocessing)
    targets = torch.tensor([int(photos.samples[index].target) for index in indices]).to(compute.device)
    step_s = forward_s = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with compute.autocast():
            loss = F.cross_entropy(main_output(model(inputs)).float(), targets)
        loss.backward()
        loss.item()  # waits for a GPU
        step_s, began = time.perf_counter() - began, time.perf_counter()
        with torch.no_grad(), compute.autocast():
            float(main_output(model(inputs)).sum())
        forward_s = time.perf_counter() - began
    return Rates(step_s / count, forward_s / count)


def predict_s(rates: Rates, stages: Sequence[Options], count: int, validation_count: int) -> float:
    """Predict the seconds of a run with its validation.

    Args:
        rates: Measured seconds.
        stages: Options of its runs.
        count: Training photos.
        validation_count: Validation photos, measured after each epoch.
    """
    seconds = 0.0
    for stage in stages:
        is_whole = stage.get("unfreeze_all") or stage.get("weights") == "none"
        is_partial = "freeze_until" in stage or ADVISED in stage
        share = PARTIAL if is_partial else 1.0 if is_whole else 0.0
        once_s = (1 - share) * (count + validation_count) * rates.forward_s
        validated = min(stage["epochs"], CURVE_POINTS) * validation_count
        seconds += START_S + once_s + share * (stage["epochs"] * count * rates.step_s + validated * rates.forward_s)
    return seconds


class RemainingTime:
    """The time that is left, from predictions and from what the cells took that are done.

    Args:
        predicted: Predicted seconds of each cell that is to be run.
    """

    def __init__(self, predicted: Mapping[Cell, float]) -> None:
        self._left, self._done = dict(predicted), dict.fromkeys({cell.way for cell in predicted}, (0.0, 0.0))

    @property
    def seconds(self) -> float:
        """Estimated seconds of the cells that are left."""
        measured, predicted = (sum(pair[index] for pair in self._done.values()) for index in (0, 1))
        general = measured / predicted if predicted else 1.0
        return sum(seconds * self._ratio(cell.way, general) for cell, seconds in self._left.items())

    def finish(self, cell: Cell, measured_s: float) -> None:
        """Count a cell as done."""
        measured, predicted = self._done[cell.way]
        self._done[cell.way] = measured + measured_s, predicted + self._left.pop(cell)

    def leave_out(self, way: str) -> None:
        """Count no cell of a way any longer."""
        self._left = {cell: seconds for cell, seconds in self._left.items() if cell.way != way}

    def _ratio(self, way: str, general: float) -> float:
        measured, predicted = self._done[way]
        return measured / predicted if predicted else general
