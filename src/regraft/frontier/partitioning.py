"""Split a network where its constant part ends: what comes before is computed once, what comes after in every epoch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.dataflow.graph import LAYER, Flow, capture, capture_widely, tensors_from_input
from regraft.anatomy.dataflow.symbolic import bound
from regraft.anatomy.dataflow.values import Values, compute_costs, sizes_of, value_key
from regraft.anatomy.inputs import Arguments, example_arguments
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.errors import EditError, ModelError
from regraft.frontier.independence import dependent_values
from regraft.frontier.liveness import live_nodes, mixed_layers
from regraft.frontier.ports import picked, ports_of, rebuilt
from regraft.frontier.replay import record_and_replay
from regraft.surgery.checks import require_editable
from regraft.surgery.rewired import EditedModule, prune, rewire_flows
from regraft.surgery.tail import begin_at

READ_BYTES_PER_S = {"cpu": 2e9, "cuda": 2e11}  # of cached tensors into a batch
MULTIPLY_ADDS_PER_S = {"cpu": 2e10, "cuda": 5e12}
NO_ROWS = "has no row for each image"


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

    Both parts are plain networks: called on what they were not made for, they raise what torch raises, as the network
    itself does.

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


class NothingConstantError(EditError):
    """All of the network is live."""


@dataclass(frozen=True)
class View:
    """A model's dataflow while it trains, and in evaluation where that differs; with the layers that were opened.

    `closed` are the layers that are partly live and could not be opened.
    """

    opened: tuple[str, ...]
    closed: tuple[str, ...]
    flow: Flow
    evaluation: Flow | None


def partition(model: nn.Module, example: Any) -> Partition:
    """Split `model` by what its flags say: the part that is the same in every epoch, and the part that is not.

    Live is what holds a trainable parameter, or draws at random or follows its batch while it trains (dropout,
    stochastic depth, batch norm), unless it is pinned as `freeze` does; and all that depends on it. Any pattern of
    flags is followed through skip connections and branches. The constant part is run on a few random inputs as well:
    what gives an image something else a second time, or beside other images, is live too, whether or not anything
    declares it. Where an earlier tensor is so much smaller than the frontier that reading it and computing the rest
    again costs less, the cut is made there.

    What a layer returns as a list, a tuple or a dict is looked through: the frontier is the tensors in it. A forward
    that cannot be traced is recorded up to its first live layer and replayed from there, where it takes nothing else
    from before.

    Args:
        model: Any module.
        example: One input (N, …), a tuple of positional inputs, or a dict of keyword inputs, as the forward takes them;
            the first tensor's first dimension is that of images. Of floating-point numbers only shapes and dtypes
            count. The cut holds for this shape, and the parts take those inputs that are given here.

    Raises:
        ModelError: The forward does not take the example, can neither be traced nor replayed, or needs an input that
            has no row for each image.
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
        values, costs = _computed(model, view, arguments)
    except ModelError as error:
        return _untraced(model, arguments, error)
    try:
        return _traced(model, view, values, costs)
    except (ModelError, NothingConstantError) as error:
        if isinstance(error, NothingConstantError) and not view.closed:
            raise
        try:  # a mixed layer could not be looked into: it is live as a whole, and may hold what is constant
            return _untraced(model, arguments, error)
        except ModelError:
            raise error from None


def _traced(model: nn.Module, view: View, values: list[Values], costs: dict[fx.Node, int]) -> Partition:
    frontier, notes = _find_frontier(model, view, values)
    chosen, cheaper = _cheapest(model, view, frontier, values, costs)
    spent = _cost_up_to(chosen, costs)
    return Partition(
        prefix=_prefix(model, view, chosen, values).eval(),
        suffix=_suffix(model, view, chosen, values),
        frontier=tuple(cut for node in chosen for cut in _cuts(node, values)),
        multiply_adds=(spent, sum(costs.values()) - spent),
        note="; ".join([*([cheaper] if cheaper else []), *notes]) or None,
    )


def _computed(model: nn.Module, view: View, arguments: Arguments) -> tuple[list[Values], dict[fx.Node, int]]:
    try:
        return compute_costs(model, view.flow)
    except Exception as error:  # of anybody's forward
        trace(model, inputs=arguments.args or arguments.kwargs)  # which says where it fails, if it does
        reason = f"{type(error).__name__} {str(error).strip().partition(chr(10))[0]}".strip()
        raise ModelError(f"{type(model).__name__} cannot be computed on shapes alone: {reason}.") from error


def _untraced(model: nn.Module, arguments: Arguments, error: ModelError | EditError) -> Partition:
    """Split a network whose forward cannot be traced, before its first live layer."""
    try:
        prefix, suffix, boundary = record_and_replay(model, arguments)
    except ModelError as second:
        raise ModelError(f"{str(error).rstrip('.')}. Nor can it be recorded and replayed: {second}") from error
    cuts = tuple(
        Cut(f"given_{position}", boundary.layer, shape, dtype)
        for position, (shape, dtype) in enumerate(zip(boundary.shapes, boundary.dtypes, strict=True))
    )
    calls = trace(model, inputs=arguments.args or arguments.kwargs).calls
    rows = arguments.shapes[0][0]
    total = next(call.multiply_adds for call in calls if call.path == "") // rows
    spent = sum(call.multiply_adds for call in calls if call.path in boundary.stubs) // rows
    note = f"what '{boundary.layer}' is given is recorded, as the forward cannot be traced"
    return Partition(prefix, suffix, cuts, (spent, max(0, total - spent)), note)


