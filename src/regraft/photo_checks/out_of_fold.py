"""Scores of each photo by a head that has not learned from it, on features of a frozen network."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.checkpoint.create import is_checkpoint, weights_path
from regraft.data.samples import Listing
from regraft.errors import DataError, ModelError
from regraft.freezing.flags import freeze, sync_frozen_state, unfreeze
from regraft.progress import Progress
from regraft.training.checks.weight_types import compute_for
from regraft.training.config import TrainConfig
from regraft.training.features.batches import Features
from regraft.training.setup import make_extractor, prepare_model
from regraft.training.train_data import load_train_data
from regraft.wording import for_caller
from regraft.zoo import needs_download

FOLDS = 5
# Times half the sum of squares, beside the mean loss of standardized features. It is strong on purpose: a head that
# can learn single wrong labels by heart tells fewer of them.
PENALTY = 0.3
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class ScoredPhotos:
    """Photos with their scores.

    Attributes:
        indices: Index of each among training and validation photos, P numbers.
        log_probabilities: (P, K), by a head that has not learned from the photo.
        targets: (P,) of int64.
        name: The network.
    """

    indices: tuple[int, ...]
    log_probabilities: torch.Tensor
    targets: torch.Tensor
    name: str

    @property
    def accuracy(self) -> float:
        """Share of the photos whose label gets the highest score."""
        return float((self.log_probabilities.argmax(1) == self.targets).double().mean())


def score_out_of_fold(
    model: nn.Module | str,
    listing: Listing,
    groups: Sequence[Sequence[int]],
    config: TrainConfig,
    progress: Progress,
    *,
    trust_code: bool,
) -> ScoredPhotos:
    """Return the scores of the photos of training and validation by cross-validated heads.

    The features are those that training a head on this network takes, from the cache or for it.

    Args:
        model: A name or a checkpoint; or a module, of which a copy is used.
        listing: The photos.
        groups: Indices of photos that show the same picture, which stay in one fold.
        config: How photos are read and weights are found.
        progress: Reports progress.
        trust_code: Whether custom code may be imported.

    Raises:
        ModelError: The weights are not on this machine, or the features of the network cannot be computed.
        DataError: There are too few photos.
    """
    _require_local(model, config)
    with progress.status("preparing the network"):
        built = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        facts = prepare_model(built, listing, config, progress, trust_code=trust_code)
        if not facts.heads:
            raise ModelError(f"no head was found in {type(facts.model).__name__}, so its features are unknown")
        freeze(facts.model)
        unfreeze(facts.model, *(head.path for head in facts.heads))
        sync_frozen_state(facts.model)
        facts = ModelFacts(facts.model)
        compute = replace(compute_for(facts.model, config.device, config.precision), has_channels_last=config.fast)
        facts.model.to(compute.device)
        extractor, reason = make_extractor(facts, None, config, compute, progress)
    if extractor is None:
        raise ModelError(f"its features cannot be computed: {reason}")
    train_data = load_train_data(
        config.data, listing, facts.preprocessing, config, compute.device, progress, extractor=extractor
    )
    assert train_data.frontier is not None
    assert train_data.photos is not None
    index_of = {sample: index for index, sample in enumerate((*listing.train, *listing.validation))}
    samples = [sample for photos in train_data.photos for sample in photos.samples]
    indices = tuple(index_of[sample] for sample in samples)
    targets = torch.tensor([int(sample.target) for sample in samples])
    parts = (train_data.frontier.train, train_data.frontier.validation)
    first, rows, owners = 0, [], []
    for features, photos in zip(parts, train_data.photos, strict=True):
        rows.append(_rows(features, len(photos)))
        owners.append(torch.arange(first, first + len(photos)).repeat_interleave(features.views))
        first += len(photos)
    with progress.status("comparing labels with what the network sees"):
        folds = _folds(targets, indices, groups, config.seed)
        scores = _cross_validated(torch.cat(rows), torch.cat(owners), targets, folds, len(listing.classes or ()))
    return ScoredPhotos(indices, scores, targets, model if isinstance(model, str) else type(model).__name__)


def _require_local(model: nn.Module | str, config: TrainConfig) -> None:
    """Refuse to download weights, which nobody expects of a check."""
    if isinstance(model, nn.Module) or is_checkpoint(model) or weights_path(config.weights) is not None:
        return
    if needs_download(model, config.weights):
        raise ModelError(
            f"the weights of '{model}' are not on this machine, and a check downloads nothing. Train once, or "
            + for_caller(
                python="pass model= with a network, or weights= with a file",
                command="pass --model, or --weights with a file",
            )
        )


def _rows(features: Features, count: int) -> torch.Tensor:
    """Return the features of all views of `count` photos as (count * V, D) of float32 on the CPU, pooled."""
    pooled = []
    for rows in torch.arange(count * features.views).split(1024):
        parts = [tensor.float().cpu() for tensor in features.pick(rows)]
        pooled.append(torch.cat([_pooled(part) for part in parts], 1))
    return torch.cat(pooled)


def _pooled(values: torch.Tensor) -> torch.Tensor:
    """Return values as (N, D): means over pixels (N, C, H, W) or tokens (N, T, D)."""
    if values.ndim == 3:
        return values.mean(1)
    return values.flatten(2).mean(2) if values.ndim > 3 else values.flatten(1)


def _folds(targets: torch.Tensor, indices: Sequence[int], groups: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    """Return the number of the fold of each photo, (P,): random, even within each class, the same within a group."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = order[targets[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[by_class] = torch.arange(len(targets)) % FOLDS
    place = {index: row for row, index in enumerate(indices)}
    for group in groups:
        rows = [place[index] for index in group if index in place]
        folds[rows] = folds[rows[:1]]
    return folds


def _cross_validated(
    features: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor, classes: int
) -> torch.Tensor:
    """Return log-probabilities (P, classes) of photos by heads of the other folds, averaged over the views of each.

    Args:
        features: (R, D), a row for each view.
        owners: (R,), the photo of each row.
        targets: (P,).
        folds: (P,).
        classes: K.
    """
    from sklearn.linear_model import LogisticRegression

    probabilities = torch.zeros(len(targets), classes, dtype=torch.float64)
    views = torch.bincount(owners, minlength=len(targets))
    for fold in range(FOLDS):
        left_out = folds[owners] == fold
        learned, labels = features[~left_out], targets[owners[~left_out]]
        if not bool(left_out.any()) or len(labels.unique()) < 2:
            raise DataError("there are too few photos to learn from some and look at others")
        mean, std = learned.mean(0), learned.std(0).clamp(min=1e-6)
        head: Any = LogisticRegression(C=1 / (PENALTY * len(labels)), max_iter=MAX_ITERATIONS, tol=1e-3)
        head.fit(((learned - mean) / std).numpy(), labels.numpy())
        predicted = torch.from_numpy(head.predict_proba(((features[left_out] - mean) / std).numpy())).double()
        spread = torch.zeros(len(predicted), classes, dtype=torch.float64)
        spread[:, torch.from_numpy(head.classes_)] = predicted
        probabilities.index_add_(0, owners[left_out], spread)
    return (probabilities / views[:, None]).log()
