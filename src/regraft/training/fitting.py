"""`fit`: train a model on photos, datasets or loaders, and keep the best weights."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.modes import preserved_randomness
from regraft.arguments import check_arguments, check_path, check_weights
from regraft.console import progress_of
from regraft.data.samples import Listing
from regraft.errors import ConfigError, ModelError
from regraft.freezing.schedule import Schedule
from regraft.progress import SILENT, Progress
from regraft.torch_internals import defer_compiler
from regraft.training.checks.leaks import say_leaks
from regraft.training.checks.weight_types import compute_for, require_trainable_types
from regraft.training.config import TrainConfig
from regraft.training.epochs import Run, train
from regraft.training.ranks.group import SINGLE, Ranks
from regraft.training.ranks.launch import joined_ranks, require_same_listing
from regraft.training.result import FitResult
from regraft.training.resume.run_folder import RunFolder
from regraft.training.resume.run_state import RunState
from regraft.training.resume.saved_run import RunFingerprint, check_state, find_run
from regraft.training.resume.signals import Signals
from regraft.training.run_lines import say_data, say_model, say_setup
from regraft.training.setup import (
    TrainSetup,
    check_options,
    make_extractor,
    prepare_model,
    prepare_setup,
    unchanged_on_failure,
)
from regraft.training.steps.compute import ComputeContext, channels_last, choose_compute
from regraft.training.train_data import TrainData, list_if_known, load_train_data
from regraft.wording import for_caller
from regraft.zoo import needs_download


def fit(
    model: nn.Module | str,
    data: Any,
    *,
    config: TrainConfig | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_code: bool = False,
    progress: Progress | bool = True,
    **options: Any,
) -> FitResult:
    """Train `model` on `data`, and keep the weights of the best epoch on the validation part.

    Parameters with `requires_grad=False` stay bit-identical. The random state of the process is restored afterwards.
    On a CPU, the same seed gives the same weights, bit for bit.

    With a folder `out`, the state of the run is saved in `out/last/` until the run has ended: at its beginning, after
    epochs, every `checkpoint_minutes`, and on SIGINT or SIGTERM, which stop the run after the current step. The same
    call with `resume=True` then resumes from the last state, with the same weights as without the interruption, bit for
    bit on the same machine.

    Args:
        model: A name (see `create_model`), which gets a head for the data's classes, and whose other layers are frozen
            if it is pretrained; a checkpoint, which keeps its frozen layers, and its head if that fits the classes; or
            a module, which is trained in place with its own flags.
        data: A folder, shards or a `.csv` table (see `list_data`); datasets of Hugging Face with photos and classes; or
            a pair (train, validation) of Datasets or DataLoaders that yield (inputs, targets): inputs (N, …), targets
            (N,) of int64 classes, or of floats for regression. Datasets, streams of webdataset and litdata among
            them, may also yield photos with classes (see `ItemCollate`).
        config: All options as one value.
        loss: A function or module of (outputs (N, K), targets (N,)) that returns one number, or a name (see
            `TrainConfig.loss`).
        overwrite: Whether results in the folder `out` may be replaced.
        resume: Whether to resume the run that stopped in the folder `out`; without one, a new run starts.
        trust_code: Whether custom code for a class or a loss (`py:…`) may be imported.
        progress: Whether progress is shown. True: bars and a line an epoch, on standard error of a terminal and below
            the cell of a notebook; elsewhere (a pipe, the log of a job) the lines alone. False: nothing. A `Progress`
            of your own gets both instead.
        **options: Fields of `TrainConfig`, which take precedence over `config`.

    Raises:
        InputError: An argument or the data is invalid (its kinds are in `regraft.errors`). Nothing was written.
        LossError: The loss is not a single finite number; the best weights so far are kept, if any.
        Interrupted: Ctrl-C or SIGTERM; the best weights so far are kept, if any.
        RankError: Started by `torchrun` or `accelerate launch`, another of the processes has ended.

    Whatever stops a run after its first epoch carries the result so far: `write_report(error.result, path)`.
    """
    model = str(model) if isinstance(model, Path) else model
    check_arguments(fit, locals())
    listener, run_state = progress_of(progress), RunState()
    if isinstance(data, (str, Path)):
        check_path(fit, "data", data)
    if isinstance(loss, type):
        raise ConfigError(f"loss is the class {loss.__name__}, expected a function. Make one: {loss.__name__}().")
    for name, module in (("model", model), ("loss", loss)):
        if isinstance(module, nn.Module):
            check_weights(fit, name, module)
    if isinstance(loss, str):
        options["loss"] = loss
    config = (config or TrainConfig()).updated(
        **{**options, "model": model} if isinstance(model, str) else options,
        **({"data": str(data)} if isinstance(data, (str, Path)) else {}),
    )
    if config.unfreeze is not None:
        config = config.updated(epochs=Schedule.parse(config.unfreeze).epochs)
    if resume and config.out is None:
        raise ConfigError("resume needs the folder of the run. Pass out=….")
    job = _Job(model, data, loss, config, overwrite, resume, trust_code)
    with (
        defer_compiler(),
        joined_ranks(config.device, listener) as ranks,
        preserved_randomness(config.seed),
        Signals() as signals,
    ):
        return _fit(job, run_state, signals, ranks, listener if ranks.is_first else SILENT)


@dataclass(frozen=True)
class _Job:
    """What `fit` was given, checked as far as it can be without the data."""

    model: nn.Module | str
    data: Any
    loss: Any
    config: TrainConfig
    overwrite: bool
    resume: bool
    trust_code: bool


def _fit(job: _Job, run_state: RunState, signals: Signals, ranks: Ranks, listener: Progress) -> FitResult:
    """Prepare the run and train; of several ranks, the first alone reads states, writes and reports."""
    model, data, loss, config, trust_code = job.model, job.data, job.loss, job.config, job.trust_code
    out = Path(config.out) if config.out is not None else None
    saved_run = ranks.from_first(lambda: find_run(out, listener)) if job.resume and out is not None else None
    resolved = saved_run.with_resolved_options(config) if saved_run is not None else config
    folder = None
    if out is not None and ranks.is_first:
        folder = RunFolder(out, overwrite=job.overwrite, continues=saved_run is not None)
    is_named = isinstance(model, str) and isinstance(data, (str, Path)) and not callable(loss)
    with run_state.phase("reading"), listener.status("looking for photos"):
        listing = list_if_known(data, config)
    if listing is not None:
        require_same_listing(listing, ranks)
        say_data(listing, listener)
    check_options(config, listing.task if listing and loss is None else None, trust_code=trust_code)
    current = choose_compute(ranks.device or config.device, config.precision).current()
    with current, folder.locked() if folder is not None else nullcontext():
        with unchanged_on_failure(model):
            setup = _prepare(model, data, listing, loss, resolved, run_state, listener, ranks, trust_code=trust_code)
            with run_state.phase("setup"):
                fingerprint = RunFingerprint.of(setup, config, is_named=is_named)
            if saved_run is not None:
                check_state(saved_run, setup, fingerprint)
        if folder is not None and (warning := folder.prepare_recipe(setup.model)) is not None:
            warnings.warn(warning, stacklevel=3)
        say_setup(setup, config, listener)
        if setup.solved is not None:
            config = config.updated(epochs=1)
        run = Run(setup, config, fingerprint, folder, run_state, signals, listener, trust_code)
        with channels_last(setup.model) if setup.compute.has_channels_last else nullcontext():
            return train(run, saved_run)


def _prepare(
    model: nn.Module | str,
    data: Any,
    listing: Listing | None,
    loss: Any,
    config: TrainConfig,
    run_state: RunState,
    progress: Progress,
    ranks: Ranks,
    *,
    trust_code: bool,
) -> TrainSetup:
    """Build the network, read the data, and prepare everything that the training loop needs."""
    with run_state.phase("model"):
        facts, compute = _build(model, listing, config, progress, ranks, trust_code=trust_code)
    with run_state.phase("reading"):
        train_data = _read(facts, data, listing, config, compute, progress)
        if train_data.frontier is not None and train_data.photos is not None and ranks.is_first:
            say_leaks(train_data.photos, train_data.frontier, progress)
    if train_data.frontier is not None:  # computed while the photos are read, batch by batch
        run_state.move_seconds("reading", "features", train_data.frontier.seconds)
    own_loss: Any = loss if callable(loss) else None
    name = model if isinstance(model, str) else None
    with run_state.phase("setup"), progress.status("preparing the training"):
        return prepare_setup(facts, name, train_data, config, compute, own_loss, progress, trust_code=trust_code)


def _build(
    model: nn.Module | str,
    listing: Listing | None,
    config: TrainConfig,
    progress: Progress,
    ranks: Ranks = SINGLE,
    *,
    trust_code: bool,
) -> tuple[ModelFacts, ComputeContext]:
    """Build the network, freeze what the options say, move it to its device, and say what will be trained."""
    name = model if isinstance(model, str) else None
    step = progress.status(f"preparing {name or 'the network'}")
    is_downloaded = name is not None and any(ranks.objects(_needs_download(name, config, progress)))
    if is_downloaded:
        progress.say(f"weights    downloading those of {name}")
        step = nullcontext()  # the download draws a bar of its own, which a spinner would hide
    with step, ranks.first_alone() if is_downloaded else nullcontext():
        facts = prepare_model(model, listing, config, progress, trust_code=trust_code)
        built = facts.model
        require_trainable_types(built, thaws_all=config.unfreeze is not None)
        compute = compute_for(built, ranks.device or config.device, config.precision)
        compute = replace(compute, has_channels_last=config.fast, ranks=ranks)
        built.to(compute.device)
    ranks.broadcast([*built.parameters(), *built.buffers()])  # a caller's networks may have drawn weights of their own
    say_model(facts, name, config, compute, progress)
    return facts, compute


def preview(config: TrainConfig, progress: Progress, *, trust_code: bool = False) -> None:
    """Report what a run with these options would train. Nothing is trained or written, and no photo is read.

    Raises:
        InputError: As from `fit`.
    """
    with defer_compiler(), preserved_randomness(config.seed):
        listing = list_if_known(config.data, config)
        check_options(config, listing.task if listing else None, trust_code=trust_code)
        if listing is not None:
            say_data(listing, progress)
        _build(config.model, listing, config, progress, trust_code=trust_code)


def _needs_download(name: str, config: TrainConfig, progress: Progress) -> bool:
    with progress.status(f"preparing {name}"):  # imports a library of networks
        return needs_download(name, config.weights)


def _read(
    facts: ModelFacts,
    data: Any,
    listing: Listing | None,
    config: TrainConfig,
    compute: ComputeContext,
    progress: Progress,
) -> TrainData:
    """Read the data, and compute the constant part once where that is possible."""
    with progress.status("looking for what can be computed once"):
        extractor, reason = make_extractor(facts, data if listing is None else None, config, compute, progress)
    try:
        train_data = load_train_data(
            data, listing, facts.preprocessing, config, compute.device, progress, compute.ranks, extractor
        )
    except ModelError as error:  # only the extractor runs the model here, so training without it is still possible
        if compute.ranks.size > 1:  # the other ranks may have succeeded, and wait for this one
            raise ModelError(
                f"the frozen layers cannot be computed once: {error}. Pass "
                f"{for_caller(python='cache=False', command='--no-cache')}, with which every epoch runs all layers."
            ) from error
        extractor, reason = None, str(error)
        train_data = load_train_data(
            data, listing, facts.preprocessing, config, compute.device, progress, compute.ranks
        )
    if extractor is not None or reason is None:
        return train_data
    progress.detail(f"caching    disabled, every epoch runs the full network: {reason}")
    return replace(train_data, cache_disabled_reason=reason)
