"""The dataflow of a forward as a torch.fx graph: which value goes where.

`capture` traces the model's own forward; every layer is a leaf, one `call_module` node, unless it is named in `traced`:

    def forward(self, x):               x ──► conv ──► relu ──► fc ──► output
        y = self.conv(x).relu()
        return self.fc(y)               placeholder, call_module, call_method, call_module, output

A leaf keeps its own forward, whatever Python that holds, so few lines have to be traceable, and most networks are. With
the default of torch.fx (trace everything outside of torch.nn) one data-dependent branch in any block fails the whole
network. `torch.export` would lower the layers to ATen operators, and fix the shapes: neither edits nor source text
could name a layer. Forward hooks see the layers, but not the flatten or the addition between two of them. The rules of
torchvision's feature extraction (functions registered with `fx.wrap`) and timm's (functions registered as not
traceable) hold as well.

What a graph fixes when it is traced, and what it does not:

- Parameters and buffers are read at run time, and so is `.training` where it is passed on (`F.dropout(x, 0.5,
  self.training)`). Where a forward branches on it (`if self.training`), there is one graph for each mode.
- Random functions of torch draw anew in every call, see `symbolic`.
- A parameter of the forward that has a default keeps that default, unless an argument is given for it.
- Control flow that depends on values or shapes is refused, and so is a forward that gives another graph each time it is
  traced, or that counts its calls: a graph would repeat what held when it was made.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from regraft.anatomy.dataflow.draws import generator_states
from regraft.anatomy.dataflow.symbolic import DREW, Tracer, bound, required_inputs
from regraft.anatomy.dataflow.symbolic import LAYER as LAYER
from regraft.anatomy.dataflow.symbolic import ModuleCall as ModuleCall
from regraft.anatomy.dataflow.symbolic import is_training_flag as is_training_flag
from regraft.anatomy.inputs import Arguments, arguments_for
from regraft.anatomy.modes import preserved_randomness, seed_all
from regraft.anatomy.paths import is_within
from regraft.anatomy.shape_copies import shared_copy
from regraft.errors import ForwardError
from regraft.torch_internals import ASSERT

SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "training"})
SIZE_METHODS = frozenset({"size", "dim", "numel", "stride", "is_floating_point"})
IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"})


@dataclass
class Flow:
    """The dataflow of one forward in one mode.

    Attributes:
        graph: Its nodes in the order of execution. Callers edit it in place.
        module_calls: Every call of every layer, leaf or traced, in the order in which the calls ended.
        training: The mode.
        mode_switch: Path of the layer whose `.training` decided a branch; None: no branch, one graph serves both modes.
        constants: Tensors that the forward creates without inputs, by the name under which the graph reads them.
        inputs: An example of each input that the graph takes, in order; empty where none was given.
    """

    graph: fx.Graph
    module_calls: list[ModuleCall]
    training: bool
    mode_switch: str | None = None
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: tuple[Any, ...] = ()

    @property
    def output(self) -> Any:
        """What the forward returns: a node, or a container of nodes and plain values."""
        return self.graph.output_node().args[0]

    def set_output(self, value: Any) -> None:
        """Make the forward return `value`."""
        self.graph.output_node().args = (value,)

    def calls_of(self, path: str) -> list[ModuleCall]:
        """List the calls of one layer."""
        return [call for call in self.module_calls if call.path == path]

    def copy(self) -> "Flow":
        """Return the same dataflow with a graph of its own, in a fraction of the time of a second trace."""
        nodes: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, nodes))
        module_calls = [
            ModuleCall(call.path, *map_arg((call.args, call.kwargs, call.output), nodes.__getitem__))
            for call in self.module_calls
        ]
        return replace(self, graph=graph, module_calls=module_calls)


def capture(
    model: nn.Module,
    traced: Collection[str] = (),
    *,
    training: bool = False,
    respect_pins: bool = False,
    arguments: Arguments | None = None,
) -> Flow:
    """Trace the forward of `model` into a graph; `model` itself is not touched.

    Args:
        model: Any module.
        traced: Paths of the layers to trace; all others are leaf nodes. The model itself is always traced.
        training: The mode that `if self.training` sees.
        respect_pins: Whether a pinned layer sees evaluation mode instead; valid as long as it stays pinned.
        arguments: What the forward is called with. Arguments that hold tensors become inputs of the graph, all others
            constants. None: all parameters without a default are inputs, or what `arguments_for` guesses where there
            are none.

    Raises:
        ForwardError: The forward cannot be traced; the message says where and why.
        ModelError: The forward does not take `arguments`.
    """
    if arguments is None and not required_inputs(model):
        arguments = arguments_for(model)
    if arguments is not None:
        bound(model, arguments)

    def trace(duplicate: nn.Module) -> tuple[fx.Graph, Tracer]:
        # By identity, so that a layer which stands at several paths is traced at each of them.
        layers = {id(duplicate), *(id(duplicate.get_submodule(path)) for path in traced)}
        tracer = Tracer(layers, training=training, respect_pins=respect_pins, arguments=arguments)
        try:
            return tracer.trace(duplicate), tracer
        except Exception as error:  # a forward is the user's code, and may raise anything when it is called on proxies
            raise _untraceable(model, tracer.path, str(error).strip() or type(error).__name__) from error

    # Tracing changes a module (hooks, `training`, new attributes), so it works on copies. There are two traces, as one
    # cannot show whether the next call of the forward would do the same.
    first, second = shared_copy(model), shared_copy(model)
    with preserved_randomness():
        layers = {path: first.get_submodule(path) for path in ("", *traced)}
        before = generator_states(layers)
        graph, tracer = trace(first)
        after = generator_states(layers)
        drew = [path for path in layers if after[path] != before[path]]
        if drew:  # the innermost, as a generator of a Python module is seen by all layers whose forwards lie in it
            raise _untraceable(model, max(drew, key=lambda path: len(path.split(".")) if path else 0), DREW)
        # The second trace goes on where the first ended and from another seed: a forward that depends on a counter, an
        # iterator or a draw that the checks above missed then gives another graph.
        counted = _carry_over(first, second, model, traced)
        seed_all(1)
        second_graph, _ = trace(second)
    for path in ("", *traced):
        if any(vars(second.get_submodule(path))[name] != value for name, value in counted.get(path, {}).items()):
            raise _untraceable(model, path, "it counts its calls")
    constants, second_constants = _constants(model, graph, first), _constants(model, second_graph, second)
    difference = _first_difference(graph, second_graph, constants, second_constants)
    if difference is not None:
        raise _untraceable(model, difference, "it does not do the same in every call")
    return Flow(graph, tracer.module_calls, training, tracer.mode_switch, constants, tracer.inputs)


def capture_widely(
    model: nn.Module,
    traced: Collection[str],
    *,
    training: bool = False,
    respect_pins: bool = False,
    arguments: Arguments | None = None,
) -> tuple[Flow, tuple[str, ...]]:
    """Trace the forward of `model` and as many of the given layers as can be traced; the rest become leaves.

    Returns:
        The dataflow, and the paths of the layers that were traced.

    Raises:
        ForwardError: Not even the model's own forward can be traced.
    """
    paths = tuple(traced)
    while True:
        try:
            return capture(model, paths, training=training, respect_pins=respect_pins, arguments=arguments), paths
        except ForwardError as error:
            # Make a leaf of the innermost traced layer around the failure. The layers inside of it are dropped too:
            # their calls belong to the leaf. Each round drops at least one path, so the loop ends.
            around = [*ancestors(error.path), error.path] if error.path else []
            failed = next((path for path in reversed(around) if path in paths), None)
            if failed is None:
                raise
            paths = tuple(path for path in paths if not is_within(path, failed))


def containers(model: nn.Module) -> list[str]:
    """List the layers whose forwards may call others: torch.nn's containers, and all layers of other libraries."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return [
        path
        for path, layer in model.named_modules()
        if path and (isinstance(layer, lists) or not type(layer).__module__.startswith("torch.nn.modules."))
    ]


