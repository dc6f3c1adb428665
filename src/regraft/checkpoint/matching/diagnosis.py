"""Explain why a file does not fit in all, and what to do about it."""

from collections.abc import Iterator, Sequence

from regraft.checkpoint.foreign.state_dicts import StateDict, listed
from regraft.checkpoint.matching.adapting import Fitter
from regraft.checkpoint.matching.load_report import LoadReport, some
from regraft.checkpoint.matching.mapping import Proposal, weakest
from regraft.checkpoint.matching.naming import Shape

SIDES_OF_LINEAR = 2  # of its weight: (out, in)
MANY = 3  # tensors that need no explanation each


def diagnose(
    report: LoadReport, found: Proposal, fitter: Fitter, others: Sequence[StateDict], *, may_adapt: bool = True
) -> tuple[str, str]:
    """Return the likely cause of what was not loaded and a suggestion, both without a full stop at the end.

    Args:
        report: What was loaded.
        found: The mapping.
        fitter: What knows the heads of the model.
        others: State dicts of the file that were not taken.
        may_adapt: Whether the caller has an argument `adapt`.
    """
    causes, advice = [], []
    for cause, suggestion in _findings(report, found, fitter, may_adapt=may_adapt):
        causes.append(cause)
        advice += [suggestion] if suggestion else []
    averages = [entry for entry in others if entry.is_average]
    if averages:
        advice.append(f"the file also has averaged weights, {listed(averages)}: take them with entry= (--entry)")
    if found.averages:
        prefix = found.averages[0]
        pattern = prefix.rstrip(".").replace(".", r"\.")
        advice.append(f"the file also has averaged weights under '{prefix}': rename={{r'^{pattern}\\.': ''}}")
    return "; ".join(causes), "; ".join(advice)


def _findings(report: LoadReport, found: Proposal, fitter: Fitter, *, may_adapt: bool) -> Iterator[tuple[str, str]]:
    if found.rivals:
        yield (
            f"several parts of the file fit equally well: {'; '.join(found.rivals)}",
            r"choose one by its prefix, as in rename={r'^student\.(.*)': r'\1'} (--rename 'student\.(.*)=\1')",
        )
    waiting = report.proposed
    if waiting and not found.rivals:
        level = weakest(waiting)
        yield (
            f"the names of {len(waiting)} tensors differ, as '{waiting[0].source}' for '{waiting[0].name}'",
            f"look at the mapping with dry_run=True (--dry-run); take it with accept='{level}' (--accept {level}), or "
            "give rename= (--rename)",
        )
    yield from _shapes(report, fitter, may_adapt=may_adapt)
    missing = [name for name in report.missing if name not in {match.name for match in waiting}]
    if missing:
        in_heads = all(fitter.is_in_head(name) for name in missing)
        is_whole = not any(fitter.is_in_head(name) for name in report.loaded)
        what = "no head that fits" if in_heads and is_whole else f"nothing for {len(missing)} tensors of the model"
        yield f"the file has {what} ({some(missing)})", ""


def _shapes(report: LoadReport, fitter: Fitter, *, may_adapt: bool) -> Iterator[tuple[str, str]]:
    turned = [
        entry
        for entry in report.mismatched
        if len(entry[1]) > 1 and entry[1] != entry[2] and entry[1][::-1] == entry[2]
    ]
    heads = [entry for entry in report.mismatched if fitter.is_in_head(entry[0]) and entry not in turned]
    if heads:  # weights tell more than biases
        yield _head(
            max(heads, key=lambda entry: (entry[0] in report.reasons, len(entry[2]))),
            report,
            fitter,
            may_adapt=may_adapt,
        )
    others = [entry for entry in report.mismatched if entry not in heads]
    if turned:
        yield (
            f"{len(turned)} tensors look transposed ({some(name for name, _, _ in turned)})",
            "transpose them before saving, as other libraries keep (in, out) where torch has (out, in)",
        )
    alike = [name for name, _, _ in others if name in report.reasons]
    if alike:
        yield (
            f"{len(alike)} tensors hold another kind of numbers ({some(alike)}), as in a quantized network: "
            f"'{alike[0]}' {report.reasons[alike[0]]}",
            "",
        )
    rest = [entry for entry in others if entry not in turned and entry[0] not in alike]
    if len(rest) >= MANY:
        yield f"{len(rest)} tensors have another shape, as in a wider or a narrower network", ""
    elif rest:
        name, theirs, ours = rest[0]
        yield f"'{name}' has the shape {theirs} in the file and {ours} in the model", ""


def _head(entry: tuple[str, Shape, Shape], report: LoadReport, fitter: Fitter, *, may_adapt: bool) -> tuple[str, str]:
    """Return why a tensor of a head keeps its values: another kind of numbers, other classes, or other features."""
    name, theirs, ours = entry
    layer = name.rpartition(".")[0]
    if name in report.reasons:
        return (
            f"'{name}' of the head {report.reasons[name]}, so it keeps its values",
            "train it, or save it in the model's dtype where the file was made",
        )
    plain_theirs, plain_ours = ([side for side in shape[1:] if side != 1] for shape in (theirs, ours))
    if theirs and ours and plain_theirs == plain_ours and fitter.is_in_output(name):
        is_adaptable = may_adapt and len(theirs) == len(ours)
        options = ", or take the first classes with adapt=('positions', 'stem', 'head')" if is_adaptable else ""
        return (
            f"the head '{layer}' is for {theirs[0]} classes in the file and for {ours[0]} in the model, so it keeps "
            "its values",
            f"train it{options}",
        )
    if theirs[:1] == ours[:1] and len(theirs) == len(ours) == SIDES_OF_LINEAR and fitter.is_in_output(name):
        return (
            f"the head '{layer}' is made for {theirs[1]} features in the file and for {ours[1]} in the model, so its "
            "weight keeps its values",
            "train it",
        )
    return f"'{name}' of the head is {theirs} in the file and {ours} in the model, so it keeps its values", "train it"
