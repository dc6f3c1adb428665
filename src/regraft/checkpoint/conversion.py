"""Convert a file of other tools to safetensors: its tensors alone, or a checkpoint of a named network."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from regraft.anatomy.modes import in_mode, preserved_randomness
from regraft.arguments import check_arguments
from regraft.checkpoint.any_file import read_state_dicts
from regraft.checkpoint.create import note_weights
from regraft.checkpoint.file.shards import write_tensors
from regraft.checkpoint.foreign.reading import unwrapping
from regraft.checkpoint.foreign.state_dicts import StateDicts, Tensors, listed
from regraft.checkpoint.matching.adapting import shape
from regraft.checkpoint.matching.load_plan import LoadPlan, carry_out
from regraft.checkpoint.matching.load_report import Confidence, LoadReport, Match, confidence_of
from regraft.checkpoint.matching.loading import Rules, plan_loading
from regraft.checkpoint.matching.naming import renamed, without_wrappers
from regraft.checkpoint.write import save
from regraft.display import some
from regraft.errors import CheckpointError
from regraft.surgery.head import replace_head
from regraft.wording import option
from regraft.zoo import build


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    rename: Mapping[str, str] | None = None,
    match: Literal["names", "shapes"] = "names",
    entry: str | None = None,
    accept: Confidence = "certain",
    tensors_only: bool = False,
    trust_code: bool = False,
    dry_run: bool = False,
) -> LoadReport:
    """Write the weights in a file as safetensors, without running anything in it.

    Without a model, the tensors keep their dtypes and names; only prefixes of wrappers are stripped. With a model, they
    get its names and dtypes, and the file becomes a checkpoint that `load` rebuilds: every tensor of the model must
    then be in the file; a head for another number of classes is built as the file has it.

    Args:
        path: Any file that `load_weights` reads.
        out: The file to write, which ends in `.safetensors`.
        model: Name of a network, as `create_model` takes it.
        rename: As for `load_weights`.
        match: As for `load_weights`; only with a model.
        entry: As for `load_weights`.
        accept: As for `load_weights`; only with a model.
        tensors_only: Whether to extract the tensors from a file that holds more, such as a whole pickled module:
            classes are read as inert data, and none is imported or run.
        trust_code: Whether a class of your own (`py:…`) may be imported to build the model.
        dry_run: Whether to return the report without writing anything.

    Raises:
        CheckpointError: The file cannot be read, holds several networks, or does not fill the model.
        RunError: The file cannot be written; a previous file is unchanged.
    """
    check_arguments(convert, locals())
    source, target = Path(path), Path(out)
    if target.suffix != ".safetensors":
        raise CheckpointError(
            f"'{target}' does not end in .safetensors, the format that is written. Nothing was written."
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"'{target}' is the file that is read. Choose another name. Nothing was written.")
    contents = read_state_dicts(source, tensors_only=tensors_only)
    if model is None:
        tensors, report = _strip_wrappers(contents, rename or {}, entry)
        if not dry_run:
            separate = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
            write_tensors(target, separate, {"format": "pt"})
        return replace(report, dry_run=dry_run)
    rules = Rules(rename or {}, match, entry, confidence_of(accept), adapt=(), may_adapt=False)
    return _convert_to_network(model, contents, rules, target, trust_code=trust_code, dry_run=dry_run)


def _convert_to_network(
    name: str, contents: StateDicts, rules: Rules, target: Path, *, trust_code: bool, dry_run: bool
) -> LoadReport:
    """Load the weights into a named network and save that; see `convert`."""
    with preserved_randomness():
        network, plan = _with_its_head(build(name, trust_code=trust_code), contents, rules)
    if dry_run:
        return replace(plan.report, dry_run=True)
    _require_whole(plan.report, name)
    carry_out(plan, network, min_share=0.0)
    note_weights(network, contents.path)
    save(in_mode(network, False), target)
    return plan.report


def _strip_wrappers(contents: StateDicts, rename: Mapping[str, str], entry: str | None) -> tuple[Tensors, LoadReport]:
    """Strip wrappers from the names of the only state dict in a file."""
    choices = contents.choices(entry)
    if len(choices) > 1:
        raise CheckpointError(
            f"'{contents.path}' holds several state dicts: {listed(choices)}. "
            f"Choose one with {option('entry', 'KEY')}. Nothing was written."
        )
    tensors = renamed(choices[0].tensors, rename, contents.path)
    names, notes = without_wrappers(tensors)
    originals = dict(zip(tensors, choices[0].tensors, strict=True))
    others = [another.key for another in contents.entries if another.key and another is not choices[0]]
    report = LoadReport(
        path=str(contents.path),
        loaded=tuple(names.values()),
        missing=(),
        unexpected=(),
        mismatched=(),
        notes=(*contents.notes, *unwrapping(choices[0]), *notes),
        matches=tuple(
            Match(now, originals[name], "certain", "same name without what a wrapper added", shape(tensors[name]))
            for name, now in names.items()
        ),
        left_out=tuple(dict.fromkeys((*contents.left_out, *others))),
    )
    return {names[name]: tensor for name, tensor in tensors.items()}, report


def _with_its_head(network: nn.Module, contents: StateDicts, rules: Rules) -> tuple[nn.Module, LoadPlan]:
    """Plan the loading; if only the number of classes differs, into a network whose head has the file's number."""
    plan = plan_loading(network, contents, rules)
    widths = {file_shape[0] for _, file_shape, _ in plan.report.mismatched if file_shape}
    is_head = all(file_shape[1:] == model_shape[1:] for _, file_shape, model_shape in plan.report.mismatched)
    if len(widths) != 1 or not is_head or plan.report.missing:
        return network, plan
    edited = replace_head(network, widths.pop())
    edited_plan = plan_loading(edited, contents, rules)
    return (edited, edited_plan) if not edited_plan.report.mismatched else (network, plan)


def _require_whole(report: LoadReport, model: str) -> None:
    lacking = [*report.missing, *(name for name, _, _ in report.mismatched)]
    if lacking or not report.loaded:
        advice = "".join(f"{text}. " for text in (report.cause, report.suggestion) if text)
        raise CheckpointError(
            f"'{report.path}' does not fill {model}: nothing fits {some(map(repr, lacking))} ({len(lacking)} tensors), "
            f"and a checkpoint needs all. {advice}Nothing was written."
        )
