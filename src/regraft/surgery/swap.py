"""Replace or remove a layer. No graph is needed, so this works on every network."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.paths import is_within, layer_at, parent_and_name
from regraft.anatomy.shape_copies import shared_copy
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.errors import EditError, ForwardError
from regraft.freezing.patterns import select
from regraft.surgery.calls import leave_fast_paths, require_calls
from regraft.surgery.checks import finish, prove, require_editable
from regraft.surgery.fitting import fitted, materialize_lazy


class Bypass(nn.Module):
    """Identity that ignores all inputs but the first."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return x


def replace(
    model: nn.Module,
    path: str,
    new: nn.Module | Callable[[nn.Module], nn.Module],
    *,
    keep_weights: bool = True,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Return `model` with another module in the place of a layer, or of every layer that a pattern selects.

    Args:
        model: Any module.
        path: Path of a layer, or a pattern as `select` takes it, such as `"type:BatchNorm2d"`; of layers that lie
            within one another, the outermost is replaced.
        new: The module, of which each place after the first gets a copy of its own; or a function from the old layer
            to the new one, such as `lambda old: nn.GroupNorm(8, old.num_features)`.
        keep_weights: Whether the result of a function takes over the old layer's tensors of the same name and shape.
        inputs: What the forward takes, for the check; guessed where not given, see `summary`.

    Raises:
        SelectionError: The path or pattern selects nothing.
        EditError: The network does not run with the new layer, or never calls it. Nothing was changed.

    >>> model = replace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "type:ReLU", nn.Tanh())
    >>> model[1]
    Tanh()
    """
    check_arguments(replace, locals())
    require_editable(model)
    layers = dict(model.named_modules(remove_duplicate=False))
    selected = select(model, path)
    paths = [inner for inner in selected if not any(outer != inner and is_within(inner, outer) for outer in selected)]
    if "" in paths:
        raise EditError("the model itself cannot be replaced in itself. Name one of its layers. Nothing was changed.")
    # By identity of the old layer: one that stands at several paths gets one replacement, so that it stays shared.
    replacements: dict[int, nn.Module] = {}
    for place in paths:
        old = layers[place]
        if id(old) not in replacements:
            is_first = not replacements
            replacements[id(old)] = _replacement(model, old, place, new, is_first=is_first, keep_weights=keep_weights)
    put = {place: replacements[id(layers[place])] for place in paths}
    edited = with_layers(model, put)
    what = f"replace {_listed(paths)}"
    run = prove(edited, model, what, inputs)
    require_calls(edited, put, model, run, inputs)
    leave_fast_paths(edited, put, model)
    materialize_lazy(edited, put, run, what)
    # One by one where a regular expression selected them: a recipe in a file of others may hold none.
    steps = {path: new} if isinstance(new, nn.Module) and not path.startswith("re:") else put
    for where, layer in steps.items():
        finish(edited, model, "replace", new_outputs=False, path=where, new=layer)
    return edited


def remove(model: nn.Module, path: str, *, inputs: Inputs | None = None) -> nn.Module:
    """Return `model` without a layer: its input is passed on in the place of its output. Its weights are gone.

    An `nn.Identity` keeps the place, so that no other layer changes its name.

    Args:
        model: Any module.
        path: Path of a layer that gives one tensor of the shape of its first input.
        inputs: What the forward takes, for the check; guessed where not given, see `summary`.

    Raises:
        SelectionError: No layer has that path.
        EditError: The layer's output differs in shape from its input, or it is never called. Nothing was changed.

    >>> remove(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1")[1]
    Identity()
    """
    check_arguments(remove, locals())
    require_editable(model)
    layer = layer_at(model, path)
    if not path:
        raise EditError(
            f"path is {path!r}, the model itself, which cannot be removed. Name one of its layers. Nothing was changed."
        )
    try:
        calls = [call for call in trace(model, inputs=inputs).calls if call.path == path]
    except ForwardError as error:
        raise EditError(f"cannot remove '{path}': whether its shapes agree is unknown, as {error}") from error
    if not calls:
        raise EditError(f"cannot remove '{path}': it is never called, so it has no place. Nothing was changed.")
    for call in calls:
        if len(call.output_shapes) != 1 or call.input_shapes[:1] != call.output_shapes:
            raise EditError(
                f"cannot remove '{path}' ({type(layer).__name__}): it takes {_shapes(call.input_shapes[:1])} and gives "
                f"{_shapes(call.output_shapes)}, so what follows would not fit. Use replace(model, '{path}', …) with a "
                "layer that makes the same change of shape. Nothing was changed."
            )
    is_plain = all(len(call.input_shapes) == 1 for call in calls)
    edited = with_layers(model, {path: nn.Identity() if is_plain else Bypass()})
    prove(edited, model, f"remove '{path}'", inputs)
    return finish(edited, model, "remove", new_outputs=False, path=path)


def with_layers(model: nn.Module, put: dict[str, nn.Module]) -> nn.Module:
    """Return `model` with other modules at these paths; its structure stays as it is, and all weights are shared."""
    edited = shared_copy(model)
    for path, layer in put.items():
        parent, name = parent_and_name(path)
        setattr(edited.get_submodule(parent), name, layer)
    return edited


def _replacement(
    model: nn.Module, old: nn.Module, path: str, new: Any, *, is_first: bool, keep_weights: bool
) -> nn.Module:
    """Return the module for one place: `new`, a copy of it, or what the function `new` returns for the old layer."""
    if isinstance(new, nn.Module):
        (layer,) = fitted(model, [new if is_first else copy.deepcopy(new)])
        return layer
    state = torch.get_rng_state()
    try:
        layer = new(old)
    except Exception as error:  # the user's function may raise anything, after it has drawn weights
        torch.set_rng_state(state)
        raise EditError(
            f"cannot replace '{path}' ({type(old).__name__}): the function that makes the new layer raised "
            f"{type(error).__name__}: {error}. Nothing was changed."
        ) from error
    if layer is old:
        return old
    if isinstance(layer, int):
        raise EditError(f"the function that makes the layer for '{path}' gave {layer}, expected a torch.nn.Module.")
    (layer,) = fitted(model, [layer])
    layer.train(old.training)
    if keep_weights:
        _take_over(layer, old)
    return layer


@torch.no_grad()
def _take_over(layer: nn.Module, old: nn.Module) -> None:
    """Copy the tensors of the same name and shape, and the flags of the same name."""
    state = old.state_dict()
    for name, tensor in layer.state_dict().items():
        if name in state and not nn.parameter.is_lazy(tensor) and state[name].shape == tensor.shape:
            tensor.copy_(state[name])
    flags = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(flags.get(name, True))


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(map(str, shapes)) or "no tensor"


def _listed(paths: list[str]) -> str:
    shown = ", ".join(map(repr, paths[:3]))
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"
