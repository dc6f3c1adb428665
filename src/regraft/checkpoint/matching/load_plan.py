"""The plan of a load: check it against the model, then copy all of it or nothing."""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.checkpoint.foreign.state_dicts import Tensors, is_extra_state
from regraft.checkpoint.matching.adapting import shape
from regraft.checkpoint.matching.load_report import LoadReport
from regraft.checkpoint.matching.naming import Shapes
from regraft.errors import CheckpointError
from regraft.wording import for_caller, option, rename_option

MIN_SHARE = 0.5


@dataclass(frozen=True)
class LoadPlan:
    """What will be loaded into a model. Nothing is changed yet.

    Attributes:
        values: The tensors to copy, by name in the model; of the model's shapes, but not always of its dtypes.
        report: The report as it will be after the copy.
        file_shapes: Shape by name in the file.
        extra: Path of a layer → argument of its `set_extra_state`.
    """

    values: Tensors
    report: LoadReport
    file_shapes: Shapes
    extra: Mapping[str, Any] = field(default_factory=dict)


class UnfitError(CheckpointError):
    """A file does not fit a model under the given options.

    Attributes:
        problem: What does not fit, and why.
        advice: What to do about it.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(" ".join(part for part in (problem, advice, "Nothing was changed.") if part))
        self.problem, self.advice = problem, advice


def carry_out(plan: LoadPlan, model: nn.Module, *, min_share: float = MIN_SHARE, strict: bool = False) -> None:
    """Check a plan and copy its tensors into the model.

    Raises:
        CheckpointError: It does not fit well enough, or a tensor cannot be written. Nothing was changed.
    """
    if not 0 <= min_share <= 1:
        raise CheckpointError(f"min_share is {min_share!r}, expected a number from 0 to 1. Nothing was changed.")
    slots = slots_of(model)
    _require_fit(plan, model, slots, min_share, strict=strict)
    _copy(model, slots, plan)


def slots_of(model: nn.Module) -> Tensors:
    """Return the tensors of a model that can be loaded, by name.

    Raises:
        CheckpointError: A tensor has no memory: it is lazy, or on the meta device.
    """
    state = model.state_dict(keep_vars=True)
    slots = {name: slot for name, slot in state.items() if isinstance(slot, torch.Tensor) and not is_extra_state(name)}
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


def _require_fit(plan: LoadPlan, model: nn.Module, slots: Tensors, min_share: float, *, strict: bool) -> None:
    report, kind = plan.report, type(model).__name__
    cause = f" {report.cause}." if report.cause else ""
    suggestion = f"{report.suggestion}." if report.suggestion else ""
    if not plan.values and not report.proposed:
        raise UnfitError(
            f"nothing in '{report.path}' fits {kind}: the file has {_first_two(plan.file_shapes)}, the model "
            f"{_first_two({name: shape(slot) for name, slot in slots.items()})}.{cause}",
            f"Give the architecture that the file was trained with, or {rename_option()}.",
        )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise UnfitError(f"'{report.path}' does not fit {kind} in all: {report.headline()}.{cause}", suggestion)
    if not plan.values:
        raise UnfitError(
            f"nothing in '{report.path}' is certain to fit {kind}.{cause}",
            f"{suggestion} Look with {option('dry_run', True)}.".lstrip(),
        )
    if report.share < min_share:
        raise UnfitError(
            f"only {report.share:.1%} of the parameters of {kind} would be loaded from '{report.path}', expected at "
            f"least {min_share:.0%}.{cause}",
            f"{suggestion} Look with {option('dry_run', True)}"
            f"{for_caller(python=', or allow less with min_share=', command='')}.".lstrip(),
        )
    _require_one_value_for_tied(plan, slots)


def _require_one_value_for_tied(plan: LoadPlan, slots: Tensors) -> None:
    """Refuse a file with two different values for one tied tensor: the last copy would win without a word."""
    first: dict[int, str] = {}
    for name, value in plan.values.items():
        other = first.setdefault(id(slots[name]), name)
        if other != name and value is not plan.values[other] and not torch.equal(value, plan.values[other]):
            raise CheckpointError(
                f"'{other}' and '{name}' are one tensor in the model, and two different ones in "
                f"'{plan.report.path}'. Untie them, or rename one of them in the file. Nothing was changed."
            )


def _copy(model: nn.Module, slots: Tensors, plan: LoadPlan) -> None:
    """Copy all tensors; on any failure, restore the old values and raise the reason."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    states: list[tuple[nn.Module, Any]] = []
    name = ""
    with torch.no_grad():
        try:
            for name, value in plan.values.items():
                before.append((slots[name], slots[name].detach().clone()))
                slots[name].copy_(value)
            for name, value in plan.extra.items():
                layer = model.get_submodule(name)
                states.append((layer, copy.deepcopy(layer.get_extra_state())))
                layer.set_extra_state(copy.deepcopy(value))
        except BaseException as error:  # Ctrl-C as well: a half-loaded model would look like a loaded one
            for layer, state in states:
                with contextlib.suppress(Exception):  # raised by the layer that refused its state, and kept the old one
                    layer.set_extra_state(state)
            for slot, old in before:
                with contextlib.suppress(RuntimeError):  # raised by the tensor that cannot be written, and was not
                    slot.copy_(old)
            if not isinstance(error, Exception):
                raise
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"'{name}' cannot be loaded from '{plan.report.path}': {reason}. Nothing was changed."
            ) from error


def _first_two(shapes: Shapes) -> str:
    """Return the first two names with their shapes, as an example in a message."""
    return ", ".join(f"'{name}' {sides}" for name, sides in list(shapes.items())[:2])