def nodes_in(value: Any) -> list[fx.Node]:
    """List the nodes in a nested value."""
    nodes: list[fx.Node] = []
    map_arg(value, lambda node: nodes.append(node) or node)
    return nodes


def reachable(nodes: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return some nodes and all that lead on from them, by their sources or by their users."""
    reached: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += neighbours(node)
    return reached


def live_across_cut(graph: fx.Graph, cut: Collection[fx.Node]) -> list[fx.Node]:
    """List the values besides `cut` that are computed from the input before the cut and used after it.

    Sizes are ignored, and so is what the output does not need. Where the list is empty, the output depends on the input
    through the cut alone.
    """
    from_input = tensors_from_input(graph)
    order = {node: position for position, node in enumerate(graph.nodes)}
    end = max((order[node] for node in cut), default=0)
    # Unused branches that run after the cut must not count as a second path from the input to the output.
    needed = reachable([graph.output_node()], lambda node: node.all_input_nodes)
    after = {node for node in needed if order[node] > end}
    used = {source for node in after for source in node.all_input_nodes}
    return [
        node for node in graph.nodes if node in used and node not in after and node not in cut and node in from_input
    ]


def tensors_from_input(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of the input, not on its sizes alone."""
    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not is_size(node) and any(source in nodes for source in node.all_input_nodes)):
            nodes.add(node)
    return nodes


