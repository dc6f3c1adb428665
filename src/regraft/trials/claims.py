"""The two claims about transfer learning, answered from measured points: fewer images, and less time.

Everything here is a pure function of measured values. A difference between two accuracies has two sources of error: the
seeds (which photos are drawn, the initial weights) and the photos on which it is measured. Their variances are added.
Both ways are measured on the same photos, so the second is taken from the differences photo by photo. An answer is
clear where the difference is larger than `CLEAR` standard errors.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CLEAR = 2.0  # standard errors

Verdict = Literal["yes", "no", "undetermined"]
ONE_SEED = " With one seed, how much another draw of photos would change this is unknown."


@dataclass(frozen=True)
class Point:
    """One way of training with one number of images, over S seeds.

    Attributes:
        images: Images per class as text, or `all`.
        count: Training photos in all.
        accuracies: Accuracy after the last epoch, one per seed.
        right: Whether each validation photo was classified correctly, `1` or `0`, one text of N characters per seed.
        curves: (seconds, accuracy) after each epoch, one curve per seed.
    """

    images: str
    count: int
    accuracies: tuple[float, ...]
    right: tuple[str, ...]
    curves: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.mean(self.accuracies)

    @property
    def label(self) -> str:
        """The number of images in words."""
        return f"all {self.count} images" if self.images == "all" else f"{self.count} images ({self.images} a class)"


@dataclass(frozen=True)
class Claim:
    """An answer to one of the two claims.

    Attributes:
        kind: `images` or `seconds`.
        way: Title of the way of training.
        verdict: Whether it needs fewer images, or less time; `undetermined` where the error is too large to tell.
        text: The answer in a sentence.
        value: Images that it needs (`images`), or how many times faster it is (`seconds`); None where there is none.
        reference: Images, or accuracy, of training from scratch that it is compared with.
    """

    kind: Literal["images", "seconds"]
    way: str
    verdict: Verdict
    text: str
    value: float | None
    reference: float


def difference(point: Point, other: Point) -> tuple[float, float]:
    """Return the mean difference in accuracy of two points of the same seeds and photos, and its standard error.

    With one seed, the error is that of the validation photos alone.

    >>> two = Point("5", 10, (0.5, 0.5), ("10", "01"), ())
    >>> difference(two, two)
    (0.0, 0.0)
    """
    differences = [own - theirs for own, theirs in zip(point.accuracies, other.accuracies, strict=True)]
    seeds, photos = len(differences), len(point.right[0])
    by_photo = [
        sum(int(own[photo]) - int(theirs[photo]) for own, theirs in zip(point.right, other.right, strict=True)) / seeds
        for photo in range(photos)
    ]
    of_seeds = statistics.variance(differences) / seeds if seeds > 1 else 0.0
    of_photos = statistics.variance(by_photo) / photos if photos > 1 else 0.0
    return statistics.mean(differences), math.sqrt(of_seeds + of_photos)


def is_above_chance(point: Point, chance: float) -> bool:
    """Return whether a point is clearly better than always answering the most frequent class.

    Args:
        point: The point.
        chance: Share of the most frequent class among the validation photos.
    """
    seeds, photos = len(point.accuracies), len(point.right[0])
    of_seeds = statistics.variance(point.accuracies) / seeds if seeds > 1 else 0.0
    return point.mean - CLEAR * math.sqrt(of_seeds + point.mean * (1 - point.mean) / photos) > chance


def images_claim(way: str, points: Sequence[Point], scratch: Point, chance: float) -> Claim:
    """Answer whether a way reaches the accuracy of training from scratch with fewer images.

    The number of images that counts is the smallest from which on the way is never below that accuracy.

    Args:
        way: Title of the way.
        points: Its points, from the fewest images to the most.
        scratch: Training from scratch with the most images.
        chance: See `is_above_chance`.
    """
    where = f"the from-scratch accuracy of {scratch.label} ({scratch.mean:.3f})"
    note = ONE_SEED if len(scratch.accuracies) == 1 else ""

    def answer(verdict: Verdict, text: str, count: int | None = None) -> Claim:
        return Claim("images", way, verdict, f"{text[0].upper()}{text[1:]}{note}", count, scratch.count)

    if not is_above_chance(scratch, chance):
        return answer(
            "undetermined",
            f"{way}: cannot be determined. From scratch, {scratch.label} give {scratch.mean:.3f}, which is not clearly "
            f"more than always answering the most frequent class ({chance:.3f}): to reach that means nothing.",
        )
    measured = [(point, *difference(point, scratch)) for point in points]
    reaching = _last_run([mean >= 0 for _, mean, _ in measured])
    if reaching is None:
        point, mean, error = measured[-1]
        behind = f"{point.mean:.3f} with {point.label}, a difference of {mean:+.3f} ± {CLEAR * error:.3f}"
        if mean + CLEAR * error >= 0:
            return answer("undetermined", f"{way}: cannot be determined whether it reaches {where}. It has {behind}.")
        return answer("no", f"{way} does not reach {where}. It has {behind}.")
    clear = next(
        (index for index, (_, mean, error) in enumerate(measured) if index >= reaching and mean > CLEAR * error), None
    )
    if clear is None or clear > reaching:
        point, mean, error = measured[reaching]
        then = f" It is clearly above with {measured[clear][0].label}." if clear is not None else ""
        verdict: Verdict = "undetermined" if clear is None or measured[clear][0].count >= scratch.count else "yes"
        count = measured[clear][0].count if clear is not None else None
        return answer(
            verdict,
            f"{way} is at {where} with {point.label} ({point.mean:.3f}), but that difference is within the error "
            f"({mean:+.3f} ± {CLEAR * error:.3f}).{then}",
            count,
        )
    point, mean, error = measured[clear]
    beyond = f"{point.mean:.3f}, a difference of {mean:+.3f} ± {CLEAR * error:.3f}"
    if point.count >= scratch.count:
        return answer("no", f"{way} needs as many images to reach {where}: {beyond}.", point.count)
    fewest = ", the fewest that were measured" if clear == 0 else ""
    factor = scratch.count / point.count
    return answer(
        "yes",
        f"{way} reaches {where} with {point.label}{fewest}: {beyond}. That is 1/{factor:.3g} of the images.",
        point.count,
    )


def seconds_claim(way: str, point: Point, scratch: Point, chance: float) -> Claim:
    """Answer whether a way is faster to the same accuracy, with the same photos.

    For each seed, the accuracy is that of training from scratch after its last epoch, and the seconds of both are those
    of the first epoch after which they have it.

    Args:
        way: Title of the way.
        point: The way with the most images.
        scratch: Training from scratch with the same images.
        chance: See `is_above_chance`.
    """
    seeds = len(scratch.accuracies)
    note = ONE_SEED if seeds == 1 else ""

    def answer(verdict: Verdict, text: str, factor: float | None = None) -> Claim:
        return Claim("seconds", way, verdict, f"{text[0].upper()}{text[1:]}{note}", factor, scratch.mean)

    if not is_above_chance(scratch, chance):
        return answer(
            "undetermined",
            f"{way}: cannot be determined, as training from scratch is not clearly better than chance ({chance:.3f}).",
        )
    pairs = [
        (seconds_to(slow, accuracy), seconds_to(fast, accuracy))
        for slow, fast, accuracy in zip(scratch.curves, point.curves, scratch.accuracies, strict=True)
    ]
    ratios = [slow / fast for slow, fast in pairs if slow is not None and fast is not None]
    if not ratios:
        return answer("no", f"{way} does not reach the from-scratch accuracy ({scratch.mean:.3f}) with {point.label}.")
    factor = math.exp(statistics.mean(map(math.log, ratios)))
    slow_s = statistics.median(slow for slow, _ in pairs if slow is not None)
    fast_s = statistics.median(fast for _, fast in pairs if fast is not None)
    figures = f"{fast_s:.3g} s instead of {slow_s:.3g} s to {scratch.mean:.3f}, with {point.label}"
    spread = f" (from {min(ratios):.3g} to {max(ratios):.3g} over {seeds} seeds)" if seeds > 1 else ""
    if len(ratios) < seeds:
        return answer(
            "undetermined",
            f"{way}: cannot be determined. It reaches the from-scratch accuracy with {len(ratios)} of {seeds} seeds, "
            f"and is then {factor:.3g}× as fast.",
        )
    if min(ratios) > 1:
        return answer("yes", f"{way} is {factor:.3g}× faster to the same accuracy{spread}: {figures}.", factor)
    if max(ratios) < 1:
        return answer("no", f"{way} is {1 / factor:.3g}× slower to the same accuracy: {figures}.", factor)
    return answer("undetermined", f"{way}: no difference in time is shown{spread}: {figures}.", factor)


def seconds_to(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Return the seconds after which a curve first has an accuracy; None if it never has.

    >>> seconds_to([(1.0, 0.5), (2.0, 0.8), (3.0, 0.7)], 0.8)
    2.0
    """
    return next((seconds for seconds, reached in curve if reached >= accuracy), None)


def _last_run(holds: Sequence[bool]) -> int | None:
    """Return the index from which on a condition holds to the end; None if it does not hold at the end.

    >>> _last_run([True, False, True, True])
    2
    """
    index = len(holds)
    while index and holds[index - 1]:
        index -= 1
    return index if index < len(holds) else None
