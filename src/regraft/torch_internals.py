"""The private parts of torch that regraft depends on, under names that tell what they give.

No other file touches a name of torch that begins with an underscore: `tests/test_layering.py` holds that. Torch may
rename or remove any of them in a release; `tests/test_torch_internals.py` checks each against torch itself, so that a
change fails there, by name. One private table of Python, one attribute of timm's and two names of transformers are here
for the same reason.

Checked with torch 2.10.0 and 2.15.0, with Python 3.11 and 3.13, and with timm 1.0.21 and 1.0.31.

Nothing here imports the compiler (`torch._dynamo`), which takes seconds; `defer_compiler` keeps torch from it.
"""

import _compat_pickle
import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.nn.utils import parametrizations
from torch.utils import _python_dispatch, _pytree

# Base classes of families of layers, from which users derive as well.
BatchNormBase = nn.modules.batchnorm._BatchNorm
ConvBase = nn.modules.conv._ConvNd  # of the transposed ones as well
ConvTransposeBase = nn.modules.conv._ConvTransposeNd
DropoutBase = nn.modules.dropout._DropoutNd
InstanceNormBase = nn.modules.instancenorm._InstanceNorm
NormBase = nn.modules.batchnorm._NormBase  # norms with running statistics: batch norm and instance norm

# Classes of the modules that `torch.nn.utils.parametrizations` registers on a layer.
OrthogonalParametrization = parametrizations._Orthogonal
SpectralNormParametrization = parametrizations._SpectralNorm
WeightNormParametrization = parametrizations._WeightNorm

# Nested tuples, lists and dicts, flattened to their leaves and put together again.
TreeSpec = _pytree.TreeSpec
keystr = _pytree.keystr
tree_flatten = _pytree.tree_flatten
tree_flatten_with_path = _pytree.tree_flatten_with_path
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_map_only = _pytree.tree_map_only  # of the leaves of one class
tree_unflatten = _pytree.tree_unflatten

# Tensors with a shape, a dtype and a device but without memory; the last is a context in which new ones have memory.
FakeTensor = fake_tensor.FakeTensor
FakeTensorMode = fake_tensor.FakeTensorMode
unset_fake_temporarily = fake_tensor.unset_fake_temporarily

TorchDispatchMode = _python_dispatch.TorchDispatchMode  # context that sees each operation as it reaches its kernel
OpOverload = torch._ops.OpOverload  # an operation for one set of types: `torch.ops.aten.add.Tensor`
OpOverloadPacket = torch._ops.OpOverloadPacket  # all of one name: `torch.ops.aten.add`

is_jit_tracing = torch._C._is_tracing  # returns whether `torch.jit.trace` is recording a forward
ASSERT = torch._assert  # the function that torch.fx records for an assertion in a forward
COMPILED_CHILD = "_orig_mod"  # name under which the module that `torch.compile` returns holds the network
READ_OF_ATTENTION = ("batch_first", "in_proj_bias", "_qkv_same_embed_dim")  # by nn.TransformerEncoderLayer.forward

# How pickles of Python 2 are read, by torch as well.
PYTHON2_MODULES = _compat_pickle.IMPORT_MAPPING  # module in Python 2 → module in Python 3
PYTHON2_NAMES = _compat_pickle.NAME_MAPPING  # (module, name) in Python 2 → (module, name) in Python 3


# Layers. The dictionaries are the layer's own: a change of them is a change of the layer. The public iterators leave
# out what is None and what has appeared before under another name.


def children_of(layer: nn.Module) -> dict[str, nn.Module | None]:
    """Return the child layers by name; None is an empty place."""
    return layer._modules


