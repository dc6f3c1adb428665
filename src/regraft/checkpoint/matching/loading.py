"""Load the weights in a file into a model: read, map names, adapt shapes, check, and copy last."""

import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from regraft.arguments import check_arguments
from regraft.checkpoint.any_file import read_state_dicts
from regraft.checkpoint.foreign.quantized import dequantized
from regraft.checkpoint.foreign.reading import unwrapping
from regraft.checkpoint.foreign.state_dicts import EXTRA_STATE, StateDict, StateDicts, Tensors, listed
from regraft.checkpoint.matching.adapting import Adaptable, Fitter, shape
from regraft.checkpoint.matching.alignment import COUNTER
from regraft.checkpoint.matching.diagnosis import diagnose
from regraft.checkpoint.matching.library_names import renamed_by_libraries
from regraft.checkpoint.matching.load_plan import MIN_SHARE, LoadPlan, UnfitError, carry_out, slots_of
from regraft.checkpoint.matching.load_report import (
    CONFIDENCE_LEVELS,
    Adaptation,
    Confidence,
    LoadReport,
    Match,
    confidence_of,
)
from regraft.checkpoint.matching.mapping import Proposal, match_shapes, propose
from regraft.checkpoint.matching.naming import renamed, strip_wrapper_parts
from regraft.checkpoint.matching.parts import joined_parts
from regraft.display import some
from regraft.errors import CheckpointError
from regraft.wording import option, rename_option


@dataclass(frozen=True)
class Rules:
    """Options of the mapping from a file to a model; see `load_weights`."""

    rename: Mapping[str, str] = field(default_factory=dict)
    match: Literal["names", "shapes"] = "names"
    entry: str | None = None
    accept: Confidence = "certain"
    adapt: Collection[Adaptable] = ("positions", "stem")
    may_adapt: bool = True  # whether the public function has an argument `adapt` that a message may suggest

    def __post_init__(self) -> None:
        problem = None
        if self.match not in ("names", "shapes"):
            problem = f"match is {self.match!r}, expected 'names' or 'shapes'"
        elif self.accept not in CONFIDENCE_LEVELS:
            problem = f"accept is {self.accept!r}, expected one of {', '.join(CONFIDENCE_LEVELS)}"
        elif isinstance(self.adapt, str) or not set(self.adapt) <= {"positions", "stem", "head"}:
            problem = f"adapt is {self.adapt!r}, expected some of 'positions', 'stem', 'head' in a tuple"
        if problem:
            raise CheckpointError(f"{problem}. Nothing was changed.")


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | None = None,
    match: Literal["names", "shapes"] = "names",
    entry: str | None = None,
    accept: Confidence = "certain",
    adapt: Collection[Adaptable] = ("positions", "stem"),
    min_share: float = MIN_SHARE,
    strict: bool = False,
    dry_run: bool = False,
) -> LoadReport:
    """Load the weights in a file into `model`, in place, without running any code from the file.

    Reads safetensors, files of `torch.save` (through torch's weights-only unpickler), npz, TorchScript archives, and
    sharded files with an index. Wrapped state dicts (`{"state_dict": …}` and the like) are unwrapped. Parts that
    wrappers add to names (`module.`, `_orig_mod.`, …) are stripped; prefixes are stripped or added where more names fit
    then. A mapping is proposed for names that still do not fit, and only what is certain is loaded.

    Everything is checked before the first tensor changes; a failure while copying restores all values. Parameters stay
    the same objects, frozen ones stay frozen, and dtype and device stay the model's. Where the model ties tensors, one
    of them in the file is enough.

    Args:
        model: Any module whose parameters exist (not on the meta device, not lazy).
        path: A file, an index of files (`….index.json`), or a folder with the weights of a Hugging Face model.
        rename: Regular expression → replacement, applied to the names in the file.
        match: `"names"`, or `"shapes"` to pair tensors by order and shape alone, where no names fit but the structure
            is the same; an error where the order leaves a choice.
        entry: Key of the state dict to load where the file holds several, as in `"ema"` or `"teacher"`.
        accept: Lowest confidence at which a pair is loaded: `"certain"`, `"likely"` or `"ambiguous"`.
        adapt: What may be changed to fit: `"positions"` (position embeddings of another image size are resampled as
            timm does), `"stem"` (the first convolution takes another number of channels), `"head"` (the first classes
            are copied where their number differs; otherwise the head keeps its values).
        min_share: Smallest share of the model's parameters, from 0 to 1, that must be loaded. A head that the file
            lacks or has for other classes is not counted.
        strict: Whether anything missing, unexpected or mismatched is an error.
        dry_run: Whether to return the report without changing anything.

    Returns:
        A report of what was loaded, what was not and why, and what to do about it. Missing and mismatched tensors keep
        their values.

    Raises:
        CheckpointError: The file cannot be read without running code, or holds several networks; nothing in it fits,
            or less than `min_share`; `strict` and not everything does. Nothing was changed.
    """
    check_arguments(load_weights, locals())
    rules = Rules(rename or {}, match, entry, confidence_of(accept), adapt)
    plan = plan_loading(model, read_state_dicts(Path(path)), rules)
    if dry_run:
        return replace(plan.report, dry_run=True)
    carry_out(plan, model, min_share=min_share, strict=strict)
    _warn_of_gaps(plan.report, model)
    return plan.report


