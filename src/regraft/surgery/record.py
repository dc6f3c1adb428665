"""What ends every edit: the recipe that the model carries gains a step, and its pins follow."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from regraft.card import Step, attach, card_of
from regraft.errors import EditError
from regraft.freezing.pins import is_pinned, sync_pins
from regraft.surgery.layerspec import describe


def finish(edited: nn.Module, operation: Any, *, new_outputs: bool, **arguments: Any) -> nn.Module:
    """Add a step to the recipe of `edited`, in place, forget what no longer holds of it, and set its pins anew.

    Args:
        edited: A model that was just edited; it still carries the card of the original.
        operation: The name of the edit.
        new_outputs: Whether the outputs mean something else now, so that the classes of the old ones are forgotten.
        **arguments: What the edit was given; layers are described as text, and what is None is left out.
    """
    card = card_of(edited)
    recipe = card.recipe
    if recipe is not None:
        try:
            plain = {name: _plain(value) for name, value in arguments.items() if value is not None}
            recipe = recipe.then(Step(operation=operation, arguments=plain))
        except EditError:
            recipe = None  # the model works, but its architecture can no longer be written down
    if any(is_pinned(layer) for layer in edited.modules()):
        sync_pins(edited)  # what is new is trainable, and so is the mode of what lies around it
    forgotten = {"task": None, "classes": None} if new_outputs else {}
    return attach(edited, recipe=recipe, metrics={}, **forgotten)


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return describe(value, tied=True)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
