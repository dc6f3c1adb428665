"""Split a network into a constant part, computed once per image, and a live part, computed in every epoch.

    x ─► stem ─► block1 ─┬─► block2 ─► block3* ─► add ─► head*          * holds trainable parameters
                         └──────── skip ───────────┘
    constant: stem, block1, block2         live: block3, add, head
    frontier: {block2, block1}             block3 reads block2, and add reads block1

The network is traced to a dataflow graph (torch.fx). A value is live if it is random, reads a trainable parameter, or
reads a live value (see `liveness`). The frontier is the set of constant values that live values read, so any pattern of
flags works, across skip connections and branches. Splitting a list of layers at one point, as with nn.Sequential, would
lose the skip connection and every operation written in a forward.

Flags and graph do not tell everything: values before the frontier are also computed on random inputs, and those that
depend on more than their image are live too (see `independence`). Where an earlier tensor is so small that reading it
and computing the rest again costs less, the cut moves there: above, perhaps to block1 alone. Only single tensors on
every path are considered; a minimum cut over all sets could save more, for a harder search.

Both parts are edited copies of the graph with the network's weights. A forward that cannot be traced is recorded and
replayed instead (see `replay`), which allows a single cut, at the inputs of one layer.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.dataflow.graph import LAYER, Flow, capture, capture_widely, reachable, tensors_from_input
from regraft.anatomy.dataflow.symbolic import bound
from regraft.anatomy.dataflow.values import Values, compute_costs, sizes_of, value_key
from regraft.anatomy.inputs import Arguments, example_arguments
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.display import block
from regraft.errors import EditError, ModelError
from regraft.frontier.independence import dependent_values
from regraft.frontier.liveness import live_nodes, mixed_layers
from regraft.frontier.ports import pick_tensor, ports_of, rebuild_value
from regraft.frontier.replay import record_and_replay
from regraft.surgery.checks import require_editable
from regraft.surgery.rewired import EditedModule, prune, rewire_flows
from regraft.surgery.tail import begin_at

# Bytes from cached tensors into a batch, and multiply-adds, per second. Not measured in each run: the cut is in the key
# of the cache and decides the bits. In 60 processes beside a busy one (2 cores of an AMD EPYC), 512 KiB of rows were
# gathered at 0.8 to 9.1 GB/s, and a product of 7 million ran at 29 to 46 G/s: no rounding makes such ratios equal.
RATES = {"cpu": (2e9, 2e10), "cuda": (2e11, 5e12)}


@dataclass(frozen=True)
class Cut:
    """One tensor that passes from the constant to the live part.

    Attributes:
        name: Name in the graph.
        layer: Path of the layer that returns it, or whose forward computes it; empty for the network's own forward.
        shape: Shape for one image, without the batch dimension.
        dtype: Data type.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def place(self) -> str:
        """The layer or value that computes it, as text."""
        return f"'{self.layer}'" if self.layer else f"'{self.name}' in its forward"

    @property
    def bytes(self) -> int:
        """Bytes for one image."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, repr=False)
class Partition:
    """A network in two parts that share its weights: `suffix(*prefix(x))` equals the network's output.

    Both parts are plain modules: on unsuitable inputs they raise torch's own errors, as the network itself does.

    Attributes:
        prefix: The constant part, from the inputs to the tuple of the frontier's tensors. In evaluation mode.
        suffix: The live part, from those tensors to the network's output, in either mode.
        frontier: The tensors between them.
        multiply_adds: Of the constant and of the live part, for one image.
        note: Why the cut is not at the end of the constant part; None where it is.
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

    def __repr__(self) -> str:
        return block(f"Partition: {self}", [])

    def __str__(self) -> str:
        constant, live = self.multiply_adds
        tensors = ", ".join(f"{cut.place} {cut.shape}" for cut in self.frontier)
        line = (
            f"{constant / max(constant + live, 1):.1%} of the multiply-adds are constant; the frontier is {tensors}, "
            f"{self.bytes / 1024:.1f} KiB an image"
        )
        return f"{line} ({self.note})" if self.note else line


class NothingConstantError(EditError):
    """All of the network is live."""


