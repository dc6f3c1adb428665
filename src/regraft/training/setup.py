"""Prepare everything that the training loop needs, and check whatever can be checked before it starts."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.card import ATTRIBUTE, attach, card_of
from regraft.checkpoint.create import is_checkpoint
from regraft.data.decoding.engines import describe_engine, require_engine, usable_engine
from regraft.data.items import length_of
from regraft.data.photos import Photos
from regraft.data.samples import Listing, Task
from regraft.data.transforms import is_random
from regraft.errors import ConfigError, EditError, ModelError
from regraft.freezing.auditing import findings_of
from regraft.freezing.flags import freeze, sync_frozen_state, unfreeze
from regraft.freezing.groups import make_optimizer, optimizer_class
from regraft.freezing.schedule import Schedule
from regraft.freezing.state import FreezeState
from regraft.frontier.cache.store import Store
from regraft.progress import Progress
from regraft.train_options import HeadWay
from regraft.training.checks.trial import try_one_batch
from regraft.training.config import FINE_TUNE_LR, HEAD_LR, SCRATCH_LR, TrainConfig
from regraft.training.features.batches import FeatureBatches
from regraft.training.features.extract import Extractor
from regraft.training.heads.model_for_data import create_for_data
from regraft.training.heads.solved_head import SolvedHead
from regraft.training.heads.start import head_parameters, require_ridge_start, solved_head
from regraft.training.heads.sweep import DECAYS, Sweep, ridge_start, sweep_heads
from regraft.training.losses import Loss, build_loss
from regraft.training.plan import describe_plan
from regraft.training.ranks.group import SINGLE
from regraft.training.result import TrainPlan
from regraft.training.steps.compute import ComputeContext, choose_compute
from regraft.training.train_data import TrainData, with_task
from regraft.wording import option
from regraft.zoo import preprocessing_of, preprocessing_source

WARM_UP_SHARE = 0.05
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # of which a step is a single kernel
UNSUPPORTED_OPTIMIZERS = ("LBFGS", "SparseAdam", "Adahessian")


@dataclass(frozen=True)
class TrainSetup:
    """Everything that the training loop needs.

    Attributes:
        facts: The whole network.
        live: The module that runs in every epoch: the network, or its live part, which takes cached features.
        rates: The arguments of `param_groups`, for layers that are unfrozen later.
        unfreezing: Schedule of gradual unfreezing; None without it.
        sweep: Results of the cross-validation of a head's options; None if the learning rate is set, or without one.
        head: `given`, `ridge` or `solved`.
        solved: The head, where it is solved instead of trained: the only epoch has no steps.
    """

    facts: ModelFacts
    live: nn.Module
    train_data: TrainData
    criterion: Loss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    compute: ComputeContext
    plan: TrainPlan
    rates: dict[str, Any]
    unfreezing: Schedule | None
    sweep: Sweep | None
    head: HeadWay
    solved: SolvedHead | None = None

    @property
    def model(self) -> nn.Module:
        """The whole network."""
        return self.facts.model

    @property
    def live_compute(self) -> ComputeContext:
        """Device and precision of the live part."""
        return _live_compute(self.compute, self.live, self.train_data)


def check_options(config: TrainConfig, task: Task | None, *, trust_code: bool) -> None:
    """Refuse options that cannot work, before any photo is read.

    Raises:
        ConfigError: An optimizer or loss of that name does not exist, options contradict each other, or no decoder of
            that name can work here.
        ModelError: The device does not exist.
        TrustError: The loss is custom code, and `trust_code` is false.
    """
    compute = choose_compute(config.device, config.precision)
    require_engine(config.decoder, compute.device)
    if task is not None:
        build_loss(config.loss, task, label_smoothing=config.label_smoothing, trust_code=trust_code)
    maker = optimizer_class(config.optimizer)
    if getattr(maker, "__name__", "") in UNSUPPORTED_OPTIMIZERS:
        raise ConfigError(
            f"the optimizer '{config.optimizer}' needs a training loop or gradients of its own kind. Choose another of "
            "torch.optim, such as adamw or sgd."
        )
    if config.unfreeze is not None and (config.unfreeze_all or config.freeze or config.freeze_until is not None):
        raise ConfigError(
            f"{option('unfreeze')} '{config.unfreeze}' says what is frozen when, so it excludes {option('freeze')}, "
            f"{option('freeze_until')} and {option('unfreeze_all')}. Pass one of them."
        )


def prepare_model(
    model: nn.Module | str, listing: Listing | None, config: TrainConfig, progress: Progress, *, trust_code: bool
) -> ModelFacts:
    """Build the model if it is a name, with a head for the data, and freeze layers as the options say.

    Its structure and its card stay as they are from here on, so its facts are worked out once for the whole run.
    Without freezing options, a pretrained model by name is frozen except for its head. The flags of a module and of a
    checkpoint change only through options; frozen normalization and dropout layers are pinned to evaluation behaviour.
    """
    if isinstance(model, str):
        if listing is None:
            raise ConfigError("a model's name needs a folder as data. Pass a module with datasets and loaders.")
        built = create_for_data(model, listing, config, trust_code=trust_code)
    else:
        built = model
    known, source = preprocessing_of(built), preprocessing_source(built)
    if config.image_size is not None:
        resize = max(1, round(config.image_size * known.resize / known.size))
        known = known.model_copy(update={"size": config.image_size, "resize": resize})
        attach(built, preprocessing=known)
    if listing is not None:
        engine = usable_engine(config.decoder, known, choose_compute(config.device, config.precision).device)
        known = known.model_copy(update={"decoder": engine})
        attach(built, preprocessing=known)
        progress.say(f"decoder    {describe_engine(engine)}")
        if source is not None:
            progress.detail(f"images     {known.summary()}; from {source}")
    facts = ModelFacts(built)
    recipe = card_of(built).recipe if isinstance(model, str) and not is_checkpoint(model) else None
    if recipe is not None and recipe.source.weights != "none" and not _names_layers(config):
        freeze(built)
        unfreeze(built, *(head.path for head in facts.heads))
    if config.unfreeze_all:
        unfreeze(built)
    if config.freeze or config.freeze_until is not None:
        freeze(built, *config.freeze, until=config.freeze_until)
    if config.unfreeze is not None:
        Schedule.parse(config.unfreeze).start(built)
    sync_frozen_state(built)
    return facts


def prepare_setup(
    facts: ModelFacts,
    name: str | None,
    train_data: TrainData,
    config: TrainConfig,
    compute: ComputeContext,
    loss: Loss | None,
    progress: Progress,
    *,
    trust_code: bool,
) -> TrainSetup:
    """Build loss, optimizer and schedule for model and data, audit them, and try one batch."""
    model = facts.model
    train_data = with_task(train_data, loss, config.loss)
    criterion = loss or build_loss(
        config.loss, train_data.task, label_smoothing=config.label_smoothing, trust_code=trust_code
    )
    live = train_data.frontier.parts.suffix if train_data.frontier is not None else model
    if isinstance(criterion, nn.Module):
        criterion.to(compute.device)
    try_one_batch(model, live, train_data, criterion, _live_compute(compute, live, train_data), config)
    start = require_ridge_start(live, train_data) if config.head == "ridge" else None
    is_head_alone = config.lr is None and _is_head_alone_trained(facts, live)
    rates = _rates(model, config, is_head_alone=is_head_alone)
    sweep = solved = None
    if config.head in ("auto", "solved"):
        solved = solved_head(live, train_data, criterion, config)
    if solved is not None:
        start, rates = head_parameters(live, solved), {**rates, "lr": 0.0}
    elif config.lr is None and is_head_alone and isinstance(train_data.train, FeatureBatches) and _is_sweepable(config):
        if config.head in ("auto", "steps"):
            start = ridge_start(live, train_data.train, torch.arange(len(train_data.train.dataset)))
        sweep = sweep_heads(
            live,
            train_data.train,
            criterion,
            epochs=config.epochs,
            decays=(config.weight_decay,) if "weight_decay" in config.model_fields_set else DECAYS,
            may_start_from_ridge=config.head in ("auto", "steps")
            and start is not None,  # a fold may be solvable where all photos are too many
            seed=config.seed,
            progress=progress,
        )
        if sweep is not None:
            rates = {**rates, "lr": sweep.best.lr, "weight_decay": sweep.best.weight_decay}
    is_ridge = config.head == "ridge" or (sweep is not None and sweep.best.starts_from_ridge)
    head: HeadWay = "solved" if solved is not None else "ridge" if is_ridge else "given"
    is_fused = compute.device.type == "cuda" and optimizer_class(config.optimizer) in FUSED
    optimizer = make_optimizer(config.optimizer, facts, rates, {"fused": True} if is_fused else {})
    if findings := findings_of(facts, optimizer):
        raise ModelError(f"{type(model).__name__} cannot be trained as it is: {findings[0]}")
    if head != "given" and start is not None:
        with torch.no_grad():
            for parameter_name, value in start.items():
                live.get_parameter(parameter_name).copy_(value)
    draw = train_data.listing.draw if train_data.listing is not None else None
    attach(model, classes=train_data.classes, task=train_data.task, preprocessing=facts.preprocessing, split=draw)
    return TrainSetup(
        facts=facts,
        live=live,
        train_data=train_data,
        criterion=criterion,
        optimizer=optimizer,
        schedule=_schedule(optimizer, config, train_data),
        scaler=compute.scaler(may_guard=is_fused and config.on_nan == "stop"),
        compute=compute,
        plan=describe_plan(model, name, train_data, config, rates["lr"], compute),
        rates=rates,
        unfreezing=Schedule.parse(config.unfreeze) if config.unfreeze is not None else None,
        sweep=sweep,
        head=head,
        solved=solved,
    )


@contextlib.contextmanager
def unchanged_on_failure(model: nn.Module | str) -> Iterator[None]:
    """Restore a module's flags, gradients, modes, pins and card if the block raises."""
    if isinstance(model, str):
        yield
        return
    card, state = card_of(model), FreezeState.of(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        state.put_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        setattr(model, ATTRIBUTE, card)
        raise


def _names_layers(config: TrainConfig) -> bool:
    return bool(config.freeze or config.unfreeze_all or config.freeze_until is not None or config.unfreeze is not None)


def _rates(model: nn.Module, config: TrainConfig, *, is_head_alone: bool) -> dict[str, Any]:
    """Resolve the arguments of `param_groups`."""
    lr = config.lr if config.lr is not None else _default_lr(model, is_head_alone=is_head_alone)
    backbone_lr = config.backbone_lr
    if backbone_lr is None and config.layer_decay is None and config.unfreeze is not None:
        backbone_lr = lr * FINE_TUNE_LR / HEAD_LR
    return {
        "lr": lr,
        "weight_decay": config.weight_decay,
        "layer_decay": config.layer_decay,
        "backbone_lr": backbone_lr,
    }


def make_extractor(
    facts: ModelFacts, data: Any, config: TrainConfig, compute: ComputeContext, progress: Progress
) -> tuple[Extractor | None, str | None]:
    """Make the extractor that computes the constant part once, if data and network allow it.

    Returns:
        The extractor, or None and the reason; no reason if nothing was to be expected.
    """
    pair = data if isinstance(data, (tuple, list)) else ()
    if not config.cache or (pair and not all(isinstance(part, Photos) for part in pair)):
        return None, None
    if all(parameter.requires_grad for parameter in facts.model.parameters()):
        return None, None
    if is_random(config.augment) and config.views is None:
        reason = (
            f"augment {config.augment} draws each photo anew in every epoch. A number of {option('views')} can be kept"
        )
        return None, reason
    try:
        extractor = Extractor(
            facts,
            compute,
            fast=config.fast,
            precision=config.cache_precision,
            keep_pixels=config.unfreeze is not None,
            store=Store(),
            progress=progress,
        )
    except (ModelError, EditError) as error:
        return None, str(error)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # its forward fails on shapes alone; a real batch is tried later
        return None, str(error).partition("\n")[0]
    return extractor, None


def _is_sweepable(config: TrainConfig) -> bool:
    return config.optimizer.lower() == "adamw" and config.unfreeze is None


def _default_lr(model: nn.Module, *, is_head_alone: bool) -> float:
    if all(parameter.requires_grad for parameter in model.parameters()):
        recipe = card_of(model).recipe
        return SCRATCH_LR if recipe is None or recipe.source.weights == "none" else FINE_TUNE_LR
    return HEAD_LR if is_head_alone else FINE_TUNE_LR


def _is_head_alone_trained(facts: ModelFacts, live: nn.Module) -> bool:
    model = facts.model
    if all(parameter.requires_grad for parameter in model.parameters()):
        return False
    if live is not model and _is_one_layer(live):
        return True
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return names <= facts.head_parameters


def _is_one_layer(live: nn.Module) -> bool:
    """Return whether exactly one layer of the live part has parameters."""
    return sum(any(True for _ in layer.parameters(False)) for layer in live.modules()) == 1


def _live_compute(compute: ComputeContext, live: nn.Module, train_data: TrainData) -> ComputeContext:
    """Return device and precision of the live part: a single layer on cached features runs without autocast.

    It takes hardly any time in either precision, and 16 bits would round a score or a prediction by up to 0.4 %. Each
    rank trains it by itself, on all features and with the same draws: an exchange takes longer than its step.
    """
    is_head = train_data.frontier is not None and _is_one_layer(live)
    return replace(compute, autocast_dtype=None, ranks=SINGLE) if is_head else compute


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, train_data: TrainData
) -> torch.optim.lr_scheduler.LRScheduler:
    count = length_of(train_data.train)
    steps = max(1, config.epochs * (count or 1))
    warm_up = max(1, round(steps * WARM_UP_SHARE))

    def cosine(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    constant = config.schedule == "constant" or count is None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, (lambda step: 1.0) if constant else cosine)
