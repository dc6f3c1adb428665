"""Write the constructor call of a layer as source code: `nn.Conv2d(3, 64, 7, stride=2, bias=False)`."""

import copy
import sys
from typing import Any, cast

import torch
from torch import nn

from regraft.anatomy.modes import preserved_randomness
from regraft.errors import EditError
from regraft.surgery.codegen.literals import quoted
from regraft.surgery.layer_text.build import describe
from regraft.surgery.layer_text.parse import LayerCall, container_text, parsed
from regraft.surgery.layer_text.read_back import OWN, parameters_of
from regraft.torch_internals import uses_fast_norm, without_children

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# What a subclass may define without computing anything else than its base class.
SAME_BEHAVIOUR = frozenset(
    {"__init__", "__module__", "__doc__", "__annotations__", "__firstlineno__", "__parameters__"}
)
SAME_BEHAVIOUR |= {"__static_attributes__", "__constants__", "__orig_bases__", "extra_repr", "reset_parameters"}
PLAIN = (bool, int, float, str, type(None), tuple)


def as_builtin(layer: nn.Module) -> nn.Module | None:
    """Return a view of `layer` as a layer of `torch.nn` that computes the same; None where there is none."""
    kind = _builtin_class(layer)
    if kind is None:
        return None
    own = type(layer).__mro__[: type(layer).__mro__.index(kind)]
    changed = {name for between in own for name in vars(between)} - SAME_BEHAVIOUR
    return _viewed(layer, kind) if not changed or _is_timm_norm(layer, kind) else None


def holder_of(layer: nn.Module) -> nn.Module | None:
    """Return a view of `layer` as the layer of `torch.nn` that it derives from, without its own layers inside."""
    kind = _builtin_class(layer)
    if kind is None:
        return None
    view = without_children(_viewed(layer, kind))
    vars(view).pop("forward", None)
    return view


def is_timm_leaf(layer: nn.Module) -> bool:
    """Return whether timm registers the class of a layer as not traceable."""
    if "timm" not in sys.modules:
        return False
    from timm import layers

    return type(layer) in cast(Any, layers).get_notrace_modules()


def constructor(layer: nn.Module) -> str:
    """Write the call that makes a layer of `torch.nn`, or one that timm does not trace, which goes by its bare name.

    Raises:
        EditError: It cannot be read from the layer; the message says why.

    >>> constructor(nn.Conv2d(3, 64, (7, 7), stride=2, padding=3, bias=False).double())
    'nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False, dtype=torch.float64)'
    """
    dtypes = {tensor.dtype for tensor in layer.state_dict().values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise EditError(f"its tensors are of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    dtype = dtypes.pop() if dtypes else torch.float32
    try:
        call = parsed(describe(layer, tied=True))
    except EditError:
        if _builtin_class(layer) is type(layer):
            raise
        call = _timm_call(layer)
    return _text(call, "" if dtype is torch.float32 else str(dtype))


def _builtin_class(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class of `torch.nn` that a layer is, or derives from; None for containers and the rest."""
    if isinstance(layer, CONTAINERS):
        return None
    for kind in type(layer).__mro__:
        if kind is not nn.Module and getattr(nn, kind.__name__, None) is kind:
            return cast("type[nn.Module]", kind)
    return None


def _is_timm_norm(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer is timm's own form of a norm, set to compute what torch's computes."""
    home, name = type(layer).__module__, type(layer).__name__
    is_norm = home == "timm.layers.norm" and name in ("LayerNorm", "GroupNorm") and name == kind.__name__
    return is_norm and not uses_fast_norm(layer)


def _viewed(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    view = copy.copy(layer)
    view.__class__ = kind
    return view


def _timm_call(layer: nn.Module) -> LayerCall:
    """Read the call of a layer of a class that is not public, from attributes of the names of its arguments.

    Raises:
        EditError: An argument is not stored, or the call builds another layer.
    """
    kind, positional, keywords = type(layer), [], {}
    for entry in parameters_of(kind):
        value = getattr(layer, entry.name, entry.default)
        if value is entry.empty or not isinstance(value, (*PLAIN, type(entry.default))):
            raise EditError(f"its argument '{entry.name}' cannot be read back from it")
        if entry.default is entry.empty:
            positional.append(value)
        elif value != entry.default:
            keywords[entry.name] = value
    with torch.device("meta"), preserved_randomness():
        rebuilt = kind(*positional, **keywords)
    if _settings(rebuilt) != _settings(layer):
        raise EditError("what its constructor was given cannot be read back from it")
    return LayerCall(kind.__name__, tuple(positional), keywords)


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Return everything that determines a layer except the values of its weights: shapes, classes, plain attributes."""
    settings: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    for path, part in layer.named_modules():
        plain = {
            name: value
            for name, value in vars(part).items()
            if name != "training" and not name.startswith("_") and isinstance(value, PLAIN)
        }
        settings[f"{path}:"] = (type(part), plain)
    return settings


def _text(value: Any, dtype: str) -> str:
    """Write a call, or a value in one, as it stands in a file that imports `nn` and the classes of other libraries."""
    if isinstance(value, (tuple, list, dict)):
        return container_text(value, lambda item: _text(item, dtype))
    if not isinstance(value, LayerCall):
        return quoted(value)
    name, positional = value.name.rpartition(".")[2], value.positional
    if name == OWN:  # of a module of timm's that is no public one
        name, positional = str(positional[0]).rpartition(":")[2], positional[1:]
    arguments = [_text(item, dtype) for item in positional]
    arguments += [f"{name}={_text(item, dtype)}" for name, item in value.keywords.items()]
    if dtype and not any(isinstance(item, LayerCall) for item in positional):
        arguments.append(f"dtype={dtype}")
    return f"{'nn.' if hasattr(nn, value.name) else ''}{name}({', '.join(arguments)})"
