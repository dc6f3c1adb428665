"""Split a network whose forward cannot be traced: record what its first live layer is given, and go on from there.

The forward itself is run in either part. The prefix stops it at the first top-level layer that is live. The suffix
runs it with the layers before that one put to sleep: what they return is not a number, and only when the live layer is
called do the recorded tensors take over. So anything else that the forward takes from before shows up as NaN, and the
split is refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from regraft.anatomy.modes import preserved_randomness
from regraft.anatomy.values import BATCHES
from regraft.errors import ModelError
from regraft.frontier.liveness import is_live_layer

Form = tuple[TreeSpec, tuple[Any, ...]]  # of nested arguments: their structure, and what in them is no tensor


@dataclass(frozen=True)
class Boundary:
    """Where the live part begins.

    Attributes:
        layer: Name of the first live top-level layer.
        form: How the recorded tensors are passed to it.
        asleep: What each layer before it returns, call by call, as a function of the batch size.
        shapes: Of the recorded tensors, without the batch.
        dtypes: Of the recorded tensors.
        image: Shape and dtype of the network's own inputs, without the batch.
    """

    layer: str
    form: Form
    asleep: dict[str, tuple[Callable[[int, torch.device], Any], ...]]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    image: tuple[tuple[tuple[int, ...], torch.dtype], ...]


class Recording(nn.Module):
    """The prefix: from a network's inputs to what its first live layer is given, as a tuple of tensors.

    Its own layers, parameters and buffers are the network's that are constant; the network itself is held beside them.
    """

    def __init__(self, model: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self._held = (model,)
        self.boundary = boundary
        for name in boundary.asleep:
            self.add_module(name, model.get_submodule(name))
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    @property
    def kind(self) -> type[nn.Module]:
        """The class whose forward is recorded."""
        return type(self._held[0])

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: D102
        return _recorded(self._held[0], self.boundary, inputs)


class Replay(nn.Module):
    """The suffix: from what the first live layer is given to the network's output."""

    def __init__(self, model: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self.model, self.boundary = model, boundary

    def forward(self, *tensors: torch.Tensor) -> Any:  # noqa: D102
        count, device = len(tensors[0]), tensors[0].device
        inputs = [_nothing((count, *shape), dtype, device) for shape, dtype in self.boundary.image]
        calls = [0]

        def take_over(_: nn.Module, args: Any, kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > 1:
                return None
            return _unflattened(self.boundary.form, tensors)

        layer = self.model.get_submodule(self.boundary.layer)
        handle = layer.register_forward_pre_hook(take_over, with_kwargs=True, prepend=True)
        try:
            with _sleeping(self.model, self.boundary, count, device):
                output = self.model(*inputs)
        finally:
            handle.remove()
        if not calls[0]:
            raise ModelError(f"its forward goes elsewhere than to '{self.boundary.layer}' when the rest is replayed.")
        return output


def record_and_replay(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Recording, Replay, Boundary]:
    """Split `model` before its first live top-level layer.

    Args:
        model: A module that runs on its device.
        inputs: Only shapes and dtypes count.

    Raises:
        ModelError: No layer is constant before the first live one, or the forward takes more from before than what
            that layer is given. Nothing was changed.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with preserved_randomness(0):
        drawn = [
            tuple(_drawn((count, *x.shape[1:]), x.dtype, device) for x in inputs) for count in BATCHES
        ]  # real numbers: whatever cannot be traced looks at them
        boundary = _boundary(model, drawn)
        recording, replay = Recording(model, boundary), Replay(model, boundary)
        with torch.no_grad():
            _require_constant(recording, drawn[0])
            for training in (False, True):
                with _mode(model, training):
                    _require_equal(model, recording, replay, drawn[0], training)
    replay.training = model.training
    return recording, replay, boundary


def _boundary(model: nn.Module, drawn: list[tuple[torch.Tensor, ...]]) -> Boundary:
    live = {name for name, layer in model.named_children() if is_live_layer(layer)}
    found = [_followed(model, live, inputs) for inputs in drawn]
    (layer, given, before), (other_layer, other_given, other_before) = found
    if layer is None or layer != other_layer:
        raise ModelError("its forward calls no live layer, or not always the same one first.")
    if not before:
        raise ModelError(f"nothing is constant before its first live layer '{layer}'.")
    (tensors, form), (other_tensors, other_form) = _flattened(given), _flattened(other_given)
    is_batched = all(
        (len(a), len(b)) == BATCHES and a.shape[1:] == b.shape[1:] and not a.requires_grad
        for a, b in zip(tensors, other_tensors, strict=False)
    )
    if form != other_form or len(tensors) != len(other_tensors) or not tensors or not is_batched:
        raise ModelError(f"what its first live layer '{layer}' is given is not one row for each image.")
    if [name for name, _ in before] != [name for name, _ in other_before]:
        raise ModelError("its forward does not always call the same layers.")
    asleep: dict[str, tuple[Callable[[int, torch.device], Any], ...]] = {}
    for (name, output), (_, other) in zip(before, other_before, strict=True):
        asleep[name] = (*asleep.get(name, ()), _sleeper(name, output, other))
    return Boundary(
        layer,
        form,
        asleep,
        tuple(tuple(tensor.shape[1:]) for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        tuple((tuple(x.shape[1:]), x.dtype) for x in drawn[0]),
    )


def _followed(
    model: nn.Module, live: set[str], inputs: tuple[torch.Tensor, ...]
) -> tuple[str | None, Any, list[tuple[str, Any]]]:
    """Run a forward up to its first live layer: that layer's name, what it is given, and what those before it gave."""
    before: list[tuple[str, Any]] = []
    handles = []
    for name, layer in model.named_children():
        if name in live:
            handles.append(layer.register_forward_pre_hook(_stop(name), with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(lambda _, __, output, name=name: before.append((name, output))))
    try:
        with _mode(model, True), torch.enable_grad():
            model(*inputs)
    except _StoppedError as stopped:
        return stopped.name, stopped.given, before
    finally:
        for handle in handles:
            handle.remove()
    return None, None, before


def _recorded(model: nn.Module, boundary: Boundary, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    handle = model.get_submodule(boundary.layer).register_forward_pre_hook(_stop(boundary.layer), with_kwargs=True)
    try:
        with _mode(model, True):  # as it will be while it trains; what is frozen is pinned
            model(*inputs)
    except _StoppedError as stopped:
        tensors, form = _flattened(stopped.given)
        if form != boundary.form:
            raise ModelError(f"its forward passes something else to '{boundary.layer}' than before.") from stopped
        return tensors
    finally:
        handle.remove()
    raise ModelError(f"its forward ended without calling '{boundary.layer}'.")


class _StoppedError(Exception):
    """Carries what a layer was given out of a forward."""

    def __init__(self, name: str, given: Any) -> None:
        super().__init__()
        self.name, self.given = name, given


def _stop(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _StoppedError(name, (args, kwargs))

    return stop


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextlib.contextmanager
def _sleeping(model: nn.Module, boundary: Boundary, count: int, device: torch.device) -> Iterator[None]:
    """Let the layers before the boundary return nothing of worth, and compute nothing."""
    layers = {name: model.get_submodule(name) for name in boundary.asleep}
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__dict__["forward"] = _asleep(layer.forward, boundary.asleep[name], count, device)
    try:
        yield
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before[name]


def _asleep(forward: Any, makers: tuple[Any, ...], count: int, device: torch.device) -> Callable[..., Any]:
    coming = iter(makers)

    def run(*args: Any, **kwargs: Any) -> Any:
        make = next(coming, None)
        return forward(*args, **kwargs) if make is None else make(count, device)

    return run


def _sleeper(name: str, output: Any, other: Any) -> Callable[[int, torch.device], Any]:
    """Return what makes an output like these two, of batches of `BATCHES`, for a batch of any size."""

    def form_of(small: Any, large: Any) -> Any:
        if not isinstance(small, torch.Tensor):
            return lambda count, device: small
        sizes = [(a, b) for a, b in zip(small.shape, large.shape, strict=True)]
        if not small.is_floating_point() or any(a != b and (a, b) != BATCHES for a, b in sizes):
            raise ModelError(f"layer '{name}' returns something that cannot be left out.")
        dtype = small.dtype
        return lambda count, device: _nothing([a if a == b else count for a, b in sizes], dtype, device)

    forms = tree_map(form_of, output, other)
    return lambda count, device: tree_map(lambda make: make(count, device), forms)


def _nothing(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of NaN (0 for whole numbers) that takes no memory."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(*shape)


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device)


def _flattened(given: Any) -> tuple[tuple[torch.Tensor, ...], Form]:
    leaves, structure = tree_flatten(given)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return tensors, (structure, tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def _unflattened(form: Form, tensors: tuple[torch.Tensor, ...]) -> Any:
    structure, leaves = form
    coming = iter(tensors)
    return tree_unflatten([next(coming) if leaf is _TENSOR else leaf for leaf in leaves], structure)


def _require_constant(recording: Recording, inputs: tuple[torch.Tensor, ...]) -> None:
    """Record twice from different random states."""
    found = []
    for seed in (0, 1):
        with preserved_randomness(seed):
            found.append(recording(*inputs))
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise ModelError(f"its forward draws at random before '{recording.boundary.layer}'.")


def _require_equal(
    model: nn.Module, recording: Recording, replay: Replay, inputs: tuple[torch.Tensor, ...], training: bool
) -> None:
    """Compare the two parts with the whole, from the same random state."""
    found = []
    for run in (lambda: replay(*recording(*inputs)), lambda: model(*inputs)):
        kept = {name: tensor.clone() for name, tensor in model.named_buffers()}  # what batch norms count and average
        with preserved_randomness(0):
            found.append([leaf for leaf in tree_flatten(run())[0] if isinstance(leaf, torch.Tensor)])
        for name, tensor in model.named_buffers():
            tensor.copy_(kept[name])
    ours, theirs = found
    if len(ours) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        mode = "training" if training else "evaluation"
        raise ModelError(
            f"its forward takes more from before '{replay.boundary.layer}' than that layer is given (in {mode} mode)."
        )


class _Tensor:
    """Stands in the place of a tensor."""


_TENSOR = _Tensor()
