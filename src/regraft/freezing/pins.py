"""Pins: frozen layers stay in evaluation mode, whatever `.train()` is called later.

`requires_grad` is the only record of what is frozen, and pins follow from it. They are recomputed after every change of
flags, and whenever the model goes into training mode, as the user may have set flags by hand or put new layers in. A
stored list would be cheaper and out of date after either; calling `.eval()` once is undone by the next `model.train()`:

    backbone   requires_grad=False         after model.train():
    ├─ conv    weight: frozen              not pinned: the mode changes nothing in its forward
    ├─ bn      weight, bias: frozen        pinned: running statistics stay
    ├─ drop    no parameters               pinned: lies in a frozen block
    fc         requires_grad=True          not pinned: it trains

- A layer with parameters (or a block of such layers) is pinned if none of them is trainable.
- A layer without any (dropout, drop path, a norm without affine parameters) is pinned if the block around it is frozen,
  or if it lies in a frozen front: the parameters registered next after it are frozen, and so is the layer before it, if
  there is any. For a norm without affine parameters the frozen layer before it is enough, as its running statistics
  describe only that layer's output. A first layer of a block that is trainable as a whole belongs to that block.
- A layer that has buffers and no parameters is pinned if it was selected itself, until it is selected for thawing, or
  until all parameters in the block around it are trainable where parameters were selected with it.
- A layer that stands at several paths is pinned if it is frozen at any of them.

`regraft.freezing.hold` does the pinning itself.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from regraft.anatomy.mode_dependence import is_pinned as is_pinned
from regraft.anatomy.mode_dependence import rewrites_weight
from regraft.errors import ModelError
from regraft.freezing.hold import GUARD, HOLD, HOST, ByPath, PinState, has_foreign_hooks, is_builtin, keeps_state
from regraft.torch_internals import DropoutBase, NormBase, parameters_of

# Builtin layers whose forward depends on their mode. In all others the mode changes nothing, unless hooks take part in
# their forward (spectral norm). Layers defined elsewhere may depend on it, so they are pinned too. The mode of
# nn.TransformerEncoderLayer decides only whether it and the layers after it take the fast path.
MODE_DEPENDENT = (NormBase, DropoutBase, nn.MultiheadAttention, nn.RNNBase, nn.RReLU)


@dataclass(frozen=True)
class Place:
    """A module at one of its paths.

    Attributes:
        path: Its path.
        layer: The module.
        frozen: Whether it is frozen there, by the rules in this module's docstring.
        host: The module whose hooks hold it, where it can have no hooks itself.
        sealed: Whether it can have no hooks itself, as inside of `nn.TransformerEncoderLayer`.
    """

    path: str
    layer: nn.Module
    frozen: bool
    host: nn.Module | None
    sealed: bool


@dataclass(frozen=True)
class PinPlan:
    """The pin state that each module of a model should have; nothing is changed before `apply`."""

    places: tuple[Place, ...]
    states: tuple[tuple[nn.Module, PinState], ...]

    @property
    def pinned(self) -> list[str]:
        """First path of each layer that is to be pinned."""
        # Reversed twice: the first of several paths wins in the dict, and the order of registration returns.
        pinned = {id(layer) for layer, state in self.states if state.pinned}
        return list({id(p.layer): p.path for p in reversed(self.places) if id(p.layer) in pinned}.values())[::-1]

    @property
    def frozen(self) -> list[tuple[str, nn.Module]]:
        """Path and layer of all frozen places."""
        return [(place.path, place.layer) for place in self.places if place.frozen]

    def require_holdable(self) -> None:
        """Refuse frozen layers that cannot be kept in evaluation mode.

        Raises:
            ModelError: A frozen layer is TorchScript that reads its mode. Nothing was changed.
        """
        scripted = [(path, layer) for path, layer in self.frozen if isinstance(layer, torch.jit.ScriptModule)]
        names = ", ".join(repr(path) for path, layer in scripted if _reads_mode(layer))
        if names:
            raise ModelError(
                f"cannot freeze {names}: TorchScript that behaves differently in training (batch norm, dropout), which "
                "nothing outside of it can keep in evaluation mode. Freeze the Python layers before torch.jit.script, "
                "or put torch.jit.freeze(layer.eval()) in its place. Nothing was changed."
            )

    def apply(self) -> list[str]:
        """Set the pin state of every module, and return the paths of the pinned layers."""
        for layer, state in self.states:
            state.apply(layer)
        return self.pinned


def plan_pins(
    model: nn.Module,
    *,
    is_trainable: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
    by_path: Mapping[nn.Module, ByPath | None] = MappingProxyType({}),
) -> PinPlan:
    """Compute which layers are to be pinned, and how.

    Args:
        model: Any module.
        is_trainable: Returns the flag that a parameter will have.
        by_path: Changes to the layers without parameters that are frozen because they were selected themselves: how a
            layer was selected, or None where it is no longer.
    """
    # A layer without parameters has no flag that could record a selection, so its pin is the record.
    chosen: dict[int, ByPath | None] = {id(layer): PinState.of(layer).by_path for layer in model.modules()}
    chosen |= {id(layer): how for layer, how in by_path.items()}
    flags: dict[int, list[bool]] = {}
    _collect_flags(model, is_trainable, flags)
    is_frozen = not any(flags[id(model)]) if flags[id(model)] else chosen[id(model)] is not None
    start = Place("", model, is_frozen, model, isinstance(model, nn.TransformerEncoderLayer))
    places = tuple(_walk(start, flags, chosen, None, flags[id(model)]))
    return PinPlan(places, tuple(_states(model, places, chosen)))


def sync_pins(model: nn.Module) -> list[str]:
    """Pin the layers that the flags freeze, unpin all others, and return the paths of the pinned layers."""
    return plan_pins(model).apply()


def frozen_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the layers that the flags freeze, by the rules in this module's docstring."""
    return plan_pins(model).frozen


