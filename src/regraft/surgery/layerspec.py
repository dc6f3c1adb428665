"""Layers of `torch.nn` described as JSON data, and built again from that description.

A description is `{"type": "Linear", "arguments": {...}}`; a container has `"layers"` instead of arguments. Only classes
that `torch.nn` exports can be described, so building one never imports anything.
"""

import inspect
from typing import Any

import torch
from torch import nn

from regraft.errors import EditError

PLAIN = (bool, int, float, str, type(None))


def describe(layer: nn.Module) -> dict[str, Any]:
    """Describe a layer of `torch.nn`, weights not included.

    Raises:
        EditError: The layer, or one inside of it, is of a class that `torch.nn` does not export, or was built with an
            argument that is no plain value.

    >>> describe(nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU()))["layers"][0][1]["arguments"]
    {'in_features': 8, 'out_features': 4, 'bias': False}
    """
    kind = type(layer).__name__
    if getattr(nn, kind, None) is not type(layer):
        raise EditError(
            f"a layer of type {type(layer).__module__}.{kind} cannot be written into a recipe: "
            "only layers of torch.nn can. Build it from those, or keep its weights with torch.save."
        )
    if isinstance(layer, nn.Sequential):
        return {
            "type": kind,
            "layers": [[name, describe(child)] for name, child in layer._modules.items() if child is not None],
        }
    arguments: dict[str, Any] = {}
    if type(layer).__init__ in (nn.Module.__init__, nn.Identity.__init__):  # take any arguments, and keep none
        return {"type": kind, "arguments": arguments}
    for name, parameter in inspect.signature(type(layer).__init__).parameters.items():
        if name in ("self", "device", "dtype") or name.startswith("_"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise EditError(f"a layer of type {kind} does not say which arguments it was built with.")
        value = _argument(layer, name, parameter.default)
        if value != parameter.default:
            arguments[name] = value
    return {"type": kind, "arguments": arguments}


def construct(description: dict[str, Any]) -> nn.Module:
    """Build a layer from its description, with fresh weights.

    Raises:
        EditError: The description names a class outside of `torch.nn`, or arguments that it does not take.
    """
    kind = description.get("type", "")
    maker = getattr(nn, str(kind), None)
    if not (isinstance(maker, type) and issubclass(maker, nn.Module)):
        raise EditError(f"'{kind}' is no layer of torch.nn, and a recipe may hold no other.")
    try:
        if "layers" in description:
            built = maker()
            for name, inner in description["layers"]:
                built.add_module(name, construct(inner))
            return built
        return maker(**{name: _as_tuple(value) for name, value in description["arguments"].items()})
    except (TypeError, ValueError, KeyError) as error:
        raise EditError(f"a recipe describes a {kind} that cannot be built: {error}.") from error


def _argument(layer: nn.Module, name: str, default: Any) -> Any:
    if not hasattr(layer, name):
        raise EditError(f"the argument '{name}' of {type(layer).__name__} cannot be read back from the layer.")
    value = getattr(layer, name)
    if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
        return value is not None
    plain = value if not isinstance(value, tuple) else list(value)
    if not isinstance(plain, (*PLAIN, list)):
        raise EditError(f"the argument '{name}' of {type(layer).__name__} is a {type(value).__name__}, no plain value.")
    if isinstance(value, tuple) and isinstance(default, int) and value == (default,) * len(value):
        return default
    return plain


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
