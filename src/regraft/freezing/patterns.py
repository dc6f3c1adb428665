"""Select layers by pattern."""

import fnmatch
import re

from torch import nn

from regraft.anatomy.paths import is_within, no_such_layer
from regraft.arguments import check_arguments
from regraft.errors import SelectionError, nearest

CHILDREN = re.compile(r"children\[(-?\d*)(:?)(-?\d*)\]")
GLOB_SIGNS = frozenset("*?[")
PARAMETERS = "params:"


def select(model: nn.Module, *patterns: str) -> list[str]:
    r"""Return the paths of the layers that match any of the patterns, in registration order.

    Args:
        model: Any module.
        *patterns: Each one of
            a path (`"layer1.0.conv1"`; `""` is the model itself);
            a glob over whole paths, in which `*` also crosses dots (`"layer[12].*.bn?"`);
            a regular expression that matches a whole path (`"re:layer[12]\\..*"`);
            a class name (`"type:BatchNorm2d"`), which base classes match as well;
            a slice of the top-level children (`"children[:6]"`, `"children[-1]"`);
            a glob over names of parameters (`"params:*.bias"`), which stands for the layers that have them, and in
            `freeze` and `unfreeze` for those parameters alone.

    Raises:
        SelectionError: A pattern matches nothing; the nearest names are listed.

    >>> select(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "type:Linear", "children[1:2]")
    ['0', '1', '2']
    """
    check_arguments(select, locals())
    chosen = {path for pattern in patterns for path in _matches(model, pattern)}
    return [path for path, _ in model.named_modules(remove_duplicate=False) if path in chosen]


def select_parameters(model: nn.Module, *patterns: str) -> set[str]:
    """Return the names of the parameters in the layers that match, and of those that `params:GLOB` names.

    Raises:
        SelectionError: A pattern matches nothing.

    >>> sorted(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "0", "params:*.bias"))
    ['0.bias', '0.weight', '1.bias']
    """
    all_names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    layers = select(model, *(pattern for pattern in patterns if not pattern.startswith(PARAMETERS)))
    names = {name for name in all_names if any(is_within(name, layer) for layer in layers)}
    for pattern in patterns:
        if pattern.startswith(PARAMETERS):
            names |= _matching_parameters(all_names, pattern)
    return names


def _matching_parameters(all_names: list[str], pattern: str) -> set[str]:
    glob = pattern.removeprefix(PARAMETERS)
    names = {name for name in all_names if fnmatch.fnmatchcase(name, glob)}
    if not names:
        raise SelectionError(f"no parameter matches '{pattern}'. {nearest(glob, all_names)}".rstrip())
    return names


def _matches(model: nn.Module, pattern: str) -> list[str]:
    """Return the paths of the layers that one pattern selects.

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
    if (children := CHILDREN.fullmatch(pattern)) is not None:
        return _children(model, pattern, children)
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


def _children(model: nn.Module, pattern: str, match: re.Match[str]) -> list[str]:
    names = [name for name, _ in model.named_children()]
    start, colon, stop = match.groups()
    if colon:
        children = names[int(start) if start else None : int(stop) if stop else None]
    else:
        children = names[int(start) :][:1] if start and -len(names) <= int(start) < len(names) else []
    if not children:
        raise SelectionError(
            f"'{pattern}' selects nothing: {type(model).__name__} has {len(names)} top-level children: "
            f"{', '.join(names)}."
        )
    return children