def is_size(node: fx.Node) -> bool:
    """Return whether a node reads only metadata of a tensor: its size, dtype, device or mode, not its values."""
    if node.op == "call_method":
        return node.target in SIZE_METHODS
    if node.target is len:
        return True
    return node.op == "call_function" and node.target is getattr and node.args[1] in SIZE_ATTRIBUTES


def tidy(graph: fx.Graph, layer_of: Callable[[str], nn.Module], effects_of: Collection[fx.Node] | None = None) -> None:
    """Erase the nodes whose values are not used, unless they change a value in place or check one.

    Args:
        graph: Is changed in place.
        layer_of: Returns the layer at a path.
        effects_of: The nodes whose effects count; None: all.
    """
    # From the end, so that a chain of unused nodes goes in one pass: each erased user frees its sources.
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            if (effects_of is None or node in effects_of) and _has_effects(node, layer_of):
                continue
            graph.erase_node(node)


def ancestors(path: str) -> list[str]:
    """List the layers around a layer, from the outside in, the model itself left out.

    >>> ancestors("layer1.0.conv1")
    ['layer1', 'layer1.0']
    """
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _has_effects(node: fx.Node, layer_of: Callable[[str], nn.Module]) -> bool:
    """Return whether a node changes a value in place or checks one."""
    # No schema says which operations write; torch marks them by a trailing underscore (`relu_`) or `inplace=True`.
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return bool(getattr(layer_of(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") or name in IN_PLACE or node.kwargs.get("inplace") is True or node.target is ASSERT


def _untraceable(model: nn.Module, path: str, text: str) -> ForwardError:
    reason = text.partition("\n")[0]
    where = f"layer '{path}'" if path else "its own forward"
    kind = type(model.get_submodule(path)).__name__
    # Reasons of our own begin with "it"; anything else is torch.fx's text about a proxy that met Python control flow.
    cause = "" if reason.startswith("it ") else "depends on values or shapes in its control flow: "
    return ForwardError(
        f"{type(model).__name__} cannot be traced: {where} ({kind}) {cause}{reason.removeprefix('it ')}",
        path=path,
        reason=reason,
    )


def _carry_over(
    first: nn.Module, second: nn.Module, model: nn.Module, traced: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Copy the attributes that tracing `first` has changed to `second`: numbers, texts and iterators.

    Returns:
        The changed numbers and texts by path and attribute name.
    """
    changed: dict[str, dict[str, Any]] = {}
    for path in ("", *traced):
        before, after = vars(model.get_submodule(path)), vars(first.get_submodule(path))
        for name, value in after.items():
            if isinstance(value, Iterator):  # advanced in place, so whether it moved cannot be compared
                vars(second.get_submodule(path))[name] = value
            elif isinstance(value, (int, float, str)) and name in before and before[name] != value:
                changed.setdefault(path, {})[name] = value
                vars(second.get_submodule(path))[name] = value
    return changed


def _constants(model: nn.Module, graph: fx.Graph, duplicate: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that tracing stored on the copy, by the name that the graph reads them under."""
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {
        str(node.target): getattr(duplicate, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and node.target not in own and str(node.target).startswith("_tensor_constant")
    }


def _first_difference(
    graph: fx.Graph,
    second_graph: fx.Graph,
    constants: dict[str, torch.Tensor],
    second_constants: dict[str, torch.Tensor],
) -> str | None:
    """Return the path of the layer in whose forward two graphs begin to differ; None where they do not."""
    for node, second in zip_longest(graph.nodes, second_graph.nodes):
        if node is None or second is None or _node_key(node) != _node_key(second):
            return cast(fx.Node, node or second).meta.get(LAYER, "")
        name = str(node.target)
        # torch.fx numbers constants in the order of creation: equal names do not yet mean equal values.
        if node.op == "get_attr" and name in constants and not _equal(constants[name], second_constants[name]):
            return node.meta.get(LAYER, "")
    return None


def _node_key(node: fx.Node) -> tuple[Any, ...]:
    """Return what a node does as a value that can be compared between graphs; torch.fx names nodes the same in both."""
    return node.op, str(node.target), repr(map_arg((node.args, node.kwargs), lambda source: cast(Any, source.name)))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta != b.is_meta:
        return False
    return a is b or a.is_meta or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
