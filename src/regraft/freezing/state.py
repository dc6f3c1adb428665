"""Take a model's freeze state, and put it back exactly."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from regraft.freezing.hold import PinState


@dataclass(frozen=True, eq=False)
class FreezeState:
    """What is frozen, what is pinned, and every layer's mode, at one moment."""

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
        """Give the parameters and layers that the model had then the state that they had."""
        for parameter, trainable in self.flags:
            parameter.requires_grad_(trainable)
        for layer, pins, training in self.layers:
            pins.apply(layer)
            layer.training = training


@contextlib.contextmanager
def freeze_state(model: nn.Module) -> Iterator[FreezeState]:
    """Put back on leaving what is frozen, what is pinned, and every layer's mode; also after an exception.

    Layers and parameters that are new inside the block keep what they have; those that are gone are passed over.

    >>> model = nn.Linear(2, 2)
    >>> with freeze_state(model):
    ...     _ = model.requires_grad_(False)
    >>> model.weight.requires_grad
    True
    """
    state = FreezeState.of(model)
    try:
        yield state
    finally:
        state.put_back()
