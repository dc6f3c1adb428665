"""The tracer behind `capture`: runs a forward on stand-ins, and writes each operation into a torch.fx graph.

Whatever a forward computes without its inputs is not an operation on a stand-in, so torch.fx would run it once, while
it traces, and keep the result: noise would be the same for ever, and a coin that chooses a branch would have fallen.
Therefore

- functions of torch that draw at random are written into the graph, whatever they are given, so that they draw anew
  in every call. A branch that depends on what was drawn is then one on a value, and is refused like any other;
- what draws in another way (Python's and NumPy's generators, generators of the forward's own, a draw into a tensor
  that exists already) cannot be written into a graph. It is noticed by the state of the generators, and refused.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from regraft.anatomy.dataflow.draws import DROPPING, RANDOM, random_state
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.mode_dependence import is_pinned
from regraft.errors import ModelError

LAYER = "regraft_layer"  # key of fx.Node.meta: path of the layer whose forward holds the operation
FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"
)  # fmt: skip
DREW = "it draws random numbers in a way that a graph cannot repeat"


@dataclass(frozen=True)
class ModuleCall:
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


class Tracer(fx.Tracer):
    """Looks into the given modules only, and writes down what each layer was given and gave.

    Args:
        opened: Identities of the modules to look into.
        training: The mode that `if self.training` sees.
        respect_pins: Whether a layer that is pinned sees evaluation mode instead.
        arguments: What the forward is called with; None: a stand-in for each parameter without a default.
    """

    proxy_buffer_attributes = True

    def __init__(self, opened: set[int], *, training: bool, respect_pins: bool, arguments: Arguments | None) -> None:
        super().__init__(autowrap_functions=_untraceable_functions(), param_shapes_constant=True)
        self.module_calls: list[ModuleCall] = []
        self.mode_switch: str | None = None
        self.path = ""
        self.inputs: tuple[Any, ...] = ()
        self._opened = opened
        self._training = training
        self._heed_pins = respect_pins
        self._arguments = arguments
        self._pinned: set[str] = set()
        self._random_state = random_state()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace `root`; see the docstring of this file for what is refused."""
        with _recorded_len(self, root), _recorded_factories(self), _RecordedDraws(self):
            graph = super().trace(root, concrete_args)
        self._require_no_draw()
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:  # noqa: D102
        root: Any = self.root
        args, kwargs = self._stand_ins(root)
        for path, layer in root.named_modules():
            if id(layer) in self._opened:
                if self._heed_pins and is_pinned(layer):
                    self._pinned.add(path)
                layer._forward_pre_hooks.clear()  # pins: the mode that they keep is read when the graph runs
                vars(layer).pop("train", None)
                vars(layer)["training"] = self.create_proxy("get_attr", f"{path}.training".lstrip("."), (), {})
        return lambda: root.forward(*args, **kwargs), []

    def _stand_ins(self, root: nn.Module) -> tuple[list[Any], dict[str, Any]]:
        """Return what to call the forward with."""
        if self._arguments is None:
            return [self.create_proxy("placeholder", name, (), {}) for name in required_inputs(root)], {}
        parameters = inspect.signature(root.forward).parameters
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        is_gapless = True  # a parameter that comes after one without a value can only be passed by its name
        values = bound(root, self._arguments)
        for name, parameter in parameters.items():
            if name not in values:
                is_gapless = False
            elif parameter.kind is parameter.VAR_POSITIONAL:
                args += [self._stand_in(f"{name}_{position}", one) for position, one in enumerate(values[name])]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= {key: self._stand_in(key, one) for key, one in values[name].items()}
            elif parameter.kind is not parameter.KEYWORD_ONLY and is_gapless:
                args.append(self._stand_in(name, values[name]))
            else:
                kwargs[name] = self._stand_in(name, values[name])
        return args, kwargs

    def _stand_in(self, name: str, value: Any) -> Any:
        """Return a stand-in for an input; a list, tuple or dict of such for one that holds tensors."""
        if not _holds_tensor(value):
            return value
        self.inputs += (value,)
        return _opened(self.create_proxy("placeholder", name, (), {}), value)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: D102
        try:
            path = self.path_of_module(m)
        except NameError:  # made in the forward, so it is no layer of the model
            return forward(*args, **kwargs)
        self._require_no_draw()
        _unproxied((args, kwargs))  # an attribute of a proxy becomes a node when it is used: here, not in the layer
        before, self.path = self.path, path
        if id(m) in self._opened:
            output = forward(*args, **kwargs)
            self._require_no_draw()
        else:
            output = self.create_proxy("call_module", path, args, kwargs)
        self.path = before
        self.module_calls.append(ModuleCall(path, *_unproxied((args, kwargs, output))))
        return output

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:  # noqa: D102
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta[LAYER] = self.path
        return proxy

    def create_arg(self, a: Any) -> Any:
        """Write a dataclass that is a dict, as the outputs of transformers are, as one of its kind."""
        if isinstance(a, dict) and is_dataclass(a):
            kwargs = {str(key): self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), kwargs)
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        return id(m) not in self._opened

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: D102
        target = str(obj.node.target)
        if obj.node.op != "get_attr" or not is_training_flag(target):
            return super().to_bool(obj)
        path = target.rpartition(".")[0]
        if path in self._pinned:
            return False
        self.mode_switch = path if self.mode_switch is None else self.mode_switch
        return self._training

    def _require_no_draw(self) -> None:
        if random_state() != self._random_state:
            raise RuntimeError(DREW)


