"""Save a model's freeze state, and restore it exactly."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from regraft.arguments import check_arguments
from regraft.freezing.hold import PinState


@dataclass(frozen=True, eq=False)
class FreezeState:
    """Snapshot of the flags of parameters, the pins and modes of layers."""

    flags: tuple[tuple[nn.Parameter, bool], ...]
    layers: tuple[tuple[nn.Module, PinState, bool], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "FreezeState":
        """Take the state that `model` has now."""
        return cls(
            flags=tuple((parameter, parameter.requires_grad) for parameter in model.parameters()),
            layers=tuple((layer, PinState.of(layer), layer.training) for layer in model.modules()),
        )

    def put_back(self) -> None:
        """Restore the state of the parameters and layers that the model had at the time of the snapshot."""
        for parameter, trainable in self.flags:
            parameter.requires_grad = trainable  # also of one that is lazy, on which methods cannot be called
        for layer, pins, training in self.layers:
            pins.apply(layer)
            layer.training = training


@contextlib.contextmanager
def freeze_state(model: nn.Module) -> Iterator[FreezeState]:
    """Restore flags, pins and modes of layers when the block ends; also after an exception.

    Layers and parameters that are added inside the block keep their state; those that are removed are ignored.

    >>> model = nn.Linear(2, 2)
    >>> with freeze_state(model):
    ...     _ = model.requires_grad_(False)
    >>> model.weight.requires_grad
    True
    """
    check_arguments(freeze_state, locals())
    state = FreezeState.of(model)
    try:
        yield state
    finally:
        state.put_back()
