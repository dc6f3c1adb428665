"""Evaluate a trained model on photos, and predict what photos show."""

import glob
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from regraft.arguments import check_arguments, check_minimum, check_path, check_weights
from regraft.card import Card, Preprocessing, card_of
from regraft.console import progress_of
from regraft.data.decoding.engines import describe_engine, require_engine, usable_engine
from regraft.data.decoding.files import Unreadable, decode, quiet_decoders
from regraft.data.folders import list_labelled, list_regression, photos_in
from regraft.data.hugging_face import list_dataset_labelled
from regraft.data.items import ItemCollate, is_torch_dataset, item_loader, length_of
from regraft.data.photos import loader, read_photos
from regraft.data.samples import Sample, Task, held_out
from regraft.data.shards.layout import find_shards
from regraft.data.shards.listing import find_member, members_of
from regraft.data.sources import ShardMember, Source
from regraft.data.transforms import augmentation, center_crop, normalize
from regraft.errors import ArgumentError, DataError, ModelError, RegraftError
from regraft.progress import Progress
from regraft.train_options import Decoder
from regraft.training.checks.targets import class_labels, has_one_hot_rows
from regraft.training.checks.weight_types import compute_for, type_names
from regraft.training.doubt.familiarity import head_inputs, resemblance
from regraft.training.loop import score
from regraft.training.metrics import Metrics, Scores, measure
from regraft.training.steps.compute import ComputeContext
from regraft.training.train_data import pairs_of
from regraft.wording import for_caller, option
from regraft.zoo import preprocessing_of

BATCH_SIZE = 32
UNKNOWN = "unknown"  # label of a photo that resembles no class


