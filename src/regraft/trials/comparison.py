"""The result of a comparison, as one value from which a report can be written."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.display import block, table_html
from regraft.trials.cells import CellResult
from regraft.trials.claims import Claim, Point, images_claim, seconds_claim
from regraft.trials.ways import LP_FT, PROBE, SCRATCH, Options

CSV_HEAD = ("way", "images", "count", "seed", "accuracy", "loss", "seconds", "validation_seconds", "epochs")


@dataclass(frozen=True)
class WaySummary:
    """A way of training in a comparison.

    Attributes:
        name: As an option names it.
        title: As pages name it.
        text: What it does.
        stages: Options of its runs on all images.
        commands: The commands that do the same on all images with seed 0.
    """

    name: str
    title: str
    text: str
    stages: tuple[Options, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`.

    Attributes:
        model: Name of the network.
        data: Path of the photos.
        classes: Names of the classes.
        train_count: Training photos in all.
        validation_count: Validation photos, on which every run was measured after its last epoch.
        chance: Share of the most frequent class among them.
        epochs: Passes over all photos; training from scratch has more, see `ways`.
        images: Images per class, as text, from the fewest to the most; `all` for all of them.
        seeds: The seeds, each of which draws the photos, the initial weights and the order.
        ways: The ways of training.
        cells: Every run.
        claims: The two claims, answered for each way.
        left_out: (what, why) of everything that could not be measured.
        machine: Device, threads and version.
        seconds: Seconds of the whole comparison, those of resumed parts included.
        once: What was computed once for all runs, and what that saved, as text.
        out: Folder of the results; None if nothing was written.
    """

    model: str
    data: str
    classes: tuple[str, ...]
    train_count: int
    validation_count: int
    chance: float
    epochs: int
    images: tuple[str, ...]
    seeds: tuple[int, ...]
    ways: tuple[WaySummary, ...]
    cells: tuple[CellResult, ...]
    claims: tuple[Claim, ...]
    left_out: tuple[tuple[str, str], ...]
    machine: str
    seconds: float
    once: str
    out: Path | None = None

    def __repr__(self) -> str:
        rows = [(way.title, ", ".join(self._cells_of(way.name, with_images=True))) for way in self.ways]
        return block(self._title(), [*rows, *((claim.kind, claim.text) for claim in self.headlines)])

    def _repr_html_(self) -> str:
        head = ("images a class", *(way.title for way in self.ways))
        columns = [self._cells_of(way.name) for way in self.ways]
        rows = [(images, *cells) for images, cells in zip(self.images, zip(*columns, strict=True), strict=True)]
        return table_html(self._title(), head, rows, [claim.text for claim in self.claims])

    def _title(self) -> str:
        return (
            f"Comparison of {len(self.ways)} ways to train {self.model}: accuracy on {self.validation_count} photos, "
            f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        )

    def _cells_of(self, way: str, *, with_images: bool = False) -> list[str]:
        texts = [mean_and_spread(self.results(way, images)) for images in self.images]
        return [f"{images}: {text}" for images, text in zip(self.images, texts, strict=True)] if with_images else texts

    @property
    def headlines(self) -> tuple[Claim, ...]:
        """The strongest answer to each of the two claims."""
        chosen = []
        for kind in ("images", "seconds"):
            claims = [claim for claim in self.claims if claim.kind == kind]
            chosen += sorted(claims, key=_strength)[:1]
        return tuple(chosen)

    def results(self, way: str, images: str) -> list[CellResult]:
        """Return the runs of a way with a number of images, by seed."""
        return [result for result in self.cells if (result.cell.way, result.cell.images) == (way, images)]

    def per_class(self, images: str) -> float:
        """Return the mean number of training photos of a class."""
        return self.train_count / len(self.classes) if images == "all" else float(images)

    def rows(self) -> list[tuple[Any, ...]]:
        """Return one row for each run, as `CSV_HEAD` names its columns."""
        return [
            (
                *(result.cell.way, result.cell.images, result.count, result.cell.seed, result.accuracy, result.loss),
                *(round(result.total_s, 4), round(result.validation_s, 4), len(result.curve)),
            )
            for result in self.cells
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("cells", "claims")}
        points = [
            {
                "way": way.name,
                "images": images,
                "count": results[0].count,
                "accuracy_mean": statistics.mean(result.accuracy for result in results),
                "accuracy_std": spread([result.accuracy for result in results]),
                "seconds_mean": statistics.mean(result.total_s for result in results),
                "seconds_std": spread([result.total_s for result in results]),
            }
            for way in self.ways
            for images in self.images
            if (results := self.results(way.name, images))
        ]
        return {
            **values,
            "out": str(self.out) if self.out else None,
            "ways": [asdict(way) for way in self.ways],
            "left_out": [{"what": what, "why": why} for what, why in self.left_out],
            "points": points,
            "claims": [asdict(claim) for claim in self.claims],
            "runs": [result.to_dict() for result in self.cells],
        }


