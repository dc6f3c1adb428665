"""Create the network that a name or a checkpoint stands for, with a head for the classes of the data."""

from typing import Any

from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.card import card_of
from regraft.checkpoint.create import create_model, is_checkpoint
from regraft.checkpoint.matching.naming import parse_rules
from regraft.data.samples import Listing
from regraft.surgery.head import replace_head
from regraft.training.config import TrainConfig


def create_for_data(name: str, listing: Listing, config: TrainConfig, *, trust_code: bool) -> nn.Module:
    """Create the network `name` with a head for the data: a new one, or that of a checkpoint which fits already.

    The head of a checkpoint fits if it gives as many scores as there are classes, and was not trained for others.
    """
    options = creation_options(config, trust_code=trust_code)
    outputs = len(listing.classes) if listing.classes is not None else 1
    if not is_checkpoint(name):
        return create_model(name, num_classes=outputs, **options)
    built = create_model(name, **options)
    known = card_of(built).classes
    has_fitting_head = known in (None, listing.classes) and ModelFacts(built).trace.class_count == outputs
    return built if has_fitting_head else replace_head(built, outputs)


def creation_options(config: TrainConfig, *, trust_code: bool) -> dict[str, Any]:
    """Return the arguments of `create_model` for the weights that the options of a run name."""
    return {
        "weights": config.weights,
        "rename": parse_rules(config.rename),
        "match": config.match,
        "entry": config.entry,
        "accept": config.accept,
        "trust_code": trust_code,
    }