@dataclass(frozen=True)
class View:
    """A model's dataflow.

    Attributes:
        closed: Layers that are live in part and cannot be traced; the graph has them as one node.
        flow: In training mode.
        evaluation: In evaluation mode; None where it is the same.
    """

    closed: tuple[str, ...]
    flow: Flow
    evaluation: Flow | None


def partition(model: nn.Module, example: Any) -> Partition:
    """Split `model` by its `requires_grad` flags: the part that is the same in every epoch, and the rest.

    A layer is live if it holds a trainable parameter, or if it is random or depends on its batch in training mode
    (dropout, stochastic depth, batch norm) and is not pinned as by `freeze`; so is everything computed from it. Any
    pattern of flags is followed through skip connections and branches. The constant part is also run on a few random
    inputs: a value that differs for the same image, when it is repeated or beside other images, is live too. Where an
    earlier tensor is so small that reading it and computing the rest again costs less, the cut is made there.

    Of a list, tuple or dict that a layer returns, the frontier is the tensors in it. A forward that cannot be traced is
    recorded up to its first live layer and replayed from there, if it uses nothing else from before that layer.

    Args:
        model: Any module.
        example: One input (N, …), a tuple of positional inputs, or a dict of keyword inputs, as the forward takes them;
            the first dimension of the first tensor is that of images. Of floating-point tensors only shape and dtype
            matter. The cut is valid for this shape, and the parts take the same inputs as this example.

    Raises:
        ModelError: The forward does not accept the example, can neither be traced nor replayed, or its live part needs
            an input that has no row for each image.
        EditError: Nothing is constant, or nothing is live. Nothing was changed.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> parts = partition(model, torch.zeros(1, 8))
    >>> [cut.layer for cut in parts.frontier]
    ['1']
    """
    check_arguments(partition, locals())
    require_editable(model)
    arguments = example_arguments(model, example)
    bound(model, arguments)
    try:
        view = view_of(model, arguments)
        values, costs = _compute_values(model, view, arguments)
    except ModelError as error:  # no graph, or none that runs on shapes alone
        return _partition_by_replay(model, arguments, error)
    try:
        return _partition_by_graph(model, view, values, costs)
    except (ModelError, NothingConstantError) as error:
        if isinstance(error, NothingConstantError) and not view.closed:
            raise  # the graph shows all layers, so a replay would find nothing either
        try:  # a layer that is live in part could not be traced, so it was live as a whole; a replay cuts inside it
            return _partition_by_replay(model, arguments, error)
        except ModelError:
            raise error from None


def _partition_by_graph(model: nn.Module, view: View, values: list[Values], costs: dict[fx.Node, int]) -> Partition:
    frontier, notes = _find_frontier(model, view, values)
    chosen, cheaper = _choose_cut(model, view, frontier, values, costs)
    constant = _cost_up_to(chosen, costs)
    return Partition(
        prefix=_prefix(model, view, chosen, values).eval(),
        suffix=_suffix(model, view, chosen, values),
        frontier=tuple(cut for node in chosen for cut in _cuts(node, values)),
        multiply_adds=(constant, sum(costs.values()) - constant),
        note="; ".join([*([cheaper] if cheaper else []), *notes]) or None,
    )


def _compute_values(model: nn.Module, view: View, arguments: Arguments) -> tuple[list[Values], dict[fx.Node, int]]:
    try:
        return compute_costs(model, view.flow)
    except Exception as error:  # arbitrary user code: a forward may raise anything
        trace(model, inputs=arguments.args or arguments.kwargs)  # raises an error that names the layer, if one fails
        reason = f"{type(error).__name__} {str(error).strip().partition(chr(10))[0]}".strip()
        raise ModelError(f"{type(model).__name__} cannot be computed on shapes alone: {reason}.") from error


