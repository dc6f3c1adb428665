"""The epochs of a run, from wherever it stands to its end, or to where it is stopped."""

import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from regraft.anatomy.modes import in_mode, preserved_randomness
from regraft.card import attach
from regraft.errors import DataError, Interrupted, LossError, RunError
from regraft.progress import Progress
from regraft.training.checks.targets import class_labels, ignored_label, kind_of
from regraft.training.config import TrainConfig
from regraft.training.fault_tolerance import Faults
from regraft.training.loop import score, train_epoch
from regraft.training.metrics import Metrics, measure
from regraft.training.result import EpochRecord, FitResult
from regraft.training.resume.progress import Best, Standing
from regraft.training.resume.rng import random_states, set_random_states
from regraft.training.resume.run_folder import RunFolder
from regraft.training.resume.run_state import Found, Origin, changing_tensors, put_back, take_state
from regraft.training.resume.signals import Signals, StopAsked
from regraft.training.resume.state_writer import Keeper
from regraft.training.setup import Job, make_extractor
from regraft.training.train_data import again


@dataclass
class Run:
    """A run and everything beside it.

    Attributes:
        job: What the training loop needs.
        config: The options, as they were given.
        origin: What its states belong to.
        folder: Of the results; None: nothing is written.
        standing: Where it stands.
        signals: Whether it is asked to stop.
        progress: Is told what happens.
        trust_code: Whether it was said that code of the user's own may be imported.
        kept_epoch: The epoch whose weights this process wrote into the folder; 0: none.
    """

    job: Job
    config: TrainConfig
    origin: Origin
    folder: RunFolder | None
    standing: Standing
    signals: Signals
    progress: Progress
    trust_code: bool
    kept_epoch: int = 0


def train(run: Run, found: Found | None) -> FitResult:
    """Train to the end, from the beginning or from the state that was found.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is written.
        LossError: The loss is not finite.
        RunError: Results cannot be written.
        DataError: Too many photos can no longer be read.
    """
    first, config = run.job.material, run.config
    if found is not None:
        _go_on(run, found)
    keeper = Keeper(
        run.folder.states if run.folder is not None else None,
        keep_last=config.keep_last,
        every_s=60 * config.checkpoint_minutes,
        progress=run.progress,
        found=found.path if found is not None else None,
    )
    faults = Faults.of(first, config, run.progress)
    with keeper, run.signals.patient():
        try:
            if found is None:
                _keep_state(run, keeper)
            for epoch in range(run.standing.epoch, config.epochs + 1):
                _one_epoch(run, epoch, faults, keeper)
            _settle(run)
        except KeyboardInterrupt as interruption:
            raise _interrupted(run, keeper, interruption) from interruption
        except LossError as error:
            raise LossError(f"epoch {run.standing.epoch}: {error} {_what_was_kept(run)}") from error
        except (RunError, DataError) as error:  # a disk, which may be repaired
            keeper.wait()
            if not (keeper.has_any and keeper.has_more_than_the_beginning):
                raise
            raise type(error)(f"{error} {_how_to_go_on(run)}") from error
    job, best = run.job, run.standing.best
    assert best is not None
    best.put_back(job.model)
    return FitResult(
        model=in_mode(job.model, False),
        plan=job.plan,
        config=config.updated(**run.origin.chosen),
        history=tuple(run.standing.history),
        best_epoch=best.epoch,
        validation=best.metrics,
        outputs=best.outputs,
        targets=best.targets,
        paths=best.paths,
        seconds=dict(run.standing.seconds),
        out=run.folder.path if run.folder else None,
        checkpoint=run.folder.checkpoint if run.folder else None,
        computed_once=first.frontier.summary(config.epochs) if first.frontier is not None else None,
        not_once_because=first.not_once_because,
    )


