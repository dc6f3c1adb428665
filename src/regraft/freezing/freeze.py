"""Freeze and unfreeze: set the flags of parameters, and pin what is frozen to evaluation behaviour."""

from dataclasses import dataclass

from torch import nn

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.paths import is_within, layer_at
from regraft.anatomy.render import percent
from regraft.anatomy.tracing import Call, Trace, trace
from regraft.arguments import check_arguments, check_weights
from regraft.errors import SelectionError
from regraft.freezing.patterns import select_parameters
from regraft.freezing.pins import sync_pins


@dataclass(frozen=True)
class FreezeReport:
    """What a call of `freeze` or `unfreeze` did; `str()` says it in a line.

    Attributes:
        changed: Names of the parameters whose flag changed.
        frozen: Number of frozen parameters after the call.
        total: Number of all parameters.
        pinned: Paths of the layers that now stay in evaluation mode.
        split_ties: For each shared parameter that was selected by only some of its names, all of its names. The flag
            holds for all of them, as it is one tensor.
    """

    changed: tuple[str, ...]
    frozen: int
    total: int
    pinned: tuple[str, ...]
    split_ties: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        line = (
            f"{self.frozen:,} of {self.total:,} parameters frozen ({percent(self.frozen, self.total)}), "
            f"{self.total - self.frozen:,} trainable; {len(self.changed)} tensors changed, "
            f"{len(self.pinned)} layers stay in evaluation mode"
        )
        ties = "".join(f"; shared: {' = '.join(names)}" for names in self.split_ties)
        return line + ties


def freeze(model: nn.Module, *patterns: str, until: str | None = None, inputs: Inputs | None = None) -> FreezeReport:
    """Freeze layers of `model` in place: their tensors stay bit-identical whatever trains the model.

    Sets `requires_grad=False`, clears stale `.grad`, and pins frozen normalization, dropout and custom layers to
    evaluation behaviour, so that running statistics cannot drift whatever `.train()` is called later. Classes and
    state dict keys stay as they are.

    Args:
        model: Any module.
        *patterns: What to freeze, see `select`. Neither patterns nor `until`: everything.
        until: A layer's path. Every parameter that is used up to and with that layer is frozen, in execution order
            (found by a run on shapes alone), whatever the order of registration.
        inputs: What the forward takes, for `until`: a tensor, a tuple of positional or a dict of keyword inputs, of
            which the shapes count; guessed where not given.

    Raises:
        SelectionError: A pattern or path selects nothing, or `until` is never executed. Nothing was changed.
        ModelError: `until` was given and the forward fails on `inputs`, or on the guessed ones. Nothing was changed.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> print(freeze(model, until="1"))
    28 of 38 parameters frozen (73.7 %), 10 trainable; 4 tensors changed, 1 layers stay in evaluation mode
    """
    check_arguments(freeze, locals())
    check_weights(freeze, "model", model, allow_meta=True)
    return _set_flags(model, _parameter_names(model, patterns, until=until, inputs=inputs), trainable=False)


def unfreeze(model: nn.Module, *patterns: str, since: str | None = None, inputs: Inputs | None = None) -> FreezeReport:
    """Make layers of `model` trainable in place; the reverse of `freeze`.

    Args:
        model: Any module.
        *patterns: What to thaw, see `select`. Neither patterns nor `since`: everything.
        since: A layer's path. Every parameter that is first used in that layer or after it is thawed.
        inputs: What the forward takes, for `since`; see `freeze`.

    Raises:
        SelectionError: A pattern or path selects nothing, or `since` is never executed. Nothing was changed.
        ModelError: `since` was given and the forward fails on `inputs`, or on the guessed ones. Nothing was changed.
    """
    check_arguments(unfreeze, locals())
    check_weights(unfreeze, "model", model, allow_meta=True)
    return _set_flags(model, _parameter_names(model, patterns, since=since, inputs=inputs), trainable=True)


def settle(model: nn.Module) -> None:
    """Do for flags that were set by hand what `freeze` does: drop stale gradients, and pin what is frozen."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
    sync_pins(model)


def _parameter_names(
    model: nn.Module,
    patterns: tuple[str, ...],
    *,
    until: str | None = None,
    since: str | None = None,
    inputs: Inputs | None = None,
) -> set[str]:
    """Work out the names of the selected parameters; nothing is changed here."""
    everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if not patterns and until is None and since is None:
        return set(everything)
    limits = {"until": until, "since": since}
    names = select_parameters(model, *patterns)
    if until is not None:
        traced = trace(model, inputs=inputs)
        end = max(call.ended for call in _calls_of(model, traced, until))
        names |= {name for name, moment in traced.first_uses.items() if moment < end}
    if since is not None:
        traced = trace(model, inputs=inputs)
        begin = min(call.began for call in _calls_of(model, traced, since))
        names |= {name for name, moment in traced.first_uses.items() if moment >= begin}
    if not names:
        given = [*map(repr, patterns), *(f"{word}={path!r}" for word, path in limits.items() if path is not None)]
        raise SelectionError(f"{', '.join(given)} selects no parameters: nothing to change.")
    return names


def _calls_of(model: nn.Module, traced: Trace, path: str) -> list[Call]:
    layer_at(model, path)
    calls = [call for call in traced.calls if is_within(call.path, path)]  # a ModuleList is not called, its layers are
    if not calls:
        raise SelectionError(f"layer '{path}' of {type(model).__name__} is never executed, so nothing is before it.")
    return calls


def _set_flags(model: nn.Module, names: set[str], *, trainable: bool) -> FreezeReport:
    changed, names_of = [], {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
        if name in names:
            if parameter.requires_grad != trainable:
                changed.append(name)
            parameter.requires_grad_(trainable)
            if not trainable:
                parameter.grad = None
    pinned = sync_pins(model)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    split = [tuple(ties) for ties in names_of.values() if 0 < len(names.intersection(ties)) < len(ties)]
    total = sum(parameter.numel() for parameter in model.parameters())
    return FreezeReport(tuple(changed), frozen, total, tuple(pinned), tuple(split))
