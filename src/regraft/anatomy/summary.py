"""What a network consists of: each layer's path, type, place in the execution order, shape, size, cost and state."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from regraft.anatomy.render import html_table, text_tree
from regraft.anatomy.tracing import Call, Shape, trace
from regraft.errors import ModelError

State = Literal["trainable", "frozen", "partly frozen", "no parameters"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a model.

    Attributes:
        path: Dotted path; empty for the model itself.
        type: Name of the layer's class.
        depth: Number of layers above it.
        order: Position in the execution order, from 0; None for a layer that is not called.
        output_shape: Shape of its (first) output, batch included; None where unknown.
        parameters: Number of parameters, inner layers included; a shared one counts once.
        trainable: How many of them are trainable.
        multiply_adds: Multiply-add operations, inner layers included; None where the model cannot run on shapes.
        state: `trainable`, `frozen`, `partly frozen`, or `no parameters`.
    """

    path: str
    type: str
    depth: int
    order: int | None
    output_shape: Shape | None
    parameters: int
    trainable: int
    multiply_adds: int | None
    state: State


@dataclass(frozen=True)
class ModelSummary:
    """A tree of layers as a table; `str()` gives it as text, notebooks show it as HTML.

    Attributes:
        layers: All layers, the model itself first, in registration order.
        input_shape: Shape of the input that the shapes and costs are for, batch included; None where unknown.
        depth: How many levels are shown; None: all. `layers` always holds all.
        problem: Why shapes and multiply-adds are unknown; None where they are known.
    """

    layers: tuple[LayerSummary, ...]
    input_shape: Shape | None = None
    depth: int | None = None
    problem: str | None = None

    @property
    def shown(self) -> tuple[LayerSummary, ...]:
        """The layers down to `depth`."""
        return tuple(layer for layer in self.layers if self.depth is None or layer.depth <= self.depth)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data, with the totals beside the layers."""
        root = self.layers[0]
        return {
            "type": root.type,
            "input_shape": self.input_shape,
            "parameters": root.parameters,
            "trainable": root.trainable,
            "multiply_adds": root.multiply_adds,
            "problem": self.problem,
            "layers": [asdict(layer) for layer in self.shown],
        }

    def __str__(self) -> str:
        return text_tree(self)

    def _repr_html_(self) -> str:
        return html_table(self)


def summary(model: nn.Module, input_size: Sequence[int] | None = None, depth: int | None = None) -> ModelSummary:
    """Summarise `model` layer by layer. Nothing about the model is changed, and no weight is read.

    Shapes come from a run on shapes alone. A model that cannot run so is summarised without shapes, and `problem` says
    why, unless `input_size` was given.

    Args:
        model: Any module whose forward takes one tensor.
        input_size: Shape of the input, batch included, as in (1, 3, 224, 224); guessed where not given.
        depth: Number of levels to show below the model itself; None shows all.

    Raises:
        ModelError: `input_size` was given and the forward fails on it; the message names the layer.

    >>> from torch import nn
    >>> print(summary(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (1, 4)))
    layer       type        output  parameters  multiply-adds  state
    Sequential  Sequential  1×3             15             12  trainable
    ├─ 0        Linear      1×3             15             12  trainable
    └─ 1        ReLU        1×3              -              -
    15 parameters, 15 trainable (100 %), 12 multiply-adds for an input of 1×4
    """
    problem = None
    try:
        calls = trace(model, input_size).calls
    except ModelError as error:
        if input_size is not None:
            raise
        calls, problem = (), str(error)
    orders: dict[str, int] = {}
    first_calls: dict[str, Call] = {}
    multiply_adds: dict[str, int] = {}
    for order, call in enumerate(calls):
        orders.setdefault(call.path, order)
        first_calls.setdefault(call.path, call)
        multiply_adds[call.path] = multiply_adds.get(call.path, 0) + call.multiply_adds
    layers = []
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        call = first_calls.get(path)
        layers.append(
            LayerSummary(
                path=path,
                type=type(module).__name__,
                depth=path.count(".") + 1 if path else 0,
                order=orders.get(path),
                output_shape=call.output_shapes[0] if call and call.output_shapes else None,
                parameters=total,
                trainable=trainable,
                multiply_adds=multiply_adds.get(path) if calls else None,
                state=_state(total, trainable),
            )
        )
    input_shape = first_calls[""].input_shapes[0] if calls else None
    return ModelSummary(tuple(layers), input_shape, depth, problem)


def _state(total: int, trainable: int) -> State:
    if total == 0:
        return "no parameters"
    if trainable == 0:
        return "frozen"
    return "trainable" if trainable == total else "partly frozen"
