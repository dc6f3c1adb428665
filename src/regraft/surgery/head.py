"""Put another classifier in the place of a network's own."""

import copy
from typing import Any

import torch
from torch import nn

from regraft.anatomy.heads import find_heads
from regraft.anatomy.paths import layer_at, parent_and_name
from regraft.anatomy.tracing import trace
from regraft.card import Step, attach, card_of
from regraft.errors import EditError
from regraft.surgery.layerspec import construct, describe


def replace_head(model: nn.Module, new: int | nn.Module, *, path: str | None = None) -> nn.Module:
    """Return `model` with another classifier. The structure of `model` stays as it is; all other weights are shared.

    The new layer has the device, the dtype and the mode of the old one, and fresh weights from torch's random state.

    Args:
        model: Any module.
        new: The number of classes K, for a layer of the same kind as the old one that gives (N, K); or a module.
        path: Path of the layer to replace; found by `find_heads` where not given.

    Raises:
        EditError: The head is of a kind that cannot be built for another number of classes. Nothing was changed.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    >>> replace_head(model, 3)
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=12, out_features=3, bias=True)
    )
    """
    if isinstance(new, int) and new < 1:
        raise EditError(f"a head needs at least 1 output, not {new}. Nothing was changed.")
    paths = [path] if path is not None else find_heads(model)
    made = {head: _new_head(model, head, _own(new, position)) for position, head in enumerate(paths)}
    edited = share(model)
    for head, layer in made.items():
        _put(edited, head, layer)
        if isinstance(new, int) and isinstance(getattr(edited, "num_classes", None), int):
            edited.__dict__["num_classes"] = new  # timm's networks and many others keep the width beside the layer
        _record(edited, head, new)
    return edited


def share(model: nn.Module) -> nn.Module:
    """Copy the structure of `model`; parameters and buffers are the same tensors in both."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def apply_step(model: nn.Module, step: Step) -> nn.Module:
    """Carry out one step of a recipe."""
    spec = step.arguments
    return replace_head(model, spec["num_classes"] if "num_classes" in spec else construct(spec["new"]), path=step.path)


def _own(new: int | nn.Module, position: int) -> int | nn.Module:
    """Give each of several heads a module of its own, so that their weights are not tied."""
    return copy.deepcopy(new) if position and isinstance(new, nn.Module) else new


def _new_head(model: nn.Module, path: str, new: int | nn.Module) -> nn.Module:
    old = layer_at(model, path)
    reference = next(old.parameters(), next(model.parameters(), None))
    if isinstance(new, nn.Module):
        layer = new
    elif isinstance(old, nn.Linear):
        layer = nn.Linear(old.in_features, new, bias=old.bias is not None)
    elif isinstance(old, nn.Identity):
        layer = nn.Linear(_width_into(model, path), new)
    elif isinstance(old, nn.Conv2d):
        layer = nn.Conv2d(old.in_channels, new, _pair(old.kernel_size), _pair(old.stride), bias=old.bias is not None)
    else:
        raise EditError(
            f"the head '{path}' is a {type(old).__name__}, which cannot be built for {new} classes. "
            "Pass a module in its place, or the path of another layer. Nothing was changed."
        )
    return (layer if reference is None else layer.to(reference.device, reference.dtype)).train(old.training)


def _width_into(model: nn.Module, path: str) -> int:
    """Return the number of features D that the layer at `path` is given as (N, D)."""
    shapes = next((call.input_shapes for call in trace(model).calls if call.path == path), ())
    if not shapes or len(shapes[0]) != 2:
        raise EditError(f"the head '{path}' is given {shapes or 'nothing'}, expected features (N, D). Pass a module.")
    return shapes[0][1]


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1])


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, name = parent_and_name(path)
    setattr(model.get_submodule(parent), name, layer)


def _record(model: nn.Module, path: str, new: int | nn.Module) -> None:
    recipe = card_of(model).recipe
    if recipe is not None:
        try:
            arguments = {"num_classes": new} if isinstance(new, int) else {"new": describe(new)}
            recipe = recipe.then(Step(operation="replace_head", path=path, arguments=arguments))
        except EditError:
            recipe = None  # the model works, but its architecture can no longer be written down
    attach(model, recipe=recipe, task=None, classes=None, metrics={})  # those were the old head's
