"""`check`: look for what is wrong with photos before a network is trained on them."""

import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from regraft.arguments import check_arguments, check_path
from regraft.console import progress_of
from regraft.data.checks.near_duplicates import find_near_duplicates, groups_of
from regraft.data.checks.thumbnails import read_thumbnails
from regraft.data.samples import Listing
from regraft.errors import InputError
from regraft.photo_checks.data_report import PROBLEMS, DataFinding, DataReport
from regraft.photo_checks.label_errors import label_suspects
from regraft.photo_checks.layout import list_contents
from regraft.photo_checks.out_of_fold import ScoredPhotos, score_out_of_fold
from regraft.photo_checks.photo_problems import about_classes, about_duplicates, about_pixels, about_unreadable
from regraft.progress import Progress
from regraft.torch_internals import defer_compiler
from regraft.training.config import TrainConfig


def check(
    data: Any,
    *,
    model: nn.Module | str | None = None,
    labels: bool = True,
    trust_code: bool = False,
    progress: Progress | bool = True,
    **options: Any,
) -> DataReport:
    """Look for problems of photos: copies in training and validation, wrong labels, damaged files, odd folders.

    Nothing is changed, and nothing is downloaded. Copies are found by their pixels, also if they were cropped, resized,
    compressed or mirrored; wrong labels by a network, of which the features are used as training a head takes them.

    Args:
        data: A folder, shards or a `.csv` table (see `list_data`), or datasets of Hugging Face. A folder that `fit`
            would refuse is looked at as well; the reason is a finding.
        model: Network that labels are compared with: a name, a checkpoint, or a module with a head, of which a copy is
            used. None: the default of `fit`, if its weights are on this machine. A network that was trained on these
            very photos, and not its head alone, has learned their wrong labels.
        labels: Whether to look for wrong labels, which takes a forward pass over all photos.
        trust_code: Whether custom code for a class (`py:…`) may be imported.
        progress: Whether progress is shown, or where; see `fit`.
        **options: Fields of `TrainConfig` that say how photos are split and read and how weights are found, as
            `weights`, `accept`, `seed`, `validation_share`, `image_size`, `device`.

    Returns:
        The problems with what to do about each; `str` of it is a summary.

    Raises:
        DataError: The data is missing; or it is a table or shards that cannot be read.
        ConfigError: An option is unknown or invalid.
    """
    check_arguments(check, locals())
    listener = progress_of(progress)
    if isinstance(data, str):
        check_path(check, "data", data)
    config = TrainConfig().updated(**options)
    config = config.updated(max_unreadable=1.0, **({"model": model} if isinstance(model, str) else {}))
    began = time.perf_counter()
    with listener.status("looking for photos"):
        contents = list_contents(data, validation_share=config.validation_share, seed=config.seed)
    listing = contents.listing
    thumbnails = read_thumbnails([sample.path for sample in (*listing.train, *listing.validation)], progress=listener)
    seconds = {"reading": time.perf_counter() - began}
    with listener.status("looking for copies"):
        duplicates = find_near_duplicates(thumbnails)
    groups = groups_of(len(listing.train) + len(listing.validation), [(one.first, one.second) for one in duplicates])
    findings = [
        *contents.findings,
        *about_duplicates(listing, duplicates),
        *about_unreadable(thumbnails.unreadable),
        *about_pixels(listing, thumbnails),
        *(about_classes(listing) if listing.classes else ()),
    ]
    seconds["copies"] = time.perf_counter() - began - sum(seconds.values())
    unchecked, notes = [], []
    reason = _labels_obstacle(listing, len(thumbnails), is_wanted=labels)
    if reason is None:
        try:
            with defer_compiler():
                network = model if isinstance(model, nn.Module) else config.model
                scored = score_out_of_fold(network, listing, groups, config, listener, trust_code=trust_code)
            findings += _about_labels(listing, scored)
            notes.append(_about_accuracy(scored))
        except InputError as error:
            if isinstance(model, nn.Module) or model is not None or "weights" in options:
                raise
            reason = str(error)
        seconds["labels"] = time.perf_counter() - began - sum(seconds.values())
    if reason is not None:
        unchecked.append(f"Labels: {reason.rstrip('.')}.")
    order = list(PROBLEMS)
    return DataReport(
        data=str(listing.root),
        task=listing.task,
        counts=tuple(listing.counts()),
        train=len(listing.train),
        validation=len(listing.validation),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.problem))),
        unchecked=tuple(unchecked),
        notes=tuple(notes),
        seconds=seconds,
    )


def _labels_obstacle(listing: Listing, readable: int, *, is_wanted: bool) -> str | None:
    """Return why labels cannot be compared with a network, as text; None if that can be tried."""
    if not is_wanted:
        return "not looked at, as was asked for"
    if listing.task == "regression":
        return "not looked at: the targets are numbers, and only classes can be compared"
    if len(listing.classes or ()) < 2:
        return "not looked at: there are no two classes to tell apart"
    if not listing.train or not listing.validation or readable < 2:
        return "not looked at: there are no photos for training, or none for validation"
    return None


def _about_labels(listing: Listing, scored: ScoredPhotos) -> Iterator[DataFinding]:
    samples, classes = (*listing.train, *listing.validation), listing.classes or ()
    for suspect in label_suspects(scored.log_probabilities, scored.targets):
        label, predicted = classes[suspect.label], classes[suspect.predicted]
        detail = (
            f"labelled {label!r} ({suspect.self_confidence:.0%}), looks like {predicted!r} ({suspect.confidence:.0%})"
        )
        suggestion = f"Look at it. If it shows {predicted!r}, move it there; if it shows no class, remove it."
        path = samples[scored.indices[suspect.index]].path
        yield DataFinding("label", "warning", path, detail, suggestion, 1 - suspect.self_confidence)


def _about_accuracy(scored: ScoredPhotos) -> str:
    return (
        f"Labels were compared with heads on the features of {scored.name} that had not learned from the photo. They "
        f"name the label of {scored.accuracy:.0%} of the photos; the lower that is, the more of the suspects are "
        "mistakes of the heads. The first suspects are the surest."
    )
