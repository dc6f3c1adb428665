"""Checks before and after every edit: the model is editable, the result runs, its recipe and pins are updated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regraft.anatomy.heads import CONVOLUTIONS
from regraft.anatomy.inputs import Inputs, Shape
from regraft.anatomy.shape_copies import shared_copy
from regraft.anatomy.tracing import Trace, trace
from regraft.card import EditOrigin, Recipe, Source, Step, attach, card_of
from regraft.errors import EditError, ForwardError
from regraft.freezing.pins import is_pinned, sync_pins
from regraft.surgery.layer_text.build import describe
from regraft.torch_internals import BatchNormBase, InstanceNormBase, is_compiled


def require_editable(model: nn.Module) -> None:
    """Refuse models without a Python forward.

    Raises:
        EditError: The model is scripted or compiled.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise EditError(
            f"{type(model).__name__} is a TorchScript module, whose dataflow can no longer be edited. "
            "Edit the model before torch.jit.script or torch.jit.trace. Nothing was changed."
        )
    if is_compiled(model):
        raise EditError(
            f"{type(model).__name__} is compiled, which an edit would not reach. Edit the model before torch.compile "
            "(a compiled one keeps it as `_orig_mod`), and compile the result. Nothing was changed."
        )


def prove(edited: nn.Module, original: nn.Module, what: str, inputs: Inputs | None = None) -> Trace | None:
    """Run an edited network on shapes alone, and return its trace; no weight is touched.

    Args:
        edited: The network after the edit.
        original: The network before it.
        what: The edit in words, as in "append Linear(512, 10)".
        inputs: What the forward takes, see `trace`.

    Returns:
        The trace, or None where the original does not run either, so that nothing is known.

    Raises:
        EditError: The edited network does not run; the message names the layer, both shapes and a way out.
    """
    try:
        return trace(edited, inputs=inputs)
    except ForwardError as error:
        failure = error
    try:
        trace(original, inputs=inputs)
    except ForwardError:
        if inputs is not None:
            raise
        return None
    raise refusal(edited, what, failure) from failure


def refusal(edited: nn.Module, what: str, failure: ForwardError) -> EditError:
    """Explain why an edit is impossible: the layer of the edited network that fails, both shapes and a way out."""
    if failure.path is None:
        return EditError(f"cannot {what}: the result does not run: {failure.reason}. Nothing was changed.")
    layer = edited.get_submodule(failure.path)
    where = f"'{failure.path}' ({type(layer).__name__})" if failure.path else "its own forward"
    fed = ", ".join(map(str, failure.given)) or "no tensor"
    expected = _expectation(layer)
    return EditError(
        f"cannot {what}: {where} would be given {fed}"
        + (f", and expects {expected}. " if expected else f": {failure.reason}. ")
        + f"{_way_out(layer, failure.given[0] if failure.given else ())} Nothing was changed."
    )


def _expectation(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"(…, {layer.in_features})"
    if isinstance(layer, CONVOLUTIONS):
        return f"(N, {layer.in_channels}{', …' * len(layer.kernel_size)})"
    if isinstance(layer, (BatchNormBase, InstanceNormBase)):
        return f"(N, {layer.num_features}, …)"
    if isinstance(layer, nn.GroupNorm):
        return f"(N, {layer.num_channels}, …)"
    if isinstance(layer, nn.LayerNorm):
        return f"(…, {', '.join(map(str, layer.normalized_shape))})"
    return ""


def _way_out(layer: nn.Module, given: Shape) -> str:
    """Name a change that makes the shapes fit."""
    if isinstance(layer, nn.Linear) and given:
        wanted, out = layer.in_features, layer.out_features
        if len(given) == 4 and given[1] != wanted and given[3] == wanted:
            return "Move its channels last with a Permute, or pool it first."
        if len(given) == 4:
            pooled = "Put nn.AdaptiveAvgPool2d(1) and nn.Flatten() before it"
            return f"{pooled}." if given[1] == wanted else f"{pooled}, and make it nn.Linear({given[1]}, {out})."
        if math.prod(given[1:]) == wanted:
            return "Put nn.Flatten() before it."
        return f"Make it nn.Linear({given[-1]}, {out}), or put nn.Linear({given[-1]}, {wanted}) before it."
    if isinstance(layer, CONVOLUTIONS) and len(given) == len(layer.kernel_size) + 2:
        return f"Put nn.{type(layer).__name__}({given[1]}, {layer.in_channels}, 1) before it."
    if isinstance(layer, BatchNormBase) and len(given) > 1:
        return f"Make it nn.{type(layer).__name__}({given[1]})."
    return "Give the layers the widths that stand on either side, or put a layer between them that converts."


def finish(edited: nn.Module, original: nn.Module, operation: Any, *, new_outputs: bool, **arguments: Any) -> nn.Module:
    """Add a step to the recipe of `edited`, in place, drop what is no longer valid on its card, and update its pins.

    Args:
        edited: A model that was just edited; it still carries the card of the original.
        original: The model that was edited.
        operation: The name of the edit.
        new_outputs: Whether the outputs mean something else now, so that the classes of the old ones are forgotten.
        **arguments: What the edit was given; layers are described as text, and what is None is left out.
    """
    card = card_of(edited)
    recipe = card.recipe
    origin: EditOrigin | None = card.origin if recipe is None else None
    if recipe is None and origin is None:
        origin = EditOrigin((shared_copy(original),))
    try:
        known = {name: value for name, value in arguments.items() if value is not None}
        step = Step(operation=operation, arguments=_as_data(known, tied=True))
    except EditError:
        recipe = origin = None  # the model works, but its architecture can no longer be written down
    else:
        recipe = recipe.then(step) if recipe is not None else None
        origin = replace(origin, steps=(*origin.steps, step)) if origin is not None else None
    if any(is_pinned(layer) for layer in edited.modules()):
        sync_pins(edited)  # what is new is trainable, and so is the mode of what lies around it
    forgotten = {"task": None, "classes": None} if new_outputs else {}
    return attach(edited, recipe=recipe, origin=origin, metrics={}, **forgotten)


def attach_joined(joined: nn.Module, name: str, parts: Sequence[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Attach the recipe of a network that joins others, or its origin where one of these has none.

    Neither is attached where a new layer cannot be written as text.
    """
    try:
        data = _as_data(arguments, tied=False)
    except EditError:
        return attach(joined, recipe=None)
    recipes = [card_of(part).recipe for part in parts]
    known = tuple(recipe for recipe in recipes if recipe is not None)
    if len(known) == len(parts):
        return attach(joined, recipe=Recipe(source=Source(name=name, parts=known, arguments=data)))
    return attach(joined, recipe=None, origin=EditOrigin(tuple(map(shared_copy, parts)), (name, data)))


def _as_data(value: Any, *, tied: bool) -> Any:
    """Return an argument as JSON data, with layers as text; `tied` as `describe` takes it."""
    if isinstance(value, nn.Module):
        return describe(value, tied=tied)
    if isinstance(value, Mapping):
        return {name: _as_data(item, tied=tied) for name, item in value.items()}
    return [_as_data(item, tied=tied) for item in value] if isinstance(value, (list, tuple)) else value
