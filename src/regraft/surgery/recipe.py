"""Apply the steps of a recipe."""

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn

from regraft.card import Step
from regraft.errors import ArgumentError, EditError, RegraftError
from regraft.surgery.edits import append, insert, truncate
from regraft.surgery.head import replace_head
from regraft.surgery.layer_text.build import construct, construct_all
from regraft.surgery.layer_text.parse import shortened
from regraft.surgery.stem import replace_stem
from regraft.surgery.swap import remove, replace

MAX_MESSAGE = 2000  # characters; a step may list a thousand layers
LAYERS = ("new", "layers")  # arguments that hold layers, described as text


def apply_step(model: nn.Module, step: Step, *, trust_code: bool = False) -> nn.Module:
    """Apply one step of a recipe.

    Raises:
        EditError: The step does not fit, or its arguments are not those of the operation.
        TrustError: It names a class of the user's own, and `trust_code` is false.
    """
    shown = shortened(str(step), 200)
    arguments = {name: _build(value, trust_code) if name in LAYERS else value for name, value in step.arguments.items()}
    edit: Callable[..., nn.Module] = {
        "append": lambda model, layers: append(model, *layers),
        "insert": insert,
        "remove": remove,
        "replace": replace,
        "replace_head": replace_head,
        "replace_stem": replace_stem,
        "truncate": truncate,
    }[step.operation]
    try:
        inspect.signature(edit).bind(model, **arguments)
    except TypeError as error:
        raise EditError(
            f"{shown} cannot be applied: {error}. Its arguments are those of regraft.{step.operation}."
        ) from error
    try:
        return edit(model, **arguments)
    except EditError as error:
        if len(str(error)) <= MAX_MESSAGE:
            raise
        raise EditError(shortened(str(error), MAX_MESSAGE)) from error
    except ArgumentError as error:
        raise EditError(f"{shown} cannot be applied: {error}") from error
    except RegraftError:
        raise
    except Exception as error:  # a recipe is data from anywhere
        raise EditError(
            f"{shown} cannot be applied: {type(error).__name__}: {str(error)[:200]}. Its arguments are those of "
            f"regraft.{step.operation}."
        ) from error


def _build(value: Any, trust_code: bool) -> Any:
    if isinstance(value, list):
        # One text may name several layers.
        built = (construct_all(item, trust_code=trust_code) if isinstance(item, str) else [item] for item in value)
        return list(chain.from_iterable(built))
    if isinstance(value, dict):
        return {path: _build(layer, trust_code) for path, layer in value.items()}
    return construct(value, trust_code=trust_code) if isinstance(value, str) else value
