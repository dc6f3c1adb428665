"""Read the constructor call of a layer back from its attributes.

Attributes may differ from the arguments that the constructor was given, so the caller has to check the call by building
it.
"""

import ast
import inspect
import numbers
import operator
import sys
from collections.abc import Callable, Mapping
from keyword import iskeyword
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from regraft.errors import EditError
from regraft.surgery.layer_text.parse import LayerCall, shortened, written
from regraft.torch_internals import ConvBase, children_of
from regraft.zoo import FILE_MODULE

LIBRARIES = ("torchvision.ops", "timm.layers")  # beside torch.nn; their classes are written with these names before
OWN = "py"  # the name under which text calls a class of the user's own
TAKE_ANYTHING = (nn.Module, nn.Identity)  # their constructors accept any arguments and store none

_RECURRENT_DEFAULTS = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
_HIDDEN_SIGNATURES: dict[type[nn.Module], dict[str, Any]] = {  # constructors with the signature `*args, **kwargs`
    nn.RNN: {**_RECURRENT_DEFAULTS, "nonlinearity": "tanh"},
    nn.LSTM: {**_RECURRENT_DEFAULTS, "proj_size": 0},
    nn.GRU: _RECURRENT_DEFAULTS,
}
_ELSEWHERE: dict[str, tuple[str, ...]] = {  # attributes in which libraries keep an argument under another name
    "affine": ("elementwise_affine",),
    "channels": ("normalized_shape",),
    "in_channel": ("in_channels",),
    "normalization_shape": ("normalized_shape",),
    "num_channels": ("num_features", "normalized_shape"),
    "p": ("norm",),
}
_CONV_NORM = {
    name: f"0.{name}" for name in ("in_channels", "out_channels", "kernel_size", "stride", "groups", "dilation")
}
_INSIDE: dict[str, dict[str, str]] = {  # arguments that are stored on an inner layer
    "torchvision.ops.Conv2dNormActivation": _CONV_NORM,
    "torchvision.ops.Conv3dNormActivation": _CONV_NORM,
    "torchvision.ops.FrozenBatchNorm2d": {"num_features": "weight"},
    "torchvision.ops.SqueezeExcitation": {"input_channels": "fc1.in_channels", "squeeze_channels": "fc1.out_channels"},
    "timm.layers.LayerScale": {"dim": "gamma"},
    "timm.layers.LayerScale2d": {"dim": "gamma"},
    "timm.layers.Mlp": {
        "in_features": "fc1.in_features",
        "hidden_features": "fc1.out_features",
        "out_features": "fc2.out_features",
        "drop": "drop1.p",
    },
}


def library_name(kind: type[nn.Module]) -> str | None:
    """Return the name under which torch.nn, torchvision.ops or timm.layers exports a class; None for any other."""
    if getattr(nn, kind.__name__, None) is kind:
        return kind.__name__
    for library in LIBRARIES:
        module = sys.modules.get(library)  # a class of it exists only where it was imported
        if module is not None and getattr(module, kind.__name__, None) is kind:
            return f"{library}.{kind.__name__}"
    return None


def parameters_of(kind: type[nn.Module]) -> list[inspect.Parameter]:
    """Return the parameters of a constructor, without `device` and `dtype`."""
    # By the class that defines the constructor, as some libraries wrap that of nn.Module while they run.
    if next(base for base in kind.__mro__ if "__init__" in vars(base)) in TAKE_ANYTHING:
        return []
    if kind in _HIDDEN_SIGNATURES:
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        required = [inspect.Parameter(name, either) for name in ("input_size", "hidden_size")]
        optional = [inspect.Parameter(n, either, default=d) for n, d in _HIDDEN_SIGNATURES[kind].items()]
        return [*required, *optional]
    entries = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return [
        entry
        for entry in entries
        if entry.default is entry.empty or not (entry.name in ("device", "dtype") or entry.name.startswith("_"))
    ]


def read_call(layer: nn.Module, path: str = "") -> LayerCall:
    """Read the call that built `layer`, the layers inside of it included.

    Raises:
        EditError: It cannot be read; the message names the layer and says why.
    """
    kind = type(layer)
    if kind is nn.Sequential:
        return _sequential(layer, path)
    if kind is nn.ModuleList:
        return LayerCall(
            "ModuleList", ([_as_literal(layer, path, "modules", child) for child in layer.children()],) * bool(layer)
        )
    if kind is nn.ModuleDict:
        entries = {name: read_call(child, f"{path}.{name}".lstrip(".")) for name, child in layer.named_children()}
        return LayerCall("ModuleDict", (entries,) if entries else ())
    name = library_name(kind)
    reference = () if name is not None else (reference_of(layer, path),)
    positional, keywords = _arguments(layer, path, name)
    return LayerCall(name or OWN, (*reference, *positional), keywords)


