"""`compare`: the same photos, learned in several ways, over numbers of images and seeds."""

import csv
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.arguments import check_arguments, check_minimum, check_path
from regraft.console import progress_of
from regraft.data.samples import Listing, draw_of
from regraft.errors import ConfigError, Interrupted, LossError
from regraft.progress import Progress
from regraft.torch_internals import defer_compiler
from regraft.training.config import TrainConfig
from regraft.training.run_lines import say_data
from regraft.training.setup import check_options
from regraft.training.steps.compute import choose_compute
from regraft.training.train_data import list_if_known
from regraft.trials.bench import Bench, open_bench, share_features
from regraft.trials.cells import EVERYTHING, Cell, CellResult, in_words, usable_images
from regraft.trials.comparison import CSV_HEAD, Comparison, WaySummary, claims_of, computed_once
from regraft.trials.estimate import RemainingTime, measure_rates, predict_s
from regraft.trials.grid_folder import GridFolder
from regraft.trials.running import run_cell
from regraft.trials.ways import (
    GRADUAL,
    LP_FT,
    MIN_EPOCHS,
    NAMES,
    PROBE,
    SCRATCH,
    Options,
    Way,
    commands,
    epochs_for,
    ways_named,
)
from regraft.version import __version__
from regraft.wording import option

IMAGES = (5, 10, 20, EVERYTHING)
SEEDS = 3
TABLE, VALUES = "comparison.csv", "comparison.json"
OF_WAYS = (  # options that the ways set
    *("data", "model", "out", "freeze", "freeze_until", "unfreeze_all", "unfreeze", "lr", "backbone_lr", "layer_decay"),
    *("keep_epoch", "augment", "views"),
)
HEAD_ALONE = (PROBE, LP_FT, GRADUAL)  # which begin with a head on the frozen network


def compare(
    model: str,
    data: Any,
    *,
    images: Sequence[int | str] = IMAGES,
    seeds: int = SEEDS,
    ways: Sequence[str] = NAMES,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    config: TrainConfig | None = None,
    progress: Progress | bool = True,
    **options: Any,
) -> Comparison:
    """Train a network in several ways on the same photos, and say which needs the fewest images and the least time.

    All runs are measured on the same validation photos after their last epoch. Nothing is chosen on these photos: no
    epoch, no learning rate, no layer. Each seed draws photos of each class (fewer are a part of more), the initial
    weights and the order. All ways make the same number of passes over the same photos; training from scratch makes
    more. Photos are decoded once for all runs, and what the frozen network gives for them is computed once.

    With a folder `out`, the result of each run is kept there as soon as it is known, and the same call goes on where
    the one before was stopped. More images, seeds or ways repeat nothing that is there.

    Args:
        model: A name (see `create_model`), or a checkpoint.
        data: A folder, shards or datasets of Hugging Face, with classes (see `fit`).
        images: Numbers of training photos per class; `"all"` for all of them.
        seeds: Number of seeds; with one, errors are not known.
        ways: Ways of training: `scratch`, `probe` (a head on the frozen network), `advised` (frozen as `advise` says),
            `lp-ft` (a probe, then all layers with a small rate), `gradual` (unfreezing), `all` (layers).
        out: Folder for the results; None keeps nothing.
        overwrite: Whether the results of another comparison in that folder may be deleted.
        trust_code: Whether custom code (`py:…`) may be imported.
        config: The options that all ways share, as one value.
        progress: See `fit`.
        **options: Fields of `TrainConfig`, which take precedence over `config`; those that make the difference between
            the ways, such as `freeze` and `lr`, are not accepted.

    Raises:
        InputError: An argument or the data is invalid. Nothing was trained.
        Interrupted: Ctrl-C or SIGTERM; the runs that are complete are kept in `out`.
    """
    model = str(model) if isinstance(model, Path) else model
    check_arguments(compare, locals())
    check_minimum(compare, 1, seeds=seeds)
    if isinstance(data, (str, Path)):
        check_path(compare, "data", data)
    settings = (config or TrainConfig()).updated(**options)
    for name in OF_WAYS:
        if name in settings.model_fields_set:
            raise ConfigError(
                f"{option(name)} is not for a comparison, whose ways differ in it. Leave it out, or choose among them "
                f"with {option('ways', 'NAMES')}."
            )
    if settings.epochs < MIN_EPOCHS:
        raise ConfigError(f"{option('epochs', settings.epochs)} is too few to compare. Pass {MIN_EPOCHS} or more.")
    grid = _Grid(model, settings, _images(images), tuple(range(seeds)), ways_named(ways), trust_code)
    folder = Path(out) if out is not None else None
    with defer_compiler():
        return _compare(grid, data, folder, progress_of(progress), overwrite=overwrite)


