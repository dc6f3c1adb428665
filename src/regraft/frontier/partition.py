"""Split a network where its constant part ends: what comes before is computed once, what comes after in every epoch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.graph import LAYER, Flow, capture, capture_widely, tensors_from_input
from regraft.anatomy.tracing import trace
from regraft.anatomy.values import BATCHES, Values, compute_costs, sizes_of, value_key
from regraft.arguments import check_arguments
from regraft.errors import EditError, ModelError
from regraft.frontier.liveness import live_nodes, mixed_layers
from regraft.frontier.replay import record_and_replay
from regraft.surgery.checks import require_editable
from regraft.surgery.middle import begin_at
from regraft.surgery.rewired import Rewired, prune, rewire, rewire_flows

READ_BYTES_PER_S = {"cpu": 2e9, "cuda": 2e11}  # of cached tensors into a batch
MULTIPLY_ADDS_PER_S = {"cpu": 2e10, "cuda": 5e12}


@dataclass(frozen=True)
class Cut:
    """One tensor that passes from the constant to the live part.

    Attributes:
        name: Its name in the graph.
        layer: Path of the layer that gives it, or in whose forward it is computed; empty for the network's own.
        shape: Its shape for one image, without the batch.
        dtype: Its type.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def place(self) -> str:
        """Where it is computed, in words."""
        return f"'{self.layer}'" if self.layer else f"'{self.name}' in its forward"

    @property
    def bytes(self) -> int:
        """Bytes for one image."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Partition:
    """A network in two parts that share its weights: `suffix(*prefix(x))` is what the network gives.

    Attributes:
        prefix: The constant part: from the inputs to the tuple of the frontier's tensors. In evaluation mode.
        suffix: The live part: from those tensors to the network's output, in either mode.
        frontier: The tensors between them.
        multiply_adds: Of the constant and of the live part, for one image.
        note: Why the cut lies elsewhere than where the constant part ends; None where it does not.
    """

    prefix: nn.Module
    suffix: nn.Module
    frontier: tuple[Cut, ...]
    multiply_adds: tuple[int, int]
    note: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the frontier for one image."""
        return sum(cut.bytes for cut in self.frontier)

    def __str__(self) -> str:
        constant, live = self.multiply_adds
        tensors = ", ".join(f"{cut.place} {cut.shape}" for cut in self.frontier)
        line = (
            f"{constant / max(constant + live, 1):.1%} of the multiply-adds are constant; the frontier is {tensors}, "
            f"{self.bytes / 1024:.1f} KiB an image"
        )
        return f"{line} ({self.note})" if self.note else line


def partition(model: nn.Module, example: Any) -> Partition:
    """Split `model` by what its flags say: the part that is the same in every epoch, and the part that is not.

    Live is what holds a trainable parameter, or draws at random or follows its batch while it trains (dropout,
    stochastic depth, batch norm), unless it is pinned as `freeze` does; and all that depends on it. Any pattern of
    flags is followed through skip connections and branches. Where an earlier tensor is so much smaller than the
    frontier that reading it and computing the rest again costs less, the cut is made there.

    A forward that cannot be traced is recorded up to its first live top-level layer and replayed from there, where it
    takes nothing else from before.

    Args:
        model: Any module.
        example: One input (N, …), or a tuple of inputs. Only shapes and dtypes count; the cut holds for this shape.

    Raises:
        ModelError: The forward can neither be traced nor replayed, or mixes images of a batch with one another.
        EditError: Nothing is constant, or nothing is live. Nothing was changed.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> parts = partition(model, torch.zeros(1, 8))
    >>> [cut.layer for cut in parts.frontier]
    ['1']
    """
    check_arguments(partition, locals())
    require_editable(model)
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, torch.Tensor) and x.ndim for x in inputs):
        raise ModelError(f"the example is a {type(example).__name__}, expected a tensor (N, …), or a tuple of tensors.")
    try:
        view = view_of(model)
    except ModelError as error:
        return _untraced(model, inputs, error)
    frontier = _frontier(view, model)
    if not frontier:
        raise EditError("nothing of this network is live, so there is nothing to train. Thaw a layer.")
    if all(node.op == "placeholder" for node in frontier):
        raise EditError("nothing of this network is constant: its first layers are trained or random.")
    try:
        values, costs = compute_costs(model, view.flow, inputs)
    except Exception as error:
        trace(model, inputs=inputs)  # which says in which layer, where the network itself does not take the example
        raise ModelError(
            f"{type(model).__name__} takes the example, but no batches of other lengths: {error}. Pass one with the "
            "batch first, (N, …)."
        ) from error
    chosen, note = _cheapest(model, view, frontier, values, costs)
    spent = _spent(chosen, costs)
    return Partition(
        prefix=_prefix(model, view, chosen).eval(),
        suffix=_suffix(model, view, chosen, values),
        frontier=tuple(_cut(node, values) for node in chosen),
        multiply_adds=(spent, sum(costs.values()) - spent),
        note=note,
    )


def _untraced(model: nn.Module, inputs: tuple[Any, ...], error: ModelError) -> Partition:
    """Split a network whose forward cannot be traced, before its first live top-level layer."""
    try:
        prefix, suffix, boundary = record_and_replay(model, inputs)
    except ModelError as second:
        raise ModelError(f"{str(error).rstrip('.')}. Nor can it be recorded and replayed: {second}") from error
    except Exception:
        trace(model, inputs=inputs)  # which says in which layer, where the network itself does not take the example
        raise
    cuts = tuple(
        Cut(f"given_{position}", boundary.layer, shape, dtype)
        for position, (shape, dtype) in enumerate(zip(boundary.shapes, boundary.dtypes, strict=True))
    )
    calls = trace(model, inputs=tuple(x[:1] for x in inputs)).calls
    total = next(call.multiply_adds for call in calls if call.path == "")
    spent = sum(call.multiply_adds for call in calls if call.path in boundary.asleep)
    note = f"what '{boundary.layer}' is given is recorded, as the forward cannot be traced"
    return Partition(prefix, suffix, cuts, (spent, max(0, total - spent)), note)


