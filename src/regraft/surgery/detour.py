"""Cut and extend networks whose forward cannot be traced: run the forward as it is, and stop it early by a hook.

A detour is a plain picklable object that replaces the instance's `forward`: the class of the network, its state dict
and `deepcopy` stay as they are. What comes after the cut is not in the code that runs, so a detour is harder to read
than a graph, and torch.compile does not follow it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.paths import is_within
from regraft.anatomy.shape_copies import shared_copy
from regraft.anatomy.tracing import trace
from regraft.errors import EditError, ModelError


class _ReachedError(Exception):
    """Stops a forward, and carries the value that becomes its output."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class EarlyExitForward:
    """Replaces a network's `forward`.

    Attributes:
        model: The network.
        layer: Path of the layer at which the class's forward stops; None: it runs to its end.
        at_input: Whether it stops before that layer, with the layer's first input, or after it, with its output.
        appended: Names of the top-level layers that are called on that value, one after the other.
    """

    def __init__(
        self, model: nn.Module, layer: str | None = None, at_input: bool = False, appended: tuple[str, ...] = ()
    ) -> None:
        self.model, self.layer, self.at_input, self.appended = model, layer, at_input, appended

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        value = self._run(*args, **kwargs)
        for name in self.appended:
            value = self.model.get_submodule(name)(value)
        return value

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.model).forward
        if self.layer is None:
            return forward(self.model, *args, **kwargs)
        layer = self.model.get_submodule(self.layer)
        if self.at_input:
            handle = layer.register_forward_pre_hook(_stop_before, prepend=True)
        else:
            handle = layer.register_forward_hook(_stop)
        try:
            forward(self.model, *args, **kwargs)
        except _ReachedError as reached:
            return reached.value
        finally:
            handle.remove()
        raise ModelError(f"the forward of {type(self.model).__name__} ended without calling '{self.layer}'.")


def is_detoured(model: nn.Module) -> bool:
    """Return whether the forward of `model` is a detour."""
    return isinstance(vars(model).get("forward"), EarlyExitForward)


def detour(model: nn.Module, added: Mapping[str, nn.Module]) -> nn.Module:
    """Return `model` with layers on top; its structure stays as it is, and its weights are shared."""
    edited = shared_copy(model)
    for name, layer in added.items():
        edited.add_module(name, layer)
    before = _detour_of(edited)
    vars(edited)["forward"] = EarlyExitForward(edited, before.layer, before.at_input, (*before.appended, *added))
    return edited


def stop_at(model: nn.Module, *, after: str | None, drop: int | None, inputs: Inputs | None) -> nn.Module:
    """Return `model` with a forward that ends after a layer, or before its last ones; what is not run is deleted.

    Raises:
        EditError: The layer is never called, or there are not that many. Nothing was changed.
        ModelError: The forward cannot even be run.
    """
    calls = trace(model, inputs=inputs).calls
    edited = shared_copy(model)
    before = _detour_of(edited)
    names = list(dict.fromkeys(call.path.partition(".")[0] for call in calls if call.path))
    target = after if after is not None else first_dropped(model, names, drop or 0)
    inside = [call for call in calls if is_within(call.path, target)]
    if target in before.appended:
        kept = before.appended[: before.appended.index(target) + (after is not None)]
        forward = EarlyExitForward(edited, before.layer, before.at_input, kept)
    elif not inside:
        raise EditError(f"cannot truncate after '{after}': that layer is never called. Nothing was changed.")
    elif after is not None:
        forward = EarlyExitForward(edited, max(inside, key=lambda call: call.ended).path)
    else:
        forward = EarlyExitForward(edited, inside[0].path, at_input=True)
    vars(edited)["forward"] = forward
    run = trace(edited, inputs=inputs)
    _delete_unused(edited, "", {call.path for call in run.calls} | set(run.first_uses))
    trace(edited, inputs=inputs)  # raises where the forward needs a layer that was deleted
    return edited


def first_dropped(model: nn.Module, names: Sequence[str], drop: int) -> str:
    """Return the first of the last `drop` top-level layers, of the `names` that are called.

    Raises:
        EditError: There are not that many. Nothing was changed.
    """
    if drop >= len(names):
        raise EditError(
            f"cannot drop {drop} layers: {type(model).__name__} calls {len(names)} top-level layers: "
            f"{', '.join(names)}. Nothing was changed."
        )
    return names[-drop]


def _detour_of(model: nn.Module) -> EarlyExitForward:
    """Return the detour of `model`, or one that runs its forward to the end."""
    return vars(model)["forward"] if is_detoured(model) else EarlyExitForward(model)


def _delete_unused(layer: nn.Module, path: str, used: set[str]) -> None:
    """Delete, in place, the layers with tensors that are never called and whose tensors are never used.

    Layers without tensors stay: a forward may read a dropout's rate without calling it.
    """
    for name, child in list(layer.named_children()):
        inner = f"{path}.{name}".lstrip(".")
        if any(is_within(target, inner) for target in used):
            _delete_unused(child, inner, used)
        elif not any(True for _ in (*child.parameters(), *child.buffers())):
            continue
        elif isinstance(layer, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            delattr(layer, name)
        else:
            layer.register_module(name, None)  # rather than no attribute: `if self.pooler is not None` is common


def _stop(layer: nn.Module, args: Any, output: Any) -> None:
    raise _ReachedError(output)


def _stop_before(layer: nn.Module, args: Any) -> None:
    raise _ReachedError(args[0])