@dataclass(frozen=True, repr=False)
class Prediction:
    """The prediction for one photo.

    Attributes:
        path: The file, or the place in a shard; None for opened images.
        label: The most probable class, or `unknown` (see `reject` in `predict`); None for regression.
        probability: Its probability; None for regression and for `unknown`.
        top: The most probable classes with their probabilities, in order.
        value: The predicted number; None for classification.
        resemblance: Share of the validation photos of the training that resemble its photos no more than this one does;
            0: every one resembles them more. None if the model does not know.
    """

    path: Source | None
    label: str | None = None
    probability: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    value: float | None = None
    resemblance: float | None = None

    def __repr__(self) -> str:
        name = f"{str(self.path)!r}: " if self.path else ""
        answer = f"{self.value:.4g}" if self.value is not None else repr(self.label)
        answer += f" {self.probability:.3f}" if self.probability is not None else ""
        return f"Prediction({name}{answer})"

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON data."""
        values = {"label": self.label, "probability": self.probability, "value": self.value}
        values["resemblance"] = self.resemblance
        known = {name: value for name, value in values.items() if value is not None}
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"path": str(self.path) if self.path else None, **known, **({"top": top} if top else {})}


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device = "auto",
    decoder: Decoder | None = None,
    progress: Progress | bool = True,
) -> Metrics:
    """Measure `model` on labelled photos.

    `write_report(evaluate(model, data), path)` writes the report of the evaluation.

    Args:
        model: A model that knows its classes and preprocessing, as `load` and `fit` return it.
        data: A folder with a folder per class, or one that holds `val/`; a folder of shards; a `.csv` table for
            regression; or a Dataset or DataLoader, of every kind that `fit` takes. Of the very data that `fit` drew its
            validation photos from, only these are measured.
        batch_size: Photos per batch.
        device: `auto`, `cpu`, `cuda`, …
        decoder: How photos are decoded, see `TrainConfig`; None: as when the model was trained.
        progress: Whether a bar and the files that are skipped are shown, or where; see `fit`.

    Raises:
        DataError: The data is missing, empty, unreadable, or has a class that the model does not know.
        ModelError: The model does not know its classes.
    """
    check_arguments(evaluate, locals())
    listener = progress_of(progress)
    check_minimum(evaluate, 1, batch_size=batch_size)
    batch_size = int(batch_size)  # torch does not accept NumPy integers
    check_weights(evaluate, "model", model)
    began = time.perf_counter()
    compute = compute_for(model, device)
    model.to(compute.device)
    known = card_of(model).classes
    rows = list_dataset_labelled(data, known) if known is not None else None
    if not isinstance(data, (str, os.PathLike)) and rows is None:
        batches = data
        if is_torch_dataset(data):
            preprocessing = preprocessing_of(model)
            batches = item_loader(data, batch_size, ItemCollate(preprocessing, augmentation("none", preprocessing)))
        outputs, targets = _score(model, listener.track(pairs_of(batches), "evaluating", length_of(batches)), compute)
        task = card_of(model).task or _infer_task(targets)
        names = card_of(model).classes or tuple(map(str, range(outputs.shape[-1])))
        metrics = measure(outputs, targets, None if task == "regression" else names)
        labels = targets if task == "regression" else class_labels(outputs, targets)
        seconds = {"evaluating": time.perf_counter() - began}
        return replace(metrics, scores=Scores(outputs, labels, model=_name(model), seconds=seconds))
    if rows is None:
        check_path(evaluate, "data", data)
    card = _require_task(model)
    samples = rows or (list_regression(data) if card.classes is None else list_labelled(data, card.classes))
    if (rest := held_out(samples, card.split)) is not None:
        listener.say(f"photos     {len(samples) - len(rest)} of {len(samples)} were trained on, and are left out")
        samples = rest
    preprocessing = _preprocessing(model, decoder, compute, listener)
    with compute.current():
        photos, unreadable = read_photos(samples, preprocessing, classes=card.classes, progress=listener)
    _report_skipped(unreadable, listener)
    read = time.perf_counter()
    batches = listener.track(loader(photos, batch_size), "evaluating", -(-len(photos) // batch_size))
    outputs, targets = _score(model, batches, compute)
    metrics = measure(outputs, targets, card.classes)
    scores = Scores(
        outputs,
        targets,
        paths=tuple(sample.path for sample in photos.samples),
        unreadable=unreadable,
        model=_name(model),
        data=str(data) if rows is None else None,
        seconds={"reading": read - began, "evaluating": time.perf_counter() - read},
        is_held_out=rest is not None,
    )
    return replace(metrics, scores=scores)


def predict(
    model: nn.Module,
    images: Any,
    *,
    top: int = 5,
    reject: float | None = None,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device = "auto",
    decoder: Decoder | None = None,
    progress: Progress | bool = True,
) -> list[Prediction]:
    """Classify photos.

    The probabilities of a network that `fit` trained are calibrated on photos that it has not learned from.

    Args:
        model: A model that knows its classes and preprocessing, as `load` and `fit` return it.
        images: A path of a photo or of a folder of photos (folders below it included) or of shards, a pattern of paths
            such as `new/*.jpg`, a `PIL.Image`, a batch of preprocessed images (N, C, H, W), or a list of paths and
            `PIL.Image`s. Unreadable files are skipped and reported to `progress`.
        top: Number of most probable classes that each prediction lists.
        reject: Photos are labelled `unknown` whose `resemblance` is below this share, as in 0.02: about so many photos
            of the classes are rejected too. None labels all.
        batch_size: Photos per batch.
        device: `auto`, `cpu`, `cuda`, …
        decoder: How photos are decoded, see `TrainConfig`; None: as when the model was trained.
        progress: Whether a bar and the files that are skipped are shown, or where; see `fit`.

    Raises:
        DataError: A path does not exist, or no photo can be read.
        ModelError: The model does not know its classes, or, to reject photos, what its training photos look like.
    """
    check_arguments(predict, locals())
    listener = progress_of(progress)
    check_minimum(predict, 1, top=top, batch_size=batch_size)
    batch_size = int(batch_size)  # torch does not accept NumPy integers
    check_weights(predict, "model", model)
    card = _require_task(model)
    _require_rejectable(model, card, reject)
    compute = compute_for(model, device)
    model.to(compute.device)
    if isinstance(images, torch.Tensor):
        if images.ndim != 4:
            raise DataError(f"the images have the shape {tuple(images.shape)}, expected (N, C, H, W).")
        batches = [(images, torch.zeros(len(images)))]
        return _predict_batches(model, batches, [None] * len(images), card, compute, top, reject)
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise DataError("there are no images. Give paths, PIL images, or a tensor (N, C, H, W).")
    preprocessing = _preprocessing(model, decoder, compute, listener)
    if any(isinstance(item, Image.Image) for item in items):
        with compute.current():
            return _predict_opened(
                model, items, preprocessing, top=top, reject=reject, device=device, progress=listener
            )
    samples = [Sample(path, 0) for item in items for path in _files(item)]
    with compute.current():
        photos, unreadable = read_photos(samples, preprocessing, progress=listener)
    _report_skipped(unreadable, listener)
    batches = listener.track(loader(photos, batch_size), "predicting", -(-len(photos) // batch_size))
    paths = [sample.path for sample in photos.samples]
    return _predict_batches(model, batches, paths, card, compute, top, reject)


def _predict_opened(
    model: nn.Module,
    items: Sequence[Any],
    preprocessing: Preprocessing,
    *,
    top: int,
    reject: float | None,
    device: str | torch.device,
    progress: Progress,
) -> list[Prediction]:
    """Predict a list of opened images and paths, in order."""
    crop = center_crop(preprocessing.size, preprocessing.border)
    pixels, paths = [], []
    for number, item in enumerate(items):
        for source in [item] if isinstance(item, Image.Image) else _files(item):
            try:
                with quiet_decoders():
                    pixels.append(crop(decode(source, preprocessing)).cpu())
            except DataError as error:
                if not isinstance(source, (Path, ShardMember)):
                    raise DataError(
                        f"image {number} cannot be read: {error}. Open it again, or leave it out."
                    ) from error
                _report_skipped([Unreadable(source, str(error))], progress)
            else:
                paths.append(source if isinstance(source, (Path, ShardMember)) else None)
    predictions = predict(model, normalize(torch.stack(pixels), preprocessing), top=top, reject=reject, device=device)
    return [replace(prediction, path=path) for prediction, path in zip(predictions, paths, strict=True)]


def _score(model: nn.Module, batches: Any, compute: ComputeContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets as `score` does; a failure of the model becomes an error that names its types."""
    try:
        return score(model, batches, compute)
    except (RegraftError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # arbitrary user code: network or dataset
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{type(model).__name__} (weights in {type_names(model.parameters())}) fails on these inputs: {reason}. "
            "Give inputs of the shape and type that it was made for, or convert it with model.float()."
        ) from error


