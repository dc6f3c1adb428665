"""The report of a load: what was loaded and what was not, printable as a table and as JSON."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from regraft.display import block, some
from regraft.wording import option

Confidence = Literal["certain", "likely", "ambiguous"]
CONFIDENCE_LEVELS: tuple[Confidence, ...] = ("certain", "likely", "ambiguous")  # highest first
OLD_LEVEL = "guess"  # what "ambiguous" was called, for one more version
ROWS = 40  # of a table


@dataclass(frozen=True)
class Match:
    """A pair of a tensor in the model and a tensor in the file.

    Attributes:
        name: Name in the model.
        source: Name in the file.
        confidence: `certain` (by names), `likely` (by shapes and order) or `ambiguous`.
        reason: Why they belong together.
        shape: Its shape in the file.
        loaded: Whether it was loaded; in a dry run, whether it would be.
    """

    name: str
    source: str
    confidence: Confidence
    reason: str
    shape: tuple[int, ...] = ()
    loaded: bool = True

    @property
    def sure(self) -> str:
        """The old name of `confidence`, for one more version; its lowest level was called `guess`."""
        warnings.warn("Match.sure is deprecated. Use Match.confidence.", DeprecationWarning, stacklevel=2)
        return self._old_level

    @property
    def _old_level(self) -> str:
        return OLD_LEVEL if self.confidence == "ambiguous" else self.confidence

    def to_dict(self) -> dict[str, Any]:
        """Return the match as JSON data, under `sure` with the old name of its confidence as well."""
        return {**asdict(self), "sure": self._old_level}


@dataclass(frozen=True)
class Adaptation:
    """A tensor that was changed to fit.

    Attributes:
        name: Name in the model.
        kind: `positions` (resampled), `stem` (another number of channels), `head` (rows of classes), `reshape`
            (dimensions of length 1) or `dtype` (one entry for all tensors of a dtype; `name` is then empty).
        what: What was done.
    """

    name: str
    kind: Literal["positions", "stem", "head", "reshape", "dtype"]
    what: str


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What was loaded from a file; `str()` shows it as a table, `headline()` in one line.

    Attributes:
        path: The file.
        loaded: Names of the loaded tensors in the model.
        missing: Names that the model has and the file lacks; these tensors keep their values.
        unexpected: Names that the file has and the model lacks.
        mismatched: (name, shape in the file, shape in the model); these tensors keep their values.
        gaps: Names of the parameters outside of the head that keep their values; a warning names them as well.
        reasons: Name → why a mismatched tensor does not fit, where the reason is not its shape.
        notes: What was unwrapped or stripped, and what probably explains the differences.
        matches: The pairs of tensors, with their confidence; includes those whose confidence was too low to load them.
        adapted: What was changed to fit.
        left_out: Other entries of the file, such as the state of an optimizer.
        share: Loaded share of the model's parameters, from 0 to 1; a head for other classes is not counted.
        cause: The probable cause of what is missing; empty where nothing is.
        suggestion: What to do about it; empty where there is nothing to do.
        dry_run: Whether nothing was changed because a dry run was requested.
    """

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    notes: tuple[str, ...] = ()
    matches: tuple[Match, ...] = ()
    adapted: tuple[Adaptation, ...] = ()
    left_out: tuple[str, ...] = ()
    share: float = 1.0
    cause: str = ""
    suggestion: str = ""
    dry_run: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)
    gaps: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors that were loaded, missing, unexpected and mismatched, and of matches by confidence."""
        lists = {name: len(getattr(self, name)) for name in ("loaded", "missing", "unexpected", "mismatched")}
        levels = Counter(match.confidence for match in self.matches)
        return {**lists, **{level: levels[level] for level in CONFIDENCE_LEVELS}, OLD_LEVEL: levels["ambiguous"]}

    @property
    def proposed(self) -> tuple[Match, ...]:
        """The matches that were not loaded, because their confidence is too low."""
        return tuple(match for match in self.matches if not match.loaded)

    def headline(self) -> str:
        """Return a one-line description."""
        verb = "would be loaded" if self.dry_run else "loaded"
        counts = f"{len(self.loaded)} tensors {verb} from '{self.path}'"
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                counts += f", {len(names)} {word} ({some(names)})"
        for name, file_shape, model_shape in self.mismatched[:3]:
            why = self.reasons.get(name, f"is {file_shape} in the file and {model_shape} in the model")
            counts += f", '{name}' {why}"
        if len(self.mismatched) > 3:
            counts += f", and {len(self.mismatched) - 3} more that do not fit"
        return "; ".join([counts, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {**asdict(self), "matches": [match.to_dict() for match in self.matches], "counts": self.counts}

    def __repr__(self) -> str:
        verb = "would be loaded" if self.dry_run else "loaded"
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": [name for name, _, _ in self.mismatched],
            "proposed": [match.name for match in self.proposed],
        }
        return block(
            f"LoadReport: {len(self.loaded)} tensors {verb} from '{self.path}', {self.share:.1%} of the parameters",
            [
                *((word, f"{len(names)}: {some(names)}" if names else "") for word, names in lists.items()),
                ("adapted", some((f"{change.name} {change.what}".strip() for change in self.adapted), 2)),
                ("cause", self.cause),
                ("suggestion", self.suggestion),
            ],
        )

    def __str__(self) -> str:
        return "\n".join([self.headline(), *self._lines()])

    def _lines(self) -> Iterator[str]:
        from regraft.anatomy.summary_table import aligned, shape_text

        yield f"share of the parameters: {self.share:.1%}"
        for change in self.adapted:
            yield f"adapted: {change.name + ' ' if change.name else ''}{change.what}"
        if self.left_out:
            yield f"left out: {some(self.left_out, 8)}"
        shown = [match for match in self.matches if match.name != match.source or match.confidence != "certain"]
        if shown:
            rows = [
                (match.source, match.name, shape_text(match.shape) or "scalar", self._taken(match), match.reason)
                for match in (shown if self.dry_run else shown[:ROWS])
            ]
            head = ("in the file", "in the model", "shape", "confidence", "because")
            yield from aligned([head, *rows], [False] * 5)
            if len(shown) > ROWS and not self.dry_run:
                yield f"… and {len(shown) - ROWS} more"
        suggestion = self.suggestion.replace(look_first(), "") if self.dry_run else self.suggestion
        for word, text in (("cause", self.cause), ("suggestion", suggestion)):
            if text:
                yield f"{word}: {text}"

    def _taken(self, match: Match) -> str:
        return match.confidence if match.loaded else f"{match.confidence}, not taken"


def look_first() -> str:
    """Return the advice to look at a mapping before it is taken, which a dry run does not need."""
    return f"look at the mapping with {option('dry_run', True)}; "


def confidence_of(level: str) -> Confidence:
    """Return the confidence that an argument names, also by its old name, which warns; others are checked later."""
    if level == OLD_LEVEL:
        warnings.warn(f'"{OLD_LEVEL}" is deprecated. Use "ambiguous".', DeprecationWarning, stacklevel=3)
        return "ambiguous"
    return cast(Confidence, level)