@dataclass(frozen=True)
class _Grid:
    """What was asked for, checked as far as it can be without the data."""

    model: str
    config: TrainConfig
    images: tuple[str, ...]
    seeds: tuple[int, ...]
    ways: tuple[Way, ...]
    trust_code: bool


def _images(images: Sequence[int | str]) -> tuple[str, ...]:
    """Return numbers of images as text.

    Raises:
        ConfigError: One is no number from 1, and not `all`.
    """
    for number in images:
        if str(number) != EVERYTHING and not (str(number).isdecimal() and int(number) >= 1):
            raise ConfigError(f"{option('images')} has {number!r}, expected numbers from 1, or 'all'.")
    if not images:
        raise ConfigError(f"{option('images')} is empty, expected numbers of images per class, or 'all'.")
    return tuple(map(str, images))


def _compare(grid: _Grid, data: Any, path: Path | None, progress: Progress, *, overwrite: bool) -> Comparison:
    began = time.perf_counter()
    with progress.status("looking for photos"):
        listing = _list(data, grid.config)
    say_data(listing, progress)
    check_options(grid.config, listing.task, trust_code=grid.trust_code)
    images, notes = usable_images(grid.images, listing)
    folder = GridFolder(path, _fingerprint(grid, listing), overwrite=overwrite)
    bench = open_bench(grid.model, listing, grid.config, progress, trust_code=grid.trust_code)
    if bench.unreadable:  # of which some may have been the last of the drawn
        images, notes = usable_images(grid.images, bench.listing)
    ways, left_out = _usable_ways(grid.ways, bench)
    left_out += [("images", note) for note in notes]
    cells = [Cell(way.name, number, seed) for seed in grid.seeds for number in images for way in ways]
    plan = {cell: _stages(cell, ways, bench) for cell in cells}
    with folder.locked():
        results, failures = _run(plan, ways, bench, folder, progress)
        ways = tuple(way for way in ways if way.title not in dict(failures))
        where = str(data) if isinstance(data, (str, Path)) else str(listing.root)
        summaries = tuple(
            _summary(way, bench, where, results[Cell(way.name, images[-1], grid.seeds[0])]) for way in ways
        )
        kept = tuple(results[cell] for cell in cells if cell in results and any(cell.way == way.name for way in ways))
        comparison = Comparison(
            model=grid.model,
            data=where,
            classes=bench.listing.classes or (),
            train_count=len(bench.train),
            validation_count=len(bench.validation),
            chance=bench.chance,
            epochs=grid.config.epochs,
            images=images,
            seeds=grid.seeds,
            ways=summaries,
            cells=kept,
            claims=claims_of(kept, summaries, images, bench.chance),
            left_out=(*left_out, *failures),
            machine=_machine(grid.config),
            seconds=max(time.perf_counter() - began, sum(result.measured_s for result in kept)),
            once=computed_once(kept, len(bench.train), len(bench.validation)),
            out=path,
        )
        if path is not None:
            folder.write(VALUES, json.dumps(comparison.to_dict(), indent=1))
            folder.write(TABLE, _csv_text(comparison))
    return comparison


def _list(data: Any, config: TrainConfig) -> Listing:
    listing = list_if_known(data, config)
    if listing is None:
        raise ConfigError(
            f"compare: data is a {type(data).__name__}, expected a folder of photos, shards, or datasets of Hugging "
            "Face: images of each class have to be drawn from a list."
        )
    if listing.task != "classification":
        raise ConfigError(
            "a table of numbers has no classes to draw images of. Pass a folder of photos for each class."
        )
    return listing


def _usable_ways(ways: Sequence[Way], bench: Bench) -> tuple[tuple[Way, ...], list[tuple[str, str]]]:
    """Return the ways that can be measured, and the reasons for the others.

    Raises:
        ConfigError: None can be.
    """
    left_out: list[tuple[str, str]] = []
    if not bench.has_weights:
        pass_weights = f"Pass {option('weights', 'FILE')}."
        reason = f"{bench.name} has no pretrained weights, so there is nothing to transfer. {pass_weights}"
        left_out = [(way.title, reason) for way in ways if way.is_pretrained]
    usable = tuple(way for way in ways if way.title not in dict(left_out))
    if not usable:
        raise ConfigError(f"nothing to compare: {left_out[0][1]} Add the way '{SCRATCH}'.")
    return usable, left_out


