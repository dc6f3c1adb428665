"""The dataflow of a forward: which value goes where, as a torch.fx graph.

Only the layers that a caller asks to open are looked into; every other layer is one node of the graph, and keeps its
own forward, whatever Python that holds. So few lines have to be traceable, and most networks are. The rules of
torchvision's feature extraction (functions registered with `fx.wrap`) and timm's (functions registered as not
traceable) hold as well.

What a graph takes from the moment of tracing, and what stays open:

- Parameters and buffers are read at run time, and so is `.training` where it is passed on (`F.dropout(x, 0.5,
  self.training)`). Where a forward branches on it (`if self.training`), there is one graph for each mode.
- What is drawn at random by functions of torch is drawn anew in every call, see `symbolic`.
- A parameter of the forward that has a default keeps that default, unless something is given for it.
- Control flow that depends on values or shapes is refused, and so is a forward that gives another graph each time that
  it is traced, or that counts its calls: a graph would repeat for ever what held when it was made.
"""

from collections.abc import Callable, Collection, Iterator
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

SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "training"})
SIZE_METHODS = frozenset({"size", "dim", "numel", "stride", "is_floating_point"})
IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"})


@dataclass
class Flow:
    """The dataflow of one forward in one mode.

    Attributes:
        graph: Its nodes in the order of execution. Editing it is the purpose.
        module_calls: Every call of every layer that is a node or was opened, in the order in which the calls ended.
        training: The mode.
        mode_switch: Path of the layer whose mode decided a branch; None where none did, so that one graph serves both.
        constants: Tensors that the forward makes out of nothing, by the name under which the graph reads them.
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
        """Let the forward return `value`."""
        self.graph.output_node().args = (value,)

    def calls_of(self, path: str) -> list[ModuleCall]:
        """List the calls of one layer."""
        return [visit for visit in self.module_calls if visit.path == path]

    def copy(self) -> "Flow":
        """Return the same dataflow with a graph of its own, in a fraction of the time of another trace."""
        nodes: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, nodes))
        module_calls = [
            ModuleCall(visit.path, *map_arg((visit.args, visit.kwargs, visit.output), nodes.__getitem__))
            for visit in self.module_calls
        ]
        return replace(self, graph=graph, module_calls=module_calls)


def capture(
    model: nn.Module,
    opened: Collection[str] = (),
    *,
    training: bool = False,
    respect_pins: bool = False,
    arguments: Arguments | None = None,
) -> Flow:
    """Trace the forward of `model` into a graph; `model` itself is not touched.

    Args:
        model: Any module.
        opened: Paths of the layers to look into. The model itself always is.
        training: The mode that `if self.training` sees.
        respect_pins: Whether a layer that is pinned sees evaluation mode instead; right as long as it stays pinned.
        arguments: What the forward is called with; the graph takes those inputs that hold tensors, and keeps what else
            is given. None: it takes all inputs without a default, or what `arguments_for` guesses where there are none.

    Raises:
        ForwardError: The forward cannot be traced; the message says where and why.
        ModelError: The forward does not take `arguments`.
    """
    if arguments is None and not required_inputs(model):
        arguments = arguments_for(model)
    if arguments is not None:
        bound(model, arguments)

    def trace(duplicate: nn.Module) -> tuple[fx.Graph, Tracer]:
        layers = {id(duplicate), *(id(duplicate.get_submodule(path)) for path in opened)}
        tracer = Tracer(layers, training=training, respect_pins=respect_pins, arguments=arguments)
        try:
            return tracer.trace(duplicate), tracer
        except Exception as error:  # a forward is anybody's code, and may raise anything when it is fed with proxies
            raise _untraceable(model, tracer.path, str(error).strip() or type(error).__name__) from error

    first, second = shared_copy(model), shared_copy(model)
    with preserved_randomness():
        traced = {path: first.get_submodule(path) for path in ("", *opened)}
        before = generator_states(traced)
        graph, tracer = trace(first)
        after = generator_states(traced)
        drew = [path for path in traced if after[path] != before[path]]
        if drew:  # the innermost, as a generator of a Python module is seen by all layers whose forwards lie in it
            raise _untraceable(model, max(drew, key=lambda path: len(path.split(".")) if path else 0), DREW)
        counted = _carry_over(first, second, model, opened)
        seed_all(1)
        again, _ = trace(second)
    for path in ("", *opened):
        if any(vars(second.get_submodule(path))[name] != value for name, value in counted.get(path, {}).items()):
            raise _untraceable(model, path, "it counts its calls")
    constants, others = _constants(model, graph, first), _constants(model, again, second)
    differs = _first_difference(graph, again, constants, others)
    if differs is not None:
        raise _untraceable(model, differs, "it does not do the same in every call")
    return Flow(graph, tracer.module_calls, training, tracer.mode_switch, constants, tracer.inputs)


def capture_widely(
    model: nn.Module,
    opened: Collection[str],
    *,
    training: bool = False,
    respect_pins: bool = False,
    arguments: Arguments | None = None,
) -> tuple[Flow, tuple[str, ...]]:
    """Trace the forward of `model`, looking into as many of the given layers as can be traced.

    Returns:
        The dataflow, and which layers were opened.

    Raises:
        ForwardError: Not even the model's own forward can be traced.
    """
    wanted = tuple(opened)
    while True:
        try:
            return capture(model, wanted, training=training, respect_pins=respect_pins, arguments=arguments), wanted
        except ForwardError as error:
            around = [*ancestors(error.path), error.path] if error.path else []
            stuck = next((path for path in reversed(around) if path in wanted), None)
            if stuck is None:
                raise
            wanted = tuple(path for path in wanted if not is_within(path, stuck))


def containers(model: nn.Module) -> list[str]:
    """List the layers whose forwards call others: all but the model itself and those of torch.nn, save its lists."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return [
        path
        for path, layer in model.named_modules()
        if path and (isinstance(layer, lists) or not type(layer).__module__.startswith("torch.nn.modules."))
    ]


