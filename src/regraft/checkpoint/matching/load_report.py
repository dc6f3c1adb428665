"""What of a file went into a model, and what did not: a plain value that prints as a table and as JSON."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Sureness = Literal["certain", "likely", "guess"]
SURENESS: tuple[Sureness, ...] = ("certain", "likely", "guess")  # surest first
ROWS = 40  # of a table


@dataclass(frozen=True)
class Match:
    """One tensor of a model and the tensor of the file that belongs to it.

    Attributes:
        name: As the model calls it.
        source: As the file calls it.
        sure: `certain` (the names say so), `likely` (shapes and order say so) or `guess`.
        reason: Why.
        shape: Its shape in the file.
        loaded: Whether it was loaded, or would be in a dry run.
    """

    name: str
    source: str
    sure: Sureness
    reason: str
    shape: tuple[int, ...] = ()
    loaded: bool = True


@dataclass(frozen=True)
class Adaptation:
    """A tensor that was changed to fit.

    Attributes:
        name: As the model calls it.
        kind: `positions` (resampled), `stem` (another number of channels), `head` (rows of classes), `reshape` (sides
            of length 1) or `dtype` (counted as one for all tensors; `name` is then empty).
        what: What was done.
    """

    name: str
    kind: Literal["positions", "stem", "head", "reshape", "dtype"]
    what: str


@dataclass(frozen=True)
class LoadReport:
    """What of a file went into a model; `str()` shows it as a table, `headline()` says it in a line.

    Attributes:
        path: The file.
        loaded: Names of the tensors that were loaded, as the model calls them.
        missing: Names that the model has and the file lacks; those keep their values.
        unexpected: Names that the file has and the model lacks.
        mismatched: (name, shape in the file, shape in the model); those keep their values.
        gaps: Names of the parameters outside of the head that keep their values; a warning names them as well.
        reasons: By name, why a mismatched tensor does not fit where that is not its shape.
        notes: What was unwrapped or stripped on the way, and what probably explains the differences.
        matches: Which tensor of the file belongs to which of the model, and how sure that is; also those that were not
            taken because they are not sure enough.
        adapted: What was changed to fit.
        left_out: What else lay in the file, as the state of an optimizer.
        share: Loaded part of the model's parameters, from 0 to 1; a head for other classes is not counted.
        cause: What probably explains what is missing; empty where nothing is.
        suggestion: What to do about it; empty where nothing is to be done.
        dry_run: Whether nothing was changed, because that was asked for.
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
        """Number of tensors that were loaded, missing, unexpected and mismatched, and of matches by sureness."""
        lists = {name: len(getattr(self, name)) for name in ("loaded", "missing", "unexpected", "mismatched")}
        sure = Counter(match.sure for match in self.matches)
        return {**lists, **{word: sure[word] for word in SURENESS}}

    @property
    def proposed(self) -> tuple[Match, ...]:
        """The matches that were not taken, because they are not sure enough."""
        return tuple(match for match in self.matches if not match.loaded)

    def headline(self) -> str:
        """Return a one-line description."""
        verb = "would be loaded" if self.dry_run else "loaded"
        counts = f"{len(self.loaded)} tensors {verb} from '{self.path}'"
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                counts += f", {len(names)} {word} ({some(names)})"
        for name, theirs, ours in self.mismatched[:3]:
            why = self.reasons.get(name, f"is {theirs} in the file and {ours} in the model")
            counts += f", '{name}' {why}"
        if len(self.mismatched) > 3:
            counts += f", and {len(self.mismatched) - 3} more that do not fit"
        return "; ".join([counts, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {**asdict(self), "counts": self.counts}

    def __str__(self) -> str:
        return "\n".join([self.headline(), *self._lines()])

    def _lines(self) -> Iterator[str]:
        from regraft.anatomy.summary_table import aligned, shape_text

        yield f"share of the parameters: {self.share:.1%}"
        for change in self.adapted:
            yield f"adapted: {change.name + ' ' if change.name else ''}{change.what}"
        if self.left_out:
            yield f"left out: {some(self.left_out, 8)}"
        shown = [match for match in self.matches if match.name != match.source or match.sure != "certain"]
        if shown:
            rows = [
                (match.source, match.name, shape_text(match.shape) or "scalar", self._taken(match), match.reason)
                for match in shown[:ROWS]
            ]
            head = ("in the file", "in the model", "shape", "sure", "because")
            yield from aligned([head, *rows], [False] * 5)
            if len(shown) > ROWS:
                yield f"… and {len(shown) - ROWS} more"
        for word, text in (("cause", self.cause), ("suggestion", self.suggestion)):
            if text:
                yield f"{word}: {text}"

    def _taken(self, match: Match) -> str:
        return match.sure if match.loaded else f"{match.sure}, not taken"


def some(names: Iterable[str], count: int = 3) -> str:
    """List the first few names."""
    known = list(names)
    return f"{', '.join(known[:count])}{', …' if len(known) > count else ''}"
