"""Compute the frontier's tensors for every photo once, or load those of an earlier run from the cache.

Two things could make cached features wrong without an error: a cache entry that does not belong to the network, and a
constant part that is not constant. So a few photos are computed again after each extraction or cache hit and compared,
and, once for each split, prefix and suffix are compared with the whole network (see `Extractor._check`).
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.modes import evaluation_mode
from regraft.data.decoding.files import Unreadable
from regraft.data.device_copies import DeviceCopies, HostCopy
from regraft.data.photos import Photos, free_memory_bytes, positions, require_readable
from regraft.data.transforms import Views, normalize
from regraft.errors import ModelError
from regraft.frontier.cache.key import features_key, file_digests, network_digest
from regraft.frontier.cache.precision import TOLERANCES, packed, packed_bytes, unpacked
from regraft.frontier.cache.rows import Rows
from regraft.frontier.cache.store import Store
from regraft.frontier.cache.writer import FeatureWriter
from regraft.frontier.fuse import faster
from regraft.frontier.partitioning import Partition, partition
from regraft.progress import SILENT, Progress
from regraft.train_options import CachePrecision
from regraft.training.features.batches import Features
from regraft.training.features.shards import ShardedWriter
from regraft.training.loop import main_output
from regraft.training.steps.compute import HALVES, ComputeContext
from regraft.wording import option

BATCH = {"cpu": 16, "cuda": 256}  # photos per batch of the constant part
MEMORY_BYTES = 512 * 2**20  # features that are larger stay on the disk
MEMORY_SHARE = 0.25  # of free memory, for features that do not fit on the disk, and of free GPU memory
MAX_COMPUTED = 2  # batches whose features are on their way into memory
CHECKED = 2  # photos that are computed again, to compare them with the kept features


class Extractor:
    """Computes features with the constant part of a model.

    Args:
        facts: The model, on its device, with its flags set for training.
        compute: Device and precision.
        fast: Whether to replace the constant part by a faster copy, equal up to rounding (see `faster`).
        precision: Precision of the kept features.
        keep_pixels: Whether decoded photos stay in memory, because the network will be split again.
        store: Store that keeps features between runs; None keeps nothing.
        progress: Reports progress.

    Raises:
        ModelError: The model cannot be split.
        EditError: Nothing is constant.
    """

    def __init__(
        self,
        facts: ModelFacts,
        compute: ComputeContext,
        *,
        fast: bool = False,
        precision: CachePrecision = "full",
        keep_pixels: bool = False,
        store: Store | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.preprocessing, self._model = facts.preprocessing, facts.model
        self._input_dtype = compute.input_dtype or torch.float32
        example = torch.empty(self.preprocessing.input_size, dtype=self._input_dtype)
        self.parts: Partition = partition(self._model, example)
        self.compute, self.store, self.progress = compute, store, progress
        self.precision: CachePrecision = precision
        self._is_verified = False
        self._has_halves = any(parameter.dtype in HALVES for parameter in self._model.parameters())
        fast = fast and not self._has_halves  # folding rounds a 16-bit weight once more
        self._fast, self._keep_pixels = fast, keep_pixels
        self.digest = network_digest(self.parts.prefix) if store is not None else ""
        self._prefix = faster(self.parts.prefix) if fast else self.parts.prefix

    def features_of(self, photos: Photos, description: str) -> tuple[Features, Photos, tuple[Unreadable, ...]]:
        """Return the features of photos; if an earlier run cached them, nearly no photo is decoded.

        Args:
            photos: The photos, decoded or not, with a finite number of views.
            description: Label of the progress bar.

        Returns:
            The features, the readable photos, and the unreadable files.

        Raises:
            DataError: No photo can be read.
            ModelError: The network is not deterministic, or there is no room for the features.
        """
        began = time.perf_counter()
        key = self.key_of(photos)
        if (cached := self._find_cached(key)) is not None:
            rows, note = cached
            photos, unreadable = photos.without(note["unreadable"])
            return self._features(rows, note, photos, began, was_found=True), photos, unreadable
        ranks, lost = self.compute.ranks, dict[int, str]()
        while True:
            readable, _ = photos.without(lost)
            own = ranks.share(len(readable), multiple=BATCH.get(self.compute.device.type, 16))
            share = readable.subset(range(own.start, own.stop)) if ranks.size > 1 else readable
            with self._open_writer(key, photos) as writer:
                extraction = _Extraction(self, photos.views, writer, first=own.start)
                share, unreadable = share.read(
                    description=description,
                    progress=self.progress,
                    on_photo=extraction.add,
                    keep=self._keep_pixels and ranks.size == 1,
                    is_ahead=self.compute.device.type != "cpu",
                    may_be_empty=ranks.size > 1,
                )
                newly_lost = ranks.union(positions(photos.samples, unreadable))
                lost = {**lost, **newly_lost}
                if len(lost) == len(photos):
                    require_readable(photos, photos.without(lost)[1])
                if ranks.size == 1 or not (newly_lost and photos.views.is_random):
                    rows, note = extraction.finish(lost)
                    break
            # The views of a photo follow from its index among the readable ones, which the share before it has changed.
        readable, all_unreadable = photos.without(lost)
        readable = share if ranks.size == 1 else readable
        return self._features(rows, note, readable, began, was_found=False), readable, all_unreadable

    def is_cached(self, photos: Photos) -> bool:
        """Return whether an earlier run has computed the features of these photos."""
        return self.store is not None and self.store.find(self.key_of(photos)) is not None

    def keep_joined(self, photos: Photos, views: Sequence[Features], unreadable: dict[int, str]) -> None:
        """Write the entry of photos with V views, from the features of each view alone; nothing is computed.

        Args:
            photos: All photos, with the V views.
            views: The features of the readable ones in each view, in the order of the views.
            unreadable: The other photos, by their indices, with the reasons.
        """
        key, count = self.key_of(photos), len(photos) - len(unreadable)
        with self._open_writer(key, photos) as writer:
            for rows in torch.arange(count).split(BATCH["cuda"]):
                parts = zip(*([tensor[rows] for tensor in view.tensors] for view in views), strict=True)
                writer.append([torch.stack(part, 1).flatten(0, 1) for part in parts])  # (n * V, …)
            holds = f"{count} photos × {len(views)} at {', '.join(cut.place for cut in self.parts.frontier)}"
            errors, seconds = (view.error for view in views), sum(view.cost_s for view in views)
            writer.finish({"unreadable": unreadable, "error": max(errors), "seconds": seconds, "holds": holds})

    def run(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the frontier's tensors of a batch (N, C, size, size) of uint8, on the model's device.

        Raises:
            ModelError: The constant part fails.
            torch.OutOfMemoryError: The batch does not fit into memory.
        """
        with _as_model_errors("its constant part"), torch.inference_mode(), self.compute.autocast():
            return [tensor.contiguous() for tensor in self._prefix(self._batch(pixels))]

    def _batch(self, pixels: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.compute.has_channels_last else torch.contiguous_format
        batch = normalize(pixels.to(self.compute.device), self.preprocessing)
        return batch.to(self._input_dtype, memory_format=layout)

    def key_of(self, photos: Photos) -> str:
        """Return the key of the features of photos in the store; empty without one."""
        if self.store is None:
            return ""
        return features_key(
            self.digest,
            [sample.path for sample in photos.samples],
            digests_of=lambda files: self.compute.ranks.spread(file_digests, files),
            preprocessing=self.preprocessing.cache_key(),
            views=photos.views.name,
            precision=f"{self.compute.autocast_dtype} {self.precision}",
            device=self.compute.device.type,
            fast=self._fast,
        )

    def _find_cached(self, key: str) -> tuple[tuple[Rows, ...], dict[str, Any]] | None:
        entry = self.store.find(key) if self.store is not None else None
        if not all(self.compute.ranks.objects(entry is not None)):  # other machines may have caches of their own
            return None
        return (entry.tensors(in_memory=entry.bytes < MEMORY_BYTES), entry.note) if entry is not None else None

    def _open_writer(self, key: str, photos: Photos) -> FeatureWriter | ShardedWriter:
        assert photos.views.count is not None
        rows = len(photos) * photos.views.count
        # An upper bound: autocast halves some of the tensors, which is known only when they are computed.
        size = sum(packed_bytes(rows, cut.shape, cut.dtype, self.precision) for cut in self.parts.frontier)
        ranks = self.compute.ranks
        if ranks.size > 1:
            in_memory = size < MEMORY_BYTES
            return ShardedWriter(self.store, key, size, in_memory=in_memory, progress=self.progress, ranks=ranks)
        writer = FeatureWriter(self.store, key, size, in_memory=size < MEMORY_BYTES, progress=self.progress)
        if writer.has_place:
            return writer
        if size < MEMORY_SHARE * free_memory_bytes():
            return FeatureWriter(None, key, size, in_memory=True, progress=self.progress)
        raise ModelError(
            f"{size / 2**30:.1f} GiB for what is computed once fit neither into memory nor on the disk "
            "(REGRAFT_CACHE names another folder, REGRAFT_CACHE_GIB a limit other than 20 GiB)"
        )

    def _features(
        self, rows: tuple[Rows, ...], note: dict[str, Any], photos: Photos, began: float, *, was_found: bool
    ) -> Features:
        place = "memory" if all(isinstance(tensor, torch.Tensor) for tensor in rows) else "disk"
        if self.compute.device.type == "cuda" and place == "memory":
            free, _ = torch.cuda.mem_get_info(self.compute.device)
            tensors = [tensor for tensor in rows if isinstance(tensor, torch.Tensor)]
            if sum(tensor.nbytes for tensor in tensors) < MEMORY_SHARE * free:
                rows, place = tuple(tensor.to(self.compute.device) for tensor in tensors), str(self.compute.device)
        assert photos.views.count is not None
        features = Features(
            rows,
            tuple(cut.dtype for cut in self.parts.frontier),
            self.precision,
            note["error"],
            photos.views.count,
            time.perf_counter() - began,
            note["seconds"],
            was_found,
            place,
            self.compute.device,
        )
        self._check(features, photos)
        return features

    def _check(self, features: Features, photos: Photos) -> None:
        """Compare kept features with recomputed ones, and, once, both parts with the whole network.

        The second comparison runs outside of autocast, without kept features: the rounding of autocast and of fewer
        bits grows from layer to layer, and could not be told from an error.

        Raises:
            ModelError: Values differ, as something is random or mixes the images of a batch without declaring it; or
                they are not finite.
        """
        indices = torch.arange(CHECKED) * (len(photos) - 1) // max(1, CHECKED - 1)
        batch = self._batch(
            torch.stack([photos.views.of(index, photos.decoded(index), 0) for index in indices.tolist()])
        )
        kept, suffix = features.pick(indices * features.views), self.parts.suffix
        of_weights = TOLERANCES["bf16" if self._has_halves else "full"]
        is_mixed = self.compute.autocast_dtype is not None
        tolerance = max(TOLERANCES[self.precision], TOLERANCES["bf16"] if is_mixed else of_weights)
        with evaluation_mode(self._model), evaluation_mode(suffix), torch.no_grad():
            with self.compute.autocast():
                recomputed = self._prefix(batch)
            for value, reference in zip(kept, recomputed, strict=True):
                _require_same(value, reference, tolerance)
            if not self._is_verified:
                with _as_model_errors("it, outside of autocast," if is_mixed else "it"):
                    # Photo by photo, so that a network that mixes the images of a batch differs from its parts.
                    whole = torch.cat([main_output(self._model(photo)) for photo in batch.split(1)])
                    parted = suffix(*(self._prefix(batch) if is_mixed else recomputed))
                _require_same(main_output(parted), whole, of_weights)
        self._is_verified = True


@contextlib.contextmanager
def _as_model_errors(what: str) -> Iterator[None]:
    """Turn the errors of a forward inside the block into a ModelError, except out-of-memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{what} fails: {reason}") from error


def _require_same(values: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """Raise a ModelError if values differ by more than `tolerance` times the largest absolute value."""
    distance, largest = (values.float() - reference.float()).abs().max(), reference.float().abs().max()
    if not largest.isfinite():
        raise ModelError(f"what is constant is not finite for some photo ({largest:g}, in {reference.dtype})")
    if not distance <= tolerance * largest.clamp(min=1e-6):
        raise ModelError(
            f"the network does not give the same values for the same photo twice (they differ by {distance:.2g}), "
            "although nothing in it is declared to be random"
        )


class _Extraction:
    """Collects photos into batches, computes their features, and writes them, while the device computes the next."""

    def __init__(
        self, extractor: Extractor, views: Views, writer: FeatureWriter | ShardedWriter, first: int = 0
    ) -> None:
        assert views.count is not None
        self._extractor, self._views, self._views_per_photo, self._writer = extractor, views, views.count, writer
        self._batch = BATCH.get(extractor.compute.device.type, 16)
        self._copies = DeviceCopies(extractor.compute.device)
        self._waiting: list[torch.Tensor] = []
        self._computed: deque[HostCopy] = deque()
        self._first = self._count = first  # index of the next photo
        self._began = time.perf_counter()
        self._rounding: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # largest error and value of each tensor

    def add(self, pixels: torch.Tensor) -> None:
        """Add the next photo (C, H, W)."""
        self._waiting.append(pixels)
        self._count += 1
        if len(self._waiting) * self._views_per_photo >= self._batch:
            self._flush()

    def finish(self, unreadable: dict[int, str]) -> tuple[tuple[Rows, ...], dict[str, Any]]:
        """Return the rows of all added photos, and the note that is stored with them.

        Raises:
            ModelError: A value does not fit into the chosen precision, or the features fit nowhere.
        """
        if self._waiting:
            self._flush()
        self._write(but=0)
        precision = self._extractor.precision
        rounding = [(float(error), float(largest)) for error, largest in self._rounding.values()]
        error = max((error / max(largest, 1e-30) for error, largest in rounding), default=0.0)
        if precision != "full" and not error <= TOLERANCES[precision]:
            raise ModelError(
                f"what is constant holds values that {precision} has no room for, too large or too small; "
                f"{option('cache_precision', 'bf16')} has"
            )
        parts = self._extractor.parts
        places = ", ".join(cut.place for cut in parts.frontier)
        holds = f"{self._count - self._first} photos × {self._views_per_photo} at {places}"
        note = {
            "unreadable": unreadable,
            "error": error,
            "seconds": time.perf_counter() - self._began,
            "holds": holds,
        }
        rows = self._writer.finish(note)
        if rows is None:
            raise ModelError("what is computed once has no room in memory, and cannot be written")
        return rows, note

    def _flush(self) -> None:
        """Compute the features of the waiting photos; halve the batch on out-of-memory."""
        pixels = self._views.all_of(self._count - len(self._waiting), self._waiting, self._copies)
        self._waiting = []
        while len(pixels):
            try:
                features = self._extractor.run(pixels[: self._batch])
            except torch.OutOfMemoryError as error:
                device = self._extractor.compute.device
                if self._batch == 1:
                    raise ModelError(f"{device} has no memory for a single photo") from error
                half = self._batch // 2
                message = f"memory     {device} has none for {self._batch} photos at a time: {half} from here on"
                self._batch = half
            else:
                pixels = pixels[self._batch :]
                self._keep(features)
                continue
            torch.cuda.empty_cache()  # outside of the except block, whose exception keeps tensors alive
            self._extractor.progress.say(message)

    def _keep(self, features: list[torch.Tensor]) -> None:
        precision = self._extractor.precision
        kept = packed(features, precision)
        # The true rounding error of these values is measured, for the report and to notice overflow.
        if precision != "full":
            restored = unpacked(kept, [tensor.dtype for tensor in features], precision)
            for number, (rounded, exact) in enumerate(zip(restored, features, strict=True)):
                rounded, exact = rounded.float(), exact.float()
                error, largest = (rounded - exact).abs().max(), exact.abs().max()
                known = self._rounding.get(number, (error, largest))
                self._rounding[number] = torch.maximum(known[0], error), torch.maximum(known[1], largest)
        self._computed.append(HostCopy(kept))
        self._write(but=MAX_COMPUTED)

    def _write(self, *, but: int) -> None:
        while len(self._computed) > but:
            self._writer.append(self._computed.popleft().tensors())
