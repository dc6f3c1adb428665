"""What all cells of a grid share: the network, the decoded photos, and the features of the frozen network."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.modes import preserved_randomness
from regraft.card import card_of
from regraft.checkpoint.create import is_checkpoint
from regraft.data.photos import Photos
from regraft.data.samples import Listing
from regraft.data.transforms import augmentation
from regraft.progress import SILENT, Progress
from regraft.training.config import TrainConfig
from regraft.training.features.subsets import store_subset
from regraft.training.setup import make_extractor, prepare_model
from regraft.training.steps.compute import choose_compute
from regraft.training.train_data import load_train_data
from regraft.trials.cells import draw
from regraft.trials.ways import LayerSplit

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        name: Name of the network.
        listing: The photos, without those that cannot be read.
        train: Training photos, decoded.
        validation: Validation photos, decoded.
        config: The options that all ways share.
        trust_code: Whether custom code may be imported.
        layers: LayerSplit of the network.
        has_weights: Whether the network has pretrained weights.
        decode_s: Seconds to decode a photo, on average.
        unreadable: Number of files that cannot be read.
    """

    name: str
    listing: Listing
    train: Photos
    validation: Photos
    config: TrainConfig
    trust_code: bool
    layers: LayerSplit
    has_weights: bool
    decode_s: float
    unreadable: int

    @property
    def targets(self) -> list[int]:
        """Classes of the training photos."""
        return [int(sample.target) for sample in self.train.samples]

    @property
    def chance(self) -> float:
        """Share of the most frequent class among the validation photos."""
        targets = torch.tensor([int(sample.target) for sample in self.validation.samples])
        return float(targets.bincount().max()) / len(targets)

    def network(self, config: TrainConfig) -> ModelFacts:
        """Build the network with its weights and a new head, and freeze what the options say, as `fit` does."""
        with preserved_randomness(config.seed):
            return prepare_model(self.name, self.listing, config, SILENT, trust_code=self.trust_code)


def open_bench(name: str, listing: Listing, config: TrainConfig, progress: Progress, *, trust_code: bool) -> Bench:
    """Build the network once, and decode each photo once.

    Raises:
        InputError: The network cannot be built, or too many photos cannot be read.
    """
    with progress.status(f"preparing {name}"), preserved_randomness(config.seed):
        facts = prepare_model(name, listing, config, SILENT, trust_code=trust_code)
        recipe = card_of(facts.model).recipe
        is_own = is_checkpoint(name) and config.weights == "default"
        has_weights = is_own or (recipe is not None and recipe.source.weights != "none")
    began = time.perf_counter()
    # On the CPU, where all runs find them; each run on a GPU copies its photos there.
    loaded = load_train_data(listing, listing, facts.preprocessing, config.updated(cache=False), CPU, progress)
    seconds = time.perf_counter() - began
    assert loaded.photos is not None
    train, validation = (part.augmented(augmentation("none", part.preprocessing)) for part in loaded.photos)
    return Bench(
        name=name,
        listing=replace(listing, train=train.samples, validation=validation.samples),
        train=train,
        validation=validation,
        config=config,
        trust_code=trust_code,
        layers=LayerSplit.of(facts),
        has_weights=has_weights,
        decode_s=seconds / (len(train) + len(validation)),
        unreadable=len(loaded.unreadable),
    )


def share_features(bench: Bench, subsets: Iterable[tuple[str, int]], progress: Progress) -> None:
    """Compute what the frozen network gives for all photos once, and store it for the runs on some of them.

    Args:
        bench: What all cells share.
        subsets: (images, seed) of the runs that train a head on the frozen network.
        progress: Reports progress.
    """
    config = bench.config
    facts = bench.network(config)
    compute = replace(choose_compute(config.device, config.precision), has_channels_last=config.fast)
    facts.model.to(compute.device)
    views = augmentation(config.augment, bench.train.preprocessing, config.views)
    train = bench.train.augmented(views)
    extractor, _ = make_extractor(facts, (train, bench.validation), config, compute, progress)
    if extractor is None:
        return
    features, _, _ = extractor.features_of(train, "computing features")
    extractor.features_of(bench.validation, "computing validation features")
    for images, seed in dict.fromkeys(subsets):
        indices = draw(bench.targets, images, seed)
        if len(indices) < len(train):
            store_subset(extractor, features, train, indices)