def plan_loading(model: nn.Module, contents: StateDicts, rules: Rules) -> LoadPlan:
    """Plan what `load_weights` will load. Nothing is changed.

    Raises:
        CheckpointError: An option is wrong, the model has nothing to load into, or the file holds several networks.
    """
    slots = slots_of(model)
    joined = joined_parts(contents.entries, {name: shape(slot) for name, slot in slots.items()})
    wanted = [entry for entry in joined if rules.entry in (None, entry.key)]
    whole = [(entry, _plan_entry(model, slots, contents, entry, rules)) for entry in wanted]
    if rules.entry is not None and whole:
        return whole[0][1]
    choices = contents.choices(rules.entry)
    plans = [_plan_entry(model, slots, contents, chosen, rules) for chosen in choices]
    if not whole:
        return _best_plan(plans, contents, choices)
    in_parts = _best_in_parts(whole, contents)
    # Parts are joined only if that loads more than the best single state dict: a file with a generator and a
    # discriminator also looks like parts.
    most = max(len(plan.report.loaded) for plan in plans)
    plan = in_parts if len(in_parts.report.loaded) > most else _best_plan(plans, contents, choices)
    _require_all_parts(plan, in_parts, contents)
    return plan


def _best_in_parts(whole: Sequence[tuple[StateDict, LoadPlan]], contents: StateDicts) -> LoadPlan:
    """Return the plan that loads the most tensors.

    Raises:
        UnfitError: Another plan loads as many, from other parts.
    """
    entry, best = max(whole, key=lambda pair: (len(pair[1].report.loaded), not pair[0].is_average))
    for other, plan in whole:
        if other.is_average and not entry.is_average:  # the raw weights win over their average without asking
            continue
        if len(plan.report.loaded) == len(best.report.loaded) and not set(other.parts) & set(entry.parts):
            raise UnfitError(
                f"'{contents.path}' holds several networks in parts: '{entry.key}' and '{other.key}'.",
                f"Choose one with {option('entry', 'KEY')}.",
            )
    return best


def _require_all_parts(plan: LoadPlan, joined: LoadPlan, contents: StateDicts) -> None:
    """Refuse a plan that ignores a part of the file which may hold tensors that the plan lacks.

    Raises:
        UnfitError: There is such a part.
    """
    waiting = [match for match in joined.report.proposed if match.name in plan.report.missing]
    if waiting:
        raise UnfitError(
            f"'{contents.path}' keeps a network in parts: {listed(contents.entries)}. One of them has "
            f"'{waiting[0].source}', which may be '{waiting[0].name}' of the model, but that is no more "
            f"than {waiting[0].confidence}.",
            f"Look with {option('dry_run', True)}, or rename the parts with {rename_option()}, or take one alone with "
            f"{option('entry', 'KEY')}.",
        )


def _warn_of_gaps(report: LoadReport, model: nn.Module) -> None:
    """Warn if parameters outside of the head keep their values; a head for other classes is expected to."""
    if report.share >= 1 or not report.gaps:
        return
    warnings.warn(
        f"{len(report.gaps)} tensors of {type(model).__name__} ({some(report.gaps)}), {1 - report.share:.1%} of its "
        f"parameters without the head, keep the values that they had: '{report.path}' has nothing certain for them. "
        f"{report.cause}",
        stacklevel=3,
    )