def _stages(cell: Cell, ways: Sequence[Way], bench: Bench) -> tuple[Options, ...]:
    way = next(way for way in ways if way.name == cell.way)
    count = len(bench.train) if cell.images == EVERYTHING else int(cell.images) * len(bench.listing.classes or ())
    return way.stages_of(bench.layers, epochs_for(count, bench.config))


def _run(
    plan: dict[Cell, tuple[Options, ...]],
    ways: Sequence[Way],
    bench: Bench,
    folder: GridFolder,
    progress: Progress,
) -> tuple[dict[Cell, CellResult], list[tuple[str, str]]]:
    """Run the cells that are not complete.

    Returns:
        The results; the ways that failed, with the reasons.
    """
    results = {cell: found for cell, stages in plan.items() if (found := folder.find(cell, stages)) is not None}
    todo = [cell for cell in plan if cell not in results]
    if results:
        progress.say(f"continued  {len(results)} of {len(plan)} runs were complete")
    failures: dict[str, str] = {}
    if not todo:
        return results, []
    titles = {way.name: way.title for way in ways}
    try:
        if shared := [(cell.images, cell.seed) for cell in todo if cell.way in HEAD_ALONE]:
            share_features(bench, shared, progress)
        left = _remaining_time(todo, plan, bench, progress)
        for number, cell in enumerate(todo, len(results) + 1):
            title = titles[cell.way]
            if title in failures:
                continue
            where = f"{number}/{len(plan)} {title}, {in_words(cell.images)}, seed {cell.seed}"
            try:
                with progress.status(f"{where}; about {_minutes(left.seconds)} left"):
                    results[cell] = run_cell(bench, cell, plan[cell])
            except LossError as error:
                failures[title] = f"stopped with {in_words(cell.images)}: {error}"
                left.leave_out(cell.way)
                continue
            folder.keep(results[cell], plan[cell])
            left.finish(cell, results[cell].measured_s)
            if cell.way == ways[-1].name:
                _say_row(cell, results, ways, left.seconds, progress)
    except KeyboardInterrupt as interruption:
        signal = getattr(interruption, "exit_code", 130) - 128
        name = "SIGTERM" if signal == 15 else "Ctrl-C"
        message = f"stopped by {name}. {folder.resume_hint(len(results), len(plan))}"
        raise Interrupted(message, number=signal) from interruption
    return results, list(failures.items())


def _remaining_time(
    todo: Sequence[Cell], plan: dict[Cell, tuple[Options, ...]], bench: Bench, progress: Progress
) -> RemainingTime:
    with progress.status("measuring a step"):
        rates = measure_rates(bench)
    per_class, classes = len(bench.train), len(bench.listing.classes or ())
    counts = {cell: per_class if cell.images == EVERYTHING else int(cell.images) * classes for cell in todo}
    left = RemainingTime({cell: predict_s(rates, plan[cell], counts[cell], len(bench.validation)) for cell in todo})
    progress.say(f"runs       {len(todo)} to go, about {_minutes(left.seconds)} ({rates.step_s * 1000:.3g} ms a photo)")
    return left


def _say_row(
    cell: Cell, results: dict[Cell, CellResult], ways: Sequence[Way], left_s: float, progress: Progress
) -> None:
    measured = [(way.title, results.get(Cell(way.name, cell.images, cell.seed))) for way in ways]
    texts = [f"{title} {result.accuracy:.3f}" for title, result in measured if result is not None]
    where = f"seed {cell.seed}, {in_words(cell.images)}"
    progress.say(f"measured   {where}: {', '.join(texts)}; about {_minutes(left_s)} left")


def _summary(way: Way, bench: Bench, data: str, result: CellResult) -> WaySummary:
    stages = result.stages
    text = commands(stages, bench.config, bench.name, data, way.name)
    return WaySummary(way.name, way.title, way.text, stages, text)


def _fingerprint(grid: _Grid, listing: Listing) -> dict[str, Any]:
    return {
        "version": __version__,
        "model": grid.model,
        "options": grid.config.model_dump(mode="json", exclude_unset=True),
        "training photos": draw_of(listing.train, 0.5, 0).samples,
        "validation photos": draw_of(listing.validation, 0.5, 0).samples,
    }


def _machine(config: TrainConfig) -> str:
    device = choose_compute(config.device, config.precision).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device}, {where}, torch {torch.__version__}"


def _csv_text(comparison: Comparison) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([CSV_HEAD, *comparison.rows()])
    return buffer.getvalue()


def _minutes(seconds: float) -> str:
    """Write a duration that is estimated.

    >>> _minutes(40), _minutes(400), _minutes(9000)
    ('40 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
