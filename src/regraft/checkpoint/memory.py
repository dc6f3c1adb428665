"""Build the network of a recipe in no more memory than the tensors need that go into it."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules import module as hooks

from regraft.anatomy.paths import parent_and_name
from regraft.card import Recipe
from regraft.checkpoint.create import rebuild
from regraft.checkpoint.foreign.limits import SLACK_BYTES
from regraft.errors import ArgumentError, CheckpointError, EditError, RegraftError
from regraft.surgery.layer_text.build import TooLargeError, at_most

Shapes = Mapping[str, tuple[int, ...]]


def rebuild_for(
    source: Path, recipe: Recipe, shapes: Shapes | None, *, kept_bytes: int, trust_code: bool = False
) -> nn.Module:
    """Build the network of a recipe, for these tensors to go into; its initial values are overwritten.

    A network that begins much larger than what was kept of it, as after a cut, is built without memory first. A file of
    a few bytes that names a network of gigabytes is so found out before these are taken.

    Args:
        source: The file, for the message.
        recipe: Of the network.
        shapes: Of what was kept, by name; None where that is not known, as of a delta alone.
        kept_bytes: Of all of it.
        trust_code: Whether code of the user's own may be imported; it may take what it wants.

    Raises:
        CheckpointError: The network needs other tensors than these, cannot be built without memory, or a step of the
            recipe does not fit.
        ModelError: The source is unknown here.
        TrustError: The source is code of the user's own and `trust_code` is false.
    """
    try:
        return _rebuilt(source, recipe, shapes, kept_bytes, trust_code)
    except (ArgumentError, EditError) as error:
        raise CheckpointError(f"'{source}' has a recipe that cannot be followed: {error}") from error


def _rebuilt(source: Path, recipe: Recipe, shapes: Shapes | None, kept_bytes: int, trust_code: bool) -> nn.Module:
    if trust_code:
        return rebuild(recipe, trust_code=True, unset=True)
    limit = kept_bytes + SLACK_BYTES
    with _counted(limit) as count:
        try:
            return rebuild(recipe, unset=True)
        except RegraftError as error:
            if count.taken <= limit and not isinstance(error, TooLargeError):
                raise
    try:
        with torch.device("meta"):
            model = rebuild(recipe)
    except RegraftError:
        raise
    except Exception as error:  # layers that look at their own values
        raise CheckpointError(
            f"'{source}' holds {kept_bytes:,} bytes of tensors, and its recipe begins with more than {limit:,}, which "
            f"cannot be built without memory ({type(error).__name__}). Where you trust it, build that network yourself "
            "and use load_weights(model, path)."
        ) from error
    if shapes is not None:
        _give_memory(source, model, shapes)
    return model


@dataclass
class _Count:
    limit: int
    taken: int = 0


@contextlib.contextmanager
def _counted(limit: int) -> Iterator[_Count]:
    """Refuse parameters and buffers beyond so many bytes while this thread builds, before they are written to."""
    count, thread = _Count(limit), threading.get_ident()

    def registered(owner: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if threading.get_ident() != thread or tensor is None or nn.parameter.is_lazy(tensor) or tensor.is_meta:
            return
        count.taken += tensor.nbytes if tensor.layout is torch.strided else 0
        if count.taken > limit:
            raise CheckpointError(f"the recipe asks for more than {limit:,} bytes. Nothing was written to them.")

    handles = [
        hooks.register_module_parameter_registration_hook(registered),
        hooks.register_module_buffer_registration_hook(registered),
    ]
    try:
        with at_most(limit // 4):
            yield count
    finally:
        for handle in handles:
            handle.remove()


def _give_memory(source: Path, model: nn.Module, shapes: Shapes) -> None:
    """Put tensors with memory into the places of those without, in place, where the file has them."""
    slots = model.state_dict(keep_vars=True)
    every = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    missing = next((name for name in [*slots, *every] if name not in slots or name not in shapes), None)
    if missing is not None:
        raise CheckpointError(
            f"'{source}' does not match its own recipe: it has nothing for '{missing}'. Where you trust it, build that "
            "network yourself and use load_weights(model, path)."
        )
    made: dict[int, torch.Tensor] = {}
    for name, slot in slots.items():
        if tuple(slot.shape) != shapes[name]:
            raise CheckpointError(
                f"'{source}' does not match its own recipe at '{name}': {shapes[name]} in the file, "
                f"{tuple(slot.shape)} in the model. Was another library version used?"
            )
        if id(slot) not in made:
            empty = torch.empty(slot.shape, dtype=slot.dtype, device="cpu")
            is_parameter = isinstance(slot, nn.Parameter)
            made[id(slot)] = nn.Parameter(empty, requires_grad=slot.requires_grad) if is_parameter else empty
        parent, attribute = parent_and_name(name)
        setattr(model.get_submodule(parent), attribute, made[id(slot)])
