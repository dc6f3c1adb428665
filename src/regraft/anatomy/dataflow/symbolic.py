"""The tracer behind `capture`: calls a forward on proxies and records each operation as a node of a torch.fx graph.

torch.fx records operations on proxies only. What a forward computes without its inputs runs once, while it is traced,
and its result becomes a constant of the graph: noise would be the same in every call, and so would a branch that is
chosen at random. Therefore

- random functions of torch are recorded whatever their arguments are, so that they draw anew in every call. A branch on
  a drawn value is then control flow that depends on a value, and is refused like any other;
- other draws (Python's and NumPy's generators, generators that the forward owns, a draw into a tensor that exists
  already) cannot be recorded. They are detected by a changed state of the generators, and refused.
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

from regraft.anatomy.dataflow.draws import DROPPING, RANDOM, random_state
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.mode_dependence import is_pinned
from regraft.errors import ModelError
from regraft.torch_internals import forward_pre_hooks, tree_leaves

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
    """torch.fx tracer with a chosen set of traced modules, which records the arguments and output of every module call.

    Args:
        traced: Identities (`id`) of the modules to trace; all others are leaves.
        training: The mode that `if self.training` sees.
        respect_pins: Whether a pinned layer sees evaluation mode instead.
        arguments: What the forward is called with; None: a proxy for each parameter without a default.
    """

    proxy_buffer_attributes = True

    def __init__(self, traced: set[int], *, training: bool, respect_pins: bool, arguments: Arguments | None) -> None:
        super().__init__(autowrap_functions=_untraceable_functions(), param_shapes_constant=True)
        self.module_calls: list[ModuleCall] = []
        self.mode_switch: str | None = None
        self.path = ""
        self.inputs: tuple[Any, ...] = ()
        self._traced = traced
        self._training = training
        self._respect_pins = respect_pins
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
        args, kwargs = self._input_proxies(root)
        for path, layer in root.named_modules():
            if id(layer) in self._traced:
                if self._respect_pins and is_pinned(layer):
                    self._pinned.add(path)
                forward_pre_hooks(layer).clear()  # pins: the mode that they keep is read when the graph runs
                vars(layer).pop("train", None)
                # A proxy in the place of the flag records where it is passed on, and `to_bool` sees branches on it.
                vars(layer)["training"] = self.create_proxy("get_attr", f"{path}.training".lstrip("."), (), {})
        # torch.fx would make one proxy for each parameter; this closure passes nested and keyword inputs as well.
        return lambda: root.forward(*args, **kwargs), []

    def _input_proxies(self, root: nn.Module) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and keyword arguments to call the forward with, tensors replaced by proxies."""
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
                args += [self._input_proxy(f"{name}_{position}", item) for position, item in enumerate(values[name])]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= {key: self._input_proxy(key, item) for key, item in values[name].items()}
            elif parameter.kind is not parameter.KEYWORD_ONLY and is_gapless:
                args.append(self._input_proxy(name, values[name]))
            else:
                kwargs[name] = self._input_proxy(name, values[name])
        return args, kwargs

    def _input_proxy(self, name: str, value: Any) -> Any:
        """Return a proxy for an input, or a list, tuple or dict of proxies; the value itself where it has no tensor."""
        if not _holds_tensor(value):
            return value
        self.inputs += (value,)
        return _nested_proxies(self.create_proxy("placeholder", name, (), {}), value)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: D102
        try:
            path = self.path_of_module(m)
        except NameError:  # created inside the forward, so it is no layer of the model
            return forward(*args, **kwargs)
        self._require_no_draw()  # before the layer as well, so that a draw is blamed on the forward that made it
        _to_nodes((args, kwargs))  # an attribute of a proxy becomes a node when it is used: here, not in the layer
        before, self.path = self.path, path
        if id(m) in self._traced:
            output = forward(*args, **kwargs)
            self._require_no_draw()
        else:
            output = self.create_proxy("call_module", path, args, kwargs)
        self.path = before
        self.module_calls.append(ModuleCall(path, *_to_nodes((args, kwargs, output))))
        return output

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:  # noqa: D102
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta[LAYER] = self.path
        return proxy

    def create_arg(self, a: Any) -> Any:
        """Record a dataclass that is a dict (`ModelOutput` of transformers) as a call of its class."""
        if isinstance(a, dict) and is_dataclass(a):  # torch.fx would make a plain dict of it
            kwargs = {str(key): self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), kwargs)
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        return id(m) not in self._traced

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: D102
        target = str(obj.node.target)
        if obj.node.op != "get_attr" or not is_training_flag(target):
            return super().to_bool(obj)
        path = target.rpartition(".")[0]
        if path in self._pinned:  # the same in both modes, so it is no mode switch
            return False
        self.mode_switch = path if self.mode_switch is None else self.mode_switch
        return self._training

    def _require_no_draw(self) -> None:
        """Raise where a generator moved: a recorded draw does not run, so something drew past the graph."""
        if random_state() != self._random_state:
            raise RuntimeError(DREW)


