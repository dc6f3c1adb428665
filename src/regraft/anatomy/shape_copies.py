"""Copies of a network's structure that can be run and hooked without touching the network itself."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from regraft.anatomy.modes import in_mode
from regraft.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    buffers_of,
    defer_compiler,
    infer_lazy_shapes,
    mark_as_parameter,
    parameters_of,
    remove_hooks,
    tree_leaves,
    tree_map,
    unset_fake_temporarily,
)

OWN_HOOKS = "torch.nn.utils."  # weight norm, spectral norm and pruning compute weights in hooks: part of the forward


@contextlib.contextmanager
def meta_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Copy the structure of `model` with an empty tensor on the meta device in the place of each tensor.

    Inside the block, tensors created without a device are on the meta device as well. The copy has no hooks and is in
    evaluation mode; lazy parameters get their shapes while it runs. A forward that needs a tensor on a CPU fails on it.
    """
    with defer_compiler(), torch.device("meta"):
        duplicate = _copied(model, _shape_only)
        for layer in _lazy_layers(duplicate):
            layer.register_forward_pre_hook(_make_lazy_tensors, with_kwargs=True)
        yield in_mode(duplicate, training=False)


@contextlib.contextmanager
def fake_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Like `meta_copy`, with fake tensors, which report the CPU as their device and may be mixed with real tensors.

    Tried second, as the first fake tensor imports all of torch's compiler, which takes a second.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        duplicate = _copied(model, lambda tensor: _fake(tensor, fake_mode))
        for layer in _lazy_layers(duplicate):
            layer.register_forward_pre_hook(_make_lazy_fakes, with_kwargs=True)
        yield in_mode(duplicate, training=False)


SHAPE_ONLY_COPIES = (meta_copy, fake_copy)  # ways to run a network on shapes alone, the cheapest first


def aliased_copy(model: nn.Module) -> nn.Module:
    """Copy the structure of `model` without hooks, for evaluation; buffers are copies, parameters share its memory.

    The caller has to ensure that nothing writes to the parameters of the copy.
    """
    duplicate = _copied(model, _aliased)
    for layer in _lazy_layers(duplicate):
        layer.register_forward_pre_hook(_make_lazy_tensors, with_kwargs=True)
    return in_mode(duplicate, training=False)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the structure of `model`; parameters, buffers and tensors kept as attributes are the same in both."""
    return _deepcopied(model, {id(tensor): tensor for tensor in _tensors(model)})


def _lazy_layers(duplicate: nn.Module) -> list[Any]:
    layers: list[Any] = [layer for layer in duplicate.modules() if isinstance(layer, LazyModuleMixin)]
    return [layer for layer in layers if layer.has_uninitialized_params()]


def _copied(model: nn.Module, replacement: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    duplicate = _deepcopied(model, {id(tensor): replacement(tensor) for tensor in _tensors(model)})
    for module in duplicate.modules():
        remove_hooks(module, lambda hook: not type(hook).__module__.startswith(OWN_HOOKS))
        if hasattr(vars(module).get("train"), "is_pinned"):  # of a pin, which would look at the flags of the copy
            del vars(module)["train"]
    return duplicate


def _deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:  # an attribute that cannot be copied, such as a lock: the copy shares it
        memo = memo | {id(value): value for value in _uncopyable(model, memo)}
        return copy.deepcopy(model, memo)


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):
        return _uninitialized(tensor, "meta")
    if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        empty = torch.empty_like(tensor, device="meta")
    else:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _fake(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    if is_lazy(tensor):
        return _uninitialized(tensor, "meta")
    if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        fake = torch.empty_like(tensor, device="cpu")
        return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    with unset_fake_temporarily():  # made directly: several times as fast as by an operation
        shape_only = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        fake = FakeTensor(fake_mode, shape_only, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        mark_as_parameter(fake)
    return fake


def _aliased(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):
        return _uninitialized(tensor, tensor.device)
    if isinstance(tensor, nn.Parameter):  # a subclass may hold more than its memory, and stays as it is
        return nn.Parameter(tensor.detach(), tensor.requires_grad) if type(tensor) is nn.Parameter else tensor
    return tensor.detach().clone()


def _uninitialized(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    kind: Any = UninitializedParameter if isinstance(tensor, UninitializedParameter) else UninitializedBuffer
    with unset_fake_temporarily():
        return kind(False, device=device, dtype=tensor.dtype)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():  # tensors kept as plain attributes
        for value in _attributes(module):
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple, dict)):
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _attributes(module: nn.Module) -> Iterator[Any]:
    """Yield the attributes of a module besides its parameters, buffers, layers and hooks."""
    return (value for name, value in vars(module).items() if name not in _MODULE_FIELDS)


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> Iterator[Any]:
    for module in model.modules():
        for value in _attributes(module):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                yield value


def _make_lazy_tensors(module: Any, args: Any, kwargs: Any) -> None:
    """Give a lazy layer its shapes, at its first call."""
    if isinstance(module, LazyModuleMixin) and cast(Any, module).has_uninitialized_params():
        infer_lazy_shapes(cast(nn.Module, module), args, kwargs)


def _make_lazy_fakes(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Give a lazy layer of a fake copy its shapes: on the meta device, then with fake tensors for the results."""
    with unset_fake_temporarily():
        stand_ins = tree_map(
            lambda leaf: (
                torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, torch.Tensor) else leaf
            ),
            (args, kwargs),
        )
        _make_lazy_tensors(module, *stand_ins)
    parameters, buffers = parameters_of(module), buffers_of(module)
    for name, tensor in parameters.items():
        if tensor is not None and tensor.is_meta:
            parameters[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False)
    for name, tensor in buffers.items():
        if tensor is not None and tensor.is_meta:
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)


_MODULE_FIELDS = frozenset(vars(nn.Module()))
