"""Compare two networks in everything but the weights: what differs here may compute something else.

Two networks are the same if their layers have the same classes, tensors of the same shapes, and the same settings. The
settings of a layer are all of its attributes: numbers, texts, functions with what they enclose, containers and objects
of these, and tensors that no state dict holds, with their values. Private attributes of a library's layer are left out,
as libraries keep caches in them, while the arguments of their constructors are public; and so are attributes that the
user has added to it.
"""

import functools
import math
import re
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.card import ATTRIBUTE
from regraft.checkpoint.recipes.transformers_config import config_data, is_config
from regraft.freezing.hold import RESET, SCRIPTABLE, TRAIN
from regraft.surgery.rewired import EditedModule
from regraft.torch_internals import buffers_of, children_of, non_persistent_buffers, parameters_of

LIBRARIES = ("torch", "torchvision", "timm", "transformers")
IGNORED = frozenset((*vars(nn.Module()), ATTRIBUTE, TRAIN, RESET, SCRIPTABLE))  # of every module, and of pins
NO_SETTINGS = {  # attributes of libraries' networks that change no output, or that each forward sets by its input
    "timm": ("pretrained_cfg", "default_cfg", "feature_info", "grad_checkpointing"),
    "transformers": (
        *("name_or_path", "generation_config", "warnings_issued", "gradient_checkpointing"),
        *("shift_size", "window_size"),
    ),
}
ADDRESS = re.compile(r"0x[0-9a-f]+")
MAX_SHOWN = 40  # characters of a value in a message


def differing_layers(model: nn.Module, reference: nn.Module) -> dict[str, str]:
    """Return the outermost layers of `model` that differ from those of `reference`, each with what differs.

    A layer differs if its class, its tensors, its settings, or the names of the layers in it do. Layers within one that
    differs are not listed. The path of the network itself is empty.

    >>> differing_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    {'0': "'weight' has the shape (3, 2), and (2, 2) in a new one"}
    """
    return dict(_differences("", model, reference, set()))


