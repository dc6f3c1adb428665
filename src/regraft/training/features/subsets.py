"""Features of some photos, taken from those of all: a run on a part of the photos then finds them in the store."""

from collections.abc import Sequence

import torch

from regraft.data.photos import Photos
from regraft.frontier.cache.writer import FeatureWriter
from regraft.training.features.batches import Features
from regraft.training.features.extract import Extractor


def store_subset(extractor: Extractor, features: Features, photos: Photos, indices: Sequence[int]) -> None:
    """Store the features of some of the photos.

    Nothing is stored where random views follow from the index of a photo, or if the disk has no room.

    Args:
        extractor: It computed the features.
        features: Features of all photos.
        photos: These photos.
        indices: Those of the subset, in order.
    """
    store, key = extractor.store, extractor.key_of(photos.subset(indices))
    if store is None or photos.views.is_random or store.find(key) is not None:
        return
    size = features.bytes // len(photos) * len(indices)
    writer = FeatureWriter(store, key, size, in_memory=False, progress=extractor.progress)
    if not writer.has_place:
        return
    share, first = len(indices) / len(photos), torch.tensor(indices)[:, None] * features.views
    rows = (first + torch.arange(features.views)).flatten()
    with writer:
        writer.append([tensor[rows.to(tensor.device)] for tensor in features.tensors])
        holds = f"{len(indices)} of {len(photos)} photos × {features.views}"
        writer.finish({"unreadable": {}, "error": features.error, "seconds": share * features.cost_s, "holds": holds})
