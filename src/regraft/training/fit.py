"""`fit`: train a model on photos, datasets or loaders, and keep the best of it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # all of the compiler, which optimizers import at their first use: here, as an import
from torch import nn

from regraft.anatomy.modes import preserved_randomness
from regraft.card import attach
from regraft.data.folders import Listing
from regraft.errors import Interrupted, LossError, ModelError
from regraft.freezing.schedule import Schedule
from regraft.progress import SILENT, Progress
from regraft.training.config import TrainConfig
from regraft.training.loop import Engine, channels_last, choose_engine, score, train_epoch
from regraft.training.material import Material, again, list_if_folder, read_material
from regraft.training.metrics import Metrics, measure
from regraft.training.prepare import (
    Job,
    check_options,
    make_extractor,
    prepare_job,
    prepare_model,
    unchanged_on_failure,
)
from regraft.training.result import EpochRecord, FitResult
from regraft.training.run_folder import RunFolder
from regraft.zoo import preprocessing_of


def fit(
    model: nn.Module | str,
    data: Any,
    *,
    config: TrainConfig | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | str | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> FitResult:
    """Train `model` on `data`, and keep the weights of the epoch that did best on the validation part.

    What has `requires_grad=False` stays bit-identical. The random state of the process is as before afterwards, and
    the same seed gives the same weights, bit for bit, on a CPU.

    Args:
        model: A name (see `create_model`), which gets a head for the data's classes and is frozen but for it where it
            is pretrained; or a module, which is trained in place as its flags stand.
        data: A folder or a `.csv` table (see `list_data`), or a pair (train, validation) of Datasets or DataLoaders
            that yield (inputs, targets): inputs (N, …), targets (N,) of int64 classes, or of floats for regression.
        config: All options as one value.
        loss: A function or module of (outputs (N, K), targets (N,)) that returns one number, or a name (see
            `TrainConfig.loss`).
        overwrite: Whether results in the folder `out` may be replaced.
        trust_code: Whether a class or a loss of your own (`py:…`) may be imported.
        progress: Is told what happens; silent by default.
        **options: Fields of `TrainConfig`, which win over `config`.

    Raises:
        InputError: Something that was given is wrong (its kinds are in `regraft.errors`). Nothing was written.
        LossError: The loss is no single finite number; the best weights so far are kept where there are any.
        Interrupted: Ctrl-C; the best weights so far are kept where there are any.
    """
    if isinstance(loss, str):
        options["loss"] = loss
    config = (config or TrainConfig()).updated(
        **{**options, "model": model} if isinstance(model, str) else options,
        **({"data": str(data)} if isinstance(data, (str, Path)) else {}),
    )
    if config.unfreeze is not None:
        config = config.updated(epochs=Schedule.parse(config.unfreeze).epochs)
    folder = RunFolder(Path(config.out), overwrite=overwrite) if config.out is not None else None
    clock = _Clock()
    with preserved_randomness(config.seed):
        listing = list_if_folder(data, config)
        check_options(config, listing.task if listing and loss is None else None, trust_code=trust_code)
        with unchanged_on_failure(model):
            with clock.phase("model"):
                built = prepare_model(model, listing, config, trust_code=trust_code)
                engine = replace(choose_engine(config.device, config.precision), has_channels_last=config.fast)
                built.to(engine.device)
            with clock.phase("reading"):
                material = _read(built, data, listing, config, engine, progress)
            own_loss = loss if callable(loss) else None
            name = model if isinstance(model, str) else None
            job = prepare_job(built, name, material, config, engine, own_loss, trust_code=trust_code)
        for line in [*job.plan.lines(config), *(material.frontier.lines() if material.frontier else ())]:
            progress.say(line)
        if job.sweep is not None:
            progress.say(f"chosen     {job.sweep}")
        with channels_last(job.model) if engine.has_channels_last else nullcontext():
            return _train(job, config, folder, clock, progress)


def _read(
    model: nn.Module, data: Any, listing: Listing | None, config: TrainConfig, engine: Engine, progress: Progress
) -> Material:
    """Read the data, and compute what is constant once where that can be done."""
    extractor, reason = make_extractor(model, data, config, engine, progress)
    preprocessing = preprocessing_of(model)
    try:
        material = read_material(data, listing, preprocessing, config, progress, extractor)
    except ModelError as error:  # of the extractor alone: nothing else runs the model here
        extractor, reason = None, str(error)
        material = read_material(data, listing, preprocessing, config, progress)
    if extractor is not None or reason is None:
        return material
    progress.say(f"frontier   every epoch runs the whole network: {reason}")
    return replace(material, not_once_because=reason)


def _renew(job: Job, config: TrainConfig, epoch: int, progress: Progress) -> Job:
    """Make layers trainable where it is time, and split the network anew where that, or a frozen weight, changed."""
    thawed = None
    if job.unfreezing is not None:
        thawed = job.unfreezing.advance(epoch, job.model, job.optimizer, scheduler=job.schedule, **job.rates)
    if thawed is not None:
        progress.say(f"unfreezing {thawed}")
    if job.material.frontier is None:
        return job
    if not job.material.frontier.is_valid():
        progress.say("frontier   frozen weights were changed from outside: what they give is computed anew")
    elif thawed is None:
        return job
    extractor, _ = make_extractor(job.model, job.material.photos, config, job.engine, progress)
    material = again(job.material, config, extractor)
    live = material.frontier.parts.suffix if material.frontier is not None else job.model
    return replace(job, material=material, live=live)


def _train(job: Job, config: TrainConfig, folder: RunFolder | None, clock: "_Clock", progress: Progress) -> FitResult:
    best: _Best | None = None
    history: list[EpochRecord] = []
    first = job.material
    scaler = job.engine.scaler()
    try:
        for epoch in range(1, config.epochs + 1):
            began = time.perf_counter()
            with clock.phase("reading"):
                job = _renew(job, config, epoch, progress)
            sampler: Any = getattr(job.material.train, "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            batches = progress.track(job.material.train, f"epoch {epoch}/{config.epochs}", _length(job.material.train))
            with clock.phase("training"):
                train_loss = train_epoch(
                    job.live,
                    batches,
                    job.criterion,
                    job.optimizer,
                    job.schedule,
                    scaler,
                    job.engine,
                    mixup=config.mixup,
                )
            with clock.phase("validation"):
                outputs, targets = score(job.live, job.material.validation, job.engine)
                found = measure(outputs, targets, _class_names(job, outputs))
                _require_finite(found, job)
            lr, seconds = job.optimizer.param_groups[0]["lr"], time.perf_counter() - began
            history.append(EpochRecord(epoch, train_loss, found, lr, seconds))
            if found.is_better_than(best.metrics if best else None):
                best = _Best(epoch, found, outputs, targets, _changing_tensors(job))
                with clock.phase("saving"):
                    attach(job.model, metrics=found.to_dict())
                    if folder is not None:
                        folder.keep_model(job.model, config)
            if folder is not None:
                folder.keep_history(history)
            progress.say(_epoch_line(history[-1], config.epochs, is_best=best is not None and best.epoch == epoch))
    except KeyboardInterrupt as interruption:
        if best is not None and folder is not None and len(history) == best.epoch:  # perhaps while it was being saved
            best.put_back(job)
            folder.keep_model(job.model, config)
            folder.keep_history(history)
        raise Interrupted(_what_was_kept("stopped by Ctrl-C.", best, job, folder)) from interruption
    except LossError as error:
        raise LossError(_what_was_kept(f"epoch {len(history) + 1}: {error}", best, job, folder)) from error
    assert best is not None
    best.put_back(job)
    return FitResult(
        model=job.model.eval(),
        plan=job.plan,
        config=config.updated(lr=job.plan.lr, weight_decay=job.rates["weight_decay"], head_start=job.head_start),
        history=tuple(history),
        best_epoch=best.epoch,
        validation=best.metrics,
        outputs=best.outputs,
        targets=best.targets,
        paths=job.material.paths,
        seconds=dict(clock.seconds),
        out=folder.path if folder else None,
        checkpoint=folder.checkpoint if folder else None,
        computed_once=first.frontier.summary(config.epochs) if first.frontier is not None else None,
        not_once_because=first.not_once_because,
    )


class _Best:
    """The weights that did best so far, and how they did."""

    def __init__(
        self,
        epoch: int,
        metrics: Metrics,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        self.epoch, self.metrics, self.outputs, self.targets = epoch, metrics, outputs, targets
        self._copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def put_back(self, job: Job) -> None:
        """Give the model these weights again."""
        slots = _changing_tensors(job)
        with torch.no_grad():
            for name, copied in self._copies.items():
                slots[name].copy_(copied)
        attach(job.model, metrics=self.metrics.to_dict())


class _Clock:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def _changing_tensors(job: Job) -> dict[str, torch.Tensor]:
    """Return what training can change: all of the state but parameters that stay frozen."""
    model = job.model
    if job.unfreezing is not None:
        return model.state_dict(keep_vars=True)
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in frozen}


def _class_names(job: Job, outputs: torch.Tensor) -> tuple[str, ...] | None:
    if job.material.task == "regression":
        return None
    return job.material.classes or tuple(map(str, range(outputs.shape[1])))


def _epoch_line(record: EpochRecord, epochs: int, *, is_best: bool) -> str:
    return (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  loss {record.train_loss:.4f}  "
        f"validation loss {record.validation.loss:.4f}  {record.validation.headline()}  {record.seconds:.1f} s"
        + ("  best" if is_best else "")
    )


def _what_was_kept(problem: str, best: _Best | None, job: Job, folder: RunFolder | None) -> str:
    if best is None:
        return f"{problem} Nothing was written: no epoch was complete."
    best.put_back(job)
    where = f"in '{folder.checkpoint}'" if folder else "in the model"
    return f"{problem} The best so far (epoch {best.epoch}, {best.metrics.headline()}) is kept {where}."


def _require_finite(found: Metrics, job: Job) -> None:
    if not math.isfinite(found.loss):
        raise LossError(
            f"the validation loss is {found.loss} (learning rate {job.plan.lr:.3g}). Try a tenth of the learning rate, "
            "--precision fp32, or look for extreme values in the data."
        )


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
