"""Load a file's weights into a model: read, propose, check, and only then copy."""

import os
import re
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
from regraft.checkpoint.matching.load_report import SURENESS, Adaptation, LoadReport, Match, Sureness, some
from regraft.checkpoint.matching.mapping import Proposal, match_shapes, propose
from regraft.checkpoint.matching.naming import strip_wrapper_parts
from regraft.checkpoint.matching.parts import joined_parts
from regraft.errors import CheckpointError


@dataclass(frozen=True)
class Rules:
    """How the tensors of a file are matched with those of a model; see `load_weights`."""

    rename: Mapping[str, str] = field(default_factory=dict)
    match: Literal["names", "shapes"] = "names"
    entry: str | None = None
    accept: Sureness = "certain"
    adapt: Collection[Adaptable] = ("positions", "stem")
    may_adapt: bool = True  # whether the function that was called has `adapt`, for advice to name it

    def __post_init__(self) -> None:
        problem = None
        if self.match not in ("names", "shapes"):
            problem = f"match is {self.match!r}, expected 'names' or 'shapes'"
        elif self.accept not in SURENESS:
            problem = f"accept is {self.accept!r}, expected one of {', '.join(SURENESS)}"
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
    accept: Sureness = "certain",
    adapt: Collection[Adaptable] = ("positions", "stem"),
    min_share: float = MIN_SHARE,
    strict: bool = False,
    dry_run: bool = False,
) -> LoadReport:
    """Load the weights in a file into `model`, in place, whatever wrote the file, without running anything in it.

    Reads safetensors, anything that `torch.save` wrote (through torch's weights-only unpickler), npz, TorchScript
    archives, and files in parts with an index. Wrapped state dicts (`{"state_dict": …}` and the like) are unwrapped,
    what wrappers put on names (`module.`, `_orig_mod.`, …) is taken off, prefixes are taken off or put on where more
    names fit so. For names that still do not fit a mapping is proposed, and only what is certain is loaded.

    Everything is checked before the first tensor changes; a failure while copying puts everything back. Parameters stay
    the same objects, frozen ones stay frozen, and dtype and device stay the model's. Where the model ties tensors, one
    of them in the file is enough.

    Args:
        model: Any module whose parameters exist (not on the meta device, not lazy).
        path: A file, an index of files (`….index.json`), or a folder with the weights of a Hugging Face model.
        rename: Regular expressions and what each is replaced by, applied to the names in the file.
        match: `"names"`, or `"shapes"` to pair tensors by order and shape alone, where no names fit but the structure
            is the same; refused where the order leaves a choice.
        entry: Key of the state dict to take where the file holds several, as in `"ema"` or `"teacher"`.
        accept: How sure a pair must be to be loaded: `"certain"`, `"likely"` or `"guess"`.
        adapt: What may be changed to fit: `"positions"` (position embeddings of another image size are resampled as
            timm does), `"stem"` (the first convolution takes another number of channels), `"head"` (the first classes
            are taken where their number differs; otherwise the head keeps its values).
        min_share: Smallest share of the model's parameters, from 0 to 1, that must be loaded. A head that the file
            lacks or has for other classes is not counted.
        strict: Whether anything missing, unexpected or mismatched is an error.
        dry_run: Whether to return the report without changing anything.

    Returns:
        What was loaded and what was not, why, and what to do about it. Missing and mismatched tensors keep their
        values.

    Raises:
        CheckpointError: The file cannot be read without running code, or holds several networks; nothing in it fits,
            or less than `min_share`; `strict` and not everything does. Nothing was changed.
    """
    check_arguments(load_weights, locals())
    rules = Rules(rename or {}, match, entry, accept, adapt)
    plan = plan_loading(model, read_state_dicts(Path(path)), rules)
    if dry_run:
        return replace(plan.report, dry_run=True)
    carry_out(plan, model, min_share=min_share, strict=strict)
    _warn_of_gaps(plan.report, model)
    return plan.report


