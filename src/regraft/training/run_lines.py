"""What a run says: each line as soon as it is known, in plain words; the rest as details."""

import math
from collections.abc import Sequence

from regraft.anatomy.model_facts import ModelFacts
from regraft.card import card_of
from regraft.checkpoint.create import is_checkpoint
from regraft.data.decoding.files import Unreadable
from regraft.data.samples import Listing
from regraft.progress import Progress
from regraft.training.config import TrainConfig
from regraft.training.plan import trained_layers
from regraft.training.result import EpochRecord
from regraft.training.setup import TrainSetup
from regraft.training.steps.compute import ComputeContext

MAX_CLASSES = 10  # that are named
MAX_SKIPPED = 3
MAX_LAYERS = 4
MAX_KIND = 60  # characters of an architecture that is written as layers
SHOWN_EPOCHS = 5  # of many
SLOW_EPOCH_S = 10.0  # an epoch that takes longer is always shown


def say_data(listing: Listing, progress: Progress) -> None:
    """Say how many photos there are, of what, and how they are split."""
    train, validation = len(listing.train), len(listing.validation)
    counts = [(name, learned + checked) for name, learned, checked in listing.counts()]
    named = ", ".join(f"{name} {count}" for name, count in counts[:MAX_CLASSES])
    rest = f" and {len(counts) - MAX_CLASSES} more" if len(counts) > MAX_CLASSES else ""
    kinds = f"in {len(counts)} classes: {named}{rest}" if counts else "with a number each"
    progress.say(f"photos     {train + validation:,} {kinds}")
    progress.say(f"           {train:,} for training, {validation:,} for validation ({listing.split})")
    if counts:
        both = ", ".join(f"{name} {learned}+{checked}" for name, learned, checked in listing.counts())
        progress.detail(f"classes    {len(counts)} (photos + validation): {both}")


def say_model(
    facts: ModelFacts, name: str | None, config: TrainConfig, compute: ComputeContext, progress: Progress
) -> None:
    """Report the network that is trained, and the part of it that is."""
    model, recipe = facts.model, card_of(facts.model).recipe
    kind = name or (recipe.source.name if recipe else type(model).__name__)
    weights = recipe.source.weights if recipe else None
    if name is not None and is_checkpoint(name) and recipe is not None:
        kind += f": {recipe.source.layers or recipe.source.name}"[:MAX_KIND]
        weights = None if config.weights == "default" else config.weights
        kind += f", {len(recipe.steps)} edit{'s' * (len(recipe.steps) > 1)}" if recipe.steps else ""
    start = "" if weights is None else ", untrained" if weights == "none" else f", pretrained ({weights})"
    progress.say(f"model      {kind}{start}")
    parameters = dict(model.named_parameters())
    trainable = {path: parameter.numel() for path, parameter in parameters.items() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in parameters.values())
    share = f"{sum(trainable.values()):,} of {_rounded(total)} numbers"
    layers = trained_layers(model)
    if len(trainable) == len(parameters):
        what = f"all layers ({_rounded(total)} numbers)"
    elif trainable.keys() <= facts.head_parameters:
        is_new = name is not None and not is_checkpoint(name)
        what = f"only the {'new ' if is_new else ''}last layer: {share}; the rest is frozen"
    else:
        named = ", ".join(layers[:MAX_LAYERS]) + (" …" if len(layers) > MAX_LAYERS else "")
        what = f"{named} ({share}); the rest is frozen"
    progress.say(f"training   {what}")
    progress.say(f"           {config.epochs} epoch{'s' * (config.epochs > 1)}, on {compute.device}")
    if config.unfreeze is not None:
        progress.say(f"unfreezing {config.unfreeze} (layers:epochs)")
    progress.detail(f"trained    {sum(trainable.values()):,} of {total:,} parameters: {', '.join(layers)}")


def say_setup(setup: TrainSetup, config: TrainConfig, progress: Progress) -> None:
    """Report the files that are skipped, and in detail what was chosen and computed."""
    plan, train_data = setup.plan, setup.train_data
    if train_data.listing is None and plan.train_count is not None:
        progress.say(f"samples    {plan.train_count} + {plan.validation_count} for validation ({plan.split})")
    _say_skipped(plan.unreadable, progress)
    if setup.compute.ranks.size > 1:
        divided = f"a batch of {config.batch_size} is divided among them, and a step is that of the whole batch"
        alone = "each trains the same head on all features: an exchange would take longer than a step"
        progress.say(f"ranks      {divided if setup.live_compute.ranks.size > 1 else alone}")
    if setup.solved is not None:
        progress.say("head       solved, not trained: one epoch without steps")
        progress.detail(f"chosen     {setup.solved}")
    progress.detail(
        f"options    batches of {config.batch_size}, {config.optimizer}, learning rate {plan.lr:g} "
        f"({config.schedule}), augmentation {config.augment}, on {plan.device}"
    )
    if train_data.frontier is not None:
        for line in train_data.frontier.lines():
            progress.detail(line)
    if setup.sweep is not None:
        progress.detail(f"chosen     {setup.sweep}")


def say_epoch(record: EpochRecord, best: int | None, epochs: int, skipped: int, progress: Progress) -> None:
    """Say how an epoch went, and which is the best so far, if that one is kept; of many fast ones, most are details."""
    is_shown = record.epoch in (1, epochs) or record.epoch % math.ceil(epochs / SHOWN_EPOCHS) == 0
    tell = progress.say if is_shown or skipped or record.seconds >= SLOW_EPOCH_S else progress.detail
    tell(
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  {record.validation.headline()}"
        + (f"  {skipped} steps without a finite loss left out" if skipped else "")
        + ("" if best is None else "  best so far" if best == record.epoch else f"  best so far: epoch {best}")
    )
    progress.detail(
        f"           loss {record.train_loss:.4f}  validation loss {record.validation.loss:.4f}  "
        f"learning rate {record.lr:.3g}  {record.seconds:.1f} s"
    )


def _say_skipped(unreadable: Sequence[Unreadable], progress: Progress) -> None:
    for number, file in enumerate(unreadable):
        tell = progress.say if number < MAX_SKIPPED else progress.detail
        tell(f"skipped    {str(file.path)!r}: {file.reason}")
    if len(unreadable) > MAX_SKIPPED:
        progress.say(f"           and {len(unreadable) - MAX_SKIPPED} more")


def _rounded(count: int) -> str:
    """Write a number of weights, in millions if it is large.

    >>> _rounded(11_177_538), _rounded(5_130)
    ('11.2 M', '5,130')
    """
    return f"{count / 10**6:,.1f} M" if count >= 10**6 else f"{count:,}"
