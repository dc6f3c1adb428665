"""One pass over the photos: what each block gives, pooled to one vector a photo, beside the features of the head.

The pass is that of `Extractor` for the network whose head alone is trained, so the features of the head are kept in
the cache as a training would keep them. Hooks on its layers take what the blocks give on the way.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from regraft.advice.depths import BlockBoundary
from regraft.anatomy.model_facts import ModelFacts
from regraft.data.photos import Photos
from regraft.errors import ModelError
from regraft.frontier.cache.key import features_key, file_digests
from regraft.frontier.cache.writer import FeatureWriter
from regraft.training.features.extract import Extractor

CLASS_TOKENS = ("cls_token", "class_token")
GRIDS, MAX_WIDTH = (4, 2), 2048  # cells to a side, and numbers that a map may give
PIXELS, PIXEL_SIDE = "pixels", 8  # name of what nothing has been computed of, and its grid


@dataclass(frozen=True)
class Activations:
    """Pooled activations of the photos that can be read.

    Attributes:
        photos: The photos that can be read, decoded where memory allows.
        lost: Index of each unreadable photo with the reason.
        by_layer: Pooled activations (N, D) after each boundary, by the path of its layer; of the last boundary, the
            features that the head takes; under `pixels` the photos themselves. A boundary that gives no tensor is
            missing.
        seconds: Time of the networks' forward passes, without decoding.
        was_found: Whether an earlier call had computed them.
    """

    photos: Photos
    lost: dict[int, str]
    by_layer: dict[str, torch.Tensor]
    seconds: float
    was_found: bool


class OutOfBudgetError(Exception):
    """The pass would take longer than the budget; `seconds` is the estimate."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:.1f} s")
        self.seconds = seconds


