"""Stubs for the constant layers of a replay, and nested arguments split into tensors and structure.

A stub returns NaN of the right shape and computes nothing. NaN survives nearly all arithmetic, so a forward that uses
the output of a stubbed layer gives an output that differs from the network's, which the check after a split notices.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from regraft.anatomy.dataflow.values import BATCHES
from regraft.errors import ModelError
from regraft.torch_internals import TreeSpec, tree_flatten, tree_map, tree_unflatten

Stubs = dict[str, tuple[Callable[[int, torch.device], Any], ...]]  # layer → a function per call that creates its output
Form = tuple[TreeSpec, tuple[Any, ...]]  # of nested arguments: their structure, and the leaves that are not tensors


@contextlib.contextmanager
def stubbed(model: nn.Module, stubs: Stubs, count: int, device: torch.device) -> Iterator[None]:
    """Replace the forward of the layers before the boundary by stubs for the block.

    The stub is an attribute of the instance, which hides the forward of its class: class, hooks and children of the
    layer stay as they are.
    """
    layers = {name: model.get_submodule(name) for name in stubs}
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__dict__["forward"] = _stub_forward(layer.forward, stubs[name], count, device)
    try:
        yield
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before[name]


def _stub_forward(forward: Any, outputs: tuple[Any, ...], count: int, device: torch.device) -> Callable[..., Any]:
    remaining = iter(outputs)

    def run(*args: Any, **kwargs: Any) -> Any:
        # One stub for each call before the boundary; later calls of a shared layer get real inputs.
        create = next(remaining, None)
        return forward(*args, **kwargs) if create is None else create(count, device)

    return run


def stub(name: str, output: Any, other_output: Any) -> Callable[[int, torch.device], Any]:
    """Return a function that creates a placeholder of a layer's output for any batch size.

    Args:
        name: Path of the layer.
        output: Its output for the first of `BATCHES`.
        other_output: Its output for the second. A dimension that differs between the two is the batch dimension.

    Raises:
        ModelError: The output contains integers, which have no NaN, or sizes that depend on more than the batch.
    """

    def form_of(small: Any, large: Any) -> Any:
        if not isinstance(small, torch.Tensor):
            return lambda count, device: small
        sizes = [(a, b) for a, b in zip(small.shape, large.shape, strict=True)]
        if not small.is_floating_point() or any(a != b and (a, b) != BATCHES for a, b in sizes):
            raise ModelError(f"layer '{name}' returns a value that cannot be replaced by a stub.")
        dtype = small.dtype
        return lambda count, device: placeholder([a if a == b else count for a, b in sizes], dtype, device)

    forms = tree_map(form_of, output, other_output)
    return lambda count, device: tree_map(lambda create: create(count, device), forms)


def placeholder(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of NaN (0 for integers): one element in memory, expanded to the shape."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(*shape)


def flatten_call(call: Any) -> tuple[tuple[torch.Tensor, ...], Form]:
    """Split nested arguments into their tensors and their form; `unflatten_call` is the inverse."""
    leaves, structure = tree_flatten(call)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return tensors, (structure, tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def unflatten_call(form: Form, tensors: tuple[torch.Tensor, ...]) -> Any:
    """Return nested arguments of a form with these tensors in it."""
    structure, leaves = form
    remaining = iter(tensors)
    return tree_unflatten([next(remaining) if leaf is _TENSOR else leaf for leaf in leaves], structure)


_TENSOR = object()  # marks the place of a tensor in a form
