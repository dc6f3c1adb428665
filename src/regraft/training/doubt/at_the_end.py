"""What a network learns about its own doubt when its training has ended."""

from dataclasses import replace

import torch

from regraft.card import FamiliarPhotos, attach
from regraft.data.photos import loader
from regraft.errors import RegraftError
from regraft.training.doubt.calibration import Calibration, calibrate, calibration_error
from regraft.training.doubt.familiarity import MAX_PHOTOS, head_inputs, remember
from regraft.training.features.batches import FeatureBatches
from regraft.training.loop import score
from regraft.training.ranks.group import SINGLE
from regraft.training.resume.run_state import Best
from regraft.training.setup import TrainSetup


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
        order = torch.randperm(len(train_data.photos[0]), generator=torch.Generator().manual_seed(0))
        layer = setup.live.get_submodule(head.path)
    except (RegraftError, AttributeError, ValueError):  # several heads, or one inside of what is replayed
        return None
    compute = replace(setup.live_compute, ranks=SINGLE)
    rows = order[:MAX_PHOTOS].sort().values
    if isinstance(train_data.train, FeatureBatches):
        parts = [
            train_data.train.pick(part, torch.zeros_like(part)) for part in rows.split(train_data.train.batch_size)
        ]
    else:
        parts = loader(train_data.photos[0].subset(rows.tolist()), MAX_PHOTOS // 8, workers=0)
    try:
        with head_inputs(layer) as training:
            score(setup.live, parts, compute)
        with head_inputs(layer) as validation:
            score(setup.live, train_data.validation, compute)
    except (RegraftError, RuntimeError):  # a photo that has vanished since, or no memory: the training itself is done
        return None
    if not training or not validation:
        return None
    return remember(head.path, torch.cat(training), torch.cat(validation))
