"""The frontier of every photo: computed once, kept, and fed to the live part in every epoch."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from regraft.anatomy.modes import evaluation_mode
from regraft.data.decode import Unreadable
from regraft.data.folders import Sample
from regraft.data.photos import Photos, SeededShuffle, free_memory_bytes, leaves_one, read_photos
from regraft.data.transforms import Versions, normalize
from regraft.errors import ModelError
from regraft.frontier.key import features_key, network_digest
from regraft.frontier.partition import Partition, partition
from regraft.frontier.speed import faster
from regraft.frontier.store import Entry, Rows, Store, Writing
from regraft.progress import SILENT, Progress
from regraft.training.loop import Engine, main_output
from regraft.zoo import preprocessing_of

BATCH = {"cpu": 32, "cuda": 256}  # photos that go through the constant part at a time
MEMORY_BYTES = 512 * 2**20  # of features; larger ones are mapped from the disk
MEMORY_SHARE = 0.25  # of what is free, for features that the disk has no room for
CHECKED = 2  # photos that are computed again, to see that they are what is kept
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest value


@dataclass(frozen=True)
class Features:
    """The frontier's tensors for every version of every photo; row `index * views + view`.

    Attributes:
        tensors: For each tensor of the frontier, rows (N * V, …).
        views: Number of versions V of each photo.
        seconds: What it took to compute or find them.
        was_found: Whether an earlier run had computed them.
        place: `memory`, `disk`, or the name of a device.
    """

    tensors: tuple[Rows, ...]
    views: int
    seconds: float
    was_found: bool
    place: str

    def pick(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return some rows of each tensor, on its device."""
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)


