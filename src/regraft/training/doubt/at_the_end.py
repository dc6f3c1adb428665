"""What a network learns about its own doubt when its training has ended."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regraft.card import FamiliarPhotos, attach
from regraft.data.photos import Photos, loader
from regraft.errors import RegraftError
from regraft.training.doubt.calibration import Calibration, calibrate
from regraft.training.doubt.familiarity import MAX_PHOTOS, head_inputs, remember
from regraft.training.features.batches import FeatureBatches
from regraft.training.loop import score
from regraft.training.metrics import calibration_error
from regraft.training.ranks.group import SINGLE
from regraft.training.resume.run_state import Best
from regraft.training.setup import TrainSetup

MAX_VALIDATION = 500  # photos that tell how far is far
BATCH = 32


def add_doubt(setup: TrainSetup, best: Best) -> Calibration | None:
    """Put into the card how sure scores are, and what the training photos look like; the best weights are loaded.

    Returns:
        The calibration; None for regression, and for too few photos.
    """
    if setup.train_data.task == "regression":
        return None
    if setup.solved is not None and setup.solved.factor is not None:
        factor = setup.solved.factor
        before = calibration_error(best.outputs / factor, best.targets)
        calibration = Calibration(factor, before, calibration_error(best.outputs, best.targets), True)
        attach(setup.model, confidence_factor=None)
    else:
        calibration = calibrate(best.outputs, best.targets)
        attach(setup.model, confidence_factor=calibration.factor if calibration is not None else None)
    attach(setup.model, familiar=_familiar_photos(setup))
    return calibration


def _familiar_photos(setup: TrainSetup) -> FamiliarPhotos | None:
    """Return what the card keeps of the photos; None for other data, and for heads that cannot be told."""
    train_data = setup.train_data
    if train_data.photos is None:
        return None
    try:
        (head,) = setup.facts.class_heads
        layer = setup.live.get_submodule(head.path)
        training = _inputs_of(layer, setup, train_data.train, train_data.photos[0], MAX_PHOTOS)
        validation = _inputs_of(layer, setup, train_data.validation, train_data.photos[1], MAX_VALIDATION)
    except (RegraftError, AttributeError, ValueError):  # several heads, or one inside of what is replayed
        return None
    except RuntimeError:  # no memory, or a photo that has vanished: the training itself is done
        return None
    return remember(head.path, training, validation) if training is not None and validation is not None else None


def _inputs_of(layer: nn.Module, setup: TrainSetup, batches: Any, photos: Photos, count: int) -> torch.Tensor | None:
    """Return what a layer is given for some of the photos, in their first view; None if it is not called."""
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))
    rows = order[:count].sort().values
    if isinstance(batches, FeatureBatches):
        parts = (batches.pick(part, torch.zeros_like(part)) for part in rows.split(batches.batch_size))
    else:
        parts = loader(photos.subset(rows.tolist()), BATCH, workers=0)
    with head_inputs(layer) as inputs:
        score(setup.live, parts, replace(setup.live_compute, ranks=SINGLE))
    return torch.cat(inputs) if inputs else None