def _one_epoch(run: Run, epoch: int, faults: Faults, keeper: Keeper) -> None:
    standing, began = run.standing, time.perf_counter()
    with standing.phase("reading"):
        job = run.job = _renew(run, epoch)
    with standing.phase("training"):
        train_loss = train_epoch(
            job.live,
            _to_learn_from(run, faults, keeper),
            job.criterion,
            job.optimizer,
            job.schedule,
            job.scaler,
            job.live_engine,
            mixup=run.config.mixup,
            on_nan=run.config.on_nan,
            tally=standing.tally,
            progress=run.progress,
        )
    with standing.phase("validation"):
        outputs, targets = _comparable(job, *score(job.live, _to_measure_on(run, faults), job.live_engine))
        found = measure(outputs, targets, _class_names(job, outputs))
        _require_finite(found, job)
    lr, seconds = job.optimizer.param_groups[0]["lr"], time.perf_counter() - began
    standing.history.append(EpochRecord(epoch, train_loss, found, lr, seconds))
    is_best = found.is_better_than(standing.best.metrics if standing.best else None)
    if is_best:
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in changing_tensors(job).items()}
        standing.best = Best(epoch, found, outputs, targets, faults.readable(job.material.paths), copies)
        attach(job.model, metrics=found.to_dict())
    with standing.phase("saving"):
        if run.kept_epoch == 0:
            keeper.wait()  # there are no results without a state to go on from
        _keep_results(run, has_new_model=is_best)
    run.progress.say(_epoch_line(standing, run.config.epochs, is_best=is_best))
    standing.begin_next_epoch()
    run.signals.stop_if_asked()
    if epoch < run.config.epochs and keeper.is_due_after_epoch():
        _keep_state(run, keeper)