class PooledExtractor(Extractor):
    """An extractor of the head's features that also pools what blocks give.

    Args:
        facts: The network; its head alone is trainable.
        boundaries: Where to pool.
        rows: Number of photos that will be computed, for the estimate.
        budget_s: Most seconds that the forward passes may take; None: no limit.
        **options: Of `Extractor`.
    """

    def __init__(
        self, facts: ModelFacts, boundaries: Sequence[BlockBoundary], rows: int, budget_s: float | None, **options: Any
    ) -> None:
        super().__init__(facts, **options)
        self._rows, self._budget_s = rows, budget_s
        self._last = boundaries[-1].layer
        self._outputs: dict[str, torch.Tensor] = {}
        self._has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in facts.model.named_parameters())
        self.pooled: list[dict[str, torch.Tensor]] = []
        self.seconds, self.count = 0.0, 0
        inside = dict(self._prefix.named_modules())
        whole = dict(facts.model.named_modules())  # of a forward that cannot be traced, whose own layers run
        for layer in (boundary.layer for boundary in boundaries):
            if (module := inside.get(layer, whole.get(layer))) is not None:
                module.register_forward_hook(self._take(layer))

    def run(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the features of a batch, and pool what the blocks gave."""
        self._outputs = {}
        began = time.perf_counter()
        features = super().run(pixels)
        pooled = {layer: pool(output, has_class_token=self._has_class_token) for layer, output in self._outputs.items()}
        if len(features) == 1 and features[0].ndim == 2:
            pooled[self._last] = features[0]  # what the head takes, even where a layer of that path lies behind it
        side = min(PIXEL_SIDE, *pixels.shape[2:])
        pooled[PIXELS] = F.adaptive_avg_pool2d(pixels.float(), side).flatten(1)
        self.pooled.append({layer: rows.float().cpu() for layer, rows in pooled.items()})
        self.seconds += time.perf_counter() - began
        self.count += len(pixels)
        estimate = self.seconds / self.count * self._rows
        if self._budget_s is not None and estimate > self._budget_s:
            raise OutOfBudgetError(estimate)
        return features

    def _take(self, layer: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.ndim in (2, 3, 4) and tensor.is_floating_point():
                self._outputs[layer] = tensor

        return hook

    def pooled_rows(self) -> dict[str, torch.Tensor]:
        """Return the pooled activations of all photos by layer."""
        layers = self.pooled[0] if self.pooled else {}
        return {layer: torch.cat([batch[layer] for batch in self.pooled]) for layer in layers}


def pool(output: torch.Tensor, *, has_class_token: bool = False) -> torch.Tensor:
    """Return activations as one vector a photo, (N, D).

    Maps (N, C, H, W), or (N, H, W, C) as in Swin, are averaged over the cells of a grid: of 4 × 4 where that gives no
    more than 2,048 numbers, else 2 × 2, or the whole map. A grid, because where something is can be all that a task
    asks for, and it is what the mean forgets. Of tokens (N, T, D) the mean, behind the first one where that is the
    class token; vectors (N, D) as they are.
    """
    if output.ndim == 4:
        is_last = output.shape[1] == output.shape[2] != output.shape[3]
        maps = output.permute(0, 3, 1, 2) if is_last else output
        side = next((side for side in GRIDS if side <= min(maps.shape[2:]) and maps.shape[1] * side**2 <= MAX_WIDTH), 1)
        return F.adaptive_avg_pool2d(maps, side).flatten(1)
    if output.ndim == 3:
        mean = output.mean(1)
        return torch.cat([output[:, 0], mean], 1) if has_class_token else mean
    return output


def first_tensor(output: Any) -> torch.Tensor | None:
    """Return the first tensor in what a layer returned; None where there is none."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for value in values if (tensor := first_tensor(value)) is not None), None)


def pooled_activations(
    extractor: PooledExtractor, photos: Photos, boundaries: Sequence[BlockBoundary], description: str
) -> Activations:
    """Return the pooled activations of photos in their first view, computed once or found in the cache.

    Raises:
        OutOfBudgetError: They would take longer than the budget.
        DataError: No photo can be read.
        ModelError: The network fails, or does not give the same twice.
    """
    store = extractor.store
    layers = [boundary.layer for boundary in boundaries]
    key = _key(extractor, photos, layers) if store is not None else ""
    if store is not None and (entry := store.find(key)) is not None:
        note = entry.note
        tensors = [tensor for tensor in entry.tensors(in_memory=True) if isinstance(tensor, torch.Tensor)]
        readable, _ = photos.without(note["unreadable"])
        lost = {int(index): reason for index, reason in note["unreadable"].items()}
        return Activations(readable, lost, dict(zip(note["layers"], tensors, strict=True)), note["seconds"], True)
    _, readable, unreadable = extractor.features_of(photos, description)
    by_layer = extractor.pooled_rows()
    if any(len(rows) != len(readable) for rows in by_layer.values()):
        raise ModelError("the layers of the network are not called once for each batch of photos")
    reasons = {file.path: file.reason for file in unreadable}
    lost = {i: reasons[sample.path] for i, sample in enumerate(photos.samples) if sample.path in reasons}
    if store is not None and by_layer:
        size = sum(rows.nbytes for rows in by_layer.values())
        with FeatureWriter(store, key, size, in_memory=False, progress=extractor.progress) as writer:
            writer.append(list(by_layer.values()))
            holds = f"{len(readable)} photos, pooled after {len(by_layer)} layers"
            note = {"unreadable": lost, "layers": list(by_layer), "seconds": extractor.seconds, "holds": holds}
            if writer.has_place:
                writer.finish(note)
    return Activations(readable, lost, by_layer, extractor.seconds, False)


def _key(extractor: PooledExtractor, photos: Photos, layers: Sequence[str]) -> str:
    return features_key(
        extractor.digest,
        [sample.path for sample in photos.samples],
        digests_of=file_digests,
        preprocessing=extractor.preprocessing.cache_key(),
        precision=str(extractor.compute.autocast_dtype),
        device=extractor.compute.device.type,
        pooled=list(layers),
    )
