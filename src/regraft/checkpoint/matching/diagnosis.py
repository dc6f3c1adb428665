"""Explain why a file does not fit a model completely, and what to do about it."""

from collections.abc import Iterator, Sequence

from regraft.checkpoint.foreign.state_dicts import StateDict, listed
from regraft.checkpoint.matching.adapting import Fitter
from regraft.checkpoint.matching.load_report import LoadReport, look_first
from regraft.checkpoint.matching.mapping import Proposal, weakest
from regraft.checkpoint.matching.naming import Shape
from regraft.display import some
from regraft.wording import for_caller, option, rename_option

SIDES_OF_LINEAR = 2  # of its weight: (out, in)
MANY = 3  # from this number on, tensors are counted instead of explained one by one


def diagnose(
    report: LoadReport, proposal: Proposal, fitter: Fitter, others: Sequence[StateDict], *, may_adapt: bool = True
) -> tuple[str, str]:
    """Return the likely cause of what was not loaded and a suggestion, both without a full stop at the end.

    Args:
        report: What was loaded.
        proposal: The mapping.
        fitter: Knows the heads of the model.
        others: State dicts of the file that were not loaded.
        may_adapt: Whether the caller has an argument `adapt`.
    """
    explained = list(_explain(report, proposal, fitter, may_adapt=may_adapt))
    advice = [suggestion for _, suggestion in explained if suggestion]
    averages = [entry for entry in others if entry.is_average]
    if averages:
        advice.append(
            f"the file also has averaged weights, {listed(averages)}: take them with {option('entry', 'KEY')}"
        )
    if proposal.averages:
        prefix = proposal.averages[0]
        pattern = prefix.rstrip(".").replace(".", r"\.")
        rule = for_caller(python=f"rename={{r'^{pattern}\\.': ''}}", command=f"--rename '^{pattern}\\.='")
        advice.append(f"the file also has averaged weights under '{prefix}': {rule}")
    return "; ".join(cause for cause, _ in explained), "; ".join(advice)


def _explain(report: LoadReport, proposal: Proposal, fitter: Fitter, *, may_adapt: bool) -> Iterator[tuple[str, str]]:
    if proposal.rivals:
        yield (
            f"several parts of the file fit equally well: {'; '.join(proposal.rivals)}",
            "choose one by its prefix, as in "
            + for_caller(python=r"rename={r'^student\.(.*)': r'\1'}", command=r"--rename 'student\.(.*)=\1'"),
        )
    proposed = report.proposed
    if proposed and not proposal.rivals:
        level = weakest(proposed)
        yield (
            f"the names of {len(proposed)} tensors differ, as '{proposed[0].source}' for '{proposed[0].name}'",
            f"{look_first()}take it with {option('accept', level)}, or give {rename_option()}",
        )
    yield from _explain_shapes(report, fitter, may_adapt=may_adapt)
    missing = [name for name in report.missing if name not in {match.name for match in proposed}]
    if missing:
        in_heads = all(fitter.is_in_head(name) for name in missing)
        is_whole = not any(fitter.is_in_head(name) for name in report.loaded)
        what = "no head that fits" if in_heads and is_whole else f"nothing for {len(missing)} tensors of the model"
        yield f"the file has {what} ({some(missing)})", ""


def _explain_shapes(report: LoadReport, fitter: Fitter, *, may_adapt: bool) -> Iterator[tuple[str, str]]:
    # Each group leaves the next what it did not explain: transposed tensors, heads, dtypes, other shapes.
    unequal = [entry for entry in report.mismatched if entry[1] != entry[2]]
    transposed = [entry for entry in unequal if len(entry[1]) > 1 and entry[1][::-1] == entry[2]]
    heads = [entry for entry in report.mismatched if fitter.is_in_head(entry[0]) and entry not in transposed]
    if heads:  # one entry stands for all: a weight, of more dimensions, says more than a bias
        entry = max(heads, key=lambda entry: (entry[0] in report.reasons, len(entry[2])))
        yield _explain_head(entry, report, fitter, may_adapt=may_adapt)
    others = [entry for entry in report.mismatched if entry not in heads]
    if transposed:
        yield (
            f"{len(transposed)} tensors look transposed ({some(name for name, _, _ in transposed)})",
            "transpose them before saving, as other libraries keep (in, out) where torch has (out, in)",
        )
    other_dtypes = [name for name, _, _ in others if name in report.reasons]
    if other_dtypes:
        yield (
            f"{len(other_dtypes)} tensors hold another kind of numbers ({some(other_dtypes)}), as in a quantized "
            f"network: '{other_dtypes[0]}' {report.reasons[other_dtypes[0]]}",
            "",
        )
    rest = [entry for entry in others if entry not in transposed and entry[0] not in other_dtypes]
    if len(rest) >= MANY:
        yield f"{len(rest)} tensors have another shape, as in a wider or a narrower network", ""
    elif rest:
        name, file_shape, model_shape = rest[0]
        yield f"'{name}' has the shape {file_shape} in the file and {model_shape} in the model", ""


def _explain_head(
    entry: tuple[str, Shape, Shape], report: LoadReport, fitter: Fitter, *, may_adapt: bool
) -> tuple[str, str]:
    """Return the cause and the suggestion for a tensor of a head: another dtype, other classes, or other features."""
    name, file_shape, model_shape = entry
    layer = name.rpartition(".")[0]
    if name in report.reasons:
        return (
            f"'{name}' of the head {report.reasons[name]}, so it keeps its values",
            "train it, or save it in the model's dtype where the file was made",
        )
    file_features, model_features = ([side for side in shape[1:] if side != 1] for shape in (file_shape, model_shape))
    if file_shape and model_shape and file_features == model_features and fitter.is_in_output(name):
        is_adaptable = may_adapt and len(file_shape) == len(model_shape)
        first_classes = for_caller(
            python=", or take the first classes with adapt=('positions', 'stem', 'head')", command=""
        )
        options = first_classes if is_adaptable else ""
        return (
            f"the head '{layer}' is for {file_shape[0]} classes in the file and for {model_shape[0]} in the model, so "
            "it keeps its values",
            f"train it{options}",
        )
    is_linear = len(file_shape) == len(model_shape) == SIDES_OF_LINEAR
    if file_shape[:1] == model_shape[:1] and is_linear and fitter.is_in_output(name):
        return (
            f"the head '{layer}' is made for {file_shape[1]} features in the file and for {model_shape[1]} in the "
            "model, so its weight keeps its values",
            "train it",
        )
    return (
        f"'{name}' of the head is {file_shape} in the file and {model_shape} in the model, so it keeps its values",
        "train it",
    )