def undescribable(layer: nn.Module, path: str, reason: str, advice: str = "") -> EditError:
    """Build the error for a layer that no text stands for."""
    kind = type(layer)
    name = library_name(kind) or f"{kind.__module__}.{kind.__qualname__}"
    where = f" at '{path}'" if path else ""
    advice = advice or "Build it from layers of torch.nn, or keep its weights with torch.save."
    return EditError(f"a layer of type {name}{where} cannot be written as text: {reason}. {advice}")


def _sequential(layer: nn.Module, path: str) -> LayerCall:
    children = {name: read_call(child, f"{path}.{name}".lstrip(".")) for name, child in _occupied(layer)}
    if list(children) == [str(number) for number in range(len(children))]:
        return LayerCall("Sequential", tuple(children.values()))
    if all(name.isidentifier() and name.isascii() and not iskeyword(name) for name in children):
        return LayerCall("Sequential", (), cast("dict[str, Any]", children))
    return LayerCall("Sequential", (children,))


def _occupied(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    # Not named_children: one layer may stand in several places.
    return [(name, child) for name, child in children_of(layer).items() if child is not None]


def reference_of(layer: nn.Module, path: str = "") -> str:
    """Return `FILE:Class` or `package.module:Class` for the class of a layer, which is the user's own.

    Raises:
        EditError: It cannot be imported from anywhere; the message says why.
    """
    kind = type(layer)
    advice = "Move the class to the top level of a file of its own, and import it from there."
    if "." in kind.__qualname__:
        raise undescribable(layer, path, "its class is defined inside of a function or another class", advice)
    module = sys.modules.get(kind.__module__)
    if kind.__module__ == "__main__" and (problem := _script_problem(module, kind.__name__)) is not None:
        raise undescribable(layer, path, problem, advice)
    if getattr(module, kind.__name__, None) is not kind:
        reason = f"its class was made at run time, and {kind.__module__} has no such name"
        raise undescribable(layer, path, reason)
    if not kind.__module__.startswith(FILE_MODULE):
        return f"{kind.__module__}:{kind.__name__}"
    specification = getattr(module, "__spec__", None)
    return f"{specification.origin if specification else getattr(module, '__file__', '')}:{kind.__name__}"


def _script_problem(script: ModuleType | None, name: str) -> str | None:
    """Return why a class of the running script cannot be imported from its file; None if it can."""
    file = getattr(script, "__file__", None)
    try:
        body = ast.parse(Path(file).read_text(encoding="utf-8")).body if file else []
    except (OSError, ValueError, SyntaxError):
        body = []
    if not any(isinstance(node, ast.ClassDef) and node.name == name for node in body):
        return "its class is defined in a notebook or an interactive session, so that no file holds it"
    is_guarded = any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in body)
    if not is_guarded:
        return "its class is defined in the script that runs, and to import it would run the whole script again"
    return None


def _arguments(layer: nn.Module, path: str, library: str | None) -> tuple[list[Any], dict[str, Any]]:
    """Read the arguments without defaults, by position, and those that differ from their defaults, by name."""
    kind = type(layer)
    special = _SPECIAL[kind](layer) if kind in _SPECIAL else {}
    positional, keywords = [], {}
    for entry in parameters_of(kind):
        if entry.kind in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD):
            if library is None or entry.kind is entry.VAR_POSITIONAL:
                raise undescribable(layer, path, f"*{entry.name} does not record the arguments it was built with")
            continue
        stored = special[entry.name] if entry.name in special else _stored_argument(layer, path, entry, library)
        if entry.default is not entry.empty and _is_default(layer, entry, stored):
            if entry.kind is entry.POSITIONAL_ONLY:  # the arguments after it need it in its place
                positional.append(_as_literal(layer, path, entry.name, entry.default))
            continue
        value = _as_literal(layer, path, entry.name, stored)
        is_leading = entry.default is entry.empty or entry.kind is entry.POSITIONAL_ONLY
        if is_leading and entry.kind is not entry.KEYWORD_ONLY:
            positional.append(value)
        else:
            keywords[entry.name] = value
    return positional, keywords


def _stored_argument(layer: nn.Module, path: str, entry: inspect.Parameter, library: str | None) -> Any:
    """Return the attribute that stores an argument; the default where a library's class does not store it."""
    places = (entry.name,)
    if library is not None:
        inside = _INSIDE.get(library, {}).get(entry.name)
        places = (inside,) if inside else (entry.name, *_ELSEWHERE.get(entry.name, ()))
    for place in places:
        try:
            value = operator.attrgetter(place)(layer)
        except AttributeError:
            continue
        # The flag `bias` is stored as the tensor that it asked for.
        if entry.name == "bias" and (value is None or isinstance(value, torch.Tensor)):
            return value is not None or _has_no_weight_either(layer)
        if library is None:
            return value
        if isinstance(value, torch.Tensor) and place != entry.name:
            return len(value)
        return _collapsed(layer, entry, value, is_own=place == entry.name)
    if library is not None and entry.default is not entry.empty:
        return entry.default
    advice = f"Keep it: self.{entry.name} = {entry.name}, as the constructor was given it."
    reason = f"its argument '{entry.name}' cannot be read back, as it has no attribute of that name"
    raise undescribable(layer, path, reason, "" if library else advice)