def _plan_entry(model: nn.Module, slots: Tensors, contents: StateDicts, chosen: StateDict, rules: Rules) -> LoadPlan:
    """Plan the loading of one state dict: dequantize, rename, map, adapt, and explain what does not fit."""
    plain_tensors, notes = dequantized(chosen.tensors, slots, contents.path)
    chosen, contents = replace(chosen, tensors=plain_tensors), replace(contents, notes=(*contents.notes, *notes))
    tensors = renamed(chosen.tensors, rules.rename, contents.path)
    # Every step below may rename. `original` keeps the way back, as the report must use the names in the file.
    original = dict(zip(tensors, chosen.tensors, strict=True))
    renamed_by: dict[str, str] = {}
    if rules.match == "names":
        # Code of libraries renames freely and reports nothing, so tensors are followed by identity. A tensor that it
        # made anew keeps its new name.
        names_by_id = {id(tensor): name for name, tensor in tensors.items()}
        tensors, renamed_by = renamed_by_libraries(model, tensors, slots)
        original = {name: original.get(names_by_id.get(id(tensor), name), name) for name, tensor in tensors.items()}
    file_shapes = {name: shape(tensor) for name, tensor in tensors.items()}
    model_shapes = {name: shape(slot) for name, slot in slots.items()}
    by_shape = rules.match == "shapes"
    proposal = (match_shapes if by_shape else propose)(file_shapes, model_shapes, is_ordered=chosen.is_ordered)
    by_model_name = {proposal.names[name]: tensor for name, tensor in tensors.items()}
    fitter = Fitter(model, slots, by_model_name, rules.adapt)
    # match="shapes" refuses every ambiguous order itself, so all of its pairs are accepted.
    values, matches, mismatched, adapted = _fit_tensors(
        proposal, tensors, slots, fitter, "ambiguous" if by_shape else rules.accept
    )
    rest = [entry for entry in contents.entries if entry.key not in (chosen.key, *chosen.parts)]
    report = _build_report(slots, contents, chosen, rest, proposal, fitter, (values, matches, mismatched, adapted))
    cause, suggestion = diagnose(report, proposal, fitter, rest, may_adapt=rules.may_adapt)
    matches = tuple(
        replace(
            pair,
            source=chosen.sources.get(original[pair.source], original[pair.source]),
            reason=f"as {renamed_by[pair.source]} while loading" if pair.source in renamed_by else pair.reason,
        )
        for pair in report.matches
    )
    # Extra states are no tensors, so they take no part in the mapping and are added to the finished report.
    extra, absent, surplus = _match_extra_states(model, chosen.extra)
    report = replace(
        report,
        cause=cause,
        suggestion=suggestion,
        matches=matches,
        loaded=(*report.loaded, *(f"{path}.{EXTRA_STATE}".lstrip(".") for path in extra)),
        missing=(*report.missing, *absent),
        unexpected=(*report.unexpected, *surplus),
    )
    return LoadPlan(values, report, file_shapes, extra)


def _fit_tensors(
    proposal: Proposal, tensors: Tensors, slots: Tensors, fitter: Fitter, accept: Confidence
) -> tuple[Tensors, list[Match], dict[str, str], list[Adaptation]]:
    """Adapt each pair of a proposal to the model.

    Returns:
        Tensors to load by name in the model; matches; name → reason (empty: the shape) of what does not fit;
        adaptations.
    """
    values: Tensors = {}
    matches: list[Match] = []
    mismatched: dict[str, str] = {}
    adapted: list[Adaptation] = []
    for pair in proposal.matches:
        tensor, slot = tensors[pair.source], slots[pair.name]
        is_taken = CONFIDENCE_LEVELS.index(pair.confidence) <= CONFIDENCE_LEVELS.index(accept)
        # Integers in the place of floats are usually quantized weights: a cast would load them without their scale.
        if not same_kind(tensor, slot):
            mismatched[pair.name] = f"is {_dtype(tensor.dtype)} in the file and {_dtype(slot.dtype)} in the model"
            continue
        if tensor.shape != slot.shape:
            fitted = fitter.fit(pair.name, tensor)
            if fitted is None:
                mismatched[pair.name] = ""  # the shapes say it all, and the report has both
                continue
            tensor = fitted[0]
            if is_taken:  # a match that is only proposed changes nothing, so no adaptation is reported
                adapted.append(fitted[1])
        matches.append(replace(pair, loaded=is_taken))
        if is_taken:
            values[pair.name] = tensor
    casts = Counter((values[name].dtype, slots[name].dtype) for name in values if values[name].ndim)
    # One line per pair of dtypes: a half-precision file casts every tensor, which is not worth a line each.
    adapted += [
        Adaptation("", "dtype", f"{count} tensors from {_dtype(before)} to {_dtype(after)}")
        for (before, after), count in casts.items()
        if before != after
    ]
    return values, matches, mismatched, adapted