def plan_loading(model: nn.Module, contents: StateDicts, rules: Rules) -> LoadPlan:
    """Work out what `load_weights` will load. Nothing is changed.

    Raises:
        CheckpointError: An option is wrong, the model has nothing to load into, or the file holds several networks.
    """
    slots = slots_of(model)
    joined = joined_parts(contents.entries, {name: shape(slot) for name, slot in slots.items()})
    wanted = [entry for entry in joined if rules.entry in (None, entry.key)]
    whole = [(entry, _planned(model, slots, contents, entry, rules)) for entry in wanted]
    if rules.entry is not None and whole:
        return whole[0][1]
    choices = contents.choices(rules.entry)
    plans = [_planned(model, slots, contents, chosen, rules) for chosen in choices]
    if not whole:
        return _best(plans, contents, choices)
    in_parts = _best_in_parts(whole, contents)
    most = max(len(plan.report.loaded) for plan in plans)
    plan = in_parts if len(in_parts.report.loaded) > most else _best(plans, contents, choices)
    _require_all_parts(plan, in_parts, contents)
    return plan


def _best_in_parts(whole: Sequence[tuple[StateDict, LoadPlan]], contents: StateDicts) -> LoadPlan:
    """Return the plan that fills the most.

    Raises:
        UnfitError: Another one fills as much, with other parts.
    """
    entry, best = max(whole, key=lambda pair: (len(pair[1].report.loaded), not pair[0].is_average))
    for other, plan in whole:
        if other.is_average and not entry.is_average:
            continue
        if len(plan.report.loaded) == len(best.report.loaded) and not set(other.parts) & set(entry.parts):
            raise UnfitError(
                f"'{contents.path}' holds several networks in parts: '{entry.key}' and '{other.key}'.",
                "Choose one with entry=KEY (--entry KEY).",
            )
    return best


def _require_all_parts(plan: LoadPlan, joined: LoadPlan, contents: StateDicts) -> None:
    """Check that no part of a file is left aside that may belong to what a plan leaves as it is.

    Raises:
        CheckpointError: There is one.
    """
    waiting = [match for match in joined.report.proposed if match.name in plan.report.missing]
    if waiting:
        raise UnfitError(
            f"'{contents.path}' keeps a network in parts: {listed(contents.entries)}. One of them has "
            f"'{waiting[0].source}', which may be '{waiting[0].name}' of the model, but that is no more "
            f"than {waiting[0].sure}.",
            "Look with dry_run=True (--dry-run), or rename the parts with rename={…} (--rename), or take one alone "
            "with entry=KEY (--entry KEY).",
        )


def _warn_of_gaps(report: LoadReport, model: nn.Module) -> None:
    """Warn where parameters outside of the head keep their values; a head for other classes is expected to."""
    if report.share >= 1 or not report.gaps:
        return
    warnings.warn(
        f"{len(report.gaps)} tensors of {type(model).__name__} ({some(report.gaps)}), {1 - report.share:.1%} of its "
        f"parameters without the head, keep the values that they had: '{report.path}' has nothing certain for them. "
        f"{report.cause}",
        stacklevel=3,
    )


def renamed(tensors: Tensors, rules: Mapping[str, str], path: Path) -> Tensors:
    """Apply regular expressions to names.

    Raises:
        CheckpointError: An expression cannot be understood, or two names become one.
    """
    for pattern, replacement in rules.items():
        try:
            names = {name: re.sub(pattern, replacement, name) for name in tensors}
        except (re.error, IndexError) as error:
            raise CheckpointError(
                f"the renaming '{pattern}={replacement}' is no regular expression with its replacement: {error}. "
                r"Expected as in 'encoder\.(.*)=backbone.\1'. Nothing was changed."
            ) from error
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            both = [before for before, after in names.items() if after == twice[0]]
            raise CheckpointError(
                f"the renaming '{pattern}={replacement}' makes '{twice[0]}' of '{both[0]}' and of '{both[1]}' in "
                f"'{path}'. Expected one name for each. Nothing was changed."
            )
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
    return tensors


