"""Freeze and unfreeze: set `requires_grad` of parameters, and pin frozen layers to evaluation mode."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.mode_dependence import follows_batch
from regraft.anatomy.paths import is_within
from regraft.anatomy.summary_table import percent
from regraft.anatomy.tracing import Call, Trace, trace
from regraft.arguments import check_arguments, check_weights
from regraft.display import block, shortened, some, table_html
from regraft.errors import SelectionError
from regraft.freezing.hold import ByPath
from regraft.freezing.patterns import PARAMETERS, Pattern, as_patterns, select, select_parameters
from regraft.freezing.pins import plan_pins

MAX_NAMED = 12  # layers in a line
MAX_ROWS = 20  # of a table


@dataclass(frozen=True, repr=False)
class FreezeReport:
    """What a call of `freeze` or `unfreeze` changed; `str()` gives one line, a session more.

    Attributes:
        changed: Names of the parameters whose flag changed.
        frozen: Number of frozen parameters after the call. Those that a lazy layer has yet to make do not count.
        total: Number of all parameters.
        pinned: Paths of the layers that now stay in evaluation mode.
        split_ties: For each shared parameter that was selected by only some of its names, all of its names. The flag
            holds for all of them, as it is one tensor.
        follow_batch: Paths of frozen layers whose tensors stay, but whose outputs depend on the other samples of a
            batch: batch norms without running statistics, and fake quantization that still observes.
        children: (name, frozen, all) of each top-level layer with parameters, after the call; of the model's own
            parameters under an empty name.
    """

    changed: tuple[str, ...]
    frozen: int
    total: int
    pinned: tuple[str, ...]
    split_ties: tuple[tuple[str, ...], ...] = ()
    follow_batch: tuple[str, ...] = ()
    children: tuple[tuple[str, int, int], ...] = ()

    def __repr__(self) -> str:
        states: dict[str, list[str]] = {"frozen": [], "partly": [], "trainable": []}
        for name, frozen, total in self.children:
            states[_state(frozen, total)].append(name or "its own parameters")
        return block(
            f"FreezeReport: {self.frozen:,} of {self.total:,} parameters frozen ({percent(self.frozen, self.total)})",
            [(state, some(names, MAX_NAMED)) for state, names in states.items()] + self._notes(),
        )

    def _repr_html_(self) -> str:
        rows = [
            (name or "its own parameters", _state(frozen, total), f"{frozen:,}", f"{total:,}")
            for name, frozen, total in self.children
        ]
        return table_html(
            f"{self.frozen:,} of {self.total:,} parameters frozen ({percent(self.frozen, self.total)})",
            ("layer", "state", "frozen", "parameters"),
            shortened(rows, MAX_ROWS - 5, 5),
            [f"{label}: {text}" for label, text in self._notes() if text],
        )

    def _notes(self) -> list[tuple[str, str]]:
        layers = [path or "the model itself" for path in self.pinned]
        return [
            ("changed", f"{len(self.changed)} tensors: {some(self.changed)}" if self.changed else "nothing"),
            ("pinned", f"{len(layers)} layers: {some(layers)}" if layers else ""),
            ("shared", some(" = ".join(names) for names in self.split_ties)),
            ("of batch", some(self.follow_batch)),
        ]

    def __str__(self) -> str:
        line = (
            f"{self.frozen:,} of {self.total:,} parameters frozen ({percent(self.frozen, self.total)}), "
            f"{self.total - self.frozen:,} trainable; {len(self.changed)} tensors changed, "
            f"{len(self.pinned)} layers stay in evaluation mode"
        )
        ties = "".join(f"; shared: {' = '.join(names)}" for names in self.split_ties)
        batch = f"; outputs still depend on the batch in: {', '.join(self.follow_batch)}" if self.follow_batch else ""
        return line + ties + batch


def freeze(
    model: nn.Module, *patterns: Pattern, until: Pattern | None = None, inputs: Inputs | None = None
) -> FreezeReport:
    """Freeze layers of `model` in place: their tensors stay bit-identical whatever trains the model.

    Sets `requires_grad=False`, clears stale `.grad`, and pins frozen normalization, dropout and custom layers to
    evaluation behaviour, so that running statistics cannot drift whatever `.train()` is called later. State that a
    forward would write to in evaluation as well (observers, codebooks, `nn.Embedding(max_norm=…)`) is put back after
    it. Classes and state dict keys stay as they are.

    Args:
        model: Any module.
        *patterns: What to freeze, see `select`. Neither patterns nor `until`: everything.
        until: A layer or its path. Every parameter that is used up to and with that layer is frozen, in execution order
            (found by a run on shapes alone), whatever the order of registration.
        inputs: What the forward takes, for `until` and `"head"`: a tensor, a tuple of positional or a dict of keyword
            inputs, of which the shapes count; guessed where not given.

    Raises:
        ArgumentError: Something is neither a pattern nor a layer; the message says what to write.
        SelectionError: A pattern or path selects nothing, or `until` is never executed. Nothing was changed.
        ModelError: `until` was given and the forward fails on `inputs`, or on the guessed ones; or something that was
            selected cannot be kept from moving (TorchScript that looks at its mode). Nothing was changed.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> print(freeze(model, until="1"))
    28 of 38 parameters frozen (73.7 %), 10 trainable; 4 tensors changed, 1 layers stay in evaluation mode
    """
    patterns = as_patterns(freeze, model, patterns)
    limits = as_patterns(freeze, model, [] if until is None else [until], "until")
    check_arguments(freeze, locals())
    check_weights(freeze, "model", model, allow_meta=True)
    return _set_flags(model, _select(model, patterns, until=limits, inputs=inputs), trainable=False)


def unfreeze(
    model: nn.Module, *patterns: Pattern, since: Pattern | None = None, inputs: Inputs | None = None
) -> FreezeReport:
    """Make layers of `model` trainable in place; the reverse of `freeze`.

    Args:
        model: Any module.
        *patterns: What to thaw, see `select`. Neither patterns nor `since`: everything.
        since: A layer or its path. Every parameter that is first used in that layer or after it is thawed.
        inputs: What the forward takes, for `since` and `"head"`; see `freeze`.

    Raises:
        SelectionError: A pattern or path selects nothing, or `since` is never executed. Nothing was changed.
        ModelError: `since` was given and the forward fails on `inputs`, or on the guessed ones. Nothing was changed.
    """
    patterns = as_patterns(unfreeze, model, patterns)
    limits = as_patterns(unfreeze, model, [] if since is None else [since], "since")
    check_arguments(unfreeze, locals())
    check_weights(unfreeze, "model", model, allow_meta=True)
    return _set_flags(model, _select(model, patterns, since=limits, inputs=inputs), trainable=True)


def sync_frozen_state(model: nn.Module) -> None:
    """Complete a freeze whose flags were set by hand, as `freeze` does: drop stale gradients, and pin frozen layers.

    Raises:
        ModelError: A frozen layer cannot be kept from changing. Nothing was changed.
    """
    plan = plan_pins(model)
    plan.require_holdable()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
    plan.apply()


@dataclass(frozen=True)
class _Selection:
    """Names of the selected parameters, and the selected layers that have buffers and no parameters."""

    names: frozenset[str]
    layers: tuple[nn.Module, ...]


def _select(
    model: nn.Module,
    patterns: tuple[str, ...],
    *,
    until: tuple[str, ...] = (),
    since: tuple[str, ...] = (),
    inputs: Inputs | None = None,
) -> _Selection:
    """Work out what is selected; nothing is changed here."""
    has_buffers_alone = {path: layer for path, layer in _all_layers(model) if _has_buffers_alone(layer)}
    if not patterns and not until and not since:
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return _Selection(frozenset(names), tuple(has_buffers_alone.values()))
    limits = {"until": until, "since": since}
    names = select_parameters(model, *patterns, inputs=inputs)
    paths = set(select(model, *(pattern for pattern in patterns if not pattern.startswith(PARAMETERS))))
    if until:
        traced = trace(model, inputs=inputs)
        end = max(call.ended for call in _calls_of(model, traced, until))
        names |= {name for name, moment in traced.first_uses.items() if moment < end}
        paths |= {call.path for call in traced.calls if call.began < end}
    if since:
        traced = trace(model, inputs=inputs)
        begin = min(call.began for call in _calls_of(model, traced, since))
        names |= {name for name, moment in traced.first_uses.items() if moment >= begin}
        paths |= {call.path for call in traced.calls if call.began >= begin}
    layers = tuple(has_buffers_alone[path] for path in sorted(paths & has_buffers_alone.keys()))
    if not names and not layers:
        selected = [*map(repr, patterns), *(f"{word}={path!r}" for word, paths in limits.items() for path in paths)]
        raise SelectionError(
            f"{', '.join(selected)} selects no parameters of {type(model).__name__}: nothing to change."
        )
    return _Selection(frozenset(names), layers)


def _all_layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _has_buffers_alone(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is None and next(layer.buffers(), None) is not None


def _calls_of(model: nn.Module, traced: Trace, patterns: tuple[str, ...]) -> list[Call]:
    paths = select(model, *patterns)  # a ModuleList is not called, its layers are
    calls = [call for call in traced.calls if any(is_within(call.path, path) for path in paths)]
    if not calls:
        raise SelectionError(
            f"layer '{patterns[0]}' of {type(model).__name__} is never executed, so nothing is before it."
        )
    return calls


def _set_flags(model: nn.Module, selection: _Selection, *, trainable: bool) -> FreezeReport:
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    chosen = {parameter for parameter, ties in names_of.items() if not selection.names.isdisjoint(ties)}
    flags = {parameter: trainable if parameter in chosen else parameter.requires_grad for parameter in names_of}
    changed = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in selection.names and parameter.requires_grad != trainable
    ]
    how: ByPath | None = None if trainable else "among" if selection.names else "alone"
    plan = plan_pins(model, is_trainable=flags.__getitem__, by_path=dict.fromkeys(selection.layers, how))
    plan.require_holdable()
    for parameter in chosen:
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None
    pinned = plan.apply()
    sizes = {parameter: 0 if is_lazy(parameter) else parameter.numel() for parameter in names_of}
    split = [tuple(ties) for ties in names_of.values() if 0 < len(selection.names.intersection(ties)) < len(ties)]
    return FreezeReport(
        changed=tuple(changed),
        frozen=sum(size for parameter, size in sizes.items() if not parameter.requires_grad),
        total=sum(sizes.values()),
        pinned=tuple(pinned),
        split_ties=tuple(split),
        follow_batch=tuple(path for path, layer in plan.frozen if follows_batch(layer)),
        children=tuple(_count(model, sizes)),
    )


def _count(model: nn.Module, sizes: dict[nn.Parameter, int]) -> Iterator[tuple[str, int, int]]:
    parts = [("", list(model.parameters(recurse=False)))]
    parts += [(name, list(child.parameters())) for name, child in model.named_children()]
    for name, parameters in parts:
        if parameters:
            frozen = sum(sizes[parameter] for parameter in parameters if not parameter.requires_grad)
            yield name, frozen, sum(sizes[parameter] for parameter in parameters)


def _state(frozen: int, total: int) -> str:
    return "trainable" if not frozen else "frozen" if frozen == total else "partly"