def parameters_of(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters of the layer itself by name; None is an empty place, as for `bias=False`."""
    return layer._parameters


def buffers_of(layer: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the buffers of the layer itself by name; None is an empty place."""
    return layer._buffers


def non_persistent_buffers(layer: nn.Module) -> set[str]:
    """Return the names of the layer's buffers that no state dict holds."""
    return layer._non_persistent_buffers_set


def with_replaced_tensors(layer: nn.Module, replacement: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a shallow copy of a layer with other parameters and buffers; `layer` keeps its own."""
    copied = copy.copy(layer)
    for name in ("_parameters", "_buffers"):
        tensors: Mapping[str, torch.Tensor | None] = vars(layer)[name]
        vars(copied)[name] = {key: None if tensor is None else replacement(tensor) for key, tensor in tensors.items()}
    return copied


def without_children(layer: nn.Module) -> nn.Module:
    """Return a shallow copy of a layer that has no child layers; `layer` keeps its own."""
    copied = copy.copy(layer)
    copied._modules = {}
    return copied


# Hooks


def forward_hooks(layer: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the hooks that run after the layer's forward, in their order."""
    return layer._forward_hooks


def forward_pre_hooks(layer: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the hooks that run before the layer's forward, in their order."""
    return layer._forward_pre_hooks


def remove_hooks(layer: nn.Module, is_removed: Callable[[Any], bool]) -> None:
    """Remove the hooks of forward and backward that `is_removed` selects, as their handles would."""
    flags = (layer._forward_hooks_with_kwargs, layer._forward_hooks_always_called, layer._forward_pre_hooks_with_kwargs)
    hooks: Any
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks):
        for key in [key for key, hook in hooks.items() if is_removed(hook)]:
            del hooks[key]
            for table in flags:  # torch notes in them how to call a hook
                table.pop(key, None)


# Loading of state dicts


def has_loading_code(layer: nn.Module) -> bool:
    """Return whether the layer's class or hooks take part in loading a state dict, other than those of torch.nn.

    The classes of torch.nn only add what an old file lacks.
    """
    is_plain = type(layer)._load_from_state_dict is nn.Module._load_from_state_dict
    is_torchs = type(layer).__module__.startswith("torch.nn.modules.")
    return bool(layer._load_state_dict_pre_hooks) or not (is_plain or is_torchs)


def run_loading_code(layer: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Load a state dict into one layer, without those inside of it; its code may rename `tensors`."""
    layer._load_from_state_dict(tensors, prefix, {}, False, [], [], [])


# Layers without shapes, and compiled ones


def infer_lazy_shapes(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Give the parameters of a lazy layer their shapes, from the inputs of a call; it becomes an ordinary layer."""
    cast(Any, layer)._infer_parameters(layer, args, kwargs)


def is_compiled(layer: nn.Module) -> bool:
    """Return whether `torch.compile(layer)` gave this layer, or `layer.compile()` was called on it."""
    return COMPILED_CHILD in children_of(layer) or getattr(layer, "_compiled_call_impl", None) is not None


# Tensors and operations


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that tensors on the same memory share, also on the meta device, where every address is 0.

    Raises:
        NotImplementedError, RuntimeError: The tensor has no memory of its own: it is sparse, for example.
    """
    return tensor.untyped_storage()._cdata


def mark_as_parameter(fake: FakeTensor) -> None:
    """Make a fake tensor an `nn.Parameter`, as `nn.Parameter(fake)` does, without an operation."""
    cast(Any, fake)._is_param = True


def operation_schema(operation: Any) -> torch.FunctionSchema:
    """Return an operation's name, its arguments, and which of them it writes to."""
    return operation._schema


# The compiler, which takes longer to import than a small training does. Functions of torch import it when they are
# called, only to say what must not be compiled: optimizers, dispatch modes, operations of the meta device. They are too
# many to change one by one, and others in each release. So a stand-in for the module takes what they say, and imports
# the module when anything else of it is read. It is the same with the symbolic shapes and with SymPy: operations of the
# meta device ask about numbers that are plain ones, unless something has imported the modules already.

_COMPILER, _SHAPES, _SYMPY = "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"
_COMPILER_READERS = ("torch", "torch._compile", "torch.optim.optimizer")  # the modules of torch that say it
_SHAPE_READERS = (  # modules of torch with operations of the meta device
    *("torch", "torch._decomp.decompositions", "torch._meta_registrations", "torch._prims", "torch._prims_common"),
    *("torch._refs", "torch._refs.nn.functional"),
)
_SHAPE_ANSWERS: dict[str, Callable[..., Any]] = {  # for plain bools and ints
    "expect_true": lambda value: value,
    "guard_or_false": lambda value: value,
    "guard_or_true": lambda value: value,
    "guard_size_oblivious": lambda value: value,
    "guarding_hint_or_throw": lambda value: value,
    "has_guarding_hint": lambda value: True,
    "is_nested_int": lambda value: False,
    "statically_known_true": lambda value: value,
    "sym_eq": lambda one, other: list(one) == list(other) if isinstance(one, (list, tuple)) else one == other,
    "sym_and": lambda *values: all(values),
    "sym_or": lambda *values: any(values),
}


@contextlib.contextmanager
def defer_compiler() -> Iterator[None]:
    """Run the block without importing torch's compiler, unless the block itself needs it.

    Results are the same. After the block, or the import of the compiler in it, nothing is left of the change: a later
    `torch.compile` finds torch as it was. Does nothing inside another such block, and where it is imported already.
    """
    shapes = _StandIn(_SHAPES, _SHAPE_READERS, _SHAPE_ANSWERS)
    symbols = _StandIn(_SYMPY, _SHAPE_READERS, {"Basic": type("Basic", (), {})})  # no number is one
    stand_ins = (_DeferredCompiler(), shapes, symbols)
    try:
        for stand_in in stand_ins:
            stand_in.put_in()
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.take_out()


class _StandIn:
    """A stand-in for a module of torch in `sys.modules`: it answers some readers, and imports the module for others."""

    def __init__(self, name: str, readers: tuple[str, ...], answers: Mapping[str, Any]) -> None:
        self.__name__ = name
        self.__spec__ = importlib.util.find_spec(name)  # for those who only ask whether it is installed
        self._parent, _, self._own_name = name.rpartition(".")
        self._readers, self._answers = readers, answers

    def put_in(self) -> None:
        """Put it where imports look for the module, unless that is imported."""
        modules: dict[str, Any] = sys.modules
        if modules.setdefault(self.__name__, self) is self and self._parent:
            setattr(importlib.import_module(self._parent), self._own_name, self)

    def take_out(self) -> None:
        """Let the next import be that of the module."""
        if sys.modules.get(self.__name__) is not cast(Any, self):
            return
        del sys.modules[self.__name__]
        if self._parent:
            delattr(importlib.import_module(self._parent), self._own_name)

    def __getattr__(self, name: str) -> Any:
        reader = str(sys._getframe(1).f_globals.get("__name__"))
        if name in self._answers and reader in self._readers:
            return self._answers[name]
        if name.startswith("__") and not (
            name == "__path__" and self.__spec__ and self.__spec__.submodule_search_locations
        ):
            raise AttributeError(name)
        self.take_out()
        return getattr(importlib.import_module(self.__name__), name)


class _DeferredCompiler(_StandIn):
    """The stand-in for the compiler, which takes off again the marks that functions got instead of its own."""

    def __init__(self) -> None:
        answers = {"disable": self._disable, "graph_break": lambda: None}
        super().__init__(_COMPILER, _COMPILER_READERS, answers)
        self._unmarked: list[Any] = []

    def _disable(self, function: Any, recursive: bool, *, wrapping: bool) -> Any:
        self._unmarked.append(function)  # to which the caller attaches the result, for its next call
        return function

    def take_out(self) -> None:
        """Let the next import be that of the module, and take off the marks."""
        super().take_out()
        for function in self._unmarked:
            vars(function).pop("__dynamo_disable", None)
        self._unmarked.clear()


# Training


def mark_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Count a step that was left out as taken, or the first `schedule.step()` after it would warn."""
    cast(Any, optimizer)._opt_called = True


def drop_workers(loader: torch.utils.data.DataLoader[Any]) -> None:
    """Make a loader read in this process; a copy that was made of one no longer shares its running workers."""
    loader.num_workers, loader.timeout, loader._iterator = 0, 0, None


def uses_fast_norm(layer: nn.Module) -> bool:
    """Return whether a norm of timm's calls a fused kernel, whose results differ from those of torch's norm."""
    return bool(getattr(layer, "_fast_norm", True))


# transformers


def module_of_transformers(name: str) -> str | None:
    """Return the module of transformers that exports a name, as in `models.vit.modeling_vit`; nothing is imported."""
    import transformers

    return getattr(transformers, "_class_to_module", {}).get(name)


def attention_of(config: Any) -> str | None:
    """Return how a network of transformers computes attention, by its configuration; None where that is open."""
    return getattr(config, "_attn_implementation", None)