def _planned(model: nn.Module, slots: Tensors, contents: StateDicts, chosen: StateDict, rules: Rules) -> LoadPlan:
    plain, notes = dequantized(chosen.tensors, slots, contents.path)
    chosen, contents = replace(chosen, tensors=plain), replace(contents, notes=(*contents.notes, *notes))
    tensors = renamed(chosen.tensors, rules.rename, contents.path)
    original = dict(zip(tensors, chosen.tensors, strict=True))
    who: dict[str, str] = {}
    if rules.match == "names":
        before = {id(tensor): name for name, tensor in tensors.items()}
        tensors, who = renamed_by_libraries(model, tensors, slots)
        original = {name: original.get(before.get(id(tensor), name), name) for name, tensor in tensors.items()}
    theirs = {name: shape(tensor) for name, tensor in tensors.items()}
    ours = {name: shape(slot) for name, slot in slots.items()}
    by_shape = rules.match == "shapes"
    found = (match_shapes if by_shape else propose)(theirs, ours, is_ordered=chosen.is_ordered)
    held = {found.names[name]: tensor for name, tensor in tensors.items()}
    fitter = Fitter(model, slots, held, rules.adapt)
    values, matches, mismatched, adapted = _fitted(found, tensors, slots, fitter, "guess" if by_shape else rules.accept)
    report = _report(slots, contents, chosen, found, fitter, (values, matches, mismatched, adapted))
    rest = [entry for entry in contents.entries if entry.key not in (chosen.key, *chosen.parts)]
    cause, suggestion = diagnose(report, found, fitter, rest, may_adapt=rules.may_adapt)
    report = replace(report, cause=cause, suggestion=suggestion)
    matches = tuple(
        replace(
            pair,
            source=chosen.sources.get(original[pair.source], original[pair.source]),
            reason=f"as {who[pair.source]} while loading" if pair.source in who else pair.reason,
        )
        for pair in report.matches
    )
    extra, absent, surplus = _extra_states(model, chosen.extra)
    report = replace(
        report,
        matches=matches,
        loaded=(*report.loaded, *(f"{path}.{EXTRA_STATE}".lstrip(".") for path in extra)),
        missing=(*report.missing, *absent),
        unexpected=(*report.unexpected, *surplus),
    )
    return LoadPlan(values, report, theirs, extra)


def _fitted(
    found: Proposal, tensors: Tensors, slots: Tensors, fitter: Fitter, accept: Sureness
) -> tuple[Tensors, list[Match], dict[str, str], list[Adaptation]]:
    """Make each pair fit; return what to load, the pairs, what does not fit with the reason, and what was changed."""
    values: Tensors = {}
    matches: list[Match] = []
    mismatched: dict[str, str] = {}
    adapted: list[Adaptation] = []
    for pair in found.matches:
        tensor, slot = tensors[pair.source], slots[pair.name]
        is_taken = SURENESS.index(pair.sure) <= SURENESS.index(accept)
        if not same_kind(tensor, slot):
            mismatched[pair.name] = f"is {_dtype(tensor.dtype)} in the file and {_dtype(slot.dtype)} in the model"
            continue
        if tensor.shape != slot.shape:
            made = fitter.fit(pair.name, tensor)
            if made is None:
                mismatched[pair.name] = ""
                continue
            tensor = made[0]
            if is_taken:
                adapted.append(made[1])
        matches.append(replace(pair, loaded=is_taken))
        if is_taken:
            values[pair.name] = tensor
    casts = Counter((values[name].dtype, slots[name].dtype) for name in values if values[name].ndim)
    adapted += [
        Adaptation("", "dtype", f"{count} tensors from {_dtype(before)} to {_dtype(after)}")
        for (before, after), count in casts.items()
        if before != after
    ]
    return values, matches, mismatched, adapted


