"""Split a network whose forward cannot be traced: record what its first live layer is given, and go on from there.

The forward itself is run in either part. The prefix stops it at the first layer that is live, however deep it lies. The
suffix runs it with stubs in the place of the constant layers before that one: what they return is not a number, and
only when the live layer is called do the recorded tensors take over. So anything else that the forward takes from
before shows up as NaN, and the split is refused.

The first live layer may be one inside another that is live in part. Tried are the innermost and then those around it,
and for each of them a replay that is given none of the network's inputs, and one that is given those of whole numbers
(tokens, masks), as later layers may need these as well.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.dataflow.values import BATCHES
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.modes import preserved_randomness
from regraft.anatomy.tracing import trace
from regraft.errors import ForwardError, ModelError
from regraft.frontier.independence import difference, with_image_of
from regraft.frontier.liveness import is_live_layer
from regraft.frontier.stubs import Stubs, nothing, stub, stubbed

Part = tuple[str, nn.Module, bool]  # path, layer, whether it is live
Form = tuple[TreeSpec, tuple[Any, ...]]  # of nested arguments: their structure, and what in them is no tensor


@dataclass(frozen=True)
class Boundary:
    """Where the live part begins.

    Attributes:
        layer: Path of the first live layer.
        form: How the recorded tensors are passed to it.
        stubs: What each constant layer before it returns, call by call, as a function of the batch size.
        shapes: Of the recorded tensors, without the batch; those of the inputs that are kept come last.
        dtypes: Of the recorded tensors.
        inputs: How the network itself is called.
        kept: Positions, among the tensors that it is called with, of those that the replay is given.
    """

    layer: str
    form: Form
    stubs: Stubs
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    inputs: Arguments
    kept: tuple[int, ...]


class Recording(nn.Module):
    """The prefix: from a network's inputs to what its first live layer is given, as a tuple of tensors.

    Its own layers, parameters and buffers are the network's that are constant; the network itself is held beside them.
    """

    def __init__(self, model: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self._held = (model,)
        self.boundary = boundary
        for path in boundary.stubs:
            self.add_module(path.replace(".", "/"), model.get_submodule(path))
        around = [model, *(model.get_submodule(path) for path in ancestors(boundary.layer))]
        for depth, layer in enumerate(around):
            prefix = f"{depth}/" if depth else ""
            for name, parameter in layer.named_parameters(recurse=False):
                self.register_parameter(prefix + name, parameter)
            for name, buffer in layer.named_buffers(recurse=False):
                self.register_buffer(prefix + name, buffer)

    @property
    def kind(self) -> type[nn.Module]:
        """The class whose forward is recorded."""
        return type(self._held[0])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:  # noqa: D102
        return _recorded(self._held[0], self.boundary, args, kwargs)


class Replay(nn.Module):
    """The suffix: from what the first live layer is given to the network's output."""

    def __init__(self, model: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self.model, self.boundary = model, boundary

    def forward(self, *tensors: torch.Tensor) -> Any:  # noqa: D102
        count, device = len(tensors[0]), tensors[0].device
        own = tensors[: len(tensors) - len(self.boundary.kept)]
        inputs = _inputs(self.boundary, tensors[len(own) :], count, device)
        calls = [0]

        def take_over(_: nn.Module, args: Any, kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > 1:
                return None
            return _unflattened(self.boundary.form, own)

        layer = self.model.get_submodule(self.boundary.layer)
        handle = layer.register_forward_pre_hook(take_over, with_kwargs=True, prepend=True)
        try:
            with stubbed(self.model, self.boundary.stubs, count, device):
                output = self.model(*inputs.args, **inputs.kwargs)
        finally:
            handle.remove()
        if not calls[0]:
            raise ModelError(f"its forward goes elsewhere than to '{self.boundary.layer}' when the rest is replayed.")
        return output


def record_and_replay(model: nn.Module, arguments: Arguments) -> tuple[Recording, Replay, Boundary]:
    """Split `model` before its first live layer.

    Args:
        model: A module that runs on its device.
        arguments: An example of what it is called with; see `Arguments.drawn` for what counts of the values.

    Raises:
        ModelError: No layer is constant before the first live one, or the forward takes more from before than what
            that layer is given. Nothing was changed.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with preserved_randomness(0):
        drawn = [arguments.drawn(count, device) for count in (*BATCHES, BATCHES[0])]
        problem: ModelError | None = None
        parts = list(_parts(model, _unused(model, arguments)))
        for layer in _candidates(model, drawn[0], parts):
            try:
                return _split_at(model, layer, arguments, drawn, parts)
            except ModelError as error:
                problem = problem or error
    raise problem or ModelError("its forward calls no live layer.")


def _split_at(
    model: nn.Module, layer: str, arguments: Arguments, drawn: list[Arguments], parts: list[Part]
) -> tuple[Recording, Replay, Boundary]:
    boundary = _boundary(model, layer, arguments, drawn, parts)
    whole = tuple(position for position, tensor in enumerate(_tensors(arguments)) if not tensor.is_floating_point())
    problem: ModelError | None = None
    for kept in dict.fromkeys(((), whole)):
        leaves = [_tensors(arguments)[position] for position in kept]
        with_inputs = replace(
            boundary,
            shapes=(*boundary.shapes, *(tuple(leaf.shape[1:]) for leaf in leaves)),
            dtypes=(*boundary.dtypes, *(leaf.dtype for leaf in leaves)),
            kept=kept,
        )
        recording, replay = Recording(model, with_inputs), Replay(model, with_inputs)
        replay.training = model.training
        try:
            with torch.no_grad():
                _require_constant(recording, drawn)
                for training in (False, True):
                    with _mode(model, training):
                        _require_equal(model, recording, replay, drawn[2], training)
        except ModelError as error:
            problem = problem or error
        else:
            return recording, replay, with_inputs
    assert problem is not None
    raise problem


def _boundary(
    model: nn.Module, layer: str, arguments: Arguments, drawn: list[Arguments], parts: list[Part]
) -> Boundary:
    (given, before), (other_given, other_before) = (_followed(model, layer, inputs, parts) for inputs in drawn[:2])
    if not before:
        raise ModelError(f"nothing is constant before its first live layer '{layer}'.")
    (tensors, form), (other_tensors, other_form) = _flattened(given), _flattened(other_given)
    is_batched = all(
        (len(a), len(b)) == BATCHES and a.shape[1:] == b.shape[1:] and not a.requires_grad
        for a, b in zip(tensors, other_tensors, strict=False)
        if a.ndim and b.ndim
    ) and all(tensor.ndim for tensor in tensors)
    if form != other_form:
        raise ModelError(f"what its first live layer '{layer}' is given has not always the same form.")
    if len(tensors) != len(other_tensors) or not tensors or not is_batched:
        raise ModelError(f"what its first live layer '{layer}' is given is not one row for each image.")
    if [name for name, _ in before] != [name for name, _ in other_before]:
        raise ModelError("its forward does not always call the same layers.")
    stubs: Stubs = {}
    for (name, output), (_, other) in zip(before, other_before, strict=True):
        stubs[name] = (*stubs.get(name, ()), stub(name, output, other))
    return Boundary(
        layer,
        form,
        stubs,
        tuple(tuple(tensor.shape[1:]) for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        arguments,
        (),
    )


def _unused(model: nn.Module, arguments: Arguments) -> list[nn.Parameter]:
    """List the trainable parameters that the forward uses in neither mode."""
    used: set[str] = set()
    for training in (False, True):
        try:
            used |= set(trace(model, inputs=arguments.args or arguments.kwargs, training=training).first_uses)
        except ForwardError:
            return []
    return [p for name, p in model.named_parameters() if p.requires_grad and name not in used]


def _parts(model: nn.Module, unused: list[nn.Parameter], path: str = "") -> Iterator[Part]:
    """List the outermost constant layers and all live ones, with whether each is live."""
    for name, layer in model.named_children():
        inner = f"{path}.{name}".lstrip(".")
        is_live = is_live_layer(layer, unused)
        yield inner, layer, is_live
        if is_live and not _is_wholly_live(layer):
            yield from _parts(layer, unused, inner)


def _is_wholly_live(layer: nn.Module) -> bool:
    flags = {parameter.requires_grad for parameter in layer.parameters()}
    return flags == {True} or not any(True for _ in layer.children())


def _candidates(model: nn.Module, inputs: Arguments, parts: list[Part]) -> list[str]:
    """List the layers at which the live part may begin: the first live one that is called, and those around it."""
    running: list[str] = []

    def begin(path: str, is_last: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            running.append(path)
            if is_last:
                raise _StoppedError(path, None)

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            raise _StoppedError(path, None)

        return hook

    handles = []
    for path, layer, is_live in parts:
        if is_live:
            handles.append(layer.register_forward_pre_hook(begin(path, _is_wholly_live(layer))))
            handles.append(layer.register_forward_hook(end(path)))
    _run_until_stopped(model, inputs, handles)
    return running[::-1]


def _followed(model: nn.Module, layer: str, inputs: Arguments, parts: list[Part]) -> tuple[Any, list[tuple[str, Any]]]:
    """Run a forward up to a layer: what that is given, and what the constant layers before it gave."""
    before: list[tuple[str, Any]] = []
    handles = [model.get_submodule(layer).register_forward_pre_hook(_stop(layer), with_kwargs=True)]
    for path, part, is_live in parts:
        if not is_live:
            handles.append(part.register_forward_hook(lambda _, __, output, path=path: before.append((path, output))))
    stopped = _run_until_stopped(model, inputs, handles)
    if stopped is None:
        raise ModelError(f"its forward does not always call '{layer}'.")
    return stopped.given, before


def _run_until_stopped(model: nn.Module, inputs: Arguments, handles: list[Any]) -> "_StoppedError | None":
    try:
        with _mode(model, True), torch.enable_grad():
            model(*inputs.args, **inputs.kwargs)
    except _StoppedError as stopped:
        return stopped
    except Exception as error:  # of anybody's forward
        raise ModelError(f"its forward fails on random inputs: {_reason(error)}.") from error
    finally:
        for handle in handles:
            handle.remove()
    return None


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _recorded(model: nn.Module, boundary: Boundary, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
    handle = model.get_submodule(boundary.layer).register_forward_pre_hook(_stop(boundary.layer), with_kwargs=True)
    try:
        with _mode(model, True):  # as it will be while it trains; what is frozen is pinned
            model(*args, **kwargs)
    except _StoppedError as stopped:
        tensors, form = _flattened(stopped.given)
        if form != boundary.form:
            raise ModelError(f"its forward passes something else to '{boundary.layer}' than before.") from stopped
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return (*tensors, *(inputs[position] for position in boundary.kept))
    finally:
        handle.remove()
    raise ModelError(f"its forward ended without calling '{boundary.layer}'.")


def _tensors(arguments: Arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((arguments.args, arguments.kwargs)) if isinstance(leaf, torch.Tensor)]


def _inputs(boundary: Boundary, kept: tuple[torch.Tensor, ...], count: int, device: torch.device) -> Arguments:
    """Return what the network is called with in a replay: the inputs that are kept, and nothing else of worth."""
    at = dict(zip(boundary.kept, kept, strict=True))
    position = -1

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal position
        position += 1
        return at[position] if position in at else nothing(tensor.shape, tensor.dtype, device)

    return boundary.inputs.of_batch(count).mapped(fill)


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


def _flattened(given: Any) -> tuple[tuple[torch.Tensor, ...], Form]:
    leaves, structure = tree_flatten(given)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return tensors, (structure, tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def _unflattened(form: Form, tensors: tuple[torch.Tensor, ...]) -> Any:
    structure, leaves = form
    coming = iter(tensors)
    return tree_unflatten([next(coming) if leaf is _TENSOR else leaf for leaf in leaves], structure)


def _require_constant(recording: Recording, drawn: list[Arguments]) -> None:
    """Record twice from different random states, and an image of one batch in another."""
    found = []
    first, other = with_image_of(*drawn[:2])
    for seed, inputs in enumerate((first, first, other)):
        with preserved_randomness(seed):
            found.append(recording(*inputs.args, **inputs.kwargs))
    problem = difference(*found)
    if problem is not None:
        raise ModelError(f"its forward {problem} before '{recording.boundary.layer}'.")


def _require_equal(model: nn.Module, recording: Recording, replay: Replay, inputs: Arguments, training: bool) -> None:
    """Compare the two parts with the whole, from the same random state."""
    args, kwargs = inputs.args, inputs.kwargs
    found = []
    for run in (lambda: replay(*recording(*args, **kwargs)), lambda: model(*args, **kwargs)):
        kept = {name: tensor.clone() for name, tensor in model.named_buffers()}  # what batch norms count and average
        try:
            with preserved_randomness(0):
                found.append([leaf for leaf in tree_flatten(run())[0] if isinstance(leaf, torch.Tensor)])
        except ModelError:
            raise
        except Exception as error:  # of a forward that is fed with what is not a number
            raise ModelError(f"its forward fails when it is replayed: {_reason(error)}.") from error
        finally:
            for name, tensor in model.named_buffers():
                tensor.copy_(kept[name])
    ours, reference = found
    if len(ours) != len(reference) or not all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True)):
        mode = "training" if training else "evaluation"
        raise ModelError(
            f"its forward takes more from before '{replay.boundary.layer}' than that layer is given (in {mode} mode)."
        )


class _Tensor:
    """Stands in the place of a tensor."""


_TENSOR = _Tensor()
