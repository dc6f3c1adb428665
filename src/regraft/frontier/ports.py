"""The tensors inside a value: lists, tuples and dicts of features, which are cached image by image."""

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
    """One tensor in a value: the keys and indices that lead to it, its shape for one image, and its dtype."""

    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def ports_of(node: fx.Node, values: Sequence[Values]) -> list[Port] | None:
    """List the tensors in a value; None where it cannot be cached image by image.

    Lists, tuples and mappings are searched. Tensors need one row for each image. Plain values, such as the number of
    patches in a column, must be the same for every batch, and become constants where they are used.

    Args:
        node: The value.
        values: The values of all nodes, for each of `BATCHES`.
    """
    return _ports(values[0].get(node), values[1].get(node), ())


def pick_tensor(graph: fx.Graph, node: fx.Node, steps: Sequence[Step]) -> fx.Node:
    """Add the node of one tensor in a value at the end of the graph, and return it."""
    with graph.inserting_before(graph.output_node()):
        for step in steps:
            node = graph.call_function(operator.getitem, (node, step))
    return node


def rebuild_value(graph: fx.Graph, value: Any, tensors: Callable[[], fx.Node]) -> Any:
    """Return the structure of a value with nodes in place of its tensors, in the order of `ports_of`.

    Nodes are made at the graph's insertion point. Lists, tuples and dicts become those of nodes; a named tuple or
    another class of mapping becomes a call of its class.
    """
    if isinstance(value, torch.Tensor):
        return tensors()
    if isinstance(value, Mapping):
        items = {key: rebuild_value(graph, item, tensors) for key, item in value.items()}
        return items if type(value) is dict else graph.call_function(type(value), (items,))
    if isinstance(value, (list, tuple)):
        parts = [rebuild_value(graph, item, tensors) for item in value]
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
