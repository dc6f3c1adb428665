"""Make the back of a network a network of its own: a graph whose inputs are values from its middle."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from regraft.anatomy.dataflow.graph import Flow, is_size, live_across_cut, reachable, tidy
from regraft.anatomy.dataflow.values import BATCHES, Sizes, compute_values, sizes_of, value_key
from regraft.anatomy.inputs import Inputs, arguments_for
from regraft.errors import EditError, ModelError
from regraft.surgery.edits import calls_within, crossed, layers_to_trace
from regraft.surgery.rewired import EditedModule, prune, rewire


def tail(model: nn.Module, after: str, *, inputs: Inputs | None = None) -> EditedModule:
    """Return the part of `model` after a layer as a network whose one input is that layer's output.

    Sizes that the forward reads before the cut become constants, so the result is valid for that size of images only.

    Raises:
        EditError: A skip connection crosses the cut, or the forward cannot be traced. Nothing was changed.
    """
    sizes: list[Sizes] = []

    def change(flow: Flow) -> None:
        module_calls = calls_within(flow, after)
        value = module_calls[-1].output if module_calls else None
        if not isinstance(value, fx.Node):
            raise EditError(f"cannot begin after '{after}': it gives no single tensor. Nothing was changed.")
        over = live_across_cut(flow.graph, [value])
        if over:
            raise EditError(crossed(flow, after, [value], over, has_choice=False))
        if not sizes:  # those of evaluation mode hold for training mode as well
            sizes.append(sizes_of(flow.graph, [compute_values(model, flow, count) for count in BATCHES]))
        begin_at(flow.graph, [value_key(value)], sizes[0], model.get_submodule)

    try:
        back = rewire(
            model, layers_to_trace(model, after), change, closed=after, arguments=arguments_for(model, inputs=inputs)
        )
    except ModelError as error:
        raise EditError(f"cannot begin after '{after}': {str(error).rstrip('.')}. Nothing was changed.") from error
    prune(back)
    return back


def begin_at(
    graph: fx.Graph,
    keys: Sequence[str],
    sizes: Sizes,
    layer_of: Callable[[str], nn.Module],
    counts: Sequence[int] | None = None,
    rebuild: Callable[[fx.Graph, int, Callable[[], fx.Node]], Any] | None = None,
) -> None:
    """Make values from the middle of a graph its inputs, and erase the nodes before them, in place.

    Args:
        graph: Is changed.
        keys: Keys of the values, see `value_key`. A key that the graph lacks becomes an input that it does not use.
        sizes: The sizes that the graph reads, see `sizes_of`. Those read from erased values become constants, except
            the size of the batch.
        layer_of: Returns the layer at a path.
        counts: Number of tensors in each value, all of which become inputs; None: one each.
        rebuild: Builds the value at a position from its tensors, which it takes one by one.

    Raises:
        ModelError: The rest needs other values as well.
    """
    known: dict[str, list[fx.Node]] = {}  # a layer that is called twice on the same gives the same key twice
    for node in graph.nodes:
        known.setdefault(value_key(node), []).append(node)
    olds = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        news = [graph.placeholder(f"value_{position}") for position in range(sum(counts or [1] * len(keys)))]
    coming = iter(news)
    for position, key in enumerate(keys):
        with graph.inserting_before(first):
            new = rebuild(graph, position, lambda: next(coming)) if rebuild else next(coming)
        for node in known.get(key, ()):
            _replace(node, new)
    _write_sizes(graph, sizes, news[0])
    tidy(graph, layer_of, effects_of=reachable(news, lambda node: node.users))
    for old in olds:
        if old.users:
            raise ModelError(f"what comes after the cut needs the input '{old.name}' itself as well.")
        graph.erase_node(old)


def _replace(old: fx.Node, new: Any) -> None:
    """Replace a value in all its users; unlike with `replace_all_uses_with`, `new` may be a container of values."""
    for user in list(old.users):
        user.args = map_arg(user.args, lambda node: new if node is old else node)
        user.kwargs = map_arg(user.kwargs, lambda node: new if node is old else node)


def _write_sizes(graph: fx.Graph, sizes: Sizes, batch: fx.Node) -> None:
    """Replace sizes that were read before the cut by constants; that of the batch is read from the new input."""
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
                parts = [_size(graph, *pair, batch) for pair in zip(small, large, strict=True)]
                new = graph.call_function(tuple, (parts,))
            else:
                part = _size(graph, small, large, batch)
                new = part if isinstance(part, fx.Node) else graph.call_function(int, (part,))
        node.replace_all_uses_with(new)


def _size(graph: fx.Graph, small: int, large: int, batch: fx.Node) -> Any:
    """Return a size that was `small` and `large` for `BATCHES`: a number, or a node that follows the batch.

    Raises:
        ModelError: It is no multiple of the batch.
    """
    if small == large:
        return small
    if small % BATCHES[0] or large % BATCHES[1] or small // BATCHES[0] != large // BATCHES[1]:
        raise ModelError("its forward computes sizes from the number of images in a batch.")
    count = graph.call_method("size", (batch, 0))
    factor = small // BATCHES[0]
    return count if factor == 1 else graph.call_function(operator.mul, (count, factor))
