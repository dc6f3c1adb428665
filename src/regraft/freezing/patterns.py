"""Select layers by pattern, by the layer itself, or by its role."""

import fnmatch
import glob
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.paths import is_within, no_such_layer, paths_of
from regraft.arguments import check_arguments, shown
from regraft.errors import ArgumentError, EditError, SelectionError, nearest

Pattern = str | nn.Module | Iterable[str | nn.Module]
INDEX = re.compile(r"(.*?)\[((?:-?\d{1,9})?)(:?)((?:-?\d{1,9})?)\](?:\.(.+))?")  # owner, start, colon, stop, rest
CHILDREN, HEAD, BACKBONE = "children", "head", "backbone"
GLOB_SIGNS = frozenset("*?[")
PARAMETERS = "params:"


def select(model: nn.Module, *patterns: Pattern) -> list[str]:
    r"""Return the paths of the layers that match any of the patterns, in registration order.

    Args:
        model: Any module.
        *patterns: Each one of
            a path (`"layer1.0.conv1"`; `""` is the model itself);
            a layer itself (`model.layer1`), or a part of a list of layers (`model.features[:6]`);
            a glob over whole paths, in which `*` also crosses dots (`"layer[12].*.bn?"`);
            a regular expression that matches a whole path (`"re:layer[12]\\..*"`);
            a class name (`"type:BatchNorm2d"`), which base classes match as well;
            a slice of the top-level children (`"children[:6]"`, `"children[-1]"`) or of those of a layer
            (`"encoder.layer[:6]"`), also followed by a dot and a pattern of what is inside (`"children[6].0.conv1"`);
            `"head"`, where no layer has that path: the layers that give the outputs;
            a glob over names of parameters (`"params:*.bias"`), which stands for the layers that have them, and in
            `freeze` and `unfreeze` for those parameters alone;
            a list of any of these.

    Raises:
        ArgumentError: One is nothing of this; the message says what to write.
        SelectionError: A pattern matches nothing; the nearest names are listed.

    >>> select(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "type:Linear", "children[1:2]")
    ['0', '1', '2']
    """
    patterns = as_patterns(select, model, patterns)
    check_arguments(select, locals())
    chosen = {path for pattern in patterns for path in _matches(model, pattern)}
    return [path for path, _ in model.named_modules(remove_duplicate=False) if path in chosen]


def select_parameters(model: nn.Module, *patterns: str, inputs: Inputs | None = None) -> set[str]:
    """Return the names of the parameters in the layers that match, and of those that `params:GLOB` names.

    Of the head, these include the norms and scales that come after it.

    Raises:
        SelectionError: A pattern matches nothing.

    >>> sorted(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "0", "params:*.bias"))
    ['0.bias', '0.weight', '1.bias']
    """
    all_names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names: set[str] = set()
    for pattern in patterns:
        if pattern.startswith(PARAMETERS):
            names |= _matching_parameters(all_names, pattern)
        elif _is_role(model, pattern):
            names |= _with_heads(model, inputs).head_parameters
        else:
            layers = select(model, pattern)
            names |= {name for name in all_names if any(is_within(name, layer) for layer in layers)}
    return names


def as_patterns(
    function: Callable[..., Any], model: Any, values: Iterable[Any], name: str | None = None
) -> tuple[str, ...]:
    """Return the patterns for the arguments of a public function: strings, layers, and lists of both.

    Args:
        function: The function.
        model: Its model.
        values: The arguments.
        name: That of the only one; None: they are `patterns`.

    Raises:
        ArgumentError: One is something else; the message says what to write instead.
    """
    patterns: list[str] = []
    if not isinstance(model, nn.Module):
        return ()  # which `check_arguments` refuses
    for number, value in enumerate(values):
        where = f"{function.__name__}: {name or f'patterns[{number}]'}"
        if isinstance(value, (list, tuple, set, frozenset, Iterator)):
            listed = [pattern for item in value for pattern in _as_patterns(where, model, item)]
            if not listed:  # not everything, as of a call without patterns
                raise ArgumentError(
                    f"{where} is {shown(value)}, so it names no layer. Leave it out to take the whole model."
                )
            patterns += listed
        else:
            patterns += _as_patterns(where, model, value)
    return tuple(patterns)


def _as_patterns(where: str, model: nn.Module, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, nn.Module):
        paths = paths_of(model, value)
        if not paths and isinstance(value, (nn.Sequential, nn.ModuleList)):  # a slice of one is a list of its own
            inside = [paths_of(model, child) for child in value.children()]
            paths = [path for paths in inside for path in paths] if all(inside) else []
        if not paths:
            raise ArgumentError(
                f"{where} is {shown(value)} that is no layer of this {type(model).__name__}. Pass one of its own, as "
                "in model.layer1, or its path, as in 'layer1'."
            )
        return paths
    raise ArgumentError(f"{where} is {shown(value)}, expected a pattern, a layer or a list. {_advice(model, value)}")


