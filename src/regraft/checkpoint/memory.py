"""Build the network of a recipe within a memory limit: the size of the checkpoint's tensors, plus slack."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.modules import module as hooks

from regraft.anatomy.paths import parent_and_name
from regraft.card import Recipe
from regraft.checkpoint.foreign.limits import SLACK_BYTES
from regraft.checkpoint.rebuilding import rebuild
from regraft.errors import ArgumentError, CheckpointError, EditError, RegraftError
from regraft.surgery.layer_text.build import TooLargeError, at_most

Shapes = Mapping[str, tuple[int, ...]]


def rebuild_for(
    source: Path,
    recipe: Recipe,
    shapes: Shapes | None,
    *,
    kept_bytes: int,
    trust_code: bool = False,
    unset: bool = True,
) -> nn.Module:
    """Build the network of a recipe as a target for the tensors of a checkpoint.

    A network that starts much larger than the checkpoint, such as one that was truncated later, is built on the meta
    device first. So a small file that names a network of gigabytes cannot take that memory.

    Args:
        source: The file, for the message.
        recipe: The recipe of the network.
        shapes: Shape of each tensor in the checkpoint, by name; None if unknown, as for a delta without its base.
        kept_bytes: Size of all tensors in the checkpoint.
        trust_code: Whether the user's own code may be imported; memory is not limited then.
        unset: Whether parameters may stay uninitialized, as they are overwritten.

    Raises:
        CheckpointError: The network needs other tensors than these, cannot be built on the meta device, or a step of
            the recipe does not fit.
        ModelError: The source is unknown.
        TrustError: The source is the user's own code and `trust_code` is false.
    """
    try:
        return _rebuild_limited(source, recipe, shapes, kept_bytes, trust_code=trust_code, unset=unset)
    except (ArgumentError, EditError) as error:
        raise CheckpointError(f"'{source}' has a recipe that cannot be followed: {error}") from error


def _rebuild_limited(
    source: Path, recipe: Recipe, shapes: Shapes | None, kept_bytes: int, *, trust_code: bool, unset: bool
) -> nn.Module:
    """Build the network in memory if it stays below the limit, otherwise on the meta device."""
    if trust_code:
        return rebuild(recipe, trust_code=True, unset=unset)
    limit = kept_bytes + SLACK_BYTES
    with _limit_registered(limit) as count:
        try:
            return rebuild(recipe, unset=unset)
        except RegraftError as error:
            # Only an exceeded limit leads to the meta device; other errors are those of the recipe.
            if count.bytes <= limit and not isinstance(error, TooLargeError):
                raise
    try:
        with torch.device("meta"):
            model = rebuild(recipe)
    except RegraftError:
        raise
    except Exception as error:  # constructors that read their own values fail on the meta device
        raise CheckpointError(
            f"'{source}' holds {kept_bytes:,} bytes of tensors, and its recipe begins with more than {limit:,}, which "
            f"cannot be built without memory ({type(error).__name__}). Where you trust it, build that network yourself "
            "and use load_weights(model, path)."
        ) from error
    if shapes is not None:
        _allocate(source, model, shapes)
    return model


@contextlib.contextmanager
def _limit_registered(limit: int) -> Iterator[SimpleNamespace]:
    """Limit the bytes of parameters and buffers that this thread registers, before they are written to.

    Yields their count so far, as `bytes`.

    Raises:
        CheckpointError: Inside of the block, at the tensor that exceeds the limit.
    """
    count, thread = SimpleNamespace(bytes=0), threading.get_ident()

    def registered(owner: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if threading.get_ident() != thread or tensor is None or nn.parameter.is_lazy(tensor) or tensor.is_meta:
            return
        count.bytes += tensor.nbytes if tensor.layout is torch.strided else 0
        if count.bytes > limit:
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


def _allocate(source: Path, model: nn.Module, shapes: Shapes) -> None:
    """Replace tensors on the meta device by empty ones on the CPU, in place.

    Raises:
        CheckpointError: The checkpoint lacks a tensor, or has it in another shape.
    """
    slots = model.state_dict(keep_vars=True)
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    missing = next((name for name in [*slots, *names] if name not in slots or name not in shapes), None)
    if missing is not None:
        raise CheckpointError(
            f"'{source}' does not match its own recipe: it has nothing for '{missing}'. Where you trust it, build that "
            "network yourself and use load_weights(model, path)."
        )
    allocated: dict[int, torch.Tensor] = {}
    for name, slot in slots.items():
        if tuple(slot.shape) != shapes[name]:
            raise CheckpointError(
                f"'{source}' does not match its own recipe at '{name}': {shapes[name]} in the file, "
                f"{tuple(slot.shape)} in the model. Was another library version used?"
            )
        if id(slot) not in allocated:
            empty = torch.empty(slot.shape, dtype=slot.dtype, device="cpu")
            is_parameter = isinstance(slot, nn.Parameter)
            allocated[id(slot)] = nn.Parameter(empty, requires_grad=slot.requires_grad) if is_parameter else empty
        parent, attribute = parent_and_name(name)
        setattr(model.get_submodule(parent), attribute, allocated[id(slot)])
