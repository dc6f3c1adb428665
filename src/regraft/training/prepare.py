"""From options to everything that a training loop needs, with every check that can be made before it starts."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from regraft.anatomy.heads import find_heads
from regraft.anatomy.modes import evaluation_mode
from regraft.card import ATTRIBUTE, Preprocessing, attach, card_of
from regraft.checkpoint.build import create_model
from regraft.data.decode import Unreadable
from regraft.data.folders import Listing, Task, list_data
from regraft.data.photos import Photos, loader, read_photos
from regraft.data.transforms import augmentation
from regraft.errors import ConfigError, DataError, ModelError
from regraft.freezing.freeze import freeze, unfreeze
from regraft.freezing.groups import build_optimizer
from regraft.freezing.pins import is_pinned, pin, unpin
from regraft.progress import Progress
from regraft.training.config import FINE_TUNE_LR, HEAD_LR, SCRATCH_LR, TrainConfig
from regraft.training.loop import Engine, choose_engine, main_output
from regraft.training.losses import Loss, build_loss, check_loss
from regraft.training.result import Plan
from regraft.zoo import preprocessing_of

WARM_UP_SHARE = 0.05


@dataclass(frozen=True)
class Material:
    """What is learned from and measured on.

    Attributes:
        train: Batches to learn from, in a new order each epoch.
        validation: Batches to measure on, in one order.
        task: Classification or regression.
        classes: Class names; None for regression.
        listing: What the folder held; None for datasets and loaders.
        paths: The validation photos, in order; empty for datasets that are no files.
        unreadable: Files that are skipped.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    task: Task
    classes: tuple[str, ...] | None
    listing: Listing | None = None
    paths: tuple[Path, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()


@dataclass(frozen=True)
class Job:
    """Everything that the training loop needs."""

    model: nn.Module
    material: Material
    criterion: Loss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    engine: Engine
    plan: Plan


def prepare_model(
    model: nn.Module | str, listing: Listing | None, config: TrainConfig, *, trust_code: bool
) -> nn.Module:
    """Build the model where it is a name, give it a head for the data, and freeze what the options say.

    A name without options to freeze is frozen but for its head where it is pretrained. The flags of a module are left
    as they are, but for the options.
    """
    if isinstance(model, str):
        if listing is None:
            raise ConfigError("a model's name needs a folder as data. Pass a module with datasets and loaders.")
        outputs = len(listing.classes) if listing.classes is not None else 1
        built = create_model(model, weights=config.weights, num_classes=outputs, trust_code=trust_code)
        recipe = card_of(built).recipe
        if recipe is not None and recipe.source.weights != "none" and not _names_layers(config):
            freeze(built)
            unfreeze(built, *find_heads(built))
    else:
        built = model
    if config.image_size is not None:
        known = preprocessing_of(built)
        resize = max(config.image_size, round(config.image_size * known.resize / known.size))
        attach(built, preprocessing=known.model_copy(update={"size": config.image_size, "resize": resize}))
    if config.unfreeze_all:
        unfreeze(built)
    if config.freeze or config.freeze_until is not None:
        freeze(built, *config.freeze, until=config.freeze_until)
    return built


def read_material(
    data: Any, listing: Listing | None, preprocessing: Preprocessing, config: TrainConfig, progress: Progress
) -> Material:
    """Decode the photos of a folder, or take datasets and loaders as they are."""
    if listing is None:
        return _given_material(data, config)
    parts, unreadable = [], []
    for samples, description in ((listing.train, "reading photos"), (listing.validation, "reading validation photos")):
        photos, failed = read_photos(
            samples, preprocessing, classes=listing.classes, description=description, progress=progress
        )
        parts.append(photos)
        unreadable += failed
    _require_readable(unreadable, len(listing.train) + len(listing.validation), config.max_unreadable)
    material = _photo_material(parts[0], parts[1], config)
    _require_all_classes(material.classes, parts[0])
    return Material(
        material.train,
        material.validation,
        listing.task,
        listing.classes,
        listing,
        tuple(sample.path for sample in parts[1].samples),
        tuple(unreadable),
    )


def prepare_job(
    model: nn.Module, name: str | None, material: Material, config: TrainConfig, loss: Loss | None, *, trust_code: bool
) -> Job:
    """Put loss, optimizer and schedule beside model and data, and try one batch."""
    engine = choose_engine(config.device, config.precision)
    criterion = loss or build_loss(
        config.loss, material.task, label_smoothing=config.label_smoothing, trust_code=trust_code
    )
    model.to(engine.device)
    if isinstance(criterion, nn.Module):
        criterion.to(engine.device)
    lr = config.lr if config.lr is not None else _default_lr(model)
    optimizer = build_optimizer(config.optimizer, model, lr=lr, weight_decay=config.weight_decay)
    if type(optimizer).__name__ in ("LBFGS", "SparseAdam", "Adahessian"):
        raise ConfigError(
            f"the optimizer '{config.optimizer}' needs a training loop or gradients of its own kind. Choose another of "
            "torch.optim, such as adamw or sgd."
        )
    _try_one_batch(model, material, criterion, engine)
    attach(model, classes=material.classes, task=material.task, preprocessing=preprocessing_of(model))
    return Job(
        model=model,
        material=material,
        criterion=criterion,
        optimizer=optimizer,
        schedule=_schedule(optimizer, config, material),
        engine=engine,
        plan=_plan(model, name, material, lr, engine),
    )


@contextlib.contextmanager
def unchanged_on_failure(model: nn.Module | str) -> Iterator[None]:
    """Give a module its flags, gradients, modes, pins and card back where the block raises."""
    if isinstance(model, str):
        yield
        return
    card = card_of(model)
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    layers = [(layer, layer.training, is_pinned(layer)) for layer in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, trainable, gradient in parameters:
            parameter.requires_grad_(trainable).grad = gradient
        for layer, training, pinned in layers:
            (pin if pinned else unpin)(layer)
            layer.training = training
        setattr(model, ATTRIBUTE, card)
        raise


def list_if_folder(data: Any, config: TrainConfig) -> Listing | None:
    """List the photos where `data` names a folder or a table; None for a pair of datasets or loaders."""
    if isinstance(data, (str, Path)):
        return list_data(data, validation_share=config.validation_share, seed=config.seed)
    return None


def _names_layers(config: TrainConfig) -> bool:
    return bool(config.freeze) or config.freeze_until is not None or config.unfreeze_all


def _given_material(data: Any, config: TrainConfig) -> Material:
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise DataError(
            f"data is a {type(data).__name__}, expected a folder, a .csv table, or a pair (train, validation) of "
            "Datasets or DataLoaders."
        )
    train, validation = data
    if isinstance(train, Photos) and isinstance(validation, Photos):
        return _photo_material(train, validation, config)
    batches, measured = _batches(train, config, shuffle=True), _batches(validation, config, shuffle=False)
    for part, found in (("training", batches), ("validation", measured)):
        if isinstance(found, Sized) and len(found) == 0:
            raise DataError(f"the {part} data is empty. Give at least one batch.")
    _, targets = _first_batch(batches)
    dataset = getattr(train, "dataset", train)
    if targets.is_floating_point():
        return Material(batches, measured, "regression", None)
    names = getattr(dataset, "classes", None)
    return Material(batches, measured, "classification", tuple(map(str, names)) if names else None)


def _photo_material(train: Photos, validation: Photos, config: TrainConfig) -> Material:
    changed = train.augmented(augmentation(config.augment, train.preprocessing))
    return Material(
        loader(changed, config.batch_size, shuffle_seed=config.seed, workers=config.workers),
        loader(validation, config.batch_size, workers=config.workers),
        "regression" if train.classes is None else "classification",
        train.classes,
        paths=tuple(sample.path for sample in validation.samples),
    )


def _batches(data: Any, config: TrainConfig, *, shuffle: bool) -> Iterable[Any]:
    if not isinstance(data, Dataset):
        if not isinstance(data, Iterable):
            raise DataError(
                f"a {type(data).__name__} is no data. Expected a Dataset, a DataLoader, or a list of batches."
            )
        return data
    count = len(data) if isinstance(data, Sized) else 0
    return DataLoader(
        data,
        config.batch_size,
        shuffle=shuffle,
        num_workers=config.workers or 0,
        generator=torch.Generator().manual_seed(config.seed),
        drop_last=shuffle and count > config.batch_size and count % config.batch_size == 1,  # batch norm needs two
    )


def _first_batch(batches: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    first = next(iter(batches), None)
    if not (isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(x, torch.Tensor) for x in first)):
        raise DataError(
            f"the training data yields {type(first).__name__}, expected pairs (inputs, targets) of tensors: "
            "let the dataset return tensors, as with torchvision.transforms.ToTensor()."
        )
    return first[0], first[1]


def _require_readable(unreadable: list[Unreadable], count: int, limit: float) -> None:
    if len(unreadable) > limit * count:
        examples = "; ".join(f"'{found.path}': {found.reason}" for found in unreadable[:3])
        raise DataError(
            f"{len(unreadable)} of {count} files cannot be read ({examples}). Repair or remove them, or allow more "
            f"with --max-unreadable (now {limit:g})."
        )


def _require_all_classes(classes: tuple[str, ...] | None, train: Photos) -> None:
    seen = {sample.target for sample in train.samples}
    if lost := [name for index, name in enumerate(classes or ()) if index not in seen]:
        raise DataError(f"none of the photos of {', '.join(map(repr, lost))} can be read. Add some that can.")


def _try_one_batch(model: nn.Module, material: Material, criterion: Loss, engine: Engine) -> None:
    """Run the model and the loss on one batch, so that what does not fit is said before the first epoch."""
    inputs, targets = (tensor.to(engine.device) for tensor in _first_batch(material.train))
    with evaluation_mode(model), torch.no_grad(), engine.autocast():
        try:
            output = main_output(model(inputs))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{type(model).__name__} fails on a batch of shape {tuple(inputs.shape)}: {reason}. "
                "Give inputs of the shape that it was made for."
            ) from error
        if material.task == "classification" and output.ndim == 2:
            known = material.classes is not None
            wanted = len(material.classes) if material.classes is not None else int(targets.max()) + 1
            if output.shape[1] < wanted or (known and output.shape[1] != wanted):
                raise ModelError(
                    f"{type(model).__name__} gives {output.shape[1]} scores, the data has {wanted} classes. "
                    f"Use model = regraft.replace_head(model, {wanted})."
                )
        check_loss(criterion(output, targets))


def _default_lr(model: nn.Module) -> float:
    if all(parameter.requires_grad for parameter in model.parameters()):
        recipe = card_of(model).recipe
        return SCRATCH_LR if recipe is None or recipe.source.weights == "none" else FINE_TUNE_LR
    heads = [model.get_submodule(path) for path in find_heads(model)]
    in_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return HEAD_LR if trained <= in_heads else FINE_TUNE_LR


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, material: Material
) -> torch.optim.lr_scheduler.LRScheduler:
    steps = max(1, config.epochs * (len(material.train) if isinstance(material.train, Sized) else 1))
    warm_up = max(1, round(steps * WARM_UP_SHARE))

    def cosine(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    constant = config.schedule == "constant" or not isinstance(material.train, Sized)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, (lambda step: 1.0) if constant else cosine)