def view_of(model: nn.Module, arguments: Arguments) -> View:
    """Trace `model`, looking into as many of its mixed layers as can be traced.

    Raises:
        ModelError: Not even the model's own forward can be traced.
    """
    mixed = mixed_layers(model)
    flow, opened = capture_widely(model, mixed, training=True, respect_pins=True, arguments=arguments)
    evaluation = None
    if flow.mode_switch is not None:
        evaluation = capture(model, opened, respect_pins=True, arguments=arguments)
    return View(opened, tuple(path for path in mixed if path not in opened), flow, evaluation)


def _find_frontier(model: nn.Module, view: View, values: list[Values]) -> tuple[list[fx.Node], list[str]]:
    """Return the constant values that live ones are computed from, and what is live although nothing declares it."""
    dependent: set[str] = set()
    notes: list[str] = []
    was_run = False
    while True:
        frontier = _frontier(view, model, dependent)
        if not frontier:
            raise EditError(
                f"nothing of this {type(model).__name__} is live, so there is nothing to train. Thaw a layer."
            )
        if all(node.op == "placeholder" or ports_of(node, values) == [] for node in frontier):
            first = next((user for node in frontier for user in node.users), None)
            where = f"; the first is {_place(first)}" if first is not None else ""
            if first is not None and first.op == "call_module" and first.target in view.closed:
                where += ", of which a part is trained, and whose forward cannot be traced to tell which"
            why = f" ({'; '.join(notes)})" if notes else ""
            raise NothingConstantError(
                f"nothing of this {type(model).__name__} is constant: all of it is computed in every epoch{where}{why}."
            )
        if not was_run:
            was_run = True
            reasons = dependent_values(model, view.flow, _ancestors(frontier, set(view.flow.graph.nodes)))
        else:
            reasons = {node: NO_ROWS for node in frontier if ports_of(node, values) is None}
        if reasons:
            dependent |= {value_key(node) for node in reasons}
            notes += [f"{_place(node)} {reason}, so it is computed in every epoch" for node, reason in reasons.items()]
            inputs = [node.name for node in reasons if node.op == "placeholder"]
            if inputs:
                raise ModelError(
                    f"the live part needs the input '{inputs[0]}', which has no row for each image, so it cannot be "
                    "kept image by image. Give it such rows, or make it part of the model."
                )
        elif all(ports_of(node, values) is not None for node in frontier):
            return frontier, list(dict.fromkeys(notes))


def _frontier(view: View, model: nn.Module, dependent: Collection[str]) -> list[fx.Node]:
    """List the constant values that live ones are computed from, in the graph of training mode."""
    known = {value_key(node): node for node in view.flow.graph.nodes}
    wanted: set[fx.Node] = set()
    for flow in (view.flow, view.evaluation or view.flow):
        live, fed = live_nodes(flow, model, dependent), tensors_from_input(flow.graph)
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
    """Choose between the frontier and single values before it, by seconds for reading and for computing again."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    read, compute = READ_BYTES_PER_S.get(device, 2e9), MULTIPLY_ADDS_PER_S.get(device, 2e10)
    size = sum(cut.bytes for node in frontier for cut in _cuts(node, values))
    best, best_seconds, note = frontier, size / read, None
    full = _cost_up_to(frontier, costs)
    least = size
    for node in _dominators(view.flow.graph, frontier):
        if not ports_of(node, values) or sum(cut.bytes for cut in _cuts(node, values)) >= 0.9 * least:
            continue
        least = sum(cut.bytes for cut in _cuts(node, values))
        again = full - _cost_up_to([node], costs)
        seconds = least / read + again / compute
        if seconds < best_seconds:
            best, best_seconds = [node], seconds
            note = (
                f"cut earlier, after '{_layer(node)}': {least / 1024:.1f} instead of {size / 1024:.1f} KiB an image, "
                f"for {again:,} multiply-adds computed again"
            )
    return best, note


def _cost_up_to(values: list[fx.Node], costs: dict[fx.Node, int]) -> int:
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


def _dominators(graph: fx.Graph, frontier: list[fx.Node]) -> list[fx.Node]:
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


def _prefix(model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values]) -> EditedModule:
    wanted = [(value_key(node), port.steps) for node in frontier for port in ports_of(node, values) or ()]

    def change(flow: Flow) -> None:
        found = {value_key(node): node for node in flow.graph.nodes}
        flow.set_output(tuple(picked(flow.graph, found[key], steps) for key, steps in wanted))

    prefix = rewire_flows(model, [view.flow.copy()], change)
    prune(prefix)
    return prefix


def _suffix(model: nn.Module, view: View, frontier: list[fx.Node], values: list[Values]) -> EditedModule:
    keys, sizes = [value_key(node) for node in frontier], sizes_of(view.flow.graph, values)
    counts = [len(ports_of(node, values) or ()) for node in frontier]
    examples = [values[0][node] for node in frontier]

    def change(flow: Flow) -> None:
        begin_at(
            flow.graph,
            keys,
            sizes,
            model.get_submodule,
            counts,
            lambda graph, position, tensors: rebuilt(graph, examples[position], tensors),
        )

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


def _place(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"'{node.target}'"
    layer = node.meta.get(LAYER, "")
    return f"'{node.name}' in the forward of '{layer}'" if layer else f"'{node.name}' in its forward"