def _build_report(
    slots: Tensors,
    contents: StateDicts,
    chosen: StateDict,
    rest: Sequence[StateDict],
    proposal: Proposal,
    fitter: Fitter,
    parts: tuple[Tensors, list[Match], dict[str, str], list[Adaptation]],
) -> LoadReport:
    """Make the report of a plan, without cause and suggestion."""
    values, matches, mismatched, adapted = parts
    filled = {id(slots[name]) for name in values}  # by identity: tied tensors are filled together
    empty = [name for name, slot in slots.items() if id(slot) not in filled]
    used = {match.source for match in proposal.matches}
    shapes = {match.name: match.shape for match in proposal.matches}
    return LoadReport(
        path=str(contents.path),
        loaded=tuple(name for name in slots if id(slots[name]) in filled),
        # `num_batches_tracked` is never missing: files from before torch 0.4.1 lack it, and inference ignores it.
        missing=tuple(name for name in empty if name not in mismatched and not name.endswith(COUNTER)),
        unexpected=tuple(
            [proposal.names[name] for name in proposal.names if name not in used]
            + [proposal.names[match.source] for match in matches if not match.loaded]
        ),
        mismatched=tuple((name, shapes[name], shape(slots[name])) for name in mismatched),
        reasons={name: reason for name, reason in mismatched.items() if reason},
        notes=(*contents.notes, *unwrapping(chosen), *proposal.notes),
        matches=tuple(matches),
        adapted=tuple(adapted),
        left_out=tuple(dict.fromkeys((*contents.left_out, *(entry.key for entry in rest if entry.key)))),
        share=_share(slots, filled, fitter),
        gaps=tuple(name for name in empty if isinstance(slots[name], nn.Parameter) and not fitter.is_in_head(name)),
    )


def _share(slots: Tensors, filled: set[int], fitter: Fitter) -> float:
    """Return the loaded share of the parameters, from 0 to 1; a head that is not loaded is not counted."""
    parameters = [slot for slot in slots.values() if isinstance(slot, nn.Parameter)]
    sizes = {id(slot): slot.numel() for slot in parameters or slots.values()}  # without any, a model of buffers alone
    # A head for other classes is usual in fine-tuning. Counted, it would hide whether the backbone is complete.
    empty = [name for name, slot in slots.items() if id(slot) in sizes and id(slot) not in filled]
    heads = {id(slots[name]) for name in empty if fitter.is_in_head(name)}
    total = sum(size for key, size in sizes.items() if key not in heads)
    loaded = sum(size for key, size in sizes.items() if key in filled)
    return loaded / total if total else float(bool(loaded))


def _best_plan(plans: list[LoadPlan], contents: StateDicts, choices: Sequence[StateDict]) -> LoadPlan:
    """Return the only plan, or the only one that fits where the file holds several state dicts.

    Raises:
        UnfitError: Several fit, or none is better than the others.
    """
    if len(plans) == 1:
        return plans[0]
    # Clear only if the second best would be refused anyway: a student and a teacher both fit.
    ranked = sorted(plans, key=lambda plan: plan.report.share, reverse=True)
    if ranked[0].report.share > ranked[1].report.share and ranked[1].report.share < MIN_SHARE:
        return ranked[0]
    fit = ", ".join(f"{plan.report.share:.0%}" for plan in plans)
    raise UnfitError(
        f"'{contents.path}' holds several state dicts: {listed(choices)}, which would fill {fit} of the model.",
        f"Choose one with {option('entry', 'KEY')}.",
    )


def _match_extra_states(
    model: nn.Module, file_states: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Assign the extra states of a file to the layers of a model.

    Returns:
        Path of the layer → extra state; names that the file lacks; names that the model lacks.
    """
    base = nn.Module.get_extra_state
    stateful = [path for path, layer in model.named_modules() if type(layer).get_extra_state is not base]
    paths = {f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE: path for path in stateful}
    plain_names = {plain: name for name, plain in strip_wrapper_parts(paths).items()}
    values: dict[str, Any] = {}
    surplus = []
    for source, plain in strip_wrapper_parts(file_states).items():
        # Prefixes differ as those of weights do: one name may end with the other, if only one layer fits so.
        near = [
            name
            for plain_name, name in plain_names.items()
            if f".{plain_name}".endswith(f".{plain}") or f".{plain}".endswith(f".{plain_name}")
        ]
        name = plain_names.get(plain) or (near[0] if len(near) == 1 else None)
        if name is None:
            surplus.append(source)
        else:
            values[paths[name]] = file_states[source]
    missing = [name for name, path in paths.items() if path not in values]
    return values, missing, surplus


def same_kind(tensor: torch.Tensor, slot: torch.Tensor) -> bool:
    """Return whether a cast from one dtype to the other only changes precision; scalars may be of any kind."""
    if slot.ndim == tensor.ndim == 0:
        return True
    return tensor.is_floating_point() == slot.is_floating_point() and tensor.is_complex() == slot.is_complex()


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