def _preprocessing(
    model: nn.Module, decoder: Decoder | None, compute: ComputeContext, progress: Progress
) -> Preprocessing:
    """Return a model's preprocessing with an engine that can work here: the one that is wanted, or else its own.

    Raises:
        ConfigError: The one that is wanted cannot work here.
    """
    known = preprocessing_of(model)
    if decoder is not None:
        require_engine(decoder, compute.device)
    engine = usable_engine(decoder or known.decoder, known, compute.device)
    if decoder is None and engine != known.decoder:
        progress.say(
            f"decoder    {describe_engine(engine)}; {known.decoder}, with which it was trained, cannot work here, so "
            "that probabilities may differ by rounding"
        )
    return known.model_copy(update={"decoder": engine})


def _name(model: nn.Module) -> str:
    recipe = card_of(model).recipe
    return recipe.source.name if recipe else type(model).__name__


def _require_task(model: nn.Module) -> Card:
    card = card_of(model)
    if card.task is None or (card.task == "classification" and card.classes is None):
        raise ModelError(
            f"this {type(model).__name__} does not know its classes. "
            + for_caller(
                python="Name them when you save it, and load that file: save(model, path, classes=['cat', 'dog']).",
                command="Give a checkpoint of `regraft train`; in Python, name them when you save it: "
                "save(model, path, classes=['cat', 'dog']).",
            )
        )
    return card


