"""Build the networks of torchvision, timm and transformers that a recipe describes by arguments.

A recipe comes from a file that may hold anything. So the arguments are those of a short list, with plain values: others
of timm's read files. What may cost more than its weights, by its configuration, is built on the meta device first.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from regraft.card import Source
from regraft.checkpoint.recipes.transformers_config import PREFIX, build_from_config
from regraft.errors import ModelError, RegraftError
from regraft.surgery.layer_text.build import CountedConstruction, TooLargeError, max_elements
from regraft.surgery.layer_text.parse import shortened
from regraft.zoo import PYTHON, TIMM, build

OF_TORCHVISION = frozenset(
    (
        "num_classes",
        "aux_logits",
        "transform_input",
        "image_size",
        "dropout",
        "attention_dropout",
        "stochastic_depth_prob",
    )
)
OF_TIMM = frozenset(
    (
        *("num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate", "attn_drop_rate"),
        *("proj_drop_rate", "pos_drop_rate", "patch_drop_rate", "class_token", "dynamic_img_size", "dynamic_img_pad"),
    )
)
GROWING = ("img_size", "image_size")  # tables of positions grow with their squares
MAX_TEXT = 64  # characters of an argument
MAX_LAYERS = 100_000


def library_arguments(name: str) -> frozenset[str]:
    """Return the arguments that a recipe may give to the constructor of a network."""
    if name.startswith((PYTHON, PREFIX)):
        return frozenset()
    return OF_TIMM if name.startswith(TIMM) else OF_TORCHVISION


def build_source(source: Source) -> nn.Module:
    """Build the network of a library that a recipe starts from, with fresh weights.

    Raises:
        ModelError: The library has no such network, or does not build it with these arguments.
        EditError: It asks for more layers, operations or memory than a recipe may.
    """
    if source.name.startswith(PREFIX):
        data = source.arguments.get("config")
        if not isinstance(data, dict) or set(source.arguments) != {"config"}:
            raise ModelError(
                f"the recipe of '{shortened(source.name)}' has no configuration. Get or make the file again."
            )
        class_name = source.name.removeprefix(PREFIX)
        with _bounded():
            build_from_config(class_name, data)
        return build_from_config(class_name, data)
    arguments = {name: _argument(source.name, name, value) for name, value in source.arguments.items()}
    if any(name in arguments for name in GROWING):
        with _bounded():
            _build(source.name, arguments)
    return _build(source.name, arguments)


def _build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return build(name, arguments=arguments)
    except RegraftError:
        raise
    except Exception as error:  # constructors raise anything where an argument does not suit them
        shown = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
        raise ModelError(
            f"'{name}' cannot be built with {shown}: {type(error).__name__}: {str(error)[:200]}. Was another "
            "version of its library used?"
        ) from error


def _argument(source: str, name: str, value: Any) -> Any:
    """Return an argument as its constructor takes it.

    Raises:
        ModelError: It is not one of the list, or no plain value.
    """
    value = tuple(value) if isinstance(value, list) else value
    numbers = value if isinstance(value, tuple) and len(value) <= 3 else (value,)
    is_plain = isinstance(value, str) and len(value) <= MAX_TEXT
    if name in library_arguments(source) and (is_plain or all(isinstance(n, (bool, int, float)) for n in numbers)):
        return value
    raise ModelError(
        f"a recipe builds '{shortened(source)}' with {shortened(f'{name}={value!r}')}, which it may not. "
        f"Expected numbers or short texts for {', '.join(sorted(library_arguments(source))) or 'no argument'}."
    )


class _BoundedConstruction(CountedConstruction):
    """Limits the size of each tensor as well, as tables of positions grow with the square of an argument."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.numel() > (most := max_elements()):
            raise TooLargeError(
                f"a recipe asks for a tensor of {result.numel():,} elements, and {most:,} are the most."
            )
        return result


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Build on the meta device, and limit layers, operations and the size of each tensor, inside of the block.

    Raises:
        ModelError: Inside of the block, at the layer above the limit.
    """
    count, thread = 0, threading.get_ident()

    def registered(owner: nn.Module, name: str, layer: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > MAX_LAYERS:
            raise ModelError(f"a recipe asks for more than {MAX_LAYERS:,} layers, which are not built.")

    handle = hooks.register_module_module_registration_hook(registered)
    try:
        with _BoundedConstruction(), torch.device("meta"):
            yield
    finally:
        handle.remove()