def _partition_by_replay(model: nn.Module, arguments: Arguments, error: ModelError | EditError) -> Partition:
    """Split a network whose forward cannot be traced, before its first live layer."""
    try:
        prefix, suffix, boundary = record_and_replay(model, arguments)
    except ModelError as replay_error:
        raise ModelError(f"{str(error).rstrip('.')}. Nor can it be recorded and replayed: {replay_error}") from error
    cuts = tuple(
        Cut(f"given_{position}", boundary.layer, shape, dtype)
        for position, (shape, dtype) in enumerate(zip(boundary.shapes, boundary.dtypes, strict=True))
    )
    # Costs come from one more run: what is recorded for a replay has no graph to count them on.
    calls = trace(model, inputs=arguments.args or arguments.kwargs, counts=True).calls
    rows = arguments.shapes[0][0]
    total = next(call.multiply_adds for call in calls if call.path == "") // rows
    constant = sum(call.multiply_adds for call in calls if call.path in boundary.stubs) // rows
    note = f"what '{boundary.layer}' is given is recorded, as the forward cannot be traced"
    return Partition(prefix, suffix, cuts, (constant, max(0, total - constant)), note)


def view_of(model: nn.Module, arguments: Arguments) -> View:
    """Trace `model`, and as many of its layers that are live in part as can be traced.

    Raises:
        ModelError: The model's own forward cannot be traced.
    """
    mixed = mixed_layers(model)  # in them the frontier may lie, so as many as possible are traced through
    flow, opened = capture_widely(model, mixed, training=True, respect_pins=True, arguments=arguments)
    evaluation = None
    if flow.mode_switch is not None:
        evaluation = capture(model, opened, respect_pins=True, arguments=arguments)
    return View(tuple(path for path in mixed if path not in opened), flow, evaluation)


def _find_frontier(model: nn.Module, view: View, values: list[Values]) -> tuple[list[fx.Node], list[str]]:
    """Return the constant values that live values read, and notes on values that are live although undeclared."""
    dependent: set[str] = set()
    notes: list[str] = []
    was_run = False
    while True:
        frontier = _frontier(view, model, dependent)
        if not frontier:
            raise EditError(
                f"nothing of this {type(model).__name__} is live, so there is nothing to train. Thaw a layer."
            )
        # A frontier of inputs, or of values without tensors, has nothing before it that is worth keeping.
        if all(node.op == "placeholder" or ports_of(node, values) == [] for node in frontier):
            first = next((user for node in frontier for user in node.users), None)
            where = f"; the first is {_where(first)}" if first is not None else ""
            if first is not None and first.op == "call_module" and first.target in view.closed:
                where += ", of which a part is trained, and whose forward cannot be traced to tell which"
            why = f" ({'; '.join(notes)})" if notes else ""
            raise NothingConstantError(
                f"nothing of this {type(model).__name__} is constant: all of it is computed in every epoch{where}{why}."
            )
        # The model runs once only: later frontiers lie before the first one, so their values have been compared.
        if not was_run:
            was_run = True
            reasons = dependent_values(model, view.flow, _with_sources(frontier))
        else:
            reasons = {node: "has no row for each image" for node in frontier if ports_of(node, values) is None}
        if reasons:
            dependent |= {value_key(node) for node in reasons}
            notes += [f"{_where(node)} {reason}, so it is computed in every epoch" for node, reason in reasons.items()]
            inputs = [node.name for node in reasons if node.op == "placeholder"]
            if inputs:
                raise ModelError(
                    f"the live part needs the input '{inputs[0]}', which has no row for each image, so it cannot be "
                    "kept image by image. Give it such rows, or make it part of the model."
                )
        elif all(ports_of(node, values) is not None for node in frontier):
            return frontier, list(dict.fromkeys(notes))


def _frontier(view: View, model: nn.Module, dependent: Collection[str]) -> list[fx.Node]:
    """List the constant values that live values read, in either mode, as nodes of the graph of training mode."""
    # The graphs of the two modes are two objects: equal keys mean the same value.
    known = {value_key(node): node for node in view.flow.graph.nodes}
    wanted: set[fx.Node] = set()
    for flow in (view.flow, view.evaluation or view.flow):
        live, fed = live_nodes(flow, model, dependent), tensors_from_input(flow.graph)
        for node in flow.graph.nodes:
            if node not in live:
                continue
            for source in node.all_input_nodes:
                # What no input reaches (a weight, a constant) is part of the suffix, and need not be kept for an image.
                if source in fed and source not in live:
                    if value_key(source) not in known:
                        raise ModelError("its forward computes other constant values in evaluation than in training.")
                    wanted.add(known[value_key(source)])
    return [node for node in view.flow.graph.nodes if node in wanted]