def _to_learn_from(run: Run, faults: Faults, keeper: Keeper) -> Iterator[Any]:
    """Yield the epoch's batches from where the run stands; between them it may be stopped, and its state is kept."""
    standing, batches = run.standing, run.job.material.train
    sampler: Any = getattr(batches, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(standing.epoch)
    if standing.states is None:
        standing.states = random_states(batches, run.job.material.validation)
    read = faults.read(batches, standing.states, done=standing.step, least=2)  # batch norm needs two
    total = len(batches) - standing.step if hasattr(batches, "__len__") else None  # pyright: ignore[reportArgumentType]
    for batch in run.progress.track(read, f"epoch {standing.epoch}/{run.config.epochs}", total):
        if batch is not None:
            yield batch
        standing.step += 1  # whose step is done when the next batch is asked for
        run.signals.stop_if_asked()
        if keeper.is_due_within_epoch():
            _keep_state(run, keeper)


def _to_measure_on(run: Run, faults: Faults) -> Iterator[Any]:
    """Yield the batches of the validation part; whoever stops here measures anew when the run goes on."""
    batches = run.job.material.validation
    states = random_states(batches)
    for batch in faults.read(batches, states):
        if run.signals.received is not None:
            set_random_states(states)
            run.signals.stop_if_asked()
        if batch is not None:
            yield batch


def _renew(run: Run, epoch: int) -> Job:
    """Make layers trainable where it is time, and split the network anew where that, or a frozen weight, changed."""
    job, thawed = run.job, None
    if job.unfreezing is not None:
        thawed = job.unfreezing.advance(epoch, job.model, job.optimizer, scheduler=job.schedule, **job.rates)
    if thawed is not None:
        run.progress.say(f"unfreezing {thawed}")
    if job.material.frontier is None:
        return job
    if thawed is None and not job.material.frontier.is_valid():
        run.progress.say("frontier   frozen weights were changed from outside: what they give is computed anew")
    elif thawed is None:
        return job
    return _split_anew(run)


def _split_anew(run: Run) -> Job:
    job = run.job
    with preserved_randomness():  # what is found in a cache draws nothing
        extractor, _ = make_extractor(job.model, job.material.photos, run.config, job.engine, run.progress)
        material = again(job.material, run.config, extractor)
    live = material.frontier.parts.suffix if material.frontier is not None else job.model
    return replace(job, material=material, live=live)


def _go_on(run: Run, found: Found) -> None:
    """Put the run where a state says that it stood."""
    prepared = run.standing.seconds
    run.standing, has_thawed = put_back(found, run.job)
    for phase, seconds in prepared.items():
        run.standing.seconds[phase] = run.standing.seconds.get(phase, 0.0) + seconds
    if has_thawed and run.job.material.frontier is not None:
        run.job = _split_anew(run)
    if run.folder is not None:
        run.folder.has_stale_results = found.tree["has_stale_results"]
    standing = run.standing
    where = f"step {standing.step} of epoch {standing.epoch}" if standing.step else f"epoch {standing.epoch - 1}"
    run.progress.say(f"continued  after {where}, from '{found.path}'")
    if found.origin.device != run.origin.device:
        run.progress.say(f"           on {run.origin.device} instead of {found.origin.device}: rounding will differ")
    found.tree.clear()  # whose tensors are the optimizer's now


def _keep_state(run: Run, keeper: Keeper) -> None:
    folder = run.folder

    def take() -> Any:
        is_stale = folder is not None and folder.has_stale_results
        return take_state(run.job, run.standing, run.origin, has_stale_results=is_stale)

    with run.standing.phase("saving"):
        keeper.keep(take, run.standing.epoch, run.standing.step)


def _keep_results(run: Run, *, has_new_model: bool) -> None:
    if run.folder is None:
        return
    if has_new_model:
        run.folder.keep_model(run.job.model, run.config)
    run.folder.keep_history(run.standing.history)
    if has_new_model and run.standing.best is not None:
        run.kept_epoch = run.standing.best.epoch


def _settle(run: Run) -> None:
    """Give the model the best weights, and write them where what is in the folder may be older or newer."""
    best = run.standing.best
    if best is None:
        return
    best.put_back(run.job.model)
    if run.folder is not None and run.kept_epoch != best.epoch:
        _keep_results(run, has_new_model=True)


def _interrupted(run: Run, keeper: Keeper, interruption: KeyboardInterrupt) -> Interrupted:
    """Keep what was reached, and return the error that says so."""
    if isinstance(interruption, StopAsked):
        _keep_state(run, keeper)
    problem = keeper.wait()
    said = _what_was_kept(run)
    if problem:
        said += f" The state of the run could not be written: {problem}"
    if keeper.has_any:
        said = f"{said if run.standing.best else 'No epoch was complete.'} {_how_to_go_on(run)}"
    return run.signals.interrupted(said)


def _how_to_go_on(run: Run) -> str:
    assert run.folder is not None
    if run.origin.is_named:
        trust = " --trust-code" if run.trust_code else ""
        return f"To continue: regraft train --resume {shlex.quote(str(run.folder.path))}{trust}"
    return "To continue: the same call of fit with resume=True"


def _what_was_kept(run: Run) -> str:
    best = run.standing.best
    if best is None:
        return "Nothing was written: no epoch was complete."
    _settle(run)
    where = f"in '{run.folder.checkpoint}'" if run.folder else "in the model"
    return f"The best so far (epoch {best.epoch}, {best.metrics.headline()}) is kept {where}."


def _class_names(job: Job, outputs: torch.Tensor) -> tuple[str, ...] | None:
    if job.material.task == "regression":
        return None
    return job.material.classes or tuple(map(str, range(outputs.shape[1])))


def _comparable(job: Job, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the metrics compare: scores and classes without those that the loss ignores, or numbers.

    Raises:
        DataError: A label is none of the classes.
    """
    if job.material.task == "regression":
        return (outputs.sigmoid() if kind_of(job.criterion) == "logits" else outputs), targets
    ignored = ignored_label(job.criterion)
    labels = class_labels(outputs, targets, ignored=ignored)
    if ignored is None or not bool((labels == ignored).any()):
        return outputs, labels
    return outputs[labels != ignored], labels[labels != ignored]


def _epoch_line(standing: Standing, epochs: int, *, is_best: bool) -> str:
    record, skipped = standing.history[-1], standing.tally.skipped
    return (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  loss {record.train_loss:.4f}  "
        f"validation loss {record.validation.loss:.4f}  {record.validation.headline()}  {record.seconds:.1f} s"
        + (f"  {skipped} steps without a finite loss left out" if skipped else "")
        + ("  best" if is_best else "")
    )


def _require_finite(found: Metrics, job: Job) -> None:
    if not math.isfinite(found.loss):
        raise LossError(
            f"the validation loss is {found.loss} (learning rate {job.plan.lr:.3g}). Try a tenth of the learning rate, "
            "--precision fp32, or look for extreme values in the data."
        )
