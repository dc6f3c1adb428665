"""The tensors in a value: of a list, tuple or dict of features, those that can be kept image by image."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.anatomy.dataflow.values import BATCHES, Values

Step = int | str


@dataclass(frozen=True)
class Port:
    """One tensor in a value: how to get at it, its shape for one image, and its type."""

    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def ports_of(node: fx.Node, values: Sequence[Values]) -> list[Port] | None:
    """List the tensors in a value; None where it cannot be kept image by image.

    Lists, tuples and mappings are looked through. Tensors need one row for each image; plain values, such as the number
    of patches in a column, have to be the same for every batch, and are written in where they are used.

    Args:
        node: The value.
        values: All values for either of `BATCHES`.
    """
    return _ports(values[0].get(node), values[1].get(node), ())


def picked(graph: fx.Graph, node: fx.Node, steps: Sequence[Step]) -> fx.Node:
    """Return one tensor in a value, as a node at the end of the graph."""
    with graph.inserting_before(graph.output_node()):
        for step in steps:
            node = graph.call_function(operator.getitem, (node, step))
    return node


def rebuilt(graph: fx.Graph, value: Any, tensors: Callable[[], fx.Node]) -> Any:
    """Return a value like another one with nodes in the place of its tensors, in the order of `ports_of`.

    Nodes are made where the graph inserts. Lists, tuples and dicts become such of nodes; of another class of mapping or
    a named tuple, a call of it.
    """
    if isinstance(value, torch.Tensor):
        return tensors()
    if isinstance(value, Mapping):
        items = {key: rebuilt(graph, one, tensors) for key, one in value.items()}
        return items if type(value) is dict else graph.call_function(type(value), (items,))
    if isinstance(value, (list, tuple)):
        parts = [rebuilt(graph, one, tensors) for one in value]
        if hasattr(value, "_fields"):
            return graph.call_function(type(value), tuple(parts))
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _ports(small: Any, large: Any, steps: tuple[Step, ...]) -> list[Port] | None:
    if isinstance(small, torch.Tensor) and isinstance(large, torch.Tensor):
        is_batched = (
            small.ndim > 0 and (small.shape[0], large.shape[0]) == BATCHES and small.shape[1:] == large.shape[1:]
        )
        return [Port(steps, tuple(small.shape[1:]), small.dtype)] if is_batched else None
    if type(small) is not type(large):
        return None
    if isinstance(small, Mapping):
        if list(small) != list(large) or not all(isinstance(key, (int, str)) for key in small):
            return None
        return _joined([_ports(small[key], large[key], (*steps, key)) for key in small])
    if isinstance(small, (list, tuple)):
        if len(small) != len(large):
            return None
        pairs = enumerate(zip(small, large, strict=True))
        return _joined([_ports(a, b, (*steps, position)) for position, (a, b) in pairs])
    is_plain = small is None or isinstance(small, (bool, int, float, str))
    return [] if is_plain and small == large else None


def _joined(parts: list[list[Port] | None]) -> list[Port] | None:
    ports = [part for part in parts if part is not None]
    return [port for part in ports for port in part] if len(ports) == len(parts) else None
