"""Take a model's freeze state, and put it back exactly."""

import contextlib
from collections.abc import Iterator

from torch import nn

from regraft.freezing.pins import is_pinned, pin, unpin


@contextlib.contextmanager
def freeze_state(model: nn.Module) -> Iterator[None]:
    """Put back on leaving what is frozen, what is pinned, and every layer's mode; also after an exception.

    Layers and parameters that are new inside the block keep what they have; those that are gone are passed over.

    >>> model = nn.Linear(2, 2)
    >>> with freeze_state(model):
    ...     _ = model.requires_grad_(False)
    >>> model.weight.requires_grad
    True
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [(layer, is_pinned(layer), layer.training) for layer in model.modules()]
    try:
        yield
    finally:
        for parameter, trainable in flags:
            parameter.requires_grad_(trainable)
        for layer, pinned, training in layers:
            (pin if pinned else unpin)(layer)
            layer.training = training