class _RecordedDraws(TorchFunctionMode):
    """Records random functions as nodes, also where no argument is a proxy."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in RANDOM and name not in DROPPING:
            return func(*args, **kwargs)
        # The tensor exists outside of the graph: a recorded write would change it again in every call.
        if name.endswith("_") and not isinstance(args[0], fx.Proxy):
            raise RuntimeError(f"{DREW}: '{name}' writes into a tensor that no input takes part in")
        return self._tracer.create_proxy("call_function", func, args, kwargs)


@contextlib.contextmanager
def _recorded_factories(tracer: Tracer) -> Iterator[None]:
    """Record functions that create a tensor of a traced size, which torch takes no proxy for."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return make

    # The argument parser of some C functions (`torch.randn`) fails on a proxy before `__torch_function__` is asked, so
    # the names in the module are replaced while the forward is traced.
    originals = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, function in originals.items():
            setattr(torch, name, recorded(function))
        yield
    finally:
        for name, function in originals.items():
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
    """Return whether the target of a `get_attr` node is the mode of a layer.

    >>> is_training_flag("layer1.0.training"), is_training_flag("fc.weight")
    (True, False)
    """
    return target.rpartition(".")[2] == "training"


def _nested_proxies(proxy: Any, value: Any) -> Any:
    """Return a container of proxies in the structure of `value`, as a forward cannot iterate over a single proxy."""
    if type(value) in (list, tuple):
        return type(value)(_nested_proxies(proxy[position], item) for position, item in enumerate(value))
    if type(value) is dict:
        return {key: _nested_proxies(proxy[key], item) for key, item in value.items()}
    return proxy if _holds_tensor(value) else value


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


@contextlib.contextmanager
def _recorded_len(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Record `len` of a proxy in the forwards of `model`: Python wants a number from `__len__`, which no proxy has."""

    def recorded(value: Any) -> Any:
        return tracer.create_proxy("call_function", len, (value,), {}) if isinstance(value, fx.Proxy) else len(value)

    # A module global hides the builtin of the same name. One that defines its own `len` is left alone.
    scopes = [getattr(type(layer).forward, "__globals__", {}) for layer in model.modules()]
    changed = {id(scope): scope for scope in scopes if "len" not in scope}
    try:
        for scope in changed.values():
            scope["len"] = recorded
        yield
    finally:
        for scope in changed.values():
            del scope["len"]


def _to_nodes(value: Any) -> Any:
    """Replace the proxies in a nested value by their nodes."""
    return map_aggregate(value, lambda leaf: cast(Any, leaf.node if isinstance(leaf, fx.Proxy) else leaf))


def _untraceable_functions() -> tuple[Callable[..., Any], ...]:
    """Return the functions that timm registers as not traceable; none where timm was not imported."""
    if "timm" not in sys.modules:
        return ()
    from timm import layers

    return tuple(cast(Any, layers).get_notrace_functions())
