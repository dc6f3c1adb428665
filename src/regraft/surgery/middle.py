"""Begin a graph in its middle: with values that something else has computed."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.graph import is_size, tidy
from regraft.anatomy.values import BATCHES, Sizes, value_key
from regraft.errors import ModelError


def begin_at(graph: fx.Graph, keys: Sequence[str], sizes: Sizes, layer_of: Callable[[str], nn.Module]) -> None:
    """Let a graph take values from its middle as its inputs, and erase what came before, in place.

    Args:
        graph: Is changed.
        keys: Of the values, see `value_key`; one that the graph lacks becomes an input that it does not use.
        sizes: What the sizes are that the graph reads, see `sizes_of`: those read from what is erased are written in as
            numbers, but for that of the batch.
        layer_of: Returns the layer at a path.

    Raises:
        ModelError: The rest needs other values as well.
    """
    found = {value_key(node): node for node in graph.nodes}
    olds = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(next(iter(graph.nodes))):
        news = [graph.placeholder(f"value_{position}") for position in range(len(keys))]
    for key, new in zip(keys, news, strict=True):
        if key in found:
            found[key].replace_all_uses_with(new)
    _settle_sizes(graph, sizes, news[0])
    tidy(graph, layer_of, effects_of=_descendants(news))
    for old in olds:
        if old.users:
            raise ModelError(f"what comes after the cut needs the input '{old.name}' itself as well.")
        graph.erase_node(old)


def _descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    found, waiting = set(nodes), list(nodes)
    while waiting:
        fresh = [user for user in waiting.pop().users if user not in found]
        found.update(fresh)
        waiting += fresh
    return found


def _settle_sizes(graph: fx.Graph, sizes: Sizes, batch: fx.Node) -> None:
    """Write numbers in the place of sizes that were read before the cut; only that of the batch stays open."""
    for node in list(graph.nodes):
        if not is_size(node) or value_key(node) not in sizes:
            continue
        small, large = sizes[value_key(node)]
        with graph.inserting_before(node):
            if isinstance(small, torch.device):
                new = graph.call_function(getattr, (batch, "device"))
            elif not isinstance(small, (int, torch.Size)):
                continue
            elif isinstance(small, torch.Size):
                parts = [_size(graph, one, other, batch) for one, other in zip(small, large, strict=True)]
                new = graph.call_function(tuple, (parts,))
            else:
                part = _size(graph, small, large, batch)
                new = part if isinstance(part, fx.Node) else graph.call_function(int, (part,))
        node.replace_all_uses_with(new)


def _size(graph: fx.Graph, small: int, large: int, batch: fx.Node) -> Any:
    if small == large:
        return small
    if small % BATCHES[0] or large % BATCHES[1] or small // BATCHES[0] != large // BATCHES[1]:
        raise ModelError("its forward computes sizes from the number of images in a batch.")
    count = graph.call_method("size", (batch, 0))
    factor = small // BATCHES[0]
    return count if factor == 1 else graph.call_function(operator.mul, (count, factor))
