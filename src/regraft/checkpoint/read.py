"""Load a checkpoint: build the architecture from its recipe, then assign the weights."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from regraft.anatomy.modes import in_mode
from regraft.anatomy.paths import parent_and_name
from regraft.arguments import check_arguments, usable_device
from regraft.card import ATTRIBUTE, Recipe
from regraft.checkpoint.delta import resolve
from regraft.checkpoint.file.format import Header, is_index
from regraft.checkpoint.file.layout import TensorEntry
from regraft.checkpoint.file.opening import OpenCheckpoint
from regraft.checkpoint.file.shards import shard_of
from regraft.checkpoint.foreign.state_dicts import split_extra
from regraft.checkpoint.memory import rebuild_for
from regraft.checkpoint.recipes.own_files import located_recipe
from regraft.checkpoint.storable import stored_state
from regraft.errors import CheckpointError
from regraft.freezing.pins import sync_pins


def load(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    trust_code: bool = False,
) -> nn.Module:
    """Load a checkpoint of `save`: architecture, weights, class names, preprocessing and frozen parameters.

    Args:
        path: The file; or the index of a checkpoint in several files, or a folder with one index.
        base: For a delta, the location of its base: a file, a folder with it, or the name of registered weights. None
            looks beside the delta, or takes the registered weights that it names. A base with another digest than the
            one that the delta was made from is refused.
        device: Device of the model, as in `"cpu"` or `"cuda"`.
        trust_code: Whether a class of your own that the recipe names (`py:…`) may be imported. A file cannot set this
            itself.

    Returns:
        The model in evaluation mode; each tensor is bit-identical to the saved one.

    Raises:
        CheckpointError: The file cannot be read, has no recipe, does not match it, or is damaged; or the base of a
            delta is missing, or has another digest.
        ModelError: There is no such device.
        TrustError: The recipe names a class of your own and `trust_code` is false.
    """
    check_arguments(load, locals())
    device = usable_device(device)
    with OpenCheckpoint(Path(path)) as checkpoint:
        header, recipe = _header_with_recipe(checkpoint, trust_code=trust_code)
        tensors = resolve(checkpoint, base).expanded()
    source = checkpoint.path
    kept_bytes = sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values())  # tied tensors once
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = rebuild_for(source, recipe, shapes, kept_bytes=kept_bytes, trust_code=trust_code)
    _tie(source, model, header.shared)
    (slots, _), (weights, extra) = split_extra(stored_state(model)), split_extra(tensors)
    for name in [*slots, *weights]:
        _check_fit(source, name, weights, slots)
    # Assigned, not copied: the network takes the memory that the file was read into, and no second copy exists.
    for name, slot in slots.items():
        slot.data = weights[name]
    _restore_extra_state(source, model, extra)
    return in_mode(_apply_header(model, header), False).to(device)


def load_outline(path: str | os.PathLike[str], *, trust_code: bool = False) -> nn.Module:
    """Build the network of a checkpoint from its header alone: its layers, dtypes and flags are as saved.

    Its weights are uninitialized or fresh, as no byte of a tensor is read. Use it for inspection only.

    Raises:
        CheckpointError: The file cannot be read, has no recipe, does not match it, or is truncated.
        TrustError: The recipe names a class of your own and `trust_code` is false.
    """
    with OpenCheckpoint(Path(path)) as checkpoint:
        header, recipe = _header_with_recipe(checkpoint, trust_code=trust_code)
        entries = {name: entry for name, (_, entry) in checkpoint.entries.items()}
    source = checkpoint.path
    kept_bytes = sum(entry.size for entry in entries.values())
    model = rebuild_for(source, recipe, None, kept_bytes=kept_bytes, trust_code=trust_code)
    _tie(source, model, header.shared)
    slots, _ = split_extra(stored_state(model))
    aliases = {alias: entries[name] for alias, name in header.shared.items() if name in entries}
    known, _ = split_extra({**entries, **aliases})
    for name in known if header.base else [*slots, *known]:
        _check_fit(source, name, known, slots)
    for name, entry in known.items():
        if entry.dtype != slots[name].dtype:
            slots[name].data = slots[name].data.to(entry.dtype)
    return in_mode(_apply_header(model, header), False)


def load_untrained(path: str | os.PathLike[str], *, trust_code: bool = False) -> nn.Module:
    """Build the network of a checkpoint with freshly initialized weights and nothing frozen, in training mode.

    Raises:
        CheckpointError: The file cannot be read, has no recipe, or is much smaller than what its recipe begins with.
        TrustError: The recipe names a class of your own and `trust_code` is false.
    """
    with OpenCheckpoint(Path(path)) as checkpoint:
        _, recipe = _header_with_recipe(checkpoint, trust_code=trust_code)
        kept_bytes = sum(tensor.nbytes for tensor in resolve(checkpoint).expanded().values())
    source = checkpoint.path
    model = rebuild_for(source, recipe, None, kept_bytes=kept_bytes, trust_code=trust_code, unset=False)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError(
            f"'{source}' holds {kept_bytes:,} bytes of tensors, and its recipe begins with a network that is much "
            "larger, so it is not built anew. Where you trust it, build that network yourself."
        )
    return model


def _restore_extra_state(source: Path, model: nn.Module, states: Mapping[str, torch.Tensor]) -> None:
    """Pass extra states to `set_extra_state` of their layers."""
    for name, state in states.items():
        try:
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(state)
        except Exception as error:  # a user's own class may raise anything
            raise CheckpointError(
                f"'{source}' holds '{name}', and set_extra_state refuses it: {type(error).__name__}: "
                f"{str(error)[:200]}. Was the class changed since?"
            ) from error


def _header_with_recipe(checkpoint: OpenCheckpoint, *, trust_code: bool) -> tuple[Header, Recipe]:
    """Return the header and its recipe; files of the user's own that it names are searched for if they are trusted."""
    source, header = checkpoint.path, checkpoint.header
    if header is not None and header.card.recipe is not None:
        recipe = header.card.recipe
        if trust_code:
            recipe = located_recipe(recipe, source.parent)
            header = header.model_copy(update={"card": header.card.model_copy(update={"recipe": recipe})})
        return header, recipe
    if not is_index(source) and (index := shard_of(source)) is not None:
        raise CheckpointError(f"'{source}' is one of several files of a checkpoint. Load its index, '{index}'.")
    raise CheckpointError(
        f"'{source}' has tensors but no recipe, so its architecture is unknown. "
        "Use load_weights(model, path) with a model of your own."
    )


