"""The contents of the report of `check`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.checkpoint.file.format import current_versions
from regraft.data.sources import ShardMember
from regraft.photo_checks.data_report import PROBLEMS, DataFinding, DataReport
from regraft.report.pictures import thumbnail

MAX_PICTURES = 24  # of one problem
WITH_PICTURES = ("leak", "conflict", "label", "duplicate", "blank", "tiny", "aspect")
MAX_ROWS = 200


@dataclass(frozen=True)
class PicturedFinding:
    """A finding with the pictures of the photo and of the one that it was compared with."""

    finding: DataFinding
    name: str
    picture: str | None = None
    other_name: str = ""
    other_picture: str | None = None


@dataclass(frozen=True)
class ProblemSection:
    """All findings of one problem; `more` of them are not shown."""

    problem: str
    title: str
    advice: str
    count: int
    is_error: bool
    has_pictures: bool
    findings: tuple[PicturedFinding, ...]
    more: int


def describe_data(result: DataReport) -> dict[str, Any]:
    """Return the variables of the template `data.html`."""
    return {
        "result": result,
        "data": Path(result.data).resolve().name or result.data,
        "warnings": len(result.findings) - result.errors,
        "problems": [_section(result, *group) for group in result.groups()],
        "versions": current_versions(),
    }


def _section(result: DataReport, problem: str, title: str, findings: tuple[DataFinding, ...]) -> ProblemSection:
    has_pictures = problem in WITH_PICTURES
    shown = findings[: MAX_PICTURES if has_pictures else MAX_ROWS]
    return ProblemSection(
        problem,
        title,
        PROBLEMS[problem][1],
        len(findings),
        any(finding.severity == "error" for finding in findings),
        has_pictures,
        tuple(_pictured(result, finding, has_pictures=has_pictures) for finding in shown),
        len(findings) - len(shown),
    )


def _pictured(result: DataReport, finding: DataFinding, *, has_pictures: bool) -> PicturedFinding:
    name = result.short_name(finding.path)
    if not has_pictures or not isinstance(finding.path, (Path, ShardMember)):
        return PicturedFinding(finding, name)
    if finding.other is None:
        return PicturedFinding(finding, name, thumbnail(finding.path))
    other = thumbnail(finding.other)
    return PicturedFinding(finding, name, thumbnail(finding.path), result.short_name(finding.other), other)