def nodes_in(value: Any) -> list[fx.Node]:
    """List the nodes in a nested value."""
    found: list[fx.Node] = []
    map_arg(value, lambda node: found.append(node) or node)
    return found


def live_across_cut(graph: fx.Graph, cut: Collection[fx.Node]) -> list[fx.Node]:
    """List what was computed from the input before a cut, besides the values of `cut`, and is used after it.

    Sizes do not count, nor does what the output does not need. Where the list is empty, the output depends on the cut
    alone.
    """
    fed = tensors_from_input(graph)
    order = {node: position for position, node in enumerate(graph.nodes)}
    end = max((order[node] for node in cut), default=0)
    after = {node for node in _needed_for(graph.output_node()) if order[node] > end}
    used = {source for node in after for source in node.all_input_nodes}
    return [node for node in graph.nodes if node in used and node not in after and node not in cut and node in fed]


def tensors_from_input(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of the input, not on its sizes alone."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not is_size(node) and any(source in fed for source in node.all_input_nodes)):
            fed.add(node)
    return fed


def is_size(node: fx.Node) -> bool:
    """Return whether a value is a size or a kind of another, and depends on nothing else of it."""
    if node.op == "call_method":
        return node.target in SIZE_METHODS
    if node.target is len:
        return True
    return node.op == "call_function" and node.target is getattr and node.args[1] in SIZE_ATTRIBUTES


def tidy(graph: fx.Graph, layer_of: Callable[[str], nn.Module], effects_of: Collection[fx.Node] | None = None) -> None:
    """Erase the nodes whose values nobody uses, unless they change a value in place or check one.

    Args:
        graph: Is changed in place.
        layer_of: Returns the layer at a path.
        effects_of: The nodes whose effects count; None: all.
    """
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


def _needed_for(node: fx.Node) -> set[fx.Node]:
    needed, waiting = {node}, [node]
    while waiting:
        fresh = [source for source in waiting.pop().all_input_nodes if source not in needed]
        needed.update(fresh)
        waiting += fresh
    return needed


def _has_effects(node: fx.Node, layer_of: Callable[[str], nn.Module]) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return bool(getattr(layer_of(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") or name in IN_PLACE or node.kwargs.get("inplace") is True or node.target is torch._assert


def _untraceable(model: nn.Module, path: str, text: str) -> ForwardError:
    reason = text.partition("\n")[0]
    where = f"layer '{path}'" if path else "its own forward"
    kind = type(model.get_submodule(path)).__name__
    said = "" if reason.startswith("it ") else "depends on values or shapes in its control flow: "
    return ForwardError(
        f"{type(model).__name__} cannot be traced: {where} ({kind}) {said}{reason.removeprefix('it ')}",
        path=path,
        reason=reason,
    )


def _carry_over(
    traced: nn.Module, fresh: nn.Module, model: nn.Module, opened: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Let another copy go on with the numbers and iterators that a traced forward has changed, and return them."""
    changed: dict[str, dict[str, Any]] = {}
    for path in ("", *opened):
        before, after = vars(model.get_submodule(path)), vars(traced.get_submodule(path))
        for name, value in after.items():
            if isinstance(value, Iterator):
                vars(fresh.get_submodule(path))[name] = value
            elif isinstance(value, (int, float, str)) and name in before and before[name] != value:
                changed.setdefault(path, {})[name] = value
                vars(fresh.get_submodule(path))[name] = value
    return changed


def _constants(model: nn.Module, graph: fx.Graph, duplicate: nn.Module) -> dict[str, torch.Tensor]:
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {
        str(node.target): getattr(duplicate, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and node.target not in own and str(node.target).startswith("_tensor_constant")
    }


def _first_difference(
    graph: fx.Graph, other: fx.Graph, constants: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
) -> str | None:
    """Return the path of the layer in whose forward two graphs begin to differ; None where they do not."""
    for node, duplicate in zip_longest(graph.nodes, other.nodes):
        if node is None or duplicate is None or _described(node) != _described(duplicate):
            return cast(fx.Node, node or duplicate).meta.get(LAYER, "")
        name = str(node.target)
        if node.op == "get_attr" and name in constants and not _equal(constants[name], others[name]):
            return node.meta.get(LAYER, "")
    return None


def _described(node: fx.Node) -> tuple[Any, ...]:
    return node.op, str(node.target), repr(map_arg((node.args, node.kwargs), lambda source: cast(Any, source.name)))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta != b.is_meta:
        return False
    return a is b or a.is_meta or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