def unpin(layer: nn.Module) -> None:
    """Make `layer` follow `.train()` and `.eval()` again."""
    PinState().apply(layer)


def _states(
    model: nn.Module, places: tuple[Place, ...], chosen: Mapping[int, ByPath | None]
) -> Iterator[tuple[nn.Module, PinState]]:
    """Yield each module once with its pin state, merged over all its paths."""
    layers = {id(place.layer): place.layer for place in places}
    pinned = {id(p.layer): p for p in places if p.frozen and (chosen.get(id(p.layer)) or _depends_on_mode(p.layer))}
    guarded = {key: place for key, place in pinned.items() if keeps_state(place.layer)}
    hosts = {id(place.host) for place in pinned.values() if place.sealed and place.host is not None}
    # Sealed layers can have no hooks, so the module around them guards their buffers.
    guards = {id(place.host if place.sealed else place.layer) for place in guarded.values()}

    if guarded:  # a module around a frozen layer may write to that layer's buffers itself
        guards.add(id(model))
    for key, layer in layers.items():
        hooks: frozenset[Callable[..., None]] = frozenset()
        if key in pinned and not pinned[key].sealed:
            hooks |= HOLD
        if key in hosts:
            hooks |= HOST
        if key in guards:
            hooks |= GUARD
        # The root alone recomputes the pins: `.train()` of the whole model passes through it first.
        follow = sync_pins if layer is model and pinned else None
        yield layer, PinState(key in pinned, chosen.get(key) if key in pinned else None, follow, hooks)


def _walk(
    place: Place,
    flags: dict[int, list[bool]],
    chosen: Mapping[int, ByPath | None],
    before: bool | None,
    around: list[bool],
) -> Iterator[Place]:
    """Yield the places of all modules from `place` down.

    Args:
        place: Where to begin.
        flags: See `_collect_flags`.
        chosen: How layers without parameters were selected, by identity.
        before: Whether the layer with parameters before `place` is frozen; None: there is none.
        around: The flags in the innermost block around `place` that has any.
    """
    yield place
    if isinstance(place.layer, torch.jit.ScriptModule):  # its submodules take neither hooks nor attributes
        return
    # A ModuleList or ModuleDict is never called, so its hooks would not run: the host is the module around it.
    called = not isinstance(place.layer, (nn.ModuleList, nn.ModuleDict))
    host = place.layer if called and not place.sealed else place.host
    children = [(name, child, flags[id(child)]) for name, child in place.layer.named_children()]
    following = [True] * len(children)  # the flag of the parameter registered next after each of them
    for position in range(len(children) - 2, -1, -1):  # from the end, to pass over children without parameters
        later = children[position + 1][2]
        following[position] = later[0] if later else following[position + 1]
    for (name, child, own), next_flag in zip(children, following, strict=True):
        in_front = (before is not False and not next_flag) or (before is True and isinstance(child, NormBase))
        by_path = chosen.get(id(child)) == "alone" or (chosen.get(id(child)) == "among" and False in around)
        frozen = not any(own) if own else place.frozen or in_front or by_path
        path = f"{place.path}.{name}" if place.path else name
        sealed = place.sealed or isinstance(child, nn.TransformerEncoderLayer)
        inner = Place(path, child, frozen, host, sealed)
        # A norm without parameters at the start of a trainable block belongs to it, not to the frozen layer before.
        yield from _walk(inner, flags, chosen, False if own and all(own) else before, own or around)
        before = not any(own) if own else before


def _collect_flags(
    layer: nn.Module, is_trainable: Callable[[nn.Parameter], bool], flags: dict[int, list[bool]]
) -> list[bool]:
    """Collect for each module, by identity, the flag of its first parameter, then each flag value that occurs in it.

    Three flags at most instead of one for each parameter: that is all that the rules ask for.
    """
    if id(layer) not in flags:
        flags[id(layer)] = []
        own = [is_trainable(parameter) for parameter in parameters_of(layer).values() if parameter is not None]
        for child in layer.children():
            own += _collect_flags(child, is_trainable, flags)
        flags[id(layer)] = own[:1] + [flag for flag in (True, False) if flag in own]
    return flags[id(layer)]


def _depends_on_mode(layer: nn.Module) -> bool:
    """Return whether the mode may change what the forward of `layer` does; unknown classes count as if it did."""
    if isinstance(layer, torch.jit.ScriptModule):
        return False
    is_known = isinstance(layer, MODE_DEPENDENT) or rewrites_weight(layer)
    return is_known or not is_builtin(layer) or has_foreign_hooks(layer)


def _reads_mode(layer: nn.Module) -> bool:
    try:
        return 'name="training"' in str(layer.inlined_graph)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError:  # no forward
        return any("training" in vars(part) for part in layer.modules())