class _RecordedDraws(TorchFunctionMode):
    """Writes functions that draw at random into the graph."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in RANDOM and name not in DROPPING:
            return func(*args, **kwargs)
        if name.endswith("_") and not isinstance(args[0], fx.Proxy):
            raise RuntimeError(f"{DREW}: '{name}' writes into a tensor that no input takes part in")
        return self._tracer.create_proxy("call_function", func, args, kwargs)


@contextlib.contextmanager
def _recorded_factories(tracer: Tracer) -> Iterator[None]:
    """Write functions that make a tensor of a traced size into the graph; torch itself takes no proxy as a size."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if _holds_stand_in((args, kwargs)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return make

    own = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, function in own.items():
            setattr(torch, name, recorded(function))
        yield
    finally:
        for name, function in own.items():
            setattr(torch, name, function)


def required_inputs(model: nn.Module) -> list[str]:
    """List the parameters of a forward that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def bound(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """Bind arguments to the parameters of a forward, as a call does.

    Raises:
        ModelError: They do not fit.
    """
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*arguments.args, **arguments.kwargs).arguments)
    except TypeError as error:
        count, names = len(arguments.args), ", ".join(arguments.kwargs) or "none"
        raise ModelError(
            f"the inputs do not fit the forward of {type(model).__name__}: {error} ({count} positional, by keyword: "
            f"{names}). It takes {signature}. Pass a tensor, a tuple of positional inputs or a dict of keyword inputs."
        ) from error


def is_training_flag(target: str) -> bool:
    """Return whether a graph's attribute is the mode of a layer.

    >>> is_training_flag("layer1.0.training"), is_training_flag("fc.weight")
    (True, False)
    """
    return target.rpartition(".")[2] == "training"


def _opened(stand_in: Any, value: Any) -> Any:
    """Let a container of inputs be one of stand-ins, so that a forward may iterate over it."""
    if type(value) in (list, tuple):
        return type(value)(_opened(stand_in[position], one) for position, one in enumerate(value))
    if type(value) is dict:
        return {key: _opened(stand_in[key], one) for key, one in value.items()}
    return stand_in if _holds_tensor(value) else value


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


@contextlib.contextmanager
def _recorded_len(tracer: Tracer, model: nn.Module) -> Iterator[None]:
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


def _holds_stand_in(value: Any) -> bool:
    found: list[bool] = []
    map_aggregate(value, lambda leaf: found.append(isinstance(leaf, fx.Proxy)))
    return any(found)


def _untraceable_functions() -> tuple[Callable[..., Any], ...]:
    """List what timm registers as not traceable; nothing where timm was not imported."""
    if "timm" not in sys.modules:
        return ()
    from timm import layers

    return tuple(cast(Any, layers).get_notrace_functions())