def _choose_cut(
    model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values], costs: dict[fx.Node, int]
) -> tuple[list[fx.Node], str | None]:
    """Choose the frontier or a single value before it, by the estimated seconds for reading and recomputing."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    read, compute = RATES.get(device, RATES["cpu"])
    size = sum(cut.bytes for node in frontier for cut in _cuts(node, values))
    best, best_seconds, note = frontier, size / read, None
    full, least = _cost_up_to(frontier, costs), size
    for node in _dominators(view.flow.graph, frontier):
        # Only a tensor that is clearly smaller is worth the cost of recomputing.
        if not ports_of(node, values) or sum(cut.bytes for cut in _cuts(node, values)) >= 0.9 * least:
            continue
        least = sum(cut.bytes for cut in _cuts(node, values))
        recomputed = full - _cost_up_to([node], costs)
        seconds = least / read + recomputed / compute
        if seconds < best_seconds:
            best, best_seconds = [node], seconds
            note = (
                f"cut earlier, after '{_layer(node)}': {least / 1024:.1f} instead of {size / 1024:.1f} KiB an image, "
                f"for {recomputed:,} multiply-adds computed again"
            )
    return best, note


def _cost_up_to(values: list[fx.Node], costs: dict[fx.Node, int]) -> int:
    """Return the multiply-adds of some values and of everything that they are computed from."""
    return sum(costs[node] for node in _with_sources(values))


def _with_sources(values: list[fx.Node]) -> set[fx.Node]:
    """Return some values and everything that they are computed from."""
    return reachable(values, lambda node: node.all_input_nodes)


def _dominators(graph: fx.Graph, frontier: list[fx.Node]) -> list[fx.Node]:
    """List the tensors that lie on every path from the inputs to the frontier, from the last to the first.

    A value is on every path if no earlier value is read after it, in execution order.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    fed = tensors_from_input(graph)
    needed = reachable(frontier, lambda node: [source for source in node.all_input_nodes if source in fed])
    dominators: list[fx.Node] = []
    reach = -1  # position of the last use of any earlier value
    for node in (node for node in graph.nodes if node in needed):
        if reach <= order[node] and node.op != "placeholder":
            dominators.append(node)
        uses = [order[user] for user in node.users if user in needed]
        reach = len(order) if node in frontier else max([reach, *uses])
    return [node for node in reversed(dominators) if node not in frontier]


def _prefix(model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values]) -> EditedModule:
    wanted = [(value_key(node), port.steps) for node in frontier for port in ports_of(node, values) or ()]

    def change(flow: Flow) -> None:
        nodes = {value_key(node): node for node in flow.graph.nodes}
        flow.set_output(tuple(pick_tensor(flow.graph, nodes[key], steps) for key, steps in wanted))

    prefix = rewire_flows(model, [view.flow.copy()], change)
    prune(prefix)
    return prefix


def _suffix(model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values]) -> EditedModule:
    keys, sizes = [value_key(node) for node in frontier], sizes_of(view.flow.graph, values)
    counts = [len(ports_of(node, values) or ()) for node in frontier]
    examples = [values[0][node] for node in frontier]

    def rebuild(graph: fx.Graph, position: int, tensors: Callable[[], fx.Node]) -> Any:
        return rebuild_value(graph, examples[position], tensors)

    def change(flow: Flow) -> None:
        begin_at(flow.graph, keys, sizes, model.get_submodule, counts, rebuild)

    flows = [view.flow] if view.evaluation is None else [view.evaluation, view.flow]
    suffix = rewire_flows(model, [flow.copy() for flow in flows], change)
    prune(suffix)
    return suffix


def _cuts(node: fx.Node, values: list[Values]) -> list[Cut]:
    return [
        Cut("".join([node.name, *(f"[{step!r}]" for step in port.steps)]), _layer(node), port.shape, port.dtype)
        for port in ports_of(node, values) or ()
    ]


def _layer(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.meta.get(LAYER, "")


def _where(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"'{node.target}'"
    layer = node.meta.get(LAYER, "")
    return f"'{node.name}' in the forward of '{layer}'" if layer else f"'{node.name}' in its forward"