def _plan(model: nn.Module, name: str | None, material: Material, lr: float, engine: Engine) -> Plan:
    recipe = card_of(model).recipe
    listing = material.listing
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[engine.autocast_dtype]
    parameters = list(model.parameters())
    return Plan(
        model=name or (recipe.source.name if recipe else type(model).__name__),
        weights=recipe.source.weights if recipe else "as given",
        task=material.task,
        classes=material.classes,
        counts=tuple(listing.counts()) if listing else (),
        split=listing.split if listing else "as given",
        train_count=_count(material.train),
        validation_count=_count(material.validation),
        unreadable=material.unreadable,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        trained_layers=tuple(_trained_layers(model)),
        lr=lr,
        device=f"{engine.device} {precision}",
    )


def _count(batches: Iterable[Any]) -> int | None:
    dataset = getattr(batches, "dataset", None)
    return len(cast(Sized, dataset)) if isinstance(dataset, Sized) else None


def _trained_layers(model: nn.Module, prefix: str = "") -> list[str]:
    """List the paths of the largest layers all of whose parameters are trainable."""
    found = []
    for name, layer in model.named_children():
        flags = [parameter.requires_grad for parameter in layer.parameters()]
        if flags and all(flags):
            found.append(prefix + name)
        elif any(flags):
            found += _trained_layers(layer, f"{prefix}{name}.")
    return list(itertools.islice(found, 50))
