"""Problems of single photos and of classes: what their thumbnails and numbers show."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from regraft.data.checks.near_duplicates import NearDuplicate, groups_of
from regraft.data.checks.thumbnails import Thumbnails
from regraft.data.decoding.files import Unreadable
from regraft.data.samples import Listing
from regraft.data.shards.layout import IMAGE_ENDINGS
from regraft.photo_checks.data_report import PROBLEMS, DataFinding, Severity

MIN_SPREAD = 3.0  # gray levels, standard deviation over a thumbnail: less is one color
MIN_SIDE = 32  # pixels
MAX_ASPECT = 3.0  # a square in the middle then shows a third
MIN_PHOTOS = 10  # of a class
MAX_RATIO = 10.0  # of the largest class to another


def about_unreadable(unreadable: Sequence[Unreadable]) -> Iterator[DataFinding]:
    """Return files that cannot be read: damaged photos, and files that are none."""
    for file in unreadable:
        is_photo = Path(str(file.path)).suffix.lower().lstrip(".") in IMAGE_ENDINGS
        problem = "damaged" if is_photo or file.reason not in ("not an image", "the file is empty") else "not-a-photo"
        yield _finding(problem, "warning", file.path, file.reason)


def about_pixels(listing: Listing, thumbnails: Thumbnails) -> Iterator[DataFinding]:
    """Return photos that show nothing, are tiny, or of extreme shapes."""
    samples = (*listing.train, *listing.validation)
    spreads = thumbnails.pixels.flatten(1).float().std(1).tolist() if len(thumbnails) else []
    for index, (width, height), spread in zip(thumbnails.indices, thumbnails.sizes, spreads, strict=True):
        path, aspect = samples[index].path, max(width, height) / min(width, height)
        if spread < MIN_SPREAD:
            yield _finding("blank", "warning", path, f"gray values spread by {spread:.1f} of 255", spread)
        if min(width, height) < MIN_SIDE:
            yield _finding("tiny", "warning", path, f"{width} × {height} pixels", min(width, height))
        if aspect > MAX_ASPECT:
            yield _finding("aspect", "warning", path, f"{width} × {height} pixels, {aspect:.1f} to 1", aspect)


def about_duplicates(listing: Listing, duplicates: Sequence[NearDuplicate]) -> Iterator[DataFinding]:
    """Return photos that are there more than once: in training and validation, in several classes, or in one part.

    Of each group of the same picture one photo is kept, if possible one of validation; the others are the findings.
    """
    samples, first_held_out = (*listing.train, *listing.validation), len(listing.train)
    of_pair = {(pair.first, pair.second): pair for pair in duplicates}
    for group in groups_of(len(samples), list(of_pair)):
        held_out = [index for index in group if index >= first_held_out]
        kept = held_out[0] if held_out else group[0]
        for index in group:
            if index == kept:
                continue
            pair = of_pair.get((min(index, kept), max(index, kept)))
            how = _how(pair) if pair is not None else "a copy of a copy of"
            other, path = samples[kept], samples[index].path
            score = pair.similarity if pair is not None else None
            where = f"{how} {other.path.name if isinstance(other.path, Path) else other.path}"
            is_leak = bool(held_out) and index < first_held_out
            problem = "leak" if is_leak else "duplicate"
            severity: Severity = "error" if is_leak else "warning"
            part = "validation" if kept >= first_held_out else "training"
            yield _finding(problem, severity, path, f"{where}, in {part}", score, other=other.path)
            if listing.classes and samples[index].target != other.target:
                names = [listing.classes[int(sample.target)] for sample in (samples[index], other)]
                detail = f"{names[0]!r} here, and {names[1]!r} for {where}"
                yield _finding("conflict", "error", path, detail, score, other=other.path)


def _how(pair: NearDuplicate) -> str:
    if pair.is_exact:
        return "the same file as"
    return "nearly the same picture, mirrored, as" if pair.is_mirrored else "nearly the same picture as"


def about_classes(listing: Listing) -> Iterator[DataFinding]:
    """Return classes with few photos, and those far smaller than the largest."""
    counts = [(name, train, held) for name, train, held in listing.counts() if train + held]
    largest = max(((train, name) for name, train, _ in counts), default=(0, ""))
    for name, train, held in counts:
        if train < MIN_PHOTOS:
            yield _finding("few", "warning", name, f"{train} to learn from, {held} to validate", train)
        if train and largest[0] / train > MAX_RATIO:
            ratio = largest[0] / train
            detail = f"{train:,} to learn from; {largest[1]!r} has {largest[0]:,}, {ratio:.0f} times as many"
            yield _finding("imbalance", "warning", name, detail, ratio)


def _finding(
    problem: str, severity: Severity, path: object, detail: str, score: float | None = None, *, other: object = None
) -> DataFinding:
    return DataFinding(problem, severity, path, detail, PROBLEMS[problem][1], score, other)  # pyright: ignore[reportArgumentType]