def mean_and_spread(results: Sequence[CellResult]) -> str:
    """Return mean and standard deviation of the accuracy as text; the mean alone for one seed."""
    values = [result.accuracy for result in results]
    if not values:
        return "–"
    deviation = spread(values)
    return f"{statistics.mean(values):.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of some values; None for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def point_of(results: Sequence[CellResult]) -> Point:
    """Return the runs of one way with one number of images as a point."""
    ordered = sorted(results, key=lambda result: result.cell.seed)
    return Point(
        ordered[0].cell.images,
        ordered[0].count,
        tuple(result.accuracy for result in ordered),
        tuple(result.right for result in ordered),
        tuple(result.curve for result in ordered),
    )


def claims_of(
    cells: Sequence[CellResult], ways: Sequence[WaySummary], images: Sequence[str], chance: float
) -> tuple[Claim, ...]:
    """Answer the two claims for each way; none without training from scratch."""
    points = {
        (way.name, number): point_of(results)
        for way in ways
        for number in images
        if (results := [result for result in cells if (result.cell.way, result.cell.images) == (way.name, number)])
    }
    most = images[-1]
    scratch = points.get((SCRATCH, most))
    if scratch is None:
        return ()
    others = [way for way in ways if way.name != SCRATCH and (way.name, most) in points]
    return (
        *(images_claim(way.title, [points[way.name, number] for number in images], scratch, chance) for way in others),
        *(seconds_claim(way.title, points[way.name, most], scratch, chance) for way in others),
    )


def computed_once(cells: Sequence[CellResult], train_count: int, validation_count: int) -> str:
    """Describe what all runs shared, and the seconds that this saved."""
    if not cells:
        return ""
    decode_s = statistics.mean(cell.seconds["decoding"] / cell.count for cell in cells)
    once_s = decode_s * (train_count + validation_count)
    alone_s = sum(decode_s * (cell.count + validation_count) for cell in cells)
    text = f"Photos were decoded once for all {len(cells)} runs, in {once_s:.1f} s instead of {alone_s:.1f} s."
    heads = [cell for cell in cells if cell.cell.way in (PROBE, LP_FT)]  # all of whose features are shared
    if heads:
        photo_s = statistics.mean(cell.seconds["features"] / cell.count for cell in heads)
        features_s = sum(cell.seconds["features"] for cell in heads)
        names = " and ".join(sorted({cell.cell.way for cell in heads}))
        text += (
            f" The training photos went through the frozen network once, in {photo_s * train_count:.1f} s instead of "
            f"{features_s:.1f} s for the {len(heads)} runs of {names}."
        )
    return text


def _strength(claim: Claim) -> tuple[int, float]:
    rank = {"yes": 0, "undetermined": 1, "no": 2}[claim.verdict]
    if claim.value is None:
        return rank, float("inf")
    return rank, claim.value if claim.kind == "images" else -claim.value
