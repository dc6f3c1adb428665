"""Stubs: what stands in the place of constant layers in a replay, and returns what is not a number."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from regraft.anatomy.dataflow.values import BATCHES
from regraft.errors import ModelError

Stubs = dict[str, tuple[Callable[[int, torch.device], Any], ...]]  # what each layer returns, call by call


@contextlib.contextmanager
def stubbed(model: nn.Module, stubs: Stubs, count: int, device: torch.device) -> Iterator[None]:
    """Let the layers before the boundary return nothing of worth, and compute nothing."""
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


def _stub_forward(forward: Any, makers: tuple[Any, ...], count: int, device: torch.device) -> Callable[..., Any]:
    coming = iter(makers)

    def run(*args: Any, **kwargs: Any) -> Any:
        make = next(coming, None)
        return forward(*args, **kwargs) if make is None else make(count, device)

    return run


def stub(name: str, output: Any, other: Any) -> Callable[[int, torch.device], Any]:
    """Return what makes an output like these two, of batches of `BATCHES`, for a batch of any size."""

    def form_of(small: Any, large: Any) -> Any:
        if not isinstance(small, torch.Tensor):
            return lambda count, device: small
        sizes = [(a, b) for a, b in zip(small.shape, large.shape, strict=True)]
        if not small.is_floating_point() or any(a != b and (a, b) != BATCHES for a, b in sizes):
            raise ModelError(f"layer '{name}' returns something that cannot be left out.")
        dtype = small.dtype
        return lambda count, device: nothing([a if a == b else count for a, b in sizes], dtype, device)

    forms = tree_map(form_of, output, other)
    return lambda count, device: tree_map(lambda make: make(count, device), forms)


def nothing(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of NaN (0 for whole numbers) that takes no memory."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(*shape)
