"""What a training that follows the advice would compute once, written into the cache where it looks for it."""

from dataclasses import replace

from regraft.advice.activations import Activations
from regraft.anatomy.model_facts import ModelFacts
from regraft.data.photos import Photos, positions
from regraft.data.transforms import augmentation
from regraft.frontier.cache.store import Store
from regraft.progress import Progress
from regraft.training.config import TrainConfig
from regraft.training.features.extract import Extractor
from regraft.training.features.pixels import store_pixels
from regraft.training.setup import make_extractor
from regraft.training.steps.compute import ComputeContext


def prepare_training(
    facts: ModelFacts,
    train: Photos,
    validation: Photos,
    activations: Activations,
    config: TrainConfig,
    compute: ComputeContext,
    progress: Progress,
) -> None:
    """Compute what `fit` would compute once for this network, its flags and these options, and keep it for `fit`.

    Where nothing of the network is constant, or each epoch draws its photos anew, the decoded photos are kept.

    Args:
        facts: The network with the flags of the advice.
        train: All training photos, as listed.
        validation: All validation photos, as listed.
        activations: Those of the training photos.
        config: Options of the training.
        compute: Device and precision.
        progress: Reports progress.

    Raises:
        ModelError: The network does not give the same twice, or the features fit nowhere.
    """
    views = augmentation(config.augment, train.preprocessing, config.views)
    decoded = activations.photos
    extractor, _ = make_extractor(facts, (train, validation), config, compute, progress)
    if extractor is None:
        if not config.cache:
            return
        store_pixels(train, decoded, activations.lost, Store(), progress)
        readable, unreadable = validation.read(description="reading validation photos", progress=progress)
        store_pixels(validation, readable, positions(validation.samples, unreadable), Store(), progress)
        return
    if views.is_mirrored and extractor.is_cached(train):
        _keep_mirrored(extractor, train, activations, config)
    else:
        _keep(extractor, train.augmented(views), activations, "computing what is frozen")
    extractor.features_of(validation, "computing validation photos")


def _keep(extractor: Extractor, photos: Photos, activations: Activations, description: str) -> None:
    """Compute the features of photos from those that are decoded already."""
    if activations.lost:  # the key is that of all photos, of which the decoded ones are a part
        extractor.features_of(photos, description)
        return
    extractor.features_of(replace(photos, pixels=activations.photos.pixels), description)


def _keep_mirrored(extractor: Extractor, photos: Photos, activations: Activations, config: TrainConfig) -> None:
    """Compute the features of the mirror images alone: those of the photos themselves are known."""
    both = augmentation("flip", photos.preprocessing)
    if extractor.is_cached(photos.augmented(both)):
        return
    decoded = activations.photos
    plain, _, _ = extractor.features_of(photos, "")
    mirrored = replace(both, name="mirrored", crop=lambda pixels: both.crop(pixels).flip(-1), is_mirrored=False)
    mirrors, readable, _ = extractor.features_of(decoded.augmented(mirrored), "computing mirror images")
    if len(readable) == len(decoded):
        extractor.keep_joined(photos.augmented(both), (plain, mirrors), activations.lost)