@dataclass(frozen=True)
class View:
    """A model's dataflow while it trains, and in evaluation where that differs; with the layers that were opened."""

    opened: tuple[str, ...]
    flow: Flow
    evaluation: Flow | None


def view_of(model: nn.Module) -> View:
    """Trace `model`, looking into as many of its mixed layers as can be traced.

    Raises:
        ModelError: Not even the model's own forward can be traced.
    """
    flow, opened = capture_widely(model, mixed_layers(model), training=True, heed_pins=True)
    return View(opened, flow, capture(model, opened, heed_pins=True) if flow.decider is not None else None)


def _frontier(view: View, model: nn.Module) -> list[fx.Node]:
    """List the constant values that live ones are computed from, in the graph of training mode."""
    known = {value_key(node): node for node in view.flow.graph.nodes}
    wanted: set[fx.Node] = set()
    for flow in (view.flow, view.evaluation or view.flow):
        live, fed = live_nodes(flow, model), tensors_from_input(flow.graph)
        for node in flow.graph.nodes:
            if node not in live:
                continue
            for source in node.all_input_nodes:
                if source in fed and source not in live:
                    if value_key(source) not in known:
                        raise ModelError("its forward computes other constant values in evaluation than in training.")
                    wanted.add(known[value_key(source)])
    return [node for node in view.flow.graph.nodes if node in wanted]


def _cheapest(
    model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values], costs: dict[fx.Node, int]
) -> tuple[list[fx.Node], str | None]:
    """Choose between the frontier and single tensors before it, by seconds for reading and for computing again."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    read, compute = READ_BYTES_PER_S.get(device, 2e9), MULTIPLY_ADDS_PER_S.get(device, 2e10)
    is_usable = all(_is_batched(node, values) for node in frontier)
    size = sum(_cut(node, values).bytes for node in frontier) if is_usable else math.inf
    best, best_seconds, note = frontier if is_usable else [], size / read, None
    full = _spent(frontier, costs)
    least = size
    for node in _gates(view.flow.graph, frontier):
        if not _is_batched(node, values) or _cut(node, values).bytes >= 0.9 * least:
            continue
        least = _cut(node, values).bytes
        again = full - _spent([node], costs)
        seconds = least / read + again / compute
        if seconds < best_seconds:
            best, best_seconds = [node], seconds
            note = (
                f"cut earlier, after '{_layer(node)}': {least / 1024:.1f} instead of {size / 1024:.1f} KiB an image, "
                f"for {again:,} multiply-adds computed again"
                if is_usable
                else f"cut earlier, after '{_layer(node)}', as images are mixed where the constant part ends"
            )
    if not best:
        raise ModelError("its forward mixes the images of a batch with one another, so none can be kept apart.")
    return best, note


def _spent(values: list[fx.Node], costs: dict[fx.Node, int]) -> int:
    """Add up the multiply-adds of all that some values are computed from, and of these."""
    return sum(costs[node] for node in _ancestors(values, costs))


def _ancestors(values: list[fx.Node], among: Collection[fx.Node]) -> set[fx.Node]:
    """Return some values and all that they are computed from, among those."""
    found: set[fx.Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node in among and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _gates(graph: fx.Graph, frontier: list[fx.Node]) -> list[fx.Node]:
    """List the tensors that all paths from the inputs to the frontier go through, from the last to the first."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    needed = _ancestors(frontier, tensors_from_input(graph))
    found: list[fx.Node] = []
    reach = -1  # position of the last use of what came before
    for node in (node for node in graph.nodes if node in needed):
        if reach <= order[node] and node.op != "placeholder":
            found.append(node)
        uses = [order[user] for user in node.users if user in needed]
        reach = len(order) if node in frontier else max([reach, *uses])
    return [node for node in reversed(found) if node not in frontier]


def _prefix(model: nn.Module, view: View, frontier: list[fx.Node]) -> Rewired:
    keys = [value_key(node) for node in frontier]

    def change(flow: Flow) -> None:
        found = {value_key(node): node for node in flow.graph.nodes}
        flow.set_output(tuple(found[key] for key in keys))

    prefix = rewire_flows(model, [capture(model, view.opened, training=True, heed_pins=True)], change)
    prune(prefix)
    return prefix


def _suffix(model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values]) -> Rewired:
    keys, sizes = [value_key(node) for node in frontier], sizes_of(view.flow.graph, values)
    suffix = rewire(
        model, view.opened, lambda flow: begin_at(flow.graph, keys, sizes, model.get_submodule), heed_pins=True
    )
    prune(suffix)
    return suffix


def _is_batched(node: fx.Node, values: list[Values]) -> bool:
    """Say whether a value is one tensor whose first dimension is the batch, and no other."""
    small, large = values[0].get(node), values[1].get(node)
    if not (isinstance(small, torch.Tensor) and isinstance(large, torch.Tensor)) or small.ndim == 0:
        return False
    return (small.shape[0], large.shape[0]) == BATCHES and small.shape[1:] == large.shape[1:]


def _cut(node: fx.Node, values: list[Values]) -> Cut:
    value = values[0][node]
    return Cut(node.name, _layer(node), tuple(value.shape[1:]), value.dtype)


def _layer(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.meta.get(LAYER, "")
