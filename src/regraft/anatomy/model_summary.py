"""Build the summary of a network: path, type, execution order, shape, size, cost and state of each layer."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.anatomy.inputs import Inputs, InputSize
from regraft.anatomy.mode_dependence import changes_while_training, follows_batch, is_pinned
from regraft.anatomy.recording import Call, Trace
from regraft.anatomy.summary_table import LayerSummary, ModelSummary, State
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.errors import ModelError
from regraft.torch_internals import children_of


def summary(
    model: nn.Module, input_size: InputSize | None = None, depth: int | None = None, *, inputs: Inputs | None = None
) -> ModelSummary:
    """Summarise `model` layer by layer. Nothing about the model is changed.

    Shapes come from a run on shapes alone, which reads no weight, or where a forward depends on values from one real
    forward on a copy (`note` says so). A model that can run neither way is summarised without shapes, and `problem`
    says why, unless `input_size` or `inputs` was given.

    Args:
        model: Any module.
        input_size: Shape of the input, batch included, as in (1, 3, 224, 224), or one shape for each of several inputs.
        depth: Number of levels to show below the model itself; None shows all.
        inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs; their values do not matter where
            shapes are enough. Neither this nor `input_size`: guessed.

    Raises:
        ModelError: `input_size` or `inputs` was given and the forward fails on it; the message names the layer.

    >>> from torch import nn
    >>> print(summary(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (1, 4)))
    layer       type        output  parameters  multiply-adds  state
    Sequential  Sequential  1×3             15             12  trainable
    ├─ 0        Linear      1×3             15             12  trainable
    └─ 1        ReLU        1×3              -              -
    15 parameters, 15 trainable (100 %), 12 multiply-adds for an input of 1×4
    outputs of all layers: 24 B
    """
    check_arguments(summary, locals())
    traced, problem = None, None
    try:
        traced = trace(model, input_size, inputs=inputs, counts=True)
    except ModelError as error:
        if input_size is not None or inputs is not None:
            raise
        problem = str(error)
    layers = tuple(_Rows(model, traced).build(model))
    if traced is None:
        return ModelSummary(layers, depth=depth, problem=problem)
    fed = next(call.input_shapes for call in traced.calls if not call.path)
    return ModelSummary(layers, fed[0] if fed else None, depth, None, fed, traced.note)


class _Rows:
    """Builds the rows of a summary from the top of a model down."""

    def __init__(self, model: nn.Module, traced: Trace | None) -> None:
        self._first_paths: dict[int, str] = {}
        self._sizes = _sizes(model, traced)
        self._is_traced = traced is not None
        self._calls: dict[str, list[Call]] = {}
        self._orders: dict[str, int] = {}
        for order, call in enumerate(traced.calls if traced else ()):
            self._calls.setdefault(call.path, []).append(call)
            self._orders.setdefault(call.path, order)
        inner = {around for path in self._calls for around in _ancestors(path)}
        self._leaf_bytes = sum(call.output_bytes for path in self._calls.keys() - inner for call in self._calls[path])

    def build(
        self, module: nn.Module, path: str = "", depth: int = 0, is_in_frozen: bool = False
    ) -> Iterator[LayerSummary]:
        """Yield the row of `module` and those of its inner layers; of a layer seen before, its row alone."""
        shared_with = self._first_paths.setdefault(id(module), path)
        row = self._row(module, path, depth, is_in_frozen, None if shared_with == path else shared_with)
        yield row
        if row.shared_with is not None:
            return
        is_frozen = row.state == "frozen" or (row.state == "no parameters" and is_in_frozen)
        for name, child in children_of(module).items():
            if child is not None:
                yield from self.build(child, f"{path}.{name}" if path else name, depth + 1, is_frozen)

    def _row(
        self, module: nn.Module, path: str, depth: int, is_in_frozen: bool, shared_with: str | None
    ) -> LayerSummary:
        parameters, buffers = list(module.parameters()), list(module.buffers())
        counted = [(self._sizes.get(id(tensor)), tensor) for tensor in parameters]
        state = _state([parameter for size, parameter in counted if size != 0])
        calls = self._calls.get(path, []) if shared_with is None else []
        first = calls[0].output_shapes if calls else ()
        activation_bytes = sum(call.output_bytes for call in calls) if path else self._leaf_bytes
        is_frozen = state == "frozen" or (state == "no parameters" and is_in_frozen)
        return LayerSummary(
            path=path,
            type=type(module).__name__,
            depth=depth,
            order=self._orders.get(path),
            output_shape=first[0] if first else None,
            parameters=sum(size or 0 for size, _ in counted),
            trainable=sum(size or 0 for size, parameter in counted if parameter.requires_grad),
            multiply_adds=sum(call.multiply_adds for call in calls) if calls else None,
            state=state,
            output_shapes=first,
            buffers=sum(self._sizes.get(id(buffer)) or 0 for buffer in buffers),
            activation_bytes=activation_bytes if self._is_traced else None,
            calls=len(calls),
            shared_with=shared_with,
            pinned=is_pinned(module),
            moves=(changes_while_training(module) or _batch_note(module)) if is_frozen else None,
            lazy=any(is_lazy(tensor) for tensor in (*parameters, *buffers)),
            unknown=sum(self._sizes.get(id(tensor)) is None for tensor in (*parameters, *buffers)),
        )


def _batch_note(module: nn.Module) -> str | None:
    return "its output follows its batch" if follows_batch(module) else None


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _sizes(model: nn.Module, traced: Trace | None) -> dict[int, int | None]:
    """Return the number of elements of each parameter and buffer by its identity; None where not known."""
    sizes = traced.sizes if traced else {}
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): sizes.get(name) if is_lazy(tensor) else tensor.numel() for name, tensor in named}


def _state(parameters: list[nn.Parameter]) -> State:
    flags = {parameter.requires_grad for parameter in parameters}
    if not flags:
        return "no parameters"
    if flags == {True, False}:
        return "partly frozen"
    return "trainable" if flags == {True} else "frozen"
