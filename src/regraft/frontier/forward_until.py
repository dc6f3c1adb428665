"""Run a forward up to one layer, and return the arguments with which that layer is called.

A forward pre-hook raises `StoppedError`, which carries the arguments out through whatever Python code lies between. So
nothing after the layer runs, however deep in the network it lies. The forward must not catch every exception itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from regraft.anatomy.inputs import Arguments
from regraft.anatomy.modes import temporary_mode
from regraft.errors import ModelError


class StoppedError(Exception):
    """Carries the arguments of a layer, as (args, kwargs), out of a forward."""

    def __init__(self, path: str, call: Any) -> None:
        super().__init__()
        self.path, self.call = path, call


def stop_at(path: str) -> Callable[[nn.Module, Any, Any], None]:
    """Return a forward pre-hook (with keyword arguments) or forward hook that stops the forward at its layer."""

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise StoppedError(path, (args, kwargs))

    return stop


def run_until_stopped(model: nn.Module, inputs: Arguments, handles: list[Any]) -> StoppedError | None:
    """Run a forward in training mode until a hook stops it, and remove the hooks; None where no hook did.

    Gradients are enabled, as `_boundary` of `replay` reads from `requires_grad` whether a tensor is live.

    Raises:
        ModelError: The forward fails.
    """
    try:
        with temporary_mode(model, True), torch.enable_grad():
            model(*inputs.args, **inputs.kwargs)
    except StoppedError as stopped:
        return stopped
    except Exception as error:  # arbitrary user code: a forward may raise anything
        raise ModelError(f"its forward fails on random inputs: {first_line(error)}.") from error
    finally:
        for handle in handles:
            handle.remove()
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message without its period, or its type where there is no message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
