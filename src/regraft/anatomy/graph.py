"""The dataflow of a forward: which value goes where, as a torch.fx graph.

Only the layers that a caller asks to open are looked into; every other layer is one node of the graph, and keeps its
own forward, whatever Python that holds. So few lines have to be traceable, and most networks are. The rules of
torchvision's feature extraction (functions registered with `fx.wrap`) and timm's (functions registered as not
traceable) hold as well.

What a graph takes from the moment of tracing, and what stays open:

- Parameters and buffers are read at run time, and so is `.training` where it is passed on (`F.dropout(x, 0.5,
  self.training)`). Where a forward branches on it (`if self.training`), there is one graph for each mode.
- A parameter of the forward that has a default keeps that default.
- Control flow that depends on values or shapes is refused.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from regraft.anatomy.drift import is_pinned
from regraft.anatomy.modes import preserved_randomness
from regraft.anatomy.paths import is_within
from regraft.anatomy.twins import shared_copy
from regraft.errors import ForwardError

SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "training"})
SIZE_METHODS = frozenset({"size", "dim", "numel", "stride", "is_floating_point"})
IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"})
LAYER = "regraft_layer"  # key of fx.Node.meta: path of the layer whose forward holds the operation


@dataclass(frozen=True)
class Visit:
    """One call of one layer.

    Attributes:
        path: The layer's dotted path.
        args: What it was called with: nodes, or containers of nodes and plain values.
        kwargs: Its keyword arguments.
        output: What it returned: a node, or a container of nodes and plain values.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Flow:
    """The dataflow of one forward in one mode.

    Attributes:
        graph: Its nodes in the order of execution. Editing it is the purpose.
        visits: Every call of every layer that is a node or was opened, in the order in which the calls ended.
        training: The mode.
        decider: Path of the layer whose mode decided a branch; None where none did, so that one graph serves both.
        constants: Tensors that the forward makes out of nothing, by the name under which the graph reads them.
    """

    graph: fx.Graph
    visits: list[Visit]
    training: bool
    decider: str | None = None
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def output(self) -> Any:
        """What the forward returns: a node, or a container of nodes and plain values."""
        return self.graph.output_node().args[0]

    def set_output(self, value: Any) -> None:
        """Let the forward return `value`."""
        self.graph.output_node().args = (value,)

    def visits_of(self, path: str) -> list[Visit]:
        """List the calls of one layer."""
        return [visit for visit in self.visits if visit.path == path]


def capture(model: nn.Module, opened: Collection[str] = (), *, training: bool = False, heed_pins: bool = False) -> Flow:
    """Trace the forward of `model` into a graph; `model` itself is not touched.

    Args:
        model: Any module.
        opened: Paths of the layers to look into. The model itself always is.
        training: The mode that `if self.training` sees.
        heed_pins: Whether a layer that is pinned sees evaluation mode instead; right as long as it stays pinned.

    Raises:
        ForwardError: The forward cannot be traced; the message says where and why.
    """
    twin = shared_copy(model)
    tracer = _Tracer({id(twin), *(id(twin.get_submodule(path)) for path in opened)}, training, heed_pins)
    try:
        with preserved_randomness(), _recorded_len(tracer, twin):
            graph = tracer.trace(twin)
    except Exception as error:  # a forward is anybody's code, and may raise anything when it is fed with proxies
        where = f"layer '{tracer.path}'" if tracer.path else "its own forward"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ForwardError(
            f"{type(model).__name__} cannot be traced: {where} ({_kind(twin, tracer.path)}) depends on values or "
            f"shapes in its control flow: {reason}",
            path=tracer.path,
            reason=reason,
        ) from error
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    constants = {
        str(node.target): getattr(twin, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and node.target not in own and str(node.target).startswith("_tensor_constant")
    }
    return Flow(graph, tracer.visits, training, tracer.decider, constants)


def capture_widely(
    model: nn.Module, opened: Collection[str], *, training: bool = False, heed_pins: bool = False
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
            return capture(model, wanted, training=training, heed_pins=heed_pins), wanted
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


def crossing(graph: fx.Graph, cut: Collection[fx.Node]) -> list[fx.Node]:
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


def is_training_flag(target: str) -> bool:
    """Say whether a graph's attribute is the mode of a layer.

    >>> is_training_flag("layer1.0.training"), is_training_flag("fc.weight")
    (True, False)
    """
    return target.rpartition(".")[2] == "training"


def is_size(node: fx.Node) -> bool:
    """Say whether a value is a size or a kind of another, and depends on nothing else of it."""
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


def _kind(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__


class _Tracer(fx.Tracer):
    """Looks into the given modules only, and writes down what each layer was given and gave."""

    proxy_buffer_attributes = True

    def __init__(self, opened: set[int], training: bool, heed_pins: bool) -> None:
        super().__init__(autowrap_functions=_untraceable_functions(), param_shapes_constant=True)
        self.visits: list[Visit] = []
        self.decider: str | None = None
        self.path = ""
        self._opened = opened
        self._training = training
        self._heed_pins = heed_pins
        self._pinned: set[str] = set()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root: Any = self.root
        parameters = inspect.signature(root.forward).parameters.values()
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in required]
        for path, layer in root.named_modules():
            if id(layer) in self._opened:
                if self._heed_pins and is_pinned(layer):
                    self._pinned.add(path)
                layer._forward_pre_hooks.clear()  # pins: the mode that they keep is read when the graph runs
                vars(layer).pop("train", None)
                vars(layer)["training"] = self.create_proxy("get_attr", f"{path}.training".lstrip("."), (), {})
        return lambda *values: root.forward(*values), inputs

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:  # made in the forward, so it is no layer of the model
            return forward(*args, **kwargs)
        before, self.path = self.path, path
        if id(m) in self._opened:
            output = forward(*args, **kwargs)
        else:
            output = self.create_proxy("call_module", path, args, kwargs)
        self.path = before
        self.visits.append(Visit(path, *_unproxied((args, kwargs, output))))
        return output

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta[LAYER] = self.path
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._opened

    def to_bool(self, obj: fx.Proxy) -> bool:
        target = str(obj.node.target)
        if obj.node.op != "get_attr" or not is_training_flag(target):
            return super().to_bool(obj)
        path = target.rpartition(".")[0]
        if path in self._pinned:
            return False
        self.decider = path if self.decider is None else self.decider
        return self._training


@contextlib.contextmanager
def _recorded_len(tracer: _Tracer, model: nn.Module) -> Iterator[None]:
    """Let the forwards of `model` ask for the length of a traced value, which Python lets no proxy give."""

    def recorded(value: Any) -> Any:
        return tracer.create_proxy("call_function", len, (value,), {}) if isinstance(value, fx.Proxy) else len(value)

    scopes = [getattr(type(layer).forward, "__globals__", {}) for layer in model.modules()]
    changed = {id(scope): scope for scope in scopes if "len" not in scope}
    try:
        for scope in changed.values():
            scope["len"] = recorded
        yield
    finally:
        for scope in changed.values():
            del scope["len"]


def _unproxied(value: Any) -> Any:
    return map_aggregate(value, lambda leaf: cast(Any, leaf.node if isinstance(leaf, fx.Proxy) else leaf))


def _untraceable_functions() -> tuple[Callable[..., Any], ...]:
    """List what timm registers as not traceable; nothing where timm was not imported."""
    if "timm" not in sys.modules:
        return ()
    from timm import layers

    return tuple(cast(Any, layers).get_notrace_functions())
