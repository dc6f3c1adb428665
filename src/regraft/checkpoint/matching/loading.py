"""Load a file's weights into a model: read, propose, check, and only then copy."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.arguments import check_arguments
from regraft.checkpoint.foreign.reading import read_state_dicts, unwrapping
from regraft.checkpoint.foreign.state_dicts import StateDict, StateDicts, Tensors, listed
from regraft.checkpoint.matching.adapting import Adaptable, Fitter, shape
from regraft.checkpoint.matching.alignment import COUNTER
from regraft.checkpoint.matching.diagnosis import diagnose
from regraft.checkpoint.matching.load_report import SURENESS, Adaptation, LoadReport, Match, Sureness
from regraft.checkpoint.matching.mapping import Proposal, match_shapes, propose
from regraft.checkpoint.matching.naming import Shapes
from regraft.errors import CheckpointError

MIN_SHARE = 0.5


@dataclass(frozen=True)
class Rules:
    """How the tensors of a file are matched with those of a model; see `load_weights`."""

    rename: Mapping[str, str] = field(default_factory=dict)
    match: Literal["names", "shapes"] = "names"
    entry: str | None = None
    accept: Sureness = "certain"
    adapt: Collection[Adaptable] = ("positions", "stem")

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


@dataclass(frozen=True)
class LoadPlan:
    """What will be loaded into a model, before anything is.

    Attributes:
        values: The tensors to copy, by their names in the model; shapes fit, dtypes may not yet.
        report: What will be so.
        theirs: Shape by name in the file.
    """

    values: Tensors
    report: LoadReport
    theirs: Shapes


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
        dry_run: Whether to only say what would be done.

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
    return plan.report


def plan_loading(model: nn.Module, contents: StateDicts, rules: Rules) -> LoadPlan:
    """Work out what `load_weights` will load. Nothing is changed.

    Raises:
        CheckpointError: An option is wrong, the model has nothing to load into, or the file holds several networks.
    """
    slots = _slots(model)
    choices = contents.choices(rules.entry)
    return _best([_planned(model, slots, contents, chosen, rules) for chosen in choices], contents, choices)


def carry_out(plan: LoadPlan, model: nn.Module, *, min_share: float = MIN_SHARE, strict: bool = False) -> None:
    """Check a plan and copy its tensors into the model.

    Raises:
        CheckpointError: It does not fit well enough, or a tensor cannot be written. Nothing was changed.
    """
    if not 0 <= min_share <= 1:
        raise CheckpointError(f"min_share is {min_share!r}, expected a number from 0 to 1. Nothing was changed.")
    slots = _slots(model)
    _require_fit(plan, model, slots, min_share, strict=strict)
    _copy(slots, plan.values, plan.report.path)


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


def _slots(model: nn.Module) -> Tensors:
    """Return the tensors of a model that can be filled.

    Raises:
        CheckpointError: Some have no memory to load into.
    """
    slots = {name: slot for name, slot in model.state_dict(keep_vars=True).items() if isinstance(slot, torch.Tensor)}
    for name, slot in slots.items():
        if is_lazy(slot):
            raise CheckpointError(
                f"'{name}' of {type(model).__name__} is lazy: it has no shape yet. Run the model once on an input, "
                "then load. Nothing was changed."
            )
        if slot.is_meta:
            raise CheckpointError(
                f"'{name}' of {type(model).__name__} is on the meta device, which has no memory to load into. Use "
                "model.to_empty(device='cpu') first. Nothing was changed."
            )
    return slots


def _planned(model: nn.Module, slots: Tensors, contents: StateDicts, chosen: StateDict, rules: Rules) -> LoadPlan:
    tensors = renamed(chosen.tensors, rules.rename, contents.path)
    theirs = {name: shape(tensor) for name, tensor in tensors.items()}
    ours = {name: shape(slot) for name, slot in slots.items()}
    by_shape = rules.match == "shapes"
    found = (match_shapes if by_shape else propose)(theirs, ours, is_ordered=chosen.is_ordered)
    held = {found.names[name]: tensor for name, tensor in tensors.items()}
    fitter = Fitter(model, slots, held, rules.adapt)
    values, matches, mismatched, adapted = _fitted(found, tensors, slots, fitter, "guess" if by_shape else rules.accept)
    report = _report(slots, contents, chosen, found, fitter, (values, matches, mismatched, adapted))
    original = dict(zip(tensors, chosen.tensors, strict=True))
    matches = tuple(replace(pair, source=original[pair.source]) for pair in report.matches)
    return LoadPlan(values, replace(report, matches=matches), theirs)


def _fitted(
    found: Proposal, tensors: Tensors, slots: Tensors, fitter: Fitter, accept: Sureness
) -> tuple[Tensors, list[Match], list[str], list[Adaptation]]:
    """Make each pair fit; return what to load, the pairs, the names that do not fit, and what was changed."""
    values: Tensors = {}
    matches: list[Match] = []
    mismatched: list[str] = []
    adapted: list[Adaptation] = []
    for pair in found.matches:
        tensor, slot = tensors[pair.source], slots[pair.name]
        is_taken = SURENESS.index(pair.sure) <= SURENESS.index(accept)
        if not _same_kind(tensor, slot):
            mismatched.append(pair.name)
            continue
        if tensor.shape != slot.shape:
            made = fitter.fit(pair.name, tensor)
            if made is None:
                mismatched.append(pair.name)
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
    parts: tuple[Tensors, list[Match], list[str], list[Adaptation]],
) -> LoadReport:
    values, matches, mismatched, adapted = parts
    filled = {id(slots[name]) for name in values}  # tied tensors are filled together
    used = {match.source for match in found.matches}
    shapes = {match.name: match.shape for match in found.matches}
    others = tuple(entry.key for entry in contents.entries if entry.key and entry.key != chosen.key)
    report = LoadReport(
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
        notes=(*contents.notes, *unwrapping(chosen), *found.notes),
        matches=tuple(matches),
        adapted=tuple(adapted),
        left_out=tuple(dict.fromkeys((*contents.left_out, *others))),
        share=_share(slots, filled, fitter),
    )
    cause, suggestion = diagnose(report, found, fitter, [entry for entry in contents.entries if entry is not chosen])
    return replace(report, cause=cause, suggestion=suggestion)


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
    raise CheckpointError(
        f"'{contents.path}' holds several state dicts that fit: {listed(choices)}, which would fill "
        f"{fit} of the model. Choose one with entry=KEY (--entry KEY). Nothing was changed."
    )


def _require_fit(plan: LoadPlan, model: nn.Module, slots: Tensors, min_share: float, *, strict: bool) -> None:
    report, kind = plan.report, type(model).__name__
    advice = " ".join(f"{text}." for text in (report.cause, report.suggestion) if text)
    if not plan.values and not report.proposed:
        raise CheckpointError(
            f"nothing in '{report.path}' fits {kind}: the file has {_listed(plan.theirs)}, the model "
            f"{_listed({name: shape(slot) for name, slot in slots.items()})}. Give the architecture that the file was "
            "trained with, or rename={…}. Nothing was changed."
        )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise CheckpointError(
            f"'{report.path}' does not fit {kind} in all: {report.headline()}. {advice} Nothing was changed.".replace(
                "  ", " "
            )
        )
    if not plan.values:
        raise CheckpointError(
            f"nothing in '{report.path}' is certain to fit {kind}. {advice} Look with dry_run=True (--dry-run). "
            "Nothing was changed."
        )
    if report.share < min_share:
        raise CheckpointError(
            f"only {report.share:.1%} of the parameters of {kind} would be loaded from '{report.path}', expected at "
            f"least {min_share:.0%}. {advice} Look with dry_run=True (--dry-run), or allow less with min_share=. "
            "Nothing was changed."
        )
    _require_one_value_for_tied(plan, slots)


def _require_one_value_for_tied(plan: LoadPlan, slots: Tensors) -> None:
    first: dict[int, str] = {}
    for name, value in plan.values.items():
        other = first.setdefault(id(slots[name]), name)
        if other != name and value is not plan.values[other] and not torch.equal(value, plan.values[other]):
            raise CheckpointError(
                f"'{other}' and '{name}' are one tensor in the model, and two different ones in "
                f"'{plan.report.path}'. Untie them, or rename one of them in the file. Nothing was changed."
            )


def _copy(slots: Tensors, values: Tensors, path: str) -> None:
    """Copy all, or put everything back and say why."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        try:
            for name, value in values.items():
                before.append((slots[name], slots[name].detach().clone()))
                slots[name].copy_(value)
        except BaseException as error:
            for slot, old in before:
                with contextlib.suppress(RuntimeError):  # of the one that cannot be written, and so was not
                    slot.copy_(old)
            if not isinstance(error, Exception):
                raise
            name, reason = list(values)[len(before) - 1], str(error).partition("\n")[0]
            raise CheckpointError(f"'{name}' cannot be loaded from '{path}': {reason}. Nothing was changed.") from error


def _same_kind(tensor: torch.Tensor, slot: torch.Tensor) -> bool:
    """Say whether both hold numbers of a kind, so that a cast loses no more than precision; counters may be either."""
    if slot.ndim == tensor.ndim == 0:
        return True
    return tensor.is_floating_point() == slot.is_floating_point() and tensor.is_complex() == slot.is_complex()


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"'{name}' {found}" for name, found in list(shapes.items())[:2])
