"""What `check` returns: problems of photos, each with what, where, and what to do."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.data.samples import Task
from regraft.data.sources import Source
from regraft.display import cut_middle, printable

Severity = Literal["error", "warning"]
WIDTH = 80  # columns of the summary
MAX_SHOWN = 5  # findings of one problem
COLUMNS = ("path", "problem", "severity", "detail", "suggestion", "score", "other")

# Each problem: its title, and what to do about it. The order is that of the summary, the worst first.
PROBLEMS: dict[str, tuple[str, str]] = {
    "layout": ("Folders that are not as expected", ""),
    "leak": (
        "Training photos that validation has too",
        "Remove them from training, or every measured accuracy is too high.",
    ),
    "conflict": ("One picture in several classes", "Decide on one class, and remove the others."),
    "label": (
        "Labels that are probably wrong",
        "Look at each; move those that are wrong into the right class.",
    ),
    "damaged": ("Damaged photos", "Get them again, or remove them; training skips them."),
    "not-a-photo": ("Files that are no photos", "Move them out of the folders of photos; training skips them."),
    "duplicate": ("Photos that are there more than once", "Keep one of each; more of the same teach nothing."),
    "blank": ("Photos of one color", "Remove them: there is nothing to learn from."),
    "tiny": ("Tiny photos", "Replace them by larger ones; they are enlarged until nothing is sharp."),
    "aspect": ("Very long or tall photos", "Crop them to what they show; the network sees the middle only."),
    "few": ("Classes with few photos", "Add photos; less than 10 say little about a class."),
    "imbalance": (
        "Classes of very different sizes",
        "Add photos of the small classes; look at the recall of each class, not at the accuracy alone.",
    ),
}


@dataclass(frozen=True)
class DataFinding:
    """One problem of the data.

    Attributes:
        problem: What it is, a key of `PROBLEMS` such as `leak`, `label` or `damaged`.
        severity: `error` where results cannot be trusted or training refuses the data; else `warning`.
        path: The photo, file, folder or table; for a class its name.
        detail: What was seen there.
        suggestion: What to do about it.
        score: How sure it is, from 0 to 1, or a size; None where there is nothing to measure.
        other: The photo that it was compared with; None without one.
    """

    problem: str
    severity: Severity
    path: Source | str
    detail: str
    suggestion: str
    score: float | None = None
    other: Source | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON data."""
        cells = (self.problem, self.severity, self.detail, self.suggestion, self.score)
        values = dict(zip(COLUMNS[1:6], cells, strict=True))
        other = None if self.other is None else str(self.other)
        return {"path": str(self.path), **values, "other": other}


@dataclass(frozen=True, repr=False)
class DataReport:
    """The problems of some photos.

    Attributes:
        data: The folder, shards or table.
        task: Classification or regression.
        counts: (class, training photos, validation photos) of each class; empty for regression.
        train: Number of training photos.
        validation: Number of validation photos.
        findings: The problems, the worst first.
        unchecked: What could not be checked, and why, a sentence each.
        notes: What else is worth knowing, a sentence each.
        seconds: Times by phase.
    """

    data: str
    task: Task
    counts: tuple[tuple[str, int, int], ...]
    train: int
    validation: int
    findings: tuple[DataFinding, ...] = ()
    unchecked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def groups(self) -> Iterator[tuple[str, str, tuple[DataFinding, ...]]]:
        """Yield the problems that there are: its name, its title and the findings."""
        for problem, (title, _) in PROBLEMS.items():
            if findings := tuple(finding for finding in self.findings if finding.problem == problem):
                yield problem, title, findings

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "data": self.data,
            "task": self.task,
            "photos": {"train": self.train, "validation": self.validation},
            "classes": [{"name": name, "train": train, "validation": held} for name, train, held in self.counts],
            "errors": self.errors,
            "warnings": len(self.findings) - self.errors,
            "problems": dict(Counter(finding.problem for finding in self.findings)),
            "findings": [finding.to_dict() for finding in self.findings],
            "unchecked": list(self.unchecked),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the table of the findings for a CSV file, its head first."""
        yield COLUMNS
        for finding in self.findings:
            row = finding.to_dict()
            score = None if finding.score is None else f"{finding.score:.4g}"
            yield tuple({**row, "score": score}[column] for column in COLUMNS)

    def headline(self) -> str:
        """Return how many problems there are, as text."""
        warnings = len(self.findings) - self.errors
        return ", ".join(
            f"{count} {name}{'s' * (count != 1)}"
            for count, name in ((self.errors, "error"), (warnings, "warning"))
            if count or name == "error"
        )

    def __repr__(self) -> str:
        return f"DataReport({self.data!r}: {self.headline()})"

    def __str__(self) -> str:
        kinds = f" in {len(self.counts)} classes" if self.counts else ""
        lines = [
            f"photos     {self.train + self.validation:,}{kinds}: {self.train:,} to learn from, "
            f"{self.validation:,} to validate",
            f"problems   {self.headline() if self.findings else 'none found'}",
        ]
        for problem, title, findings in self.groups():
            mark = "error" if any(finding.severity == "error" for finding in findings) else "warning"
            lines += ["", f"{title}: {len(findings):,} ({mark})"]
            for finding in findings[:MAX_SHOWN]:
                lines += self._lines(finding)
            if len(findings) > MAX_SHOWN:
                lines.append(f"  and {len(findings) - MAX_SHOWN:,} more")
            if PROBLEMS[problem][1]:
                lines += _folded(f"-> {PROBLEMS[problem][1]}", "  ", "     ")
        for label, sentences in (("notes", self.notes), ("unchecked", self.unchecked)):
            for number, sentence in enumerate(sentences):
                lines += (
                    ["", *_folded(sentence, f"{label:11}", " " * 11)]
                    if number == 0
                    else _folded(sentence, " " * 11, " " * 11)
                )
        return "\n".join(lines)

    def _lines(self, finding: DataFinding) -> list[str]:
        path = printable(self.short_name(finding.path))
        if finding.problem == "layout":
            return [
                *_folded(printable(finding.detail), "  ", "    "),
                *_folded(f"-> {printable(finding.suggestion)}", "    ", "       "),
            ]
        return [f"  {cut_middle(path, WIDTH - 2)}", *_folded(printable(finding.detail), "    ", "    ")]

    def short_name(self, path: Source | str) -> str:
        """Return a path relative to the data."""
        text, root = str(path), str(self.data)
        if not isinstance(path, str) and text.startswith(root.rstrip("/\\")) and len(text) > len(root):
            return text[len(root.rstrip("/\\")) + 1 :]
        return Path(text).name if isinstance(path, Path) and path == Path(root) else text


def _folded(text: str, first: str, rest: str) -> list[str]:
    """Break a text between words into lines of at most `WIDTH` columns; a longer word loses its middle."""
    lines, line = [], first
    for word in text.split():
        word = cut_middle(word, WIDTH - len(rest))
        if len(line) + len(word) + 1 > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = rest
        line += word if line in (first, rest) else f" {word}"
    return [*lines, line]
