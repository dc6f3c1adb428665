"""Check the arguments of public functions against their annotations.

Each public function begins with `check_arguments(function, locals())`. Its annotations are the only definition of the
types that it accepts; what they cannot express (a range, a choice, a layer that exists) the function checks itself.
Annotations of other forms than those below are not checked, as `Any` is not.
"""

import collections.abc
import enum
import functools
import inspect
import math
import numbers
import operator
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.errors import ArgumentError, ModelError
from regraft.wording import option

DEVICE_PROBLEMS = {  # how messages of torch begin, which go on with all that it could be built for
    "Expected one of": "PyTorch has no device of that name",
    "Could not run": "this PyTorch is built without it",
}
MAX_INTEGER = 2**63 - 1  # sizes in torch are int64
MAX_NAME_BYTES = 255  # of one part of a path, in every common file system
MAX_SHOWN = 60  # characters of a value in a message
WORDS = {
    str: "a string",
    int: "a whole number of at most 64 bits",
    float: "a finite number",
    bool: "True or False",
    type(None): "None",
    nn.Module: "a torch.nn.Module",
    torch.Tensor: "a tensor",
    os.PathLike: "a path",
    type: "a class",
    collections.abc.Callable: "a function",
    collections.abc.Mapping: "a dict",
    collections.abc.Sequence: "a list",
    collections.abc.Collection: "a list",
    collections.abc.Iterable: "a list",
}
LISTS = (collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
NO_LISTS = (str, bytes, bytearray, torch.Tensor, np.ndarray)  # iterable, but passed by mistake where a list is expected


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check arguments against the annotations of a function. Nothing is changed, and no iterator is consumed.

    Args:
        function: The function.
        values: Its arguments by name, as `locals()` gives them in its first line.

    Raises:
        ArgumentError: A value is of a type that its annotation does not allow.

    >>> def shift(model: nn.Module, by: float | None = None) -> None:
    ...     check_arguments(shift, locals())
    >>> shift(nn.ReLU, 1)
    Traceback (most recent call last):
    regraft.errors.ArgumentError: shift: model is the class ReLU, expected a torch.nn.Module. Make one: ReLU(…).
    """
    see = f"See help(regraft.{function.__qualname__})."
    for name, hint in _hints(function):
        if (mismatch := _mismatch(name, values[name], hint)) is not None:
            where, culprit, wanted = mismatch
            raise ArgumentError(
                f"{function.__qualname__}: {where} is {shown(culprit)}, expected {_words(wanted)}. "
                f"{_place(culprit, wanted, values) or _advice(culprit, wanted) or see}"
            )


def check_minimum(function: Callable[..., Any], minimum: int, **values: float) -> None:
    """Refuse numbers that are too small.

    Raises:
        ArgumentError: One is below `minimum`.
    """
    for name, value in values.items():
        if value < minimum:
            raise ArgumentError(
                f"{function.__qualname__}: {name} is {value}, expected at least {minimum}. Nothing was changed."
            )


def check_path(function: Callable[..., Any], name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path that is invalid in every file system.

    Raises:
        ArgumentError: It is empty, or holds a null byte or a name that is too long.
    """
    if (problem := path_problem(path)) is not None:
        raise ArgumentError(f"{function.__qualname__}: {name} is {shown(path)}: {problem}. Give the path of a file.")


def check_target(function: Callable[..., Any], name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can be written to.

    Raises:
        ArgumentError: It is a folder, or has no name.
    """
    if Path(path).is_dir() or not Path(path).name:
        raise ArgumentError(
            f"{function.__qualname__}: {name} is the folder {shown(path)}, expected the path of a file to write. "
            "Name a file in it. Nothing was written."
        )


def check_weights(function: Callable[..., Any], name: str, model: nn.Module, *, allow_meta: bool = False) -> None:
    """Refuse a network without values: with uninitialized lazy layers, or on the meta device.

    Raises:
        ArgumentError: It has no values.
    """
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            problem, advice = "has no shape yet, as its layer is lazy", "Run the network once on an input first"
        elif tensor.is_meta and not allow_meta:
            problem, advice = "holds no values (it is on the meta device)", "Use to_empty and load weights first"
        else:
            continue
        raise ArgumentError(
            f"{function.__qualname__}: '{path}' of {name} ({type(model).__name__}) {problem}. {advice}. "
            "Nothing was changed."
        )


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device after checking that tensors can be created on it; `gpu` is the first GPU of any maker.

    Raises:
        ModelError: The device does not exist here, or is the meta device.
    """
    try:
        chosen = torch.device(_device_name(device) if isinstance(device, str) else device)
        if chosen.type == "meta":
            raise RuntimeError("it holds shapes without numbers")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0].rstrip(".")
        for start, words in DEVICE_PROBLEMS.items():
            reason = words if reason.startswith(start) else reason
        here = ", ".join(_devices_here())
        raise ModelError(
            f"the device {str(device)!r} cannot be used: {reason}. This machine has {here}. "
            f"Try {option('device', 'cpu')}."
        ) from error
    return chosen


def _device_name(text: str) -> str:
    """Return a device's name in PyTorch: of `gpu`, `CUDA`, `cuda0`, `gpu:1`, `metal`; any other text as it is."""
    word = re.fullmatch(r"(cpu|gpu|cuda|mps|metal)[: ]?(\d*)", text.strip().lower())
    if word is None:
        return text
    kind, number = word.groups()
    if kind == "metal" or (kind == "gpu" and not torch.cuda.is_available() and torch.backends.mps.is_available()):
        kind = "mps"
    kind = "cuda" if kind == "gpu" else kind
    return f"{kind}:{number}" if number else kind


def _devices_here() -> list[str]:
    gpus = [f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def path_problem(path: str | os.PathLike[Any]) -> str | None:
    """Return what is wrong with a path as text, whether or not it exists; None if it is valid."""
    text = os.fspath(path)
    if not isinstance(text, str):
        return "it is bytes, expected text"
    if not text:
        return "it is empty"
    if "\0" in text:
        return "it has a null byte"
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(text).parts):
        return f"it has a name of more than {MAX_NAME_BYTES} bytes"
    return None


@functools.cache
def _hints(function: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    """Return name and annotation of each parameter; that of `*args` becomes a tuple of any length."""
    hints = get_type_hints(inspect.unwrap(function))
    listed = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in hints and parameter.kind is not parameter.VAR_KEYWORD:
            is_variadic = parameter.kind is parameter.VAR_POSITIONAL
            listed.append((name, tuple[hints[name], ...] if is_variadic else hints[name]))
    return tuple(listed)


def _mismatch(where: str, value: Any, hint: Any) -> tuple[str, Any, Any] | None:
    """Return the place, value and annotation of a mismatch; None if the value fits."""
    options = _options(hint)
    if isinstance(value, (str, os.PathLike)) and any(_kind(option) in (Path, os.PathLike) for option in options):
        return None if path_problem(value) is None else (where, value, os.PathLike)
    problems = [_mismatch_inside(where, value, option) for option in options if _is_of_kind(value, _kind(option))]
    if not problems:
        return where, value, hint
    return None if None in problems else problems[0]


def _mismatch_inside(where: str, value: Any, hint: Any) -> tuple[str, Any, Any] | None:
    """Check the elements of a container; those of an iterator are skipped, as checking would consume them."""
    inner = get_args(hint)
    if not inner or get_origin(hint) in (Literal, type, collections.abc.Callable):
        return None
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(value, Mapping) and len(inner) == 2:
        parts = [(f"a key of {where}", key, inner[0]) for key in value]
        parts += [(f"{where}[{shown(key)}]", element, inner[-1]) for key, element in value.items()]
    elif isinstance(value, (tuple, list)):
        hints = [inner[0]] * len(value) if len(inner) == 1 or inner[1] is Ellipsis else inner
        if len(hints) != len(value):
            return where, value, hint
        parts = [(f"{where}[{i}]", element, hints[i]) for i, element in enumerate(value)]
    return next((problem for part in parts if (problem := _mismatch(*part)) is not None), None)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _kind(hint: Any) -> Any:
    """Return the class of an annotation without its element types; for a `Literal`, the class of its values."""
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    return get_origin(hint) or hint


def _is_of_kind(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind is int:
        return _is_whole(value)
    if kind is float:
        return _is_number(value)
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in LISTS and isinstance(value, NO_LISTS):
        return False
    return isinstance(value, kind)


def _is_whole(value: Any) -> bool:
    if isinstance(value, (bool, torch.Tensor, np.ndarray)) or not hasattr(type(value), "__index__"):
        return False
    return abs(operator.index(value)) <= MAX_INTEGER


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # the learning rate of an optimizer may be a tensor
        return value.ndim == 0 and value.is_floating_point() and not value.is_meta and math.isfinite(value.item())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def shown(value: Any) -> str:
    """Return what a message says of a value: itself if it is short, else its type and size."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, os.PathLike, numbers.Number)):
        text = repr(value)
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"
    name = type(value).__name__
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, (torch.Tensor, np.ndarray)) else ""
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{_with_article(name)}{shape or size}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _words(hint: Any) -> str:
    return " or ".join(dict.fromkeys(map(_word, _options(hint))))


def _word(hint: Any) -> str:
    kind, inner = _kind(hint), get_args(hint)
    if kind is tuple:
        return f"a tuple of {len(inner)}" if inner and inner[-1] is not Ellipsis else "a tuple"
    return WORDS.get(kind) or _with_article(getattr(kind, "__name__", str(kind)))


def _place(value: Any, hint: Any, values: Mapping[str, Any]) -> str:
    """Return what to write where the value is right but its place is not; empty for any other."""
    kinds = {_kind(option) for option in _options(hint)}
    networks = [other for other in values.values() if isinstance(other, nn.Module) and other is not value]
    if kinds == {nn.Module} and isinstance(value, str) and networks:
        return f"The order is ({', '.join(values)})."
    if str in kinds and isinstance(value, nn.Module):
        for network in networks:
            path = next((path for path, layer in network.named_modules() if layer is value), None)
            if path is not None:
                return f"Name the layer by its path: {path!r}."
    return ""


def _advice(value: Any, hint: Any) -> str:
    """Return what to write instead, for the most frequent mistakes; empty for any other value."""
    kinds = {_kind(option) for option in _options(hint)}
    if kinds & {int, float} and isinstance(value, str) and _is_numeral(value):
        return f"Write it without quotes: {value}."
    if {int, nn.Module} <= kinds and isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
        return f"Pass their number: {len(value)}."
    if nn.Module in kinds and (advice := _network_instead_of(value)):
        return advice
    if os.PathLike in kinds and isinstance(value, (str, os.PathLike)):
        return f"Give the path of a file: {path_problem(value)}."
    if str in kinds:
        if isinstance(value, enum.Enum):
            return f"Pass its name: {value.name!r}."
        if isinstance(value, (bytes, bytearray)):
            return "Decode it first: .decode()."
        if isinstance(value, nn.Module):
            return "Name a layer by its path, as in 'layer1.0.conv1'."
        if inspect.isroutine(value) and value.__name__ != "<lambda>":
            return f"Pass its name: {value.__name__!r}."
        if isinstance(value, bool):
            return ""
        if isinstance(value, (list, tuple, set, frozenset)):
            return "Pass strings one by one: a star takes a list apart, as in *names."
        if isinstance(value, int):
            return f"Write it in quotes: '{value}'." if abs(value) <= MAX_INTEGER else ""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return "Pass plain numbers: .item() gives one, .tolist() a list."
    return ""


def _network_instead_of(value: Any) -> str:
    if isinstance(value, type):
        return f"Make one: {value.__name__}(…)." if issubclass(value, nn.Module) else ""
    if inspect.isroutine(value):
        return f"Call it first: {value.__name__}(…)."
    if isinstance(value, (str, os.PathLike)):
        return "regraft.create_model(NAME) makes one, regraft.load(PATH) reads one."
    if isinstance(value, Mapping):
        return "A state dict holds weights alone: make its network, and give it these with load_state_dict."
    if isinstance(value, (list, tuple)):
        return "torch.nn.Sequential(*layers) makes one of layers."
    if isinstance(value, (torch.optim.Optimizer, torch.Tensor, Iterator)):
        return "Pass the network itself, not its parameters or their optimizer."
    return "Pass its network: .model." if isinstance(getattr(value, "model", None), nn.Module) else ""


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