def _infer_task(targets: torch.Tensor) -> Task:
    """Infer the task from targets: floats are regression, except one-hot rows."""
    is_one_hot = targets.ndim == 2 and targets.shape[1] > 1 and has_one_hot_rows(targets)
    return "regression" if targets.is_floating_point() and not is_one_hot else "classification"


def _files(item: Any) -> Sequence[Source]:
    if not isinstance(item, (str, os.PathLike)):
        raise DataError(f"a {type(item).__name__} is no image. Give paths, PIL images, or a tensor (N, C, H, W).")
    check_path(predict, "images", item)
    path = Path(item)
    if path.exists() and (shards := find_shards(path)):
        return members_of(shards)
    if path.is_dir():
        files = photos_in(path)
        if not files:
            raise DataError(f"no photos in '{path}'.")
        return files
    if path.exists():
        return [path]
    if (member := find_member(path)) is not None:
        return [member]
    # A pattern that the shell has passed on. Path.glob takes no absolute one.
    if matches := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207
        return [file for match in matches for file in _files(match)]
    raise DataError(f"no file or folder '{path}' (looked from {Path.cwd()}).")


def _report_skipped(unreadable: Sequence[Unreadable], progress: Progress) -> None:
    for file in unreadable:
        progress.say(f"skipped    {str(file.path)!r}: {file.reason}")


def _require_rejectable(model: nn.Module, card: Card, reject: float | None) -> None:
    if reject is None:
        return
    if not 0 < reject < 1:
        raise ArgumentError(f"predict: {option('reject', reject)}, expected a share between 0 and 1, as in 0.02.")
    if _head_of(model, card) is None:
        raise ModelError(
            f"this {type(model).__name__} does not know what its training photos look like, so none can be rejected. "
            f"Train it with `fit` or `regraft train` on photos, or leave {option('reject')} out."
        )


def _head_of(model: nn.Module, card: Card) -> nn.Module | None:
    """Return the layer whose inputs tell how much photos resemble the training photos; None if there is none."""
    if card.familiar is None:
        return None
    layer = dict(model.named_modules()).get(card.familiar.layer)
    return layer if getattr(layer, "in_features", card.familiar.width) == card.familiar.width else None


def _predict_batches(
    model: nn.Module,
    batches: Any,
    paths: Sequence[Source | None],
    card: Card,
    compute: ComputeContext,
    top: int,
    reject: float | None,
) -> list[Prediction]:
    head = _head_of(model, card)
    if card.classes is None or card.familiar is None or head is None:
        return _predictions(_score(model, batches, compute)[0], paths, card, top)
    with head_inputs(head) as inputs:
        outputs, _ = _score(model, batches, compute)
    shares = resemblance(torch.cat(inputs), card.familiar).tolist() if inputs else []
    predictions = _predictions(outputs, paths, card, top)
    if len(shares) != len(predictions):  # its forward runs the head several times, or not at all
        return predictions
    return [
        replace(one, resemblance=share, label=UNKNOWN, probability=None)
        if reject is not None and share < reject
        else replace(one, resemblance=share)
        for one, share in zip(predictions, shares, strict=True)
    ]


def _predictions(outputs: torch.Tensor, paths: Sequence[Source | None], card: Card, top: int) -> list[Prediction]:
    if card.classes is None:
        return [Prediction(path, value=value) for path, value in zip(paths, outputs.flatten().tolist(), strict=True)]
    probabilities, indices = (outputs * (card.confidence_factor or 1)).softmax(1).topk(min(top, len(card.classes)))
    predictions = []
    for path, values, places in zip(paths, probabilities.tolist(), indices.tolist(), strict=True):
        ranked = tuple((card.classes[place], value) for place, value in zip(places, values, strict=True))
        predictions.append(Prediction(path, ranked[0][0], ranked[0][1], ranked))
    return predictions