class Extractor:
    """Computes features with the constant part of a model.

    Args:
        model: The model, on its device, with its flags as they will be while it trains.
        engine: Where and in which precision.
        fast: Whether the constant part may be replaced by a faster copy, equal up to rounding (see `faster`).
        keep_pixels: Whether decoded photos stay in memory, as the network will be split again.
        store: Where features are kept between runs; None keeps nothing.
        progress: Is told what happens.

    Raises:
        ModelError: The model cannot be split.
        EditError: Nothing is constant.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        *,
        fast: bool,
        keep_pixels: bool,
        store: Store | None,
        progress: Progress = SILENT,
    ) -> None:
        self.preprocessing = preprocessing_of(model)
        self.parts: Partition = partition(model, torch.empty(self.preprocessing.input_size))
        self.engine = engine
        self._model, self._is_proven = model, False
        self.store = store
        self.progress = progress
        self._fast, self._keep_pixels = fast, keep_pixels
        self._digest = network_digest(self.parts.prefix) if store is not None else ""
        self._prefix = faster(self.parts.prefix) if fast else self.parts.prefix

    def of_samples(
        self,
        samples: Sequence[Sample],
        versions: Versions,
        classes: tuple[str, ...] | None,
        *,
        description: str,
    ) -> tuple[Features, Photos, tuple[Unreadable, ...]]:
        """Return the features of photo files, decoding none of them where an earlier run kept what is needed.

        Args:
            samples: Files and what they show.
            versions: What the network may see of each; a known number.
            classes: Class names; None for regression.
            description: What is said of it while it goes on.

        Raises:
            DataError: No photo can be read.
            ModelError: The constant part does not give the same values twice.
        """
        began = time.perf_counter()
        key = self._key([sample.path for sample in samples], versions) if self.store else ""
        entry = self.store.find(key) if self.store else None
        if entry is not None:
            lost = {int(index): reason for index, reason in entry.note["unreadable"].items()}
            readable = [sample for index, sample in enumerate(samples) if index not in lost]
            photos = Photos(tuple(readable), self.preprocessing, versions, classes)
            features = self._features(self._opened(entry), photos, began, was_found=True)
            self._check(features, photos)
            return features, photos, tuple(Unreadable(samples[index].path, reason) for index, reason in lost.items())
        with self._extraction(key, len(samples), versions) as extraction:
            photos, unreadable = read_photos(
                samples,
                self.preprocessing,
                classes=classes,
                description=description,
                progress=self.progress,
                on_photo=lambda _, pixels: extraction.add(pixels),
                keep=self._keep_pixels,
            )
            photos = photos.augmented(versions)
            places = {sample.path: index for index, sample in enumerate(samples)}
            rows = extraction.finish({places[found.path]: found.reason for found in unreadable})
        features = self._features(rows, photos, began, was_found=False)
        self._check(features, photos)
        return features, photos, unreadable

    def of_photos(self, photos: Photos) -> Features:
        """Return the features of photos that were read before.

        Raises:
            ModelError: The constant part does not give the same values twice.
        """
        began = time.perf_counter()
        key = self._key([sample.path for sample in photos.samples], photos.versions) if self.store else ""
        entry = self.store.find(key) if self.store else None
        if entry is not None:
            rows = self._opened(entry)
        else:
            with self._extraction(key, len(photos), photos.versions) as extraction:
                for index in range(len(photos)):
                    extraction.add(photos.decoded(index))
                rows = extraction.finish({})
        features = self._features(rows, photos, began, was_found=entry is not None)
        self._check(features, photos)
        return features

    def _key(self, files: Sequence[Path], versions: Versions) -> str:
        return features_key(
            self._digest,
            files,
            preprocessing=self.preprocessing.model_dump(),
            views=versions.name,
            precision=str(self.engine.autocast_dtype),
            device=self.engine.device.type,
            fast=self._fast,
        )

    @contextlib.contextmanager
    def _extraction(self, key: str, count: int, versions: Versions) -> Iterator["_Extraction"]:
        views = versions.count
        assert views is not None
        size = count * views * self.parts.bytes
        writing = None
        if self.store is not None and self.store.has_room(size):
            self.store.make_room(size)
            with contextlib.suppress(OSError):
                writing = self.store.write(key, {"frontier": [cut.layer for cut in self.parts.frontier]})
        in_memory = size < MEMORY_BYTES
        if writing is None and not in_memory and not (in_memory := size < MEMORY_SHARE * free_memory_bytes()):
            raise ModelError(
                f"{size / 2**30:.1f} GiB for what is computed once fit neither into memory nor on the disk "
                "(REGRAFT_CACHE names another folder)"
            )
        extraction = _Extraction(self, versions, views, writing, in_memory=in_memory)
        try:
            yield extraction
        finally:
            extraction.close()

    def run(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the frontier of a few photos, each (C, size, size) of uint8, on the model's device."""
        with torch.inference_mode(), self.engine.autocast():
            return [tensor.contiguous() for tensor in self._prefix(self._batch(pixels))]

    def _batch(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = normalize(torch.stack(list(pixels)), self.preprocessing)
        layout = torch.channels_last if self.engine.has_channels_last else torch.contiguous_format
        return batch.to(self.engine.device, memory_format=layout)

    def _opened(self, entry: Entry) -> tuple[Rows, ...]:
        return entry.tensors(in_memory=entry.bytes < MEMORY_BYTES)

    def _features(self, rows: tuple[Rows, ...], photos: Photos, began: float, *, was_found: bool) -> Features:
        place = "memory" if all(isinstance(tensor, torch.Tensor) for tensor in rows) else "disk"
        if self.engine.device.type == "cuda" and place == "memory":
            free, _ = torch.cuda.mem_get_info(self.engine.device)
            tensors = [tensor for tensor in rows if isinstance(tensor, torch.Tensor)]
            if sum(tensor.nbytes for tensor in tensors) < MEMORY_SHARE * free:
                rows, place = tuple(tensor.to(self.engine.device) for tensor in tensors), str(self.engine.device)
        assert photos.versions.count is not None
        return Features(rows, photos.versions.count, time.perf_counter() - began, was_found, place)

    def _check(self, features: Features, photos: Photos) -> None:
        """Compute a few photos again, with the constant part and, once, with the whole network.

        Raises:
            ModelError: What is kept differs from either: something draws at random, or mixes the images of a batch,
                and nothing declares it.
        """
        indices = torch.arange(CHECKED) * (len(photos) - 1) // max(1, CHECKED - 1)
        batch = self._batch([photos.versions.of(index, photos.decoded(index), 0) for index in indices.tolist()])
        kept = tuple(tensor.to(batch.device) for tensor in features.pick(indices * features.views))
        suffix = self.parts.suffix
        with evaluation_mode(self._model), evaluation_mode(suffix), torch.no_grad(), self.engine.autocast():
            pairs = list(zip(kept, self._prefix(batch), strict=True))
            if not self._is_proven:
                whole = torch.cat([main_output(self._model(photo)) for photo in batch.split(1)])
                pairs.append((main_output(suffix(*kept)), whole))
        for ours, theirs in pairs:
            distance = (ours.float() - theirs.float()).abs().max()
            if not distance <= TOLERANCE.get(theirs.dtype, 1e-3) * theirs.float().abs().max().clamp(min=1e-6):
                raise ModelError(
                    "the network does not give the same values for the same photo twice (they differ by "
                    f"{distance:.2g}), although nothing in it is declared to be random"
                )
        self._is_proven = True


class _Extraction:
    """Gathers photos into batches, and their features into memory, into an entry, or both."""

    def __init__(
        self, extractor: Extractor, versions: Versions, views: int, writing: Writing | None, *, in_memory: bool
    ) -> None:
        self._extractor, self._versions, self._views, self._writing = extractor, versions, views, writing
        self._batch = BATCH.get(extractor.engine.device.type, 32)
        self._kept: list[list[torch.Tensor]] | None = [] if in_memory else None
        self._waiting: list[torch.Tensor] = []
        self._count = 0

    def add(self, pixels: torch.Tensor) -> None:
        """Take the next photo (C, H, W)."""
        self._waiting += [self._versions.of(self._count, pixels, view) for view in range(self._views)]
        self._count += 1
        while len(self._waiting) >= self._batch:
            self._flush()

    def finish(self, unreadable: dict[int, str]) -> tuple[Rows, ...]:
        """Return the rows of all photos that were taken."""
        while self._waiting:
            self._flush()
        entry = None
        if self._writing is not None:
            try:
                entry, self._writing = self._writing.finish(unreadable=unreadable), None
            except OSError as error:
                self._give_up_writing(error)
        if self._kept is not None:
            return tuple(torch.cat(parts) for parts in zip(*self._kept, strict=True))
        assert entry is not None
        return entry.tensors(in_memory=False)

    def close(self) -> None:
        """Delete what was not completed."""
        if self._writing is not None:
            self._writing.abandon()
            self._writing = None

    def _flush(self) -> None:
        now, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        found = [tensor.cpu() for tensor in self._extractor.run(now)]
        if self._kept is not None:
            self._kept.append(found)
        if self._writing is not None:
            try:
                self._writing.append(found)
            except OSError as error:
                self._give_up_writing(error)

    def _give_up_writing(self, error: OSError) -> None:
        self.close()
        if self._kept is None:
            raise ModelError(f"what is computed once cannot be written: {error}") from error
        self._extractor.progress.say(f"frontier   what is computed once is not kept for the next run: {error}")


class FeatureBatches:
    """Batches ((tensors of the frontier), targets) for the live part.

    Args:
        features: Rows of all photos and versions.
        photos: Whose rows they are.
        batch_size: N.
        sampler: Draws order and versions anew in each epoch; None: the photos in order, in their first version.
    """

    def __init__(
        self, features: Features, photos: Photos, batch_size: int, sampler: SeededShuffle | None = None
    ) -> None:
        self.features, self.dataset, self.batch_size, self.sampler = features, photos, batch_size, sampler
        self.targets = torch.tensor([sample.target for sample in photos.samples])
        if any(isinstance(tensor, torch.Tensor) and tensor.is_cuda for tensor in features.tensors):
            self.targets = self.targets.to(features.place)
        self._drops_last = sampler is not None and leaves_one(len(photos), batch_size)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self._drops_last)

    def __iter__(self) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        count = len(self.dataset)
        order, draws = self.sampler.draw() if self.sampler else (torch.arange(count), torch.zeros(count).long())
        for step in range(len(self)):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield self.pick(order[part], draws[part])

    def pick(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Return features and targets of some photos, in the versions that the numbers in `draws` stand for."""
        rows = indices * self.features.views + draws % self.features.views
        return self.features.pick(rows), self.targets[indices.to(self.targets.device)]