def _has_no_weight_either(layer: nn.Module) -> bool:
    """Return whether a norm was built without affine parameters, so that its `bias` argument is ignored."""
    return False in (getattr(layer, "affine", None), getattr(layer, "elementwise_affine", None))


def _collapsed(layer: nn.Module, entry: inspect.Parameter, value: Any, *, is_own: bool) -> Any:
    """Return one number in the place of a tuple that the constructor made of it, as `kernel_size=3` gives `(3, 3)`."""
    if not isinstance(value, tuple) or not value or value != (value[0],) * len(value):
        return value
    repeats = isinstance(layer, ConvBase) or type(layer).__module__ == "torch.nn.modules.padding"
    single = entry.name == "normalized_shape" and len(value) == 1
    if repeats or single or not is_own:
        return value[0]
    return entry.default if value == (entry.default,) * len(value) else value


def _is_default(layer: nn.Module, entry: inspect.Parameter, value: Any) -> bool:
    default = entry.default
    if value is default:
        return True
    if isinstance(default, type) and type(value) is default:
        return True  # the argument was the class of a layer, and the attribute is the layer made from it
    if isinstance(value, (torch.Tensor, nn.Module)):
        return False
    if entry.name == "stride" and default is None and type(layer).__module__ == "torch.nn.modules.pooling":
        return value == cast(Any, layer).kernel_size
    return isinstance(value, (type(default), numbers.Real)) and value == default


def _as_literal(layer: nn.Module, path: str, name: str, value: Any) -> Any:
    """Return a value that text can hold, with layers in it as calls.

    Raises:
        EditError: No text stands for it.
    """
    if isinstance(value, nn.Module):
        slot = next((slot for slot, child in _occupied(layer) if child is value), name)
        return read_call(value, f"{path}.{slot}".lstrip("."))
    for known in ("relu", "gelu"):  # activations of transformers, which are functions
        if value is getattr(nn.functional, known):
            return known
    if isinstance(value, tuple):
        return tuple(_as_literal(layer, path, name, item) for item in value)
    if isinstance(value, list):
        return [_as_literal(layer, path, name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _as_literal(layer, path, name, item) for key, item in value.items()}
    try:
        written(value)
    except EditError as error:
        reason = f"its argument '{name}' is a {type(value).__name__}, no plain value ({shortened(repr(value), 40)})"
        raise undescribable(layer, path, reason) from error
    return value


def _attention(layer: Any) -> dict[str, Any]:
    width = layer.embed_dim
    return {
        "bias": layer.in_proj_bias is not None,
        "add_bias_kv": layer.bias_k is not None,
        "kdim": None if layer.kdim == width else layer.kdim,
        "vdim": None if layer.vdim == width else layer.vdim,
    }


def _transformer_layer(layer: Any) -> dict[str, Any]:
    return {
        "d_model": layer.self_attn.embed_dim,
        "nhead": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": layer.dropout.p,
        "layer_norm_eps": layer.norm1.eps,
        "batch_first": layer.self_attn.batch_first,
        "bias": layer.linear1.bias is not None,
    }


def _stack(argument: str) -> Callable[[Any], dict[str, Any]]:
    def read(layer: Any) -> dict[str, Any]:
        if not len(layer.layers):
            raise undescribable(layer, "", "it has no layers to tell what they are made of")
        return {argument: layer.layers[0], "num_layers": len(layer.layers)}

    return read


def _transformer(layer: Any) -> dict[str, Any]:
    stacks = [*getattr(layer.encoder, "layers", ()), *getattr(layer.decoder, "layers", ())]
    inner = _transformer_layer(stacks[0]) if stacks else {}
    inner |= {name: getattr(stacks[0], name) for name in ("activation", "norm_first") if stacks}
    depths = {"num_encoder_layers": layer.encoder, "num_decoder_layers": layer.decoder}
    return {**inner, **{name: len(getattr(stack, "layers", ())) for name, stack in depths.items()}}


# Classes whose attributes differ from their arguments in more than the name: functions from a layer to its arguments.
_SPECIAL: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.AdaptiveLogSoftmaxWithLoss: lambda layer: {"cutoffs": list(layer.cutoffs[:-1])},
    nn.MultiheadAttention: _attention,
    nn.Transformer: _transformer,
    nn.TransformerDecoder: _stack("decoder_layer"),
    nn.TransformerDecoderLayer: _transformer_layer,
    nn.TransformerEncoder: _stack("encoder_layer"),
    nn.TransformerEncoderLayer: _transformer_layer,
}
