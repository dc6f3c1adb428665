"""Fit new layers to the network that they are put into: widths, device, dtype, mode."""

import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from regraft.anatomy.heads import CONVOLUTIONS
from regraft.anatomy.inputs import Inputs, Shape
from regraft.anatomy.tracing import Trace, trace
from regraft.errors import EditError
from regraft.torch_internals import BatchNormBase, InstanceNormBase, infer_lazy_shapes
from regraft.wording import for_caller

CHANNELS_FIRST = (*CONVOLUTIONS, nn.GroupNorm, BatchNormBase, InstanceNormBase)


def fitted(model: nn.Module, layers: Sequence[nn.Module | int], inputs: Inputs | None = None) -> list[nn.Module]:
    """Return the layers on the device, in the dtype and in the mode of `model`; a number becomes a classifier.

    Raises:
        EditError: A layer is neither a module nor a number of classes, or a number comes after other layers.
    """
    modules = []
    for position, layer in enumerate(layers):
        if not isinstance(layer, (nn.Module, bool)) and hasattr(layer, "__index__"):  # NumPy's integers, too
            layer = operator.index(layer)
            if position:
                raise EditError(f"{layer} classes are asked for after other layers. Give a layer, or the number alone.")
            shape = output_shape(model, inputs)
            layer = classifier(shape, layer, are_channels_last=_are_channels_last(model, shape, inputs))
        if isinstance(layer, type):
            raise EditError(f"{layer.__name__} is a class. Give a layer made from it, as in {layer.__name__}(…).")
        if not isinstance(layer, nn.Module):
            raise EditError(
                f"{layer!r} is a {type(layer).__name__}, expected a torch.nn.Module or a number of classes."
            )
        modules.append(layer)
    for layer in modules:
        place(layer, model).train(model.training)
    return modules


def place(layer: nn.Module, *around: nn.Module) -> nn.Module:
    """Put a layer on the device and in the dtype of the first floating-point parameter around it, if any, in place.

    Raises:
        EditError: It holds no values, and those of the network around it do.
    """
    parameters = chain.from_iterable(module.parameters() for module in around)
    reference = next((parameter for parameter in parameters if parameter.is_floating_point()), None)
    if reference is None:
        return layer
    if not reference.is_meta and any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        raise EditError(
            f"the new {type(layer).__name__} holds no values (it is on the meta device). Make it on a real one. "
            "Nothing was changed."
        )
    return layer.to(reference.device, reference.dtype)


def classifier(shape: Shape, classes: int, *, are_channels_last: bool = False) -> nn.Module:
    """Build a linear classifier for outputs of a shape, batch included, pooled to vectors where they are none.

    Args:
        shape: (N, D), maps (N, C, H, W) or tokens (N, T, D).
        classes: Number of outputs K.
        are_channels_last: Whether maps are (N, H, W, C) instead.

    Raises:
        EditError: There is no usual way from such a shape to a vector.

    >>> classifier((1, 512, 7, 7), 10)[-1]
    Linear(in_features=512, out_features=10, bias=True)
    """
    if classes < 1:
        raise EditError(f"a classifier needs at least 1 output, not {classes}. Nothing was changed.")
    if len(shape) == 2:
        return nn.Linear(shape[1], classes)
    if len(shape) == 4 and not are_channels_last:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[1], classes))
    if len(shape) == 3:  # tokens (N, T, D)
        return nn.Sequential(nn.AdaptiveAvgPool2d((1, shape[2])), nn.Flatten(), nn.Linear(shape[2], classes))
    if len(shape) == 4:
        pool = (nn.Flatten(1, 2), nn.AdaptiveAvgPool2d((1, shape[3])), nn.Flatten())
        return nn.Sequential(*pool, nn.Linear(shape[3], classes))
    raise EditError(
        f"the network gives {shape}, expected (N, D), maps (N, C, H, W) or tokens (N, T, D) to put a classifier on. "
        "Give layers of your own. Nothing was changed."
    )


def _are_channels_last(model: nn.Module, shape: Shape, inputs: Inputs | None) -> bool:
    """Return whether maps are (N, H, W, C).

    Decided by the two equal sides, where maps are square; else by the last layer that works on one of the two layouts.
    """
    if len(shape) != 4:
        return False
    if (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return shape[1] == shape[2]
    for call in sorted(trace(model, inputs=inputs).calls, key=lambda call: -call.ended):
        layer = model.get_submodule(call.path)
        if isinstance(layer, CHANNELS_FIRST) or type(layer).__name__.endswith(("Norm2d", "NormAct2d")):
            return False
        width = layer.out_features if isinstance(layer, nn.Linear) else None
        if isinstance(layer, nn.LayerNorm):
            width = layer.normalized_shape[-1]
        if width == shape[3]:
            return True
    return False


def output_shape(model: nn.Module, inputs: Inputs | None = None) -> Shape:
    """Return the shape of the one tensor that `model` gives, batch included.

    Raises:
        EditError: It gives several, or none.
        ModelError: Its forward fails.
    """
    shapes = next(call.output_shapes for call in trace(model, inputs=inputs).calls if call.path == "")
    if len(shapes) != 1:
        raise EditError(
            f"{type(model).__name__} gives {len(shapes)} tensors, expected one. "
            "Truncate it after the layer whose output you want first. Nothing was changed."
        )
    return shapes[0]


def materialize_lazy(edited: nn.Module, added: Mapping[str, nn.Module], run: Trace | None, what: str) -> None:
    """Give the lazy layers among the new ones the widths that a run on shapes showed, in place.

    Raises:
        EditError: There are lazy layers, and the network cannot be run on shapes.
    """
    lazy = {
        f"{name}.{path}".rstrip("."): layer
        for name, layer in added.items()
        for path, layer in layer.named_modules()
        if isinstance(layer, LazyModuleMixin) and cast(Any, layer).has_uninitialized_params()
    }
    if lazy and run is None:
        raise EditError(
            f"cannot {what}: the widths of lazy layers are unknown, as the network cannot be run on shapes. "
            f"Pass {for_caller(python='inputs=, or ', command='')}layers with widths. Nothing was changed."
        )
    calls = {call.path: call for call in reversed(run.calls)} if run else {}
    for path in lazy:
        if path not in calls:
            raise EditError(f"cannot {what}: the lazy layer '{path}' is never called. Nothing was changed.")
    for path, layer in lazy.items():
        device = next(cast(nn.Module, layer).parameters()).device
        inputs = tuple(torch.empty(shape, device="meta") for shape in calls[path].input_shapes)
        infer_lazy_shapes(cast(nn.Module, layer), inputs)
        cast(nn.Module, layer).to(device)