def _advice(model: nn.Module, value: Any) -> str:
    """Return what to write instead of a value that is no pattern."""
    if isinstance(value, nn.Parameter):
        name = next((name for name, parameter in model.named_parameters() if parameter is value), None)
        if name is None:
            return f"It is no parameter of this {type(model).__name__}."
        owner = name.rpartition(".")[0]
        whole = f", or '{owner}' for its layer" if owner else ""
        return (
            f"Write '{PARAMETERS}{glob.escape(name)}' for it alone{whole}. For all of a layer's parameters, pass the "
            "layer itself, without .parameters()."
        )
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return "Pass the names alone: [name for name, _ in …]."
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"Write 'type:{value.__name__}' for all layers of that class."
    if isinstance(value, int) and not isinstance(value, bool):
        one = f"'{CHILDREN}[{value}]' for that top-level layer alone"
        first = f"the first {value}" if value > 0 else f"all but the last {-value}"
        return f"Write {one}, '{CHILDREN}[:{value}]' for {first}." if value else f"Write {one}."
    if isinstance(value, slice):
        start, stop = ("" if end is None else end for end in (value.start, value.stop))
        return f"Write '{CHILDREN}[{start}:{stop}]' for these top-level layers."
    if value is None:
        return "Leave it out to take the whole model."
    if isinstance(value, (bytes, bytearray)):
        return "Decode it first: .decode()."
    if callable(value):
        return "Call it on the names first: [name for name, layer in model.named_modules() if …]."
    return "help(regraft.select) lists all forms."


def _is_role(model: nn.Module, pattern: str) -> bool:
    """Return whether a pattern means the heads, as no layer has that path."""
    return pattern == HEAD and HEAD not in dict(model.named_modules(remove_duplicate=False))


def _with_heads(model: nn.Module, inputs: Inputs | None = None) -> ModelFacts:
    facts = ModelFacts(model, inputs)
    try:
        heads = facts.heads
    except EditError as error:
        raise SelectionError(f"'{HEAD}' selects nothing: {error}") from error
    if not heads:
        raise SelectionError(no_such_layer(model, HEAD))
    return facts


def _matching_parameters(all_names: list[str], pattern: str) -> set[str]:
    wanted = pattern.removeprefix(PARAMETERS)
    names = {name for name in all_names if fnmatch.fnmatchcase(name, wanted)}
    if not names:
        raise SelectionError(f"no parameter matches '{pattern}'. {nearest(wanted, all_names)}".rstrip())
    return names


def _matches(model: nn.Module, pattern: str, *, has_roles: bool = True) -> list[str]:
    """Return the paths of the layers that one pattern selects; inside of a layer, nothing has a role.

    Raises:
        SelectionError: There are none.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    if pattern in layers:
        return [pattern]
    if pattern.startswith(PARAMETERS):
        return [
            name.rpartition(".")[0] for name in _matching_parameters([n for n, _ in model.named_parameters()], pattern)
        ]
    if pattern.startswith("type:"):
        return _of_type(layers, pattern.removeprefix("type:"))
    if pattern == HEAD and has_roles:  # a head that is a bare parameter stands for the layer that has it
        heads = [head.path for head in _with_heads(model).heads]
        return [path if path in layers else path.rpartition(".")[0] for path in heads]
    indexed = INDEX.fullmatch(pattern)
    if indexed is not None and _is_index(layers, indexed):
        return _children(model, pattern, indexed)
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise SelectionError(f"'{pattern}' is not a regular expression: {error}.") from error
        paths = [path for path in layers if expression.fullmatch(path)]
    elif GLOB_SIGNS & set(pattern):
        paths = [path for path in layers if path and fnmatch.fnmatchcase(path, pattern)]
    else:
        paths = []
    if not paths and pattern == BACKBONE:
        raise SelectionError(
            f"no layer '{BACKBONE}' in {type(model).__name__}. For all but the head, write freeze(model), then "
            f"unfreeze(model, '{HEAD}')."
        )
    if not paths:
        raise SelectionError(no_such_layer(model, pattern))
    return paths


def _of_type(layers: dict[str, nn.Module], name: str) -> list[str]:
    paths = [path for path, layer in layers.items() if name in {base.__name__ for base in type(layer).__mro__}]
    if not paths:
        kinds = sorted({type(layer).__name__ for layer in layers.values()})
        hint = nearest(name, kinds) or f"Its types: {', '.join(kinds)}."
        raise SelectionError(f"no layer of type '{name}'. {hint}")
    return paths


def _is_index(layers: dict[str, nn.Module], indexed: re.Match[str]) -> bool:
    """Return whether it takes children of the model or of a layer; `layer[12]` is a glob."""
    owner, colon = indexed.group(1), indexed.group(3)
    return owner == CHILDREN or (owner.removesuffix(f".{CHILDREN}") in layers and (bool(colon) or owner not in layers))


def _children(model: nn.Module, pattern: str, indexed: re.Match[str]) -> list[str]:
    owner, start, colon, stop, rest = indexed.groups()
    owner = "" if owner == CHILDREN else owner.removesuffix(f".{CHILDREN}")
    layer = model.get_submodule(owner)
    names = [name for name, _ in layer.named_children()]
    if colon:
        chosen = names[int(start) if start else None : int(stop) if stop else None]
    else:
        chosen = names[int(start) :][:1] if start and -len(names) <= int(start) < len(names) else []
    if not chosen:
        where = f"'{owner}'" if owner else type(model).__name__
        kind = "children" if owner else "top-level children"
        raise SelectionError(f"'{pattern}' selects nothing: {where} has {len(names)} {kind}: {', '.join(names)}.")
    children = [f"{owner}.{name}".lstrip(".") for name in chosen]
    if rest is None:
        return children
    paths, problem = [], None
    for path in children:
        try:
            paths += [
                f"{path}.{inner}".rstrip(".") for inner in _matches(model.get_submodule(path), rest, has_roles=False)
            ]
        except SelectionError as error:
            problem = SelectionError(f"'{pattern}' selects nothing: {error}")
    if not paths and problem is not None:
        raise problem
    return paths
