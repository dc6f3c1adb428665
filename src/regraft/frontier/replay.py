"""Split a network whose forward cannot be traced: record the inputs of its first live layer, and replay from there.

Both parts run the network's own forward; no code is rewritten.

    network      x ─► stem ─► layer1 ─► layer2* ─► head* ─► scores         * holds trainable parameters
    recording    x ─► stem ─► layer1 ─► stop: return the arguments of layer2      once for each image
    replay         NaN ─► NaN ─► NaN ─► layer2* ─► head* ─► scores         in every epoch
                                         ▲ the recorded arguments

The replay has stubs in place of the constant layers before the cut. They return NaN and compute nothing. A pre-hook on
the first live layer exchanges the arguments of its first call for the recorded ones. Where the forward uses anything
else from before the cut, such as a skip connection from stem to head, the NaN reaches the output. Each split is
compared with the whole network on random inputs, and refused where they differ. Zeros could hide such a connection.

The first live layer may lie inside a layer that is live in part. Candidates are the innermost live layer and then those
around it. For each, a replay is tried without any of the network's inputs, and then with its integer inputs
(tokens, masks), which later layers may need as well.

Alternatives: running the constant layers in every epoch would save nothing; caching the outputs of all of them would
allow skip connections, but multiply the size of the cache; splitting the source of the forward would require an
analysis of arbitrary Python.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.dataflow.values import BATCHES
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.modes import preserved_randomness, temporary_mode
from regraft.anatomy.tracing import trace
from regraft.errors import ForwardError, ModelError
from regraft.frontier.forward_until import StoppedError, first_line, run_until_stopped, stop_at
from regraft.frontier.independence import difference, with_image_of
from regraft.frontier.liveness import is_live_layer
from regraft.frontier.stubs import Form, Stubs, flatten_call, placeholder, stub, stubbed, unflatten_call
from regraft.torch_internals import tree_leaves

Part = tuple[str, nn.Module, bool]  # path, layer, whether it is live


@dataclass(frozen=True)
class Boundary:
    """The cut before the first live layer.

    Attributes:
        layer: Path of the first live layer.
        form: How the recorded tensors are passed to it.
        stubs: For each constant layer before it, functions from batch size and device to a placeholder of its output,
            one for each call.
        shapes: Of the recorded tensors, without the batch dimension; those of the kept inputs come last.
        dtypes: Of the recorded tensors.
        inputs: An example of the network's own arguments.
        kept: Positions, among the network's input tensors, of those that are passed on to the replay.
    """

    layer: str
    form: Form
    stubs: Stubs
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    inputs: Arguments
    kept: tuple[int, ...]


class Recording(nn.Module):
    """The prefix: from a network's inputs to the arguments of its first live layer, as a tuple of tensors.

    Its submodules are the constant layers before the cut. Its own parameters and buffers are those that the network and
    the layers around the cut own directly, as their forwards may read them.
    """

    def __init__(self, model: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        # In a tuple, so that the network is no submodule: the digest of the prefix, which names the cached features,
        # must not depend on live layers.
        self._held = (model,)
        self.boundary = boundary
        for path in boundary.stubs:  # a dot separates layers in the names of modules, so none may be in one
            self.add_module(path.replace(".", "/"), model.get_submodule(path))
        enclosing = [model, *(model.get_submodule(path) for path in ancestors(boundary.layer))]
        for depth, layer in enumerate(enclosing):
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
        return _record(self._held[0], self.boundary, args, kwargs)


class Replay(nn.Module):
    """The suffix: from the arguments of the first live layer to the network's output."""

    def __init__(self, model: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        self.model, self.boundary = model, boundary

    def forward(self, *tensors: torch.Tensor) -> Any:  # noqa: D102
        # The forward runs from its beginning, on inputs of the right shape; what it does before the cut has no effect.
        count, device = len(tensors[0]), tensors[0].device
        recorded = tensors[: len(tensors) - len(self.boundary.kept)]
        inputs = _inputs(self.boundary, tensors[len(recorded) :], count, device)
        calls = [0]

        def replace_arguments(_: nn.Module, args: Any, kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > 1:  # later calls of the layer depend on the live part
                return None
            return unflatten_call(self.boundary.form, recorded)

        layer = self.model.get_submodule(self.boundary.layer)
        handle = layer.register_forward_pre_hook(replace_arguments, with_kwargs=True, prepend=True)
        try:
            with stubbed(self.model, self.boundary.stubs, count, device):
                output = self.model(*inputs.args, **inputs.kwargs)
        finally:
            handle.remove()
        if not calls[0]:  # it branches on a value that the stubs do not give
            raise ModelError(f"its forward does not call '{self.boundary.layer}' in a replay.")
        return output


def record_and_replay(model: nn.Module, arguments: Arguments) -> tuple[Recording, Replay, Boundary]:
    """Split `model` before its first live layer.

    Args:
        model: A module that runs on its device.
        arguments: An example of its arguments; `Arguments.drawn` says which of their values matter.

    Raises:
        ModelError: No layer is constant before the first live one, or the forward uses more from before the cut than
            the arguments of that layer. Nothing was changed.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with preserved_randomness(0):
        # Two batch sizes identify the batch dimension. The third batch is for the comparison with the network.
        drawn = [arguments.drawn(count, device) for count in (*BATCHES, BATCHES[0])]
        problem: ModelError | None = None
        parts = list(_parts(model, _unused_parameters(model, arguments)))
        for layer in _candidates(model, drawn[0], parts):
            try:
                return _split_at(model, layer, arguments, drawn, parts)
            except ModelError as error:
                problem = problem or error  # the error at the innermost layer is the one to report
    raise problem or ModelError("its forward calls no live layer.")


def _split_at(
    model: nn.Module, layer: str, arguments: Arguments, drawn: list[Arguments], parts: list[Part]
) -> tuple[Recording, Replay, Boundary]:
    boundary = _boundary(model, layer, arguments, drawn, parts)
    integers = tuple(position for position, tensor in enumerate(_tensors(arguments)) if not tensor.is_floating_point())
    problem: ModelError | None = None
    for kept in dict.fromkeys(((), integers)):
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
                    with temporary_mode(model, training):
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
    (call, before), (other_call, other_before) = (_run_up_to(model, layer, inputs, parts) for inputs in drawn[:2])
    if not before:
        raise ModelError(f"nothing is constant before its first live layer '{layer}'.")
    (tensors, form), (other_tensors, other_form) = flatten_call(call), flatten_call(other_call)
    is_batched = all(
        (len(a), len(b)) == BATCHES and a.shape[1:] == b.shape[1:] and not a.requires_grad
        for a, b in zip(tensors, other_tensors, strict=False)
        if a.ndim and b.ndim
    ) and all(tensor.ndim for tensor in tensors)
    if form != other_form:
        raise ModelError(f"the arguments of its first live layer '{layer}' do not always have the same structure.")
    if len(tensors) != len(other_tensors) or not tensors or not is_batched:
        raise ModelError(f"the arguments of its first live layer '{layer}' do not have one row for each image.")
    if [name for name, _ in before] != [name for name, _ in other_before]:
        raise ModelError("its forward does not always call the same layers.")
    stubs: Stubs = {}
    for (name, output), (_, other_output) in zip(before, other_before, strict=True):
        stubs[name] = (*stubs.get(name, ()), stub(name, output, other_output))
    return Boundary(
        layer,
        form,
        stubs,
        tuple(tuple(tensor.shape[1:]) for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        arguments,
        (),
    )


def _unused_parameters(model: nn.Module, arguments: Arguments) -> list[nn.Parameter]:
    """List the trainable parameters that the forward uses in neither mode, which do not make a layer live."""
    used: set[str] = set()
    for training in (False, True):
        try:
            used |= set(trace(model, inputs=arguments.args or arguments.kwargs, training=training).first_uses)
        except ForwardError:
            return []
    return [p for name, p in model.named_parameters() if p.requires_grad and name not in used]


def _parts(model: nn.Module, unused: list[nn.Parameter], path: str = "") -> Iterator[Part]:
    """List the outermost constant layers and all live layers, each with whether it is live."""
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
    """List the layers at which the live part may begin: the first live layer that is called, then those around it."""
    running: list[str] = []  # live layers that have been entered, the innermost last

    def begin(path: str, is_last: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            running.append(path)
            if is_last:
                raise StoppedError(path, None)

        return hook

    handles = []
    for path, layer, is_live in parts:
        if is_live:
            handles.append(layer.register_forward_pre_hook(begin(path, _is_wholly_live(layer))))
            # One that calls no live layer inside is live by its own parameters or randomness.
            handles.append(layer.register_forward_hook(stop_at(path)))
    run_until_stopped(model, inputs, handles)
    return running[::-1]


def _run_up_to(model: nn.Module, layer: str, inputs: Arguments, parts: list[Part]) -> tuple[Any, list[tuple[str, Any]]]:
    """Run a forward up to a layer, and return its arguments and the outputs of the constant layers before it."""
    before: list[tuple[str, Any]] = []
    handles = [model.get_submodule(layer).register_forward_pre_hook(stop_at(layer), with_kwargs=True)]
    for path, part, is_live in parts:
        if not is_live:
            handles.append(part.register_forward_hook(lambda _, __, output, path=path: before.append((path, output))))
    stopped = run_until_stopped(model, inputs, handles)
    if stopped is None:
        raise ModelError(f"its forward does not always call '{layer}'.")
    return stopped.call, before


def _record(model: nn.Module, boundary: Boundary, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
    handle = model.get_submodule(boundary.layer).register_forward_pre_hook(stop_at(boundary.layer), with_kwargs=True)
    try:
        with temporary_mode(model, True):  # the mode in which it will train; frozen layers are pinned to evaluation
            model(*args, **kwargs)
    except StoppedError as stopped:
        tensors, form = flatten_call(stopped.call)
        if form != boundary.form:
            raise ModelError(
                f"the arguments of '{boundary.layer}' have another structure than in the recording."
            ) from stopped
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return (*tensors, *(inputs[position] for position in boundary.kept))
    finally:
        handle.remove()
    raise ModelError(f"its forward ended without calling '{boundary.layer}'.")


def _tensors(arguments: Arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((arguments.args, arguments.kwargs)) if isinstance(leaf, torch.Tensor)]


def _inputs(boundary: Boundary, kept: tuple[torch.Tensor, ...], count: int, device: torch.device) -> Arguments:
    """Return the network's arguments in a replay: the kept inputs, and placeholders for all others."""
    kept_at = dict(zip(boundary.kept, kept, strict=True))
    position = -1

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal position
        position += 1
        return kept_at[position] if position in kept_at else placeholder(tensor.shape, tensor.dtype, device)

    return boundary.inputs.of_batch(count).mapped(fill)


def _require_constant(recording: Recording, drawn: list[Arguments]) -> None:
    """Refuse a recording that differs from run to run, or with the other images of a batch.

    The first batch is recorded twice from different random states, and one of its images in a second batch.
    """
    recordings = []
    first, mixed_in = with_image_of(*drawn[:2])
    for seed, inputs in enumerate((first, first, mixed_in)):
        with preserved_randomness(seed):
            recordings.append(recording(*inputs.args, **inputs.kwargs))
    problem = difference(*recordings)
    if problem is not None:
        raise ModelError(f"its forward {problem} before '{recording.boundary.layer}'.")


def _require_equal(model: nn.Module, recording: Recording, replay: Replay, inputs: Arguments, training: bool) -> None:
    """Refuse two parts whose output differs from the network's, bit for bit, from the same random state."""
    args, kwargs = inputs.args, inputs.kwargs
    outputs = []
    for run in (lambda: replay(*recording(*args, **kwargs)), lambda: model(*args, **kwargs)):
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}  # batch norms count and average
        try:
            with preserved_randomness(0):
                outputs.append([leaf for leaf in tree_leaves(run()) if isinstance(leaf, torch.Tensor)])
        except ModelError:
            raise
        except Exception as error:  # arbitrary user code, run on NaN
            raise ModelError(f"its forward fails when it is replayed: {first_line(error)}.") from error
        finally:
            for name, tensor in model.named_buffers():
                tensor.copy_(buffers[name])
    parted, whole = outputs
    if len(parted) != len(whole) or not all(torch.equal(a, b) for a, b in zip(parted, whole, strict=True)):
        mode = "training" if training else "evaluation"
        raise ModelError(
            f"its forward uses more from before '{replay.boundary.layer}' than that layer's arguments ({mode} mode)."
        )
