"""The epochs of a run, from its beginning or a saved state, to its end or an interruption."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from regraft.anatomy.modes import in_mode, preserved_randomness
from regraft.card import attach
from regraft.data.items import length_of
from regraft.errors import DataError, Interrupted, LossError, RunError
from regraft.progress import Progress
from regraft.training.config import TrainConfig
from regraft.training.doubt.at_the_end import add_doubt
from regraft.training.doubt.calibration import Calibration
from regraft.training.fault_tolerance import FaultTolerantReader
from regraft.training.features.batches import PickedBatches
from regraft.training.loop import score, train_epoch
from regraft.training.ranks.group import NO_ROWS
from regraft.training.result import EpochRecord, FitResult
from regraft.training.resume.rng import random_states, set_random_states
from regraft.training.resume.run_folder import RunFolder
from regraft.training.resume.run_state import Best, RunState
from regraft.training.resume.saved_run import RunFingerprint, SavedRun, changing_tensors, restore_state, take_state
from regraft.training.resume.signals import Signals, StopRequested
from regraft.training.resume.state_writer import StateWriter
from regraft.training.run_lines import say_epoch
from regraft.training.setup import TrainSetup, make_extractor
from regraft.training.train_data import TrainData, with_features
from regraft.training.validation import measure_validation
from regraft.wording import for_caller


@dataclass
class Run:
    """A run with its options, progress and outputs.

    Attributes:
        setup: Everything that the training loop needs.
        config: The options, as the user passed them.
        fingerprint: Identifies the run in its saved states.
        folder: Folder of the results; None writes nothing.
        run_state: The progress so far.
        signals: Signals that request a stop.
        progress: Reports progress.
        trust_code: Whether custom code may be imported.
        kept_epoch: The epoch whose weights this process wrote into the folder; 0 before the first.
        calibration: That of the best epoch, at the end of a run.
    """

    setup: TrainSetup
    config: TrainConfig
    fingerprint: RunFingerprint
    folder: RunFolder | None
    run_state: RunState
    signals: Signals
    progress: Progress
    trust_code: bool
    kept_epoch: int = 0
    calibration: Calibration | None = None


def train(run: Run, saved_run: SavedRun | None) -> FitResult:
    """Train to the end, from the beginning or from a saved state.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
        LossError: The loss is not finite.
        RunError: Results cannot be written.
        DataError: Too many photos became unreadable.
    """
    first_data, config = run.setup.train_data, run.config
    if saved_run is not None:
        _restore(run, saved_run)
    state_writer = StateWriter(
        run.folder.states if run.folder is not None else None,
        keep_last=config.keep_last,
        every_s=60 * config.checkpoint_minutes,
        progress=run.progress,
        resumed_from=saved_run.path if saved_run is not None else None,
    )
    reader = FaultTolerantReader.of(first_data, config, run.progress)
    with state_writer, run.signals.deferred():
        try:
            if saved_run is None:
                _save_state(run, state_writer)
            for epoch in range(run.run_state.epoch, config.epochs + 1):
                _run_epoch(run, epoch, reader, state_writer)
            _finish(run)
        except KeyboardInterrupt as interruption:
            stopped: BaseException = _interrupted(run, state_writer, interruption)
            _attach_result(run, first_data, state_writer, stopped)
            raise stopped from interruption
        except LossError as error:
            stopped = LossError(f"epoch {run.run_state.epoch}: {error} {_describe_best(run)}")
            _attach_result(run, first_data, state_writer, stopped)
            raise stopped from error
        except (RunError, DataError) as error:  # a full disk or unreadable photos: the user can repair them and resume
            state_writer.wait()
            hint = f" {_resume_hint(run)}" if _can_continue(state_writer) else ""
            stopped = type(error)(f"{error}{hint}")
            stopped.is_told = error.is_told
            _attach_result(run, first_data, state_writer, stopped)
            raise stopped from error
        except Exception as error:  # of the caller's loss or dataset, or of torch: raised as it is
            state_writer.wait()
            with contextlib.suppress(Exception):  # after an error of a GPU, nothing can be copied to it
                if run.run_state.best is not None:
                    error.add_note(_describe_best(run))
                _attach_result(run, first_data, state_writer, error)
            if _can_continue(state_writer):
                error.add_note(_resume_hint(run))
            raise
    return _result(run, first_data)


def _result(
    run: Run, first_data: TrainData, *, stopped_by: str | None = None, to_continue: str | None = None
) -> FitResult:
    """Return the result of the best epoch, whose weights are loaded into the model."""
    setup, config, best = run.setup, run.config, run.run_state.best
    assert best is not None
    best.load_into(setup.model)
    return FitResult(
        model=in_mode(setup.model, False),
        plan=setup.plan,
        config=config.updated(**run.fingerprint.chosen),
        history=tuple(run.run_state.history),
        best_epoch=best.epoch,
        validation=best.metrics,
        outputs=best.outputs,
        targets=best.targets,
        paths=best.paths,
        seconds=run.run_state.all_seconds(),
        out=run.folder.path if run.folder else None,
        checkpoint=run.folder.checkpoint if run.folder else None,
        computed_once=first_data.frontier.summary(config.epochs) if first_data.frontier is not None else None,
        cache_disabled_reason=first_data.cache_disabled_reason,
        is_named=run.fingerprint.is_named,
        calibration=run.calibration,
        stopped_by=stopped_by,
        to_continue=to_continue,
    )


def _run_epoch(run: Run, epoch: int, reader: FaultTolerantReader, state_writer: StateWriter) -> None:
    run_state, began = run.run_state, time.perf_counter()
    with run_state.phase("reading"):
        setup = run.setup = _refresh_setup(run, epoch)
    run.signals.agreed = (ranks := setup.live_compute.ranks).agree_on(lambda: run.signals.noted)
    with run_state.phase("training"):
        train_loss = (
            setup.solved.loss
            if setup.solved is not None
            else train_epoch(
                setup.live,
                _train_batches(run, reader, state_writer),
                setup.criterion,
                setup.optimizer,
                setup.schedule,
                setup.scaler,
                setup.live_compute,
                mixup=run.config.mixup,
                on_nan=run.config.on_nan,
                tally=run_state.tally,
                progress=run.progress,
            )
        )
    with run_state.phase("validation"):
        scores = score(setup.live, _validation_batches(run, reader), setup.live_compute)
        reader.merge(ranks)
        outputs, targets, metrics = measure_validation(setup, *scores)
    lr, seconds = setup.optimizer.param_groups[0]["lr"], time.perf_counter() - began
    run_state.history.append(EpochRecord(epoch, train_loss, metrics, lr, seconds))
    is_best = metrics.is_better_than(run_state.best.metrics if run_state.best else None)
    if is_best:
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in changing_tensors(setup).items()}
        run_state.best = Best(epoch, metrics, outputs, targets, reader.readable(setup.train_data.paths), copies)
        attach(setup.model, metrics=metrics.to_dict())
    with run_state.phase("saving"):
        if run.kept_epoch == 0:
            state_writer.wait()  # the first results need a state beside them, or a run killed now could not be resumed
        _save_results(run, has_new_model=is_best)
    assert run_state.best is not None
    best, skipped = run_state.best.epoch, run_state.tally.skipped
    say_epoch(run_state.history[-1], best, run.config.epochs, skipped, run.progress)
    run_state.begin_next_epoch()
    run.signals.stop_if_requested()
    if epoch < run.config.epochs and state_writer.is_due_after_epoch():
        _save_state(run, state_writer)


def _train_batches(run: Run, reader: FaultTolerantReader, state_writer: StateWriter) -> Iterator[Any]:
    """Yield the remaining batches of the epoch; between steps, save states and stop if requested."""
    run_state, batches, ranks = run.run_state, run.setup.train_data.train, run.setup.live_compute.ranks
    if ranks.size > 1 and isinstance(batches, PickedBatches) and not run.config.mixup:
        batches = batches.shared(ranks)
    sampler: Any = getattr(batches, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(run_state.epoch)
    if run_state.states is None:
        run_state.states = random_states(batches, run.setup.train_data.validation)
        if ranks.size > 1:  # all ranks draw the same order, and the same mixup
            run_state.states = ranks.from_first(lambda: run_state.states)
            set_random_states(run_state.states, batches, run.setup.train_data.validation)
    read = reader.read(batches, run_state.states, done=run_state.step, min_photos=2)  # batch norm needs two
    count = length_of(batches)
    total = count - run_state.step if count is not None else None
    for batch in run.progress.track(read, _step_name(run), total):
        if batch is not None or ranks.size > 1:
            yield batch if batch is not None else NO_ROWS
        run_state.step += 1  # the step of a batch is complete when the next batch is requested
        run.signals.stop_if_requested()
        if state_writer.is_due_within_epoch():
            _save_state(run, state_writer)


def _validation_batches(run: Run, reader: FaultTolerantReader) -> Iterator[Any]:
    """Yield the validation batches; a run that is stopped here repeats the validation when it is resumed."""
    batches, ranks = run.setup.train_data.validation, run.setup.live_compute.ranks
    if ranks.size > 1 and isinstance(batches, PickedBatches):
        batches = batches.shared(ranks)
    states = random_states(batches)
    for batch in run.progress.track(reader.read(batches, states), f"checking {_step_name(run)}", length_of(batches)):
        if run.signals.received is not None:
            set_random_states(states)
            run.signals.stop_if_requested()
        if batch is not None or ranks.size > 1:
            yield batch if batch is not None else NO_ROWS


def _refresh_setup(run: Run, epoch: int) -> TrainSetup:
    """Unfreeze layers that are due, and split the network anew if flags or frozen weights have changed."""
    setup, thawed = run.setup, None
    if setup.unfreezing is not None:
        thawed = setup.unfreezing.advance(epoch, setup.model, setup.optimizer, scheduler=setup.schedule, **setup.rates)
    if thawed is not None:
        run.progress.say(f"unfreezing {thawed}")
    if setup.train_data.frontier is None:
        return setup
    if thawed is None and not setup.train_data.frontier.is_valid():
        run.progress.say("frontier   frozen weights were changed from outside: what they give is computed anew")
    elif thawed is None:
        return setup
    return _repartition(run)


def _repartition(run: Run) -> TrainSetup:
    setup = run.setup
    with preserved_randomness():  # so that a cache hit and a computation leave the same random state
        extractor, _ = make_extractor(setup.facts, setup.train_data.photos, run.config, setup.compute, run.progress)
        train_data = with_features(
            setup.train_data, run.config, setup.compute.device, run.progress, setup.compute.ranks, extractor
        )
    live = train_data.frontier.parts.suffix if train_data.frontier is not None else setup.model
    return replace(setup, train_data=train_data, live=live)


def _restore(run: Run, saved_run: SavedRun) -> None:
    """Restore the run from a saved state."""
    prepared = run.run_state
    run.run_state, has_thawed = restore_state(saved_run, run.setup)
    run.run_state.add_preparation(prepared)
    if has_thawed and run.setup.train_data.frontier is not None:
        run.setup = _repartition(run)
    if run.folder is not None:
        run.folder.has_stale_results = saved_run.tree["has_stale_results"]
    run_state = run.run_state
    where = f"step {run_state.step} of epoch {run_state.epoch}" if run_state.step else f"epoch {run_state.epoch - 1}"
    run.progress.say(f"continued  after {where}, from '{saved_run.path}'")
    if saved_run.fingerprint.device != run.fingerprint.device:
        run.progress.say(
            f"           on {run.fingerprint.device} instead of {saved_run.fingerprint.device}: rounding will differ"
        )
    saved_run.tree.clear()  # the optimizer has taken over its tensors; free the rest


def _save_state(run: Run, state_writer: StateWriter) -> None:
    folder = run.folder

    def take() -> Any:
        is_stale = folder is not None and folder.has_stale_results
        return take_state(run.setup, run.run_state, run.fingerprint, has_stale_results=is_stale)

    with run.run_state.phase("saving"):
        state_writer.keep(take, run.run_state.epoch, run.run_state.step)


def _save_results(run: Run, *, has_new_model: bool) -> None:
    if run.folder is None:
        return
    if has_new_model:
        run.folder.save_model(run.setup.model, run.config)
    run.folder.save_history(run.run_state.history)
    if has_new_model and run.run_state.best is not None:
        run.kept_epoch = run.run_state.best.epoch


def _load_best(run: Run) -> None:
    """Load the best weights into the model, and save them unless this process has already done so."""
    best = run.run_state.best
    if best is None:
        return
    best.load_into(run.setup.model)
    if run.folder is not None and run.kept_epoch != best.epoch:
        _save_results(run, has_new_model=True)


def _finish(run: Run) -> None:
    """Load the best weights, add to the card how far they may be trusted, and write both."""
    best = run.run_state.best
    _load_best(run)
    if best is None or not run.setup.compute.ranks.is_first:
        return
    with run.run_state.phase("validation"):
        run.calibration = add_doubt(run.setup, best)
    with run.run_state.phase("saving"):
        if run.folder is not None:
            run.folder.save_model(run.setup.model, run.config)
    if run.calibration is not None:
        run.progress.detail(f"confidence {run.calibration}")


def _interrupted(run: Run, state_writer: StateWriter, interruption: KeyboardInterrupt) -> Interrupted:
    """Save the state, and return the error that says how to resume."""
    if isinstance(interruption, StopRequested):
        _save_state(run, state_writer)
    problem = state_writer.wait()
    message = _describe_best(run)
    if problem:
        message += f" The state of the run could not be written: {problem}"
    if state_writer.has_any:
        message = f"{message if run.run_state.best else 'No epoch was complete.'} {_resume_hint(run)}"
    return run.signals.interrupted(message)


def _attach_result(run: Run, first_data: TrainData, state_writer: StateWriter, error: BaseException) -> None:
    """Let the error carry the result of the best epoch so far, from which a report can be written."""
    if run.run_state.best is None:
        return
    is_signal = isinstance(error, Interrupted)
    reason = run.signals.name if is_signal else f"{type(error).__name__}: {error}".partition("\n")[0]
    is_repeatable = isinstance(error, LossError)  # the same steps give the same loss
    to_continue = _resume_command(run) if _can_continue(state_writer) and not is_repeatable else None
    setattr(error, "result", _result(run, first_data, stopped_by=reason, to_continue=to_continue))  # noqa: B010


def _can_continue(state_writer: StateWriter) -> bool:
    return state_writer.has_any and state_writer.has_progress


def _resume_hint(run: Run) -> str:
    # On the screen alone: no file keeps the leave to import code.
    trust = for_caller(python="", command=" --trust-code") if run.trust_code else ""
    command = f"{_resume_command(run)}{trust}"
    return f"To continue: {for_caller(python='the same call of fit with resume=True', command=command)}"


def _resume_command(run: Run) -> str:
    assert run.folder is not None
    folder = str(run.folder.path)
    return for_caller(
        python=f"regraft.fit(…, out={folder!r}, resume=True)",
        command=f"regraft train --resume {shlex.quote(folder)}",
    )


def _describe_best(run: Run) -> str:
    best = run.run_state.best
    if best is None:
        return "Nothing was written: no epoch was complete."
    _load_best(run)
    where = f"in '{run.folder.checkpoint}'" if run.folder else "in the model"
    return f"The best so far (epoch {best.epoch}, {best.metrics.headline()}) is kept {where}."


def _step_name(run: Run) -> str:
    """Name the current epoch on a progress bar, with the best result so far."""
    best = run.run_state.best
    so_far = f", {best.metrics.accuracy:.1%} so far" if best is not None and best.metrics.accuracy is not None else ""
    return f"epoch {run.run_state.epoch}/{run.config.epochs}{so_far}"