def _apply_header(model: nn.Module, header: Header) -> nn.Module:
    """Set the flags, pins and card of a model as in the header."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in header.frozen)
    setattr(model, ATTRIBUTE, header.card.model_copy(update={"carried": dict(header.model_extra or {})}))
    sync_pins(model)
    return model


def _tie(source: Path, model: nn.Module, shared: dict[str, str]) -> None:
    """Tie the tensors that were tied when they were saved, if the architecture does not tie them itself."""
    slots = model.state_dict(keep_vars=True)
    for alias, name in shared.items():
        if alias in slots and name in slots and slots[alias] is not slots[name]:
            if slots[alias].shape != slots[name].shape or type(slots[alias]) is not type(slots[name]):
                raise CheckpointError(f"'{source}' is damaged: '{alias}' cannot be one with '{name}'. Get it again.")
            parent, attribute = parent_and_name(alias)
            setattr(model.get_submodule(parent), attribute, slots[name])


Shaped = Mapping[str, torch.Tensor] | Mapping[str, TensorEntry]


def _check_fit(source: Path, name: str, tensors: Shaped, slots: Mapping[str, torch.Tensor]) -> None:
    """Check that file and model both have a tensor, with the same shape and the same kind of numbers."""
    if name not in tensors or name not in slots or tuple(tensors[name].shape) != tuple(slots[name].shape):
        raise CheckpointError(
            f"'{source}' does not match its own recipe at '{name}': {_shape(tensors, name)} in the file, "
            f"{_shape(slots, name)} in the model. Was the class changed since, or another library version used?"
        )
    stored, expected = tensors[name].dtype, slots[name].dtype
    if (stored.is_floating_point, stored.is_complex) != (expected.is_floating_point, expected.is_complex):
        raise CheckpointError(
            f"'{source}' does not match its own recipe at '{name}': {stored} in the file, {expected} in the model. "
            "Get or make it again."
        )


def _shape(tensors: Shaped, name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "nothing"