def _differences(path: str, layer: Any, other: Any, seen: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    if (id(layer), id(other)) in seen and layer is not None:
        return
    difference = _own_difference(layer, other, seen)
    if difference is not None:
        yield path, difference
    elif layer is not None:
        seen.add((id(layer), id(other)))
        children = children_of(other)
        for name, child in children_of(layer).items():
            yield from _differences(f"{path}.{name}".lstrip("."), child, children[name], seen)


def _own_difference(layer: nn.Module | None, other: nn.Module | None, seen: set[tuple[int, int]]) -> str | None:
    """Return what differs between two layers themselves, without the layers in them."""
    if layer is None or other is None or not _are_of_one_class(layer, other):
        if layer is other:
            return None
        return f"it is of the class {_class_name(layer)}, and of {_class_name(other)} in a new one"
    if list(children_of(layer)) != list(children_of(other)):
        return (
            f"it holds the layers {_shown(list(children_of(layer)))}, and a new one {_shown(list(children_of(other)))}"
        )
    return _tensor_difference(layer, other) or _setting_difference(layer, other, seen)


def _are_of_one_class(layer: nn.Module, other: nn.Module) -> bool:
    if isinstance(layer, EditedModule) and isinstance(other, EditedModule):  # each has a class of its own
        return (layer.origin, layer.programs, layer.mode_switch) == (other.origin, other.programs, other.mode_switch)
    return type(layer) is type(other)


def _tensor_difference(layer: nn.Module, other: nn.Module) -> str | None:
    """Compare the shapes of all tensors, and the values of those that no state dict holds."""
    kept_nowhere = non_persistent_buffers(other)
    if non_persistent_buffers(layer) != kept_nowhere:
        return "other buffers of it are kept in the state dict than of a new one"
    for tensors, others in ((parameters_of(layer), parameters_of(other)), (buffers_of(layer), buffers_of(other))):
        for name in [*tensors, *others]:
            tensor, expected = tensors.get(name), others.get(name)
            if name not in tensors or name not in others or (tensor is None) != (expected is None):
                return f"'{name}' is there in only one of it and a new one"
            if tensor is None or expected is None:
                continue
            if tensor.shape != expected.shape:
                return f"'{name}' has the shape {tuple(tensor.shape)}, and {tuple(expected.shape)} in a new one"
            if name in kept_nowhere and not _is_same_tensor(tensor, expected):
                return (
                    f"the buffer '{name}', which no state dict holds, has other values or another dtype than a new one"
                )
    return None


def _setting_difference(layer: nn.Module, other: nn.Module, seen: set[tuple[int, int]]) -> str | None:
    library = type(layer).__module__.partition(".")[0]
    ignored = {*IGNORED, *NO_SETTINGS.get(library, ())}
    settings, expected = (
        {
            name: value
            for name, value in vars(part).items()
            if name not in ignored and not (library in LIBRARIES and name.startswith("_"))
        }
        for part in (layer, other)
    )
    for name in [*settings, *expected]:
        if name not in expected and library in LIBRARIES and not hasattr(type(layer), name):
            continue  # a note of the user's, such as the names of classes, which the code of a library does not read
        if name not in settings or name not in expected:
            return f"its attribute '{name}' is there in only one of it and a new one"
        if not _is_same(settings[name], expected[name], seen):
            value, fresh = _shown(settings[name]), _shown(expected[name])
            return f"its '{name}' is {value}, and {fresh if fresh != value else 'another'} in a new one"
    return None


def _is_same(value: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    """Return whether two values are equal, down to the values in them; what was compared before counts as equal."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, (bool, int, str, bytes, type(None), torch.dtype, torch.Size)):
        return value == other
    if isinstance(value, (float, complex)):
        return value == other or (value != value and other != other)
    if (id(value), id(other)) in seen:
        return True
    if isinstance(value, nn.Module):
        return not any(_differences("", value, other, seen))
    seen.add((id(value), id(other)))

    def all_same(values: Any, others: Any) -> bool:
        return len(values) == len(others) and all(_is_same(a, b, seen) for a, b in zip(values, others, strict=True))

    if isinstance(value, torch.Tensor):
        return value.shape == other.shape if value.requires_grad else _is_same_tensor(value, other)
    if isinstance(value, np.ndarray):
        return value.dtype == other.dtype and value.shape == other.shape and value.tobytes() == other.tobytes()
    if is_config(value):
        return config_data(value) == config_data(other)
    if isinstance(value, (tuple, list)):
        return all_same(value, other)
    if isinstance(value, (dict, Mapping)):
        return list(value) == list(other) and all_same(list(value.values()), list(other.values()))
    if isinstance(value, functools.partial):
        return all_same((value.func, value.args, value.keywords), (other.func, other.args, other.keywords))
    if isinstance(value, types.MethodType):
        return all_same((value.__func__, value.__self__), (other.__func__, other.__self__))
    if isinstance(value, types.FunctionType):
        return all_same(_parts_of_function(value), _parts_of_function(other))
    if isinstance(value, weakref.ReferenceType):
        return True
    if hasattr(value, "__dict__"):
        return _is_same(vars(value), vars(other), seen)
    return _is_equal(value, other) or ADDRESS.sub("", repr(value)) == ADDRESS.sub("", repr(other))


def _parts_of_function(function: types.FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    return function.__code__, function.__defaults__, function.__kwdefaults__, cells


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _is_same_tensor(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor.shape != other.shape or tensor.dtype != other.dtype or tensor.layout != other.layout:
        return False
    if tensor.is_meta or other.is_meta:
        return tensor.is_meta == other.is_meta
    tensor, other = tensor.detach().cpu(), other.detach().cpu()
    if tensor.is_floating_point():
        return torch.equal(tensor.nan_to_num(nan=math.pi), other.nan_to_num(nan=math.pi))
    return torch.equal(tensor, other)


def _is_equal(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except Exception:  # objects of users may raise anything
        return False


def _class_name(layer: nn.Module | None) -> str:
    return "None" if layer is None else type(layer).__name__


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split()) if not isinstance(value, torch.Tensor) else f"a tensor {tuple(value.shape)}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