def _report(
    slots: Tensors,
    contents: StateDicts,
    chosen: StateDict,
    found: Proposal,
    fitter: Fitter,
    parts: tuple[Tensors, list[Match], dict[str, str], list[Adaptation]],
) -> LoadReport:
    values, matches, mismatched, adapted = parts
    filled = {id(slots[name]) for name in values}  # tied tensors are filled together
    used = {match.source for match in found.matches}
    shapes = {match.name: match.shape for match in found.matches}
    others = tuple(
        entry.key for entry in contents.entries if entry.key and entry.key not in (chosen.key, *chosen.parts)
    )
    return LoadReport(
        path=str(contents.path),
        loaded=tuple(name for name in slots if id(slots[name]) in filled),
        missing=tuple(
            name
            for name in slots
            if id(slots[name]) not in filled and name not in mismatched and not name.endswith(COUNTER)
        ),
        unexpected=tuple(
            [found.names[name] for name in found.names if name not in used]
            + [found.names[match.source] for match in matches if not match.loaded]
        ),
        mismatched=tuple((name, shapes[name], shape(slots[name])) for name in mismatched),
        reasons={name: reason for name, reason in mismatched.items() if reason},
        notes=(*contents.notes, *unwrapping(chosen), *found.notes),
        matches=tuple(matches),
        adapted=tuple(adapted),
        left_out=tuple(dict.fromkeys((*contents.left_out, *others))),
        share=_share(slots, filled, fitter),
        gaps=tuple(
            name
            for name, slot in slots.items()
            if isinstance(slot, nn.Parameter) and id(slot) not in filled and not fitter.is_in_head(name)
        ),
    )


def _share(slots: Tensors, filled: set[int], fitter: Fitter) -> float:
    """Return the loaded part of the parameters; a head that is not loaded does not count."""
    sizes = {id(slot): slot.numel() for slot in slots.values() if isinstance(slot, nn.Parameter)}
    if not sizes:
        sizes = {id(slot): slot.numel() for slot in slots.values()}
    empty = [name for name, slot in slots.items() if id(slot) in sizes and id(slot) not in filled]
    heads = {id(slots[name]) for name in empty if fitter.is_in_head(name)}
    total = sum(size for key, size in sizes.items() if key not in heads)
    loaded = sum(size for key, size in sizes.items() if key in filled)
    return loaded / total if total else float(bool(loaded))


def _best(plans: list[LoadPlan], contents: StateDicts, choices: Sequence[StateDict]) -> LoadPlan:
    """Return the one plan, or of several state dicts in a file the only one that fits."""
    if len(plans) == 1:
        return plans[0]
    ranked = sorted(plans, key=lambda plan: plan.report.share, reverse=True)
    if ranked[0].report.share > ranked[1].report.share and ranked[1].report.share < MIN_SHARE:
        return ranked[0]
    fit = ", ".join(f"{plan.report.share:.0%}" for plan in plans)
    raise UnfitError(
        f"'{contents.path}' holds several state dicts: {listed(choices)}, which would fill {fit} of the model.",
        "Choose one with entry=KEY (--entry KEY).",
    )


def _extra_states(model: nn.Module, held: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Find the layers to which the extra states of a file belong.

    Returns:
        Values by the layers' paths; names that the file lacks; names that the model lacks.
    """
    base = nn.Module.get_extra_state
    keeping = [path for path, layer in model.named_modules() if type(layer).get_extra_state is not base]
    ours = {f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE: path for path in keeping}
    plain_ours = {plain: name for name, plain in strip_wrapper_parts(ours).items()}
    values: dict[str, Any] = {}
    surplus = []
    for source, plain in strip_wrapper_parts(held).items():
        near = [
            name
            for now, name in plain_ours.items()
            if f".{now}".endswith(f".{plain}") or f".{plain}".endswith(f".{now}")
        ]
        name = plain_ours.get(plain) or (near[0] if len(near) == 1 else None)
        if name is None:
            surplus.append(source)
        else:
            values[ours[name]] = held[source]
    absent = [name for name, path in ours.items() if path not in values]
    return values, absent, surplus


def same_kind(tensor: torch.Tensor, slot: torch.Tensor) -> bool:
    """Return whether a cast between both loses no more than precision; single numbers may be of any kind."""
    if slot.ndim == tensor.ndim == 0:
        return True
    return tensor.is_floating_point() == slot.is_floating_point() and tensor.is_complex() == slot.is_complex()


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
