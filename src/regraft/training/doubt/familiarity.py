"""How much photos resemble those that a network was trained on.

The inputs of its head are compared by their angle: a photo is as far from the training photos as from the fifth nearest
of some of them. How far is far, the validation photos tell, which belong to the classes, and were not learned from.

Source: Sun et al. 2022, https://arxiv.org/abs/2204.06507.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from regraft.card import FamiliarPhotos

NEAREST = 5
MAX_PHOTOS = 256  # kept in the card, in 8 bits a feature
MAX_DISTANCES = 200
MIN_VALIDATION = 10  # photos without which nothing can be said of how far is far
STEPS = 127


@contextmanager
def head_inputs(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what a layer is given inside the block, as rows (N, D) on the CPU; maps and tokens as their means."""
    rows: list[torch.Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        first = inputs[0] if inputs else None
        if isinstance(first, torch.Tensor) and first.ndim >= 2:
            spread = tuple(range(2, first.ndim)) if first.ndim == 4 else tuple(range(1, first.ndim - 1))
            rows.append((first.float().mean(spread) if spread else first.float()).cpu())

    handle = head.register_forward_pre_hook(keep)
    try:
        yield rows
    finally:
        handle.remove()


def remember(layer: str, training: torch.Tensor, validation: torch.Tensor) -> FamiliarPhotos | None:
    """Return what a card keeps of the photos; None if there are too few, or their features tell nothing.

    Args:
        layer: Path of the head.
        training: Its inputs (M, D) for training photos.
        validation: Its inputs (N, D) for the validation photos.
    """
    if len(validation) < MIN_VALIDATION or len(training) < NEAREST:
        return None
    rows = F.normalize(training, dim=1)
    largest = rows.abs().amax(1, keepdim=True)
    if not bool((largest > 0).all() and largest.isfinite().all() and validation.isfinite().all()):
        return None
    steps = (rows / largest * STEPS).round().to(torch.int8)
    distances = _distances(validation, F.normalize(steps.float(), dim=1)).sort().values
    if len(distances) > MAX_DISTANCES:
        distances = distances.quantile(torch.linspace(0, 1, MAX_DISTANCES))
    features = base64.b64encode(steps.numpy().tobytes()).decode("ascii")
    kept = tuple(round(distance, 6) for distance in distances.tolist())
    return FamiliarPhotos(layer=layer, width=rows.shape[1], features=features, distances=kept)


def resemblance(features: torch.Tensor, photos: FamiliarPhotos) -> torch.Tensor:
    """Return the share of validation photos that resemble the training photos no more than each photo does, (N,).

    Args:
        features: Inputs of the head, (N, D).
        photos: What the card has kept.
    """
    steps = np.frombuffer(base64.b64decode(photos.features), np.int8).reshape(-1, photos.width)
    rows = F.normalize(torch.from_numpy(steps.astype(np.float32)), dim=1)
    known = torch.tensor(photos.distances)
    return (known[None] >= _distances(features, rows)[:, None]).float().mean(1)


def _distances(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    cosines = F.normalize(features.float(), dim=1) @ rows.T
    return 1 - cosines.topk(min(NEAREST, len(rows)), dim=1).values[:, -1]
